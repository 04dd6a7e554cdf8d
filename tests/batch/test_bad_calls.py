"""Bad input of mixers: every call is a TypeError or ValueError that names the argument, and changes nothing."""

import copy

import numpy as np
import pytest
import torch

import mixupe_kernels as mk

X, Y = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


class Law:
    """A caller's law of λ."""

    expected_a_lambda = 0.3

    def __init__(self, value):
        self.value = value

    def sample(self, size, generator, device):
        torch.rand(size, generator=generator)
        return self.value(size)


def pairing(value):
    def pair(size, generator, device, labels=None, ids=None):
        torch.rand(3, generator=generator)
        return value

    return pair


def law(value):
    return mk.sampling.Custom(lambda size, generator, device: torch.rand(9, generator=generator)[0] * 0 + value, 0.3)


# (arguments of the mixer, arguments of the call, what the message must name)
CALLS = {
    "sparse x": ({}, {"x": X.flatten(1).to_sparse()}, "x must be a dense tensor, got a sparse_coo one"),
    "nested x": (
        {},
        {"x": torch.nested.nested_tensor([torch.ones(2)] * 6, layout=torch.jagged)},
        "x must be a dense tensor, got a nested one",
    ),
    "complex x": ({}, {"x": X.to(torch.complex64)}, "x must have dtype"),
    "bool x": ({}, {"x": X > 0}, "x must have dtype"),
    "sparse labels": ({}, {"labels": Y.to_sparse()}, "labels must be a dense tensor"),
    "sparse soft labels": ({}, {"labels": torch.eye(6).to_sparse()}, "labels must be a dense tensor"),
    "meta labels": ({}, {"labels": Y.to("meta")}, "labels must be on the device of x"),
    "meta x": ({}, {"x": X.to("meta")}, "labels must be on the device of x"),
    "array labels": ({}, {"labels": Y.numpy()}, "labels must be a torch.Tensor"),
    "complex labels": ({}, {"labels": Y.to(torch.complex64)}, "labels must have dtype int64"),
    "ids of another size": ({}, {"ids": Y[1:]}, "ids must have shape"),
    "ids as a list": ({}, {"ids": Y.tolist()}, "ids must be a torch.Tensor"),
    "out that overlaps": ({}, {"out": X}, "out must"),
    "out expanded": ({}, {"out": X[:1].expand(12, 3, 4, 4)}, "out must"),
    "out of another device": ({}, {"out": torch.empty(12, 3, 4, 4, device="meta")}, "out must be on the device of x"),
    "out sparse": ({}, {"out": torch.zeros(12, 48).to_sparse(), "x": X.flatten(1)}, "out must be a dense tensor"),
    "pairing returns None": ({"pairing": pairing(None)}, {}, "pairing"),
    "pairing returns floats": ({"pairing": pairing(torch.rand(6))}, {}, "pairing"),
    "pairing of another size": ({"pairing": pairing(torch.arange(5))}, {}, "pairing"),
    "pairing out of range": ({"pairing": pairing(torch.arange(1, 7))}, {}, "pairing"),
    "pairing below 0": ({"pairing": pairing(torch.arange(-1, 5))}, {}, "pairing"),
    "pairing of another device": ({"pairing": pairing(torch.arange(6, device="meta"))}, {}, "pairing"),
    "pairing of many": (
        {"pairing": pairing(torch.arange(1, 7)), "num_samples": 3, "num_classes": 3},
        {},
        "pairing",
    ),
    "neighbours below 0": (
        {"pairing": mk.pairing.Neighbors(torch.zeros(9, 1, dtype=torch.int64))},
        {"ids": torch.arange(-1, 5)},
        "ids must be in",
    ),
    "neighbours beyond": (
        {"pairing": mk.pairing.Neighbors(torch.zeros(9, 1, dtype=torch.int64))},
        {"ids": torch.arange(4, 10)},
        "ids must be in",
    ),
    "neighbours without ids": (
        {"pairing": mk.pairing.Neighbors(torch.zeros(9, 1, dtype=torch.int64))},
        {},
        "ids must be given",
    ),
    "λ above 1": ({"lam_distribution": law(1.5)}, {}, "function"),
    "λ NaN": ({"lam_distribution": law(float("nan"))}, {}, "function"),
    "λ below 0, checked": ({"lam_distribution": Law(lambda size: torch.full(size, -0.1))}, {}, "lam_distribution"),
    "λ of another shape": ({"lam_distribution": Law(lambda size: torch.rand(3))}, {}, "lam_distribution"),
    "λ as a float": ({"lam_distribution": Law(lambda size: 0.5)}, {}, "lam_distribution"),
    "λ as integers": ({"lam_distribution": Law(lambda size: torch.ones(size).long())}, {}, "lam_distribution"),
    "CutMix of vectors": ({"cutmix_alpha": 1.0}, {"x": X.flatten(1)}, "x must have shape"),
    "labels of no class": ({"num_samples": 3, "num_classes": 2}, {}, "labels must be a class"),
    "no classes": ({"num_samples": 3}, {}, "num_classes must be given"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_changes_nothing(name, backend):
    if backend == "reference" and name in ("out that overlaps", "out expanded"):
        pytest.skip("only the compiled backends see the overlap: the reference makes a tensor of its own first")
    options, call, message = CALLS[name]
    fn = mk.MixupE(**{"generator": torch.Generator().manual_seed(0), "interval": 2, **options})
    fn(X[:0], Y[:0])
    fn.steps = 1
    call = {"x": X, "labels": Y, **call}
    before, default = copy.deepcopy(fn.state_dict()), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=message):
        fn(**call)
    assert_same_state(fn.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), default)
    assert fn.plan.progress.due()


