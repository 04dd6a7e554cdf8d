"""Bad calls of every public name, as a table: each is a TypeError or a ValueError that names the argument, and changes nothing.

A row of the table is a call that works, and the kind of each of its arguments; a kind has the values that must be refused.
"""

import copy
import functools
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mixupe_kernels as mk

from .bad_values import (
    BATCH,
    CALLABLE,
    CHOICE,
    COUNT,
    ETA,
    FLAG,
    FLOATS,
    FRACTION,
    GENERATOR,
    INTEGERS,
    LAMBDA,
    LOSS_OPTIONS,
    MIXED_TARGET,
    MIXER,
    MIXER_DEFAULTS,
    MIXER_SAYS,
    NO_TENSOR,
    NON_NEGATIVE,
    NUMBER,
    POSITIVE,
    SOFT,
    TARGET,
    C,
    Call,
    N,
    images,
    labels,
    lam,
    linear_arguments,
    logits,
    loss_options,
    mixed_target,
    model,
    nonsense,
    optional,
    rand,
    run,
    seeded,
    soft,
    without,
)
from .test_bad_parts import CUSTOM


def mixers():
    for name, make in (
        ("Mixup", lambda: mk.Mixup(generator=seeded())),
        ("MixupE", lambda: mk.MixupE(generator=seeded(), clean_fraction=1 / 2)),
        ("MixupE interval", lambda: mk.MixupE(generator=seeded(), interval=2)),
        ("CutMix", lambda: mk.Mixup(generator=seeded(), cutmix_alpha=1.0)),
        ("same_class", lambda: mk.Mixup(generator=seeded(), pairing="same_class")),
    ):
        rows = make().num_rows(N)
        good = functools.partial(dict, x=images(), labels=labels(), ids=torch.arange(N), out=rand(rows, 3, 4, 4))
        # ids say nothing to these pairings but are checked all the same.
        kinds = {**BATCH, "ids": without(BATCH["ids"], "negative", "too large")}
        yield Call(f"{name}()", run, good, kinds, {"x": "x|labels"}, make)


def tables_of_targets(name, function, good):
    """A loss's target as a MixedTarget with one field wrong."""
    counts = {**without(NUMBER, "NaN"), "negative": lambda v: -1, "too large": lambda v: N + 1, "float": lambda v: 2.0,
              "tensor": lambda v: torch.tensor(2)}  # fmt: skip
    fields = {
        "labels": INTEGERS,
        "partner_labels": INTEGERS,
        "lam": LAMBDA,
        "num_mixed": counts,
        "num_reg": counts,
        "reg_weight": {**without(ETA, "infinite"), "sparse": lambda v: torch.ones(1).to_sparse()},
    }
    if name in ("ce_entropy", "q_hat"):  # no more than labels and λ
        fields = {field: fields[field] for field in ("labels", "partner_labels", "lam")}
    if name == "mixed_accuracy":  # looks labels up in the best classes, and weighs with λ as it is
        fields = {field: kind for field, kind in fields.items() if field not in ("num_reg", "reg_weight")}
        fields["labels"] = fields["partner_labels"] = without(INTEGERS, "negative", "too large")

    for field, kind in fields.items():

        def call(field=field, **arguments):
            return function(**{**good(), "target": mixed_target(**arguments)})

        def value(field=field):
            return {field: getattr(mixed_target(), field)}

        yield Call(f"{name} target", call, value, {field: kind}, {field: rf"target|{field}"})


def table():
    yield Call("mix", mk.mix, lambda: {"x": rand(N, 5), "partner": torch.arange(N).flip(0), "lam": lam()},
               {"x": FLOATS, "partner": INTEGERS, "lam": without(LAMBDA, "number")})  # fmt: skip
    yield Call("mix out", mk.mix, lambda: {"x": rand(N, 5), "partner": "flip", "lam": 0.5, "out": rand(N, 5)},
               {"out": {**optional(FLOATS), "shape": lambda v: v[1:], "requires grad": lambda v: v.clone().requires_grad_(),
                        "expanded": lambda v: v[:1].expand(N, 5)},
                "partner": CHOICE, "lam": FRACTION})  # fmt: skip
    yield Call("mix_labels", mk.mix_labels,
               lambda: {"labels": labels(), "partner": torch.arange(N).flip(0), "lam": lam(), "num_classes": C,
                        "label_smoothing": 0.1},
               {"labels": INTEGERS, "partner": INTEGERS, "lam": without(LAMBDA, "number"),
                "num_classes": {**COUNT, "another": lambda v: C - 1}, "label_smoothing": FRACTION},
               {"num_classes": "num_classes|labels", "labels": "labels|partner", "partner": "labels|partner"})  # fmt: skip
    for name in ("ce_entropy", "q_hat", "mixupe_loss"):
        function = getattr(mk, name)
        rest = loss_options() if name == "mixupe_loss" else {}
        good = functools.partial(lambda rest: {"logits": logits(), "target": labels(), **rest}, rest)
        kinds = {"logits": {**FLOATS, "no classes": lambda v: v[:, :0]}, "target": TARGET}
        yield Call(name, function, good, {**kinds, **{key: LOSS_OPTIONS[key] for key in rest}})
        yield from tables_of_targets(name, function, good)
    yield Call("ce_entropy options", mk.ce_entropy,
               lambda: {"logits": logits(), "target": labels(), "label_smoothing": 0.1, "class_weight": rand(C)},
               {"label_smoothing": FRACTION,
                "class_weight": {**optional(FLOATS), "another C": lambda v: v[1:]}})  # fmt: skip
    yield Call("q_hat options", mk.q_hat, lambda: {"logits": logits(), "target": labels(), "activation": "softmax"},
               {"activation": CHOICE})  # fmt: skip
    for name in ("bce_entropy",):
        good = lambda: {"logits": logits(), "target": soft()}  # noqa: E731
        yield Call(name, getattr(mk, name), good, {"logits": FLOATS, "target": {**SOFT, "classes": lambda v: labels()}})
    yield Call("MixupELoss", lambda **options: mk.MixupELoss(**options)(logits(), mixed_target()),
               lambda: {**loss_options(), "inplace_backward": False},
               {**LOSS_OPTIONS, "eta": NON_NEGATIVE, "inplace_backward": FLAG})  # fmt: skip
    good = lambda: {"logits": logits(), "target": labels()}  # noqa: E731
    criterion = functools.partial(mk.MixupELoss, eta=0.1)
    yield Call("MixupELoss()", run, good, {"logits": FLOATS, "target": TARGET}, {}, criterion)
    yield Call("MixupELoss.eta", lambda owner, eta: setattr(owner, "eta", eta), lambda: {"eta": 0.1},
               {"eta": NON_NEGATIVE}, {}, criterion)  # fmt: skip
    yield Call("MixupELoss.clean_weight", lambda owner, clean_weight: setattr(owner, "clean_weight", clean_weight),
               lambda: {"clean_weight": 0.1}, {"clean_weight": NON_NEGATIVE}, {}, criterion)  # fmt: skip
    good = lambda: {**linear_arguments(), **loss_options()}  # noqa: E731
    shapes = {"another width": lambda v: v[..., 1:], "3-d": lambda v: v.unsqueeze(0)}
    yield Call("linear_mixupe_loss", mk.linear_mixupe_loss, good,
               {"hidden": {**FLOATS, **without(shapes, "3-d")}, "weight": {**FLOATS, **shapes}, "target": TARGET,
                "bias": {**optional(FLOATS), **shapes}, "chunk_rows": optional(COUNT), **LOSS_OPTIONS},
               {"weight": "weight|hidden", "hidden": "weight|hidden"})  # fmt: skip
    yield from tables_of_targets("linear_mixupe_loss", mk.linear_mixupe_loss, good)
    group = {"str": lambda v: "world", "int": lambda v: 0}
    yield Call("ClassShards", mk.ClassShards, lambda: {"num_classes": C, "process_group": None, "first": 0},
               {"num_classes": COUNT, "process_group": group, "first": {"negative": lambda v: -1, "str": lambda v: "0"}})  # fmt: skip
    yield Call("StepRows", mk.StepRows, lambda: {"targets": [mixed_target()], "process_group": None},
               {"targets": {"none": lambda v: [], "tensors": lambda v: [labels()], **without(NO_TENSOR, "list", "numpy")},
                "process_group": group})  # fmt: skip
    yield Call("exact_q", mk.exact_q,
               lambda: {"model": model(), "x": rand(N, 5), "labels": labels(), "x_mean": torch.zeros(5),
                        "detach_residual": False},
               {"model": CALLABLE, "x": FLOATS, "labels": INTEGERS, "detach_residual": FLAG,
                "x_mean": {**without(FLOATS, "int", "bool", "0-d"), "shape": lambda v: v[1:]}})  # fmt: skip
    yield Call("input_mean", mk.input_mean, lambda: {"loader": [rand(2, 3)], "progress": False},
               {"loader": {"None": lambda v: None, "number": lambda v: 1, "empty": lambda v: [], "None batch": lambda v: [None],
                           "empty tuple": lambda v: [()], "shapes": lambda v: [rand(2, 3), rand(2, 4)],
                           "complex": lambda v: [rand(2, 3).to(torch.complex64)], "0-d": lambda v: [torch.tensor(1.0)],
                           "sparse": lambda v: [rand(2, 3).to_sparse()], "numpy": lambda v: [np.zeros((2, 3))]},
                "progress": FLAG})  # fmt: skip
    good = lambda: {"logits": logits(), "target": mixed_target(), "topk": (1,)}  # noqa: E731
    yield Call("mixed_accuracy", mk.mixed_accuracy, good,
               {"logits": {**FLOATS, "3-d": lambda v: v.unsqueeze(0)}, "target": MIXED_TARGET,
                "topk": {"None": lambda v: None, "str": lambda v: "1", "bool": lambda v: True, "zero": lambda v: 0,
                         "float": lambda v: 1.5, "too large": lambda v: (1, C + 1), "empty": lambda v: ()}})  # fmt: skip
    yield from tables_of_targets("mixed_accuracy", mk.mixed_accuracy, good)
    yield Call("clean_rows", mk.clean_rows, lambda: {"logits": logits(), "target": mixed_target()},
               {"logits": {**FLOATS, "3-d": lambda v: v.unsqueeze(0)}, "target": MIXED_TARGET})  # fmt: skip
    yield Call("Collate", mk.Collate, lambda: {"mixup_fn": mk.Mixup(), "collate_fn": len},
               {"mixup_fn": {**CALLABLE, "function": lambda v: len}, "collate_fn": CALLABLE})  # fmt: skip
    timm = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_minmax": (0.2, 0.8), "prob": 1.0, "switch_prob": 0.5,
            "mode": "batch", "correct_lam": True, "label_smoothing": 0.1, "num_classes": C, "clean_fraction": 0.25,
            "eta": 1e-3, "clean_weight": 0.25, "split": False, "off_epoch": 3, "generator": None}  # fmt: skip
    yield Call("like_timm", mk.like_timm, lambda: dict(timm),
               {"mixup_alpha": NON_NEGATIVE, "prob": FRACTION, "switch_prob": FRACTION, "mode": CHOICE,
                "correct_lam": FLAG, "label_smoothing": FRACTION, "num_classes": COUNT, "eta": optional(NON_NEGATIVE),
                "clean_weight": optional(NON_NEGATIVE), "clean_fraction": optional(POSITIVE), "split": FLAG,
                "off_epoch": optional(NON_NEGATIVE), "generator": GENERATOR,
                "cutmix_minmax": {"str": lambda v: "ab", "one": lambda v: (0.2,), "swapped": lambda v: v[::-1],
                                  "above 1": lambda v: (0.2, 1.2)}})  # fmt: skip
    yield Call("like_timm", mk.like_timm, lambda: {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
               {"cutmix_alpha": NON_NEGATIVE})  # fmt: skip
    yield Call("forward_mixupe", mk.forward_mixupe,
               lambda: {"model": nn.Linear(5, C), "x": rand(N, 5), "target": mixed_target(num_mixed=2, num_reg=2),
                        "batched": False},
               {"model": CALLABLE, "x": {**NO_TENSOR, "one less": lambda v: v[1:], "0-d": lambda v: v.new_zeros(())},
                "target": without(MIXED_TARGET, "None"), "batched": FLAG})  # fmt: skip
    yield Call("split_batch_norm", mk.split_batch_norm, lambda: {"model": nn.Sequential(nn.BatchNorm1d(5))},
               {"model": {**CALLABLE, "function": lambda v: v.forward, "class": lambda v: nn.BatchNorm1d}})  # fmt: skip
    yield Call("expected_a_lambda", mk.expected_a_lambda, lambda: {"alpha": 1.0, "beta": 2.0},
               {"alpha": POSITIVE, "beta": optional(POSITIVE)})  # fmt: skip
    yield Call("use_backend", lambda name: mk.use_backend(name).__enter__(), lambda: {"name": "reference"},
               {"name": CHOICE}, {"name": "backend"})  # fmt: skip
    means = lambda: {"x_mean": rand(5), "y_mean": rand(C), "theta": 0.75}  # noqa: E731
    mean = {**without(FLOATS, "0-d", "meta"), "int": lambda v: v.long()}
    yield Call("ApproximatedMixup", mk.ApproximatedMixup, means,
               {"x_mean": mean, "y_mean": {**mean, "0-d": lambda v: v[0], "2-d": lambda v: v.unsqueeze(0)}, "theta": FRACTION})  # fmt: skip
    yield Call("ApproximatedMixup()", mk.ApproximatedMixup.__call__, lambda: {"x": rand(N, 5), "labels": labels()},
               {"x": {**FLOATS, "one more": lambda v: torch.cat([v, v[:1]]), "another shape": lambda v: v[:, 1:]},
                "labels": INTEGERS}, {"x": "x|labels"}, lambda: mk.ApproximatedMixup(**means()))  # fmt: skip
    yield Call("LinearRamp", mk.LinearRamp, lambda: {"start": 0.0, "stop": 1.0, "first_epoch": 0, "last_epoch": 2},
               {"start": {**NUMBER, "infinite": lambda v: float("inf")}, "stop": NUMBER, "first_epoch": NON_NEGATIVE,
                "last_epoch": {**NUMBER, "before": lambda v: 0}})  # fmt: skip
    yield Call("LinearRamp()", mk.LinearRamp(0, 1, last_epoch=2), lambda: {"epoch": 1.0}, {"epoch": NON_NEGATIVE})
    yield Call("Mixup", mk.Mixup, lambda: dict(MIXER_DEFAULTS), MIXER, MIXER_SAYS)
    yield Call("MixupE", mk.MixupE,
               lambda: {**MIXER_DEFAULTS, "clean_fraction": 1.0, "split": False, "regularize": "clean", "interval": 1,
                        "eta_ramp": None},
               {**MIXER, "clean_fraction": {**FRACTION, "zero": lambda v: 0.0}, "split": FLAG, "regularize": CHOICE,
                "interval": COUNT, "eta_ramp": {"number": lambda v: 1.0, "str": lambda v: "x"}},
               {**MIXER_SAYS, "split": "split|clean_fraction", "inplace": "inplace|regularize"})  # fmt: skip
    yield from mixers()
    mixer = lambda: mk.MixupE(generator=seeded())  # noqa: E731
    state = mixer().state_dict()
    yield Call("set_epoch", mk.MixupE.set_epoch, lambda: {"epoch": 1.0}, {"epoch": NON_NEGATIVE}, {}, mixer)
    yield Call("num_rows", mk.MixupE.num_rows, lambda: {"batch": N}, {"batch": without(COUNT, "zero")}, {}, mixer)
    yield Call("draw", mk.MixupE.draw, lambda: {"labels": labels(), "ids": torch.arange(N)},
               {"labels": without(INTEGERS, "negative", "too large", "one more", "one less"),
                "ids": without(optional(INTEGERS), "negative", "too large")}, {"labels": "labels|ids"}, mixer)  # fmt: skip
    yield Call("load_state_dict", lambda owner, **changes: owner.load_state_dict(changes), lambda: dict(state),
               {"epoch": NON_NEGATIVE, "steps": {**without(NON_NEGATIVE, "infinite"), "fraction": lambda v: 1.5},
                "enabled": FLAG, "generator": {"None": lambda v: None, "str": lambda v: "x", "short": lambda v: v[1:]}},
               {}, mixer)  # fmt: skip
    yield Call("load_state_dict whole", mk.MixupE.load_state_dict, lambda: {"state": dict(state)},
               {"state": {"None": lambda v: None, "list": list, "empty": lambda v: {}, "number": lambda v: 1}},
               {}, mixer)  # fmt: skip
    manifold = lambda: {"model": model(), "layers": ["0"], "mixup_fn": mk.Mixup(generator=seeded()), "generator": None}  # noqa: E731
    yield Call("ManifoldMixup", mk.ManifoldMixup, manifold,
               {"model": {**CALLABLE, "function": lambda v: v.forward},
                "layers": {"None": lambda v: None, "str": lambda v: "0", "empty": lambda v: [], "other": lambda v: ["9"],
                           "number": lambda v: [0], "None name": lambda v: [None]},
                "mixup_fn": CALLABLE, "generator": GENERATOR})  # fmt: skip
    yield Call("ManifoldMixup()", run, lambda: {"x": rand(N, 5), "labels": labels(), "ids": torch.arange(N)},
               {"labels": without(INTEGERS, "negative", "too large"),
                "ids": without(optional(INTEGERS), "negative", "too large"),
                "x": {"one less": lambda v: v[1:]}},
               {"labels": "labels|ids|x"}, lambda: mk.ManifoldMixup(**manifold()))  # fmt: skip
    for name, good, kinds in (
        ("Beta", {"alpha": 1.0, "beta": 2.0, "fold": "none"}, {"alpha": POSITIVE, "beta": optional(POSITIVE), "fold": CHOICE}),
        ("HalfBeta", {"alpha": 1.0}, {"alpha": POSITIVE}),
        ("DLambda", {"alpha": 1.0, "beta": 2.0}, {"alpha": POSITIVE, "beta": optional(POSITIVE)}),
        ("WShaped", {"alpha": 1.0, "fold": "none"}, {"alpha": POSITIVE, "fold": CHOICE}),
        ("Uniform", {"low": 0.0, "high": 1.0, "fold": "none"}, {"low": FRACTION, "high": FRACTION, "fold": CHOICE}),
        ("Fixed", {"value": 0.5, "fold": "none"}, {"value": FRACTION, "fold": CHOICE}),
        ("Custom", {"function": nonsense(torch.ones(1)), "expected_a_lambda": 0.3},
         {"function": CALLABLE, "expected_a_lambda": {**optional(FRACTION), "above 1/2": lambda v: 0.6}}),
        ("Dirichlet", {"alpha": 1.0, "num_samples": 3}, {"alpha": POSITIVE, "num_samples": COUNT}),
    ):  # fmt: skip
        yield Call(f"sampling.{name}", getattr(mk.sampling, name), functools.partial(dict, good), kinds)
    index = torch.tensor([[1], [0], [3], [2]])
    yield Call("pairing.Neighbors", mk.pairing.Neighbors, lambda: {"index": index},
               {"index": {**without(INTEGERS, "one more", "one less", "meta"), "1-d": lambda v: v[0], "empty": lambda v: v[:, :0]}})  # fmt: skip
    yield Call("MixedTarget.dense", lambda **arguments: mixed_target().dense(**arguments),
               lambda: {"num_classes": C, "label_smoothing": 0.1},
               {"num_classes": {**COUNT, "too small": lambda v: 2}, "label_smoothing": FRACTION},
               {"num_classes": "num_classes|labels"})  # fmt: skip
    yield Call("MixedTarget.cat", mk.MixedTarget.cat, lambda: {"targets": [mixed_target()]},
               {"targets": {"None": lambda v: None, "number": lambda v: 1, "empty": lambda v: [], "tensors": lambda v: [labels()]}})  # fmt: skip


CALLS = list(table())
BAD = [(call, name, kind) for call in CALLS for name, kinds in call.kinds.items() for kind in kinds]


def snapshot(values, owner):
    """What a refused call must not change: tensors given, torch's generator, and the state of a mixer or criterion."""
    kept = [value.clone() if isinstance(value, Tensor) and value.device.type == "cpu" else None for value in values]
    if isinstance(owner, mk.ManifoldMixup):
        owner = owner.mixup_fn
    if isinstance(owner, mk.Mixup):
        described = copy.deepcopy(owner.state_dict())
    elif isinstance(owner, nn.Module):
        described = copy.deepcopy({**owner.state_dict(), "last": owner.last})
    else:
        described = None
    return kept, torch.get_rng_state(), described


def same(a, b):
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.is_nested or a.layout != torch.strided:
            return True
        return a.shape == b.shape and torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_the_good_call_works(call):
    function, _ = call.start()
    function(**call.good())


@pytest.mark.parametrize(("call", "name", "kind"), BAD, ids=[f"{c.name}-{n}-{k}" for c, n, k in BAD])
def test_a_bad_argument_is_refused(call, name, kind):
    function, owner = call.start()
    arguments = call.good()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments[name] = call.kinds[name][kind](arguments[name])
        before = snapshot(arguments.values(), owner)
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**arguments)
    message = str(caught.value)
    says = call.says.get(name, name)
    assert re.search(rf"\b({says})\b", message) and re.search(r" must |argument", message), (
        f"must name {says}: {message}"
    )
    assert same(snapshot(arguments.values(), owner), before), "a refused call changed something"


def test_the_table_covers_the_public_names():
    covered = " ".join([call.name for call in CALLS] + [row[0] for row in CUSTOM])
    takes_nothing = {"available_backends", "MixedAccuracy", "MixedTarget", "batch_mean"}  # the last is input_mean
    for name in set(mk.__all__) - takes_nothing:
        assert re.search(rf"\b{name}\b", covered), name