def assert_same_state(state, before):
    assert torch.equal(state.pop("generator"), before.pop("generator")) and state == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "x"}, r"state\['steps'\] must be an int"),
        ({"steps": -1}, r"state\['steps'\] must be an int >= 0"),
        ({"steps": 1.5}, r"state\['steps'\] must be an int"),
        ({"epoch": float("nan")}, r"state\['epoch'\] must be a number >= 0"),
        ({"epoch": None}, r"state\['epoch'\] must be"),
        ({"enabled": "yes"}, r"state\['enabled'\] must be True or False"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, r"state\['generator'\] must be a generator's state"),
        ({"generator": torch.zeros(3)}, r"state\['generator'\] must have dtype uint8"),
        ({"generator": [1]}, r"state\['generator'\] must be a torch.Tensor"),
        ({"generator": None}, "generator must be given where the saved one had one"),
        ({"worker_steps": 3}, r"state\['worker_steps'\] must be a list"),
        ({"worker_steps": [7]}, r"state\['steps'\] must be an int >= 7"),
        ({"epoch": 7}, "eta_ramp"),
    ],
)
def test_a_bad_state_changes_nothing(change, message):
    fn = mk.MixupE(generator=torch.Generator().manual_seed(0), eta_ramp=lambda epoch: 1.0 if epoch < 5 else -1.0)
    good = fn.state_dict()
    fn.set_epoch(2)
    fn(X, Y)
    before = copy.deepcopy(fn.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        fn.load_state_dict({**good, **change})
    assert_same_state(fn.state_dict(), before)
    with pytest.raises(TypeError, match="state must be what state_dict"):
        fn.load_state_dict([1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mk.Mixup(generator=3), "generator must be a torch.Generator"),
        (lambda: mk.Mixup(per_sample="yes"), "per_sample must be True or False"),
        (lambda: mk.Mixup(inplace=1), "inplace must be True or False"),
        (lambda: mk.MixupE(split="no", clean_fraction=0.5), "split must be True or False"),
        (lambda: mk.MixupE(interval=1.5), "interval must be an int"),
        (lambda: mk.MixupE(regularize=None), "regularize must be one of"),
        (lambda: mk.Mixup(pairing=None), "pairing must be one of"),
        (lambda: mk.Mixup(lam_distribution=0.5), "lam_distribution must be"),
        (lambda: mk.Mixup(lam_distribution=mk.sampling.Beta), "lam_distribution must be"),
        (lambda: mk.Mixup(mean=np.zeros((2, 2)), std=np.ones(2)), r"mean\[0\] must be a number"),
        (lambda: mk.Mixup(mean=[1, 2], std=3.0), "std must be a sequence"),
        (lambda: mk.Mixup().num_rows(-1), "batch must be an int >= 0"),
        (lambda: mk.MixupE(clean_fraction=0.5).num_rows("8"), "batch must be an int >= 0"),
        (lambda: mk.MixupE().num_clean(2.0), "batch must be an int >= 0"),
        (lambda: mk.Mixup().draw("x"), "labels must be a torch.Tensor"),
        (lambda: mk.Mixup().draw(Y.float()), "soft labels must have shape"),
        (lambda: mk.Mixup().draw(Y, ids=Y[1:]), "ids must have shape"),
        (lambda: mk.Mixup(cutmix_alpha=1.0).draw(Y), "image_size must be given"),
        (lambda: mk.Mixup().apply(mk.Mixup().draw(Y), X[1:]), "x must have the 6 rows that were drawn for"),
        (lambda: mk.MixupE().apply(mk.MixupE().draw(Y), X[1:]), "x must have the 6 rows that were drawn for"),
        (lambda: mk.Mixup().apply(mk.Mixup().draw(Y), X.long()), "x must have dtype"),
        (lambda: mk.Mixup().apply(None, X), "draw must be what Mixup.draw returned"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_numpys_numbers_and_arrays_are_taken():
    mean, std = np.array([0.1, 0.2, 0.3], dtype=np.float32), np.array([1, 2, 4])
    fn = mk.MixupE(np.float64(0.5), interval=np.int64(2), mean=mean, std=std, clean_fraction=np.float32(0.5))
    rows, target = fn(X, Y, out=torch.empty(fn.num_rows(np.int64(6)), 3, 4, 4))
    assert len(rows) == 6 and target.num_reg == 0
    assert mk.Mixup(num_samples=np.int32(3), num_classes=np.int64(3))(X, Y)[1].labels.shape == (6, 3)


@pytest.mark.parametrize("shape", [(6, 3, 0, 4), (6, 0), (6, 2, 0, 0), (6, 0, 4, 4)])
@pytest.mark.parametrize("options", [{}, {"cutmix_alpha": 1.0}, {"clean_fraction": 0.5}, {"pairing": "flip"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_images_of_no_pixels(shape, options, dtype):
    if "cutmix_alpha" in options and len(shape) < 4:
        pytest.skip("CutMix is for images")
    rows, target = mk.MixupE(**options)(torch.ones(shape, dtype=dtype), Y)
    assert rows.shape == (len(target.lam), *shape[1:])
    assert bool(((target.lam >= 0) & (target.lam <= 1)).all())


def test_a_weight_handed_out_is_the_callers_own():
    fn = mk.MixupE()
    _, first = fn(X, Y)
    weight = first.reg_weight
    weight *= 0
    assert float(fn(X, Y)[1].reg_weight) == float(first.reg_weight) == pytest.approx(1 / 3)
