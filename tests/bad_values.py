"""Good arguments of the public calls, and for each kind of them the values that must be refused."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import mixupe_kernels as mk

N, C = 4, 3


def seeded():
    return torch.Generator().manual_seed(0)


# Kinds of arguments. Each value is made of the good one.


def changed(index, number):
    def change(value):
        value = value.clone()
        value.view(-1)[index] = number
        return value

    return change


NO_TENSOR = {
    "None": lambda v: None,
    "str": lambda v: "x",
    "list": lambda v: v.tolist(),
    "numpy": lambda v: v.detach().numpy(),
    "number": lambda v: 1.5,
}
LAYOUTS = {
    "complex": lambda v: v.to(torch.complex64),
    "bool": lambda v: v.bool(),
    "sparse": lambda v: v.to_sparse(),
    "nested": lambda v: torch.nested.nested_tensor(list(v)),
    "meta": lambda v: v.to("meta"),
}
FLOATS = {**NO_TENSOR, **LAYOUTS, "int": lambda v: v.long(), "0-d": lambda v: v.new_zeros(())}
INTEGERS = {
    **NO_TENSOR,
    **LAYOUTS,
    "int32": lambda v: v.int(),
    "one more": lambda v: torch.cat([v, v[:1]]),
    "one less": lambda v: v[:-1],
    "0-d": lambda v: v[0],
    "negative": changed(1, -1),
    "too large": changed(1, 1000),
}
SOFT = {
    **NO_TENSOR,
    **LAYOUTS,
    "one more": lambda v: torch.cat([v, v[:1]]),
    "another C": lambda v: v[:, 1:],
    "3-d": lambda v: v.unsqueeze(1),
}
LAMBDA_VALUES = {"below 0": changed(1, -0.1), "above 1": changed(1, 1.1), "NaN": changed(1, float("nan"))}
LAMBDA = {
    **NO_TENSOR,
    **LAYOUTS,
    "one more": lambda v: torch.cat([v, v[:1]]),
    "2-d": lambda v: v.unsqueeze(0),
    "int": lambda v: v.long(),
    **LAMBDA_VALUES,
}
NUMBER = {
    "None": lambda v: None,
    "str": lambda v: "1",
    "bool": lambda v: True,
    "list": lambda v: [v],
    "complex": lambda v: 1j,
    "NaN": lambda v: float("nan"),
}
NON_NEGATIVE = {**NUMBER, "negative": lambda v: -0.1, "infinite": lambda v: float("inf")}
POSITIVE = {**NON_NEGATIVE, "zero": lambda v: 0.0}
FRACTION = {**NUMBER, "negative": lambda v: -0.1, "above 1": lambda v: 1.1}
COUNT = {**NUMBER, "zero": lambda v: 0, "negative": lambda v: -1, "fraction": lambda v: 1.5}
FLAG = {"None": lambda v: None, "str": lambda v: "no", "int": lambda v: 1, "tensor": lambda v: torch.tensor(True)}
CHOICE = {"None": lambda v: None, "str": lambda v: "another", "int": lambda v: 1, "list": lambda v: [v]}
CALLABLE = {"None": lambda v: None, "str": lambda v: "x", "int": lambda v: 1}
GENERATOR = {"str": lambda v: "x", "int": lambda v: 0}


def without(kind, *names):
    return {name: make for name, make in kind.items() if name not in names}


def optional(kind):
    return without(kind, "None")


ETA = {  # a number >= 0, or a 0-d tensor
    **without(NON_NEGATIVE),
    "vector": lambda v: torch.ones(2),
    "complex tensor": lambda v: torch.tensor(1j),
    "meta": lambda v: torch.tensor(0.1, device="meta"),
}
TARGET = {  # a MixedTarget, classes (N,), soft labels (N, C)
    **without(INTEGERS, "list", "numpy", "number"),
    "list": lambda v: v.tolist(),
    "numpy": lambda v: v.numpy(),
    "number": lambda v: 1,
    "empty tuple": lambda v: (),
    "short tuple": lambda v: (v, v),
    "long tuple": lambda v: (v, v, torch.ones(N), N, 0, 0.0, 1),
    "tuple of None": lambda v: (None, v, torch.ones(N)),
    "soft of another C": lambda v: rand(N, C + 1),
    "soft complex": lambda v: rand(N, C).to(torch.complex64),
}
MIXED_TARGET = {
    "None": lambda v: None,
    "tensor": lambda v: v.labels,
    "tuple": tuple,
    "short tuple": lambda v: (v.labels, v.partner_labels, v.lam),
}


class Call(NamedTuple):
    """A call that works, and what must be refused for each argument."""

    name: str
    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    kinds: dict[str, dict[str, Callable[[Any], Any]]]
    says: dict[str, str] = {}  # what a message may call the argument instead, as a pattern
    owner: Callable[[], Any] | None = None  # makes what the call is a method of; ``function`` takes it first

    def start(self) -> tuple[Callable[..., Any], Any]:
        if self.owner is None:
            return self.function, None
        owner = self.owner()
        return functools.partial(self.function, owner), owner


def rand(*size):
    return torch.linspace(0.1, 0.9, max(1, torch.Size(size).numel())).view(size)


def logits():
    return rand(N, C)


def labels():
    return torch.tensor([0, 2, 1, 2])


def lam():
    return torch.tensor([0.25, 0.5, 0.75, 1.0])


def soft():
    return rand(N, C)


def mixed_target(**changes):
    return mk.MixedTarget(labels(), labels().flip(0), lam(), N, N, 0.25)._replace(**changes)


def images():
    return rand(N, 3, 4, 4)


def linear_arguments():
    return {"hidden": rand(N, 5), "weight": rand(C, 5), "target": labels(), "bias": rand(C), "chunk_rows": 2}


def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(5, C))


LOSS_OPTIONS = {
    "eta": ETA,
    "clean_weight": NON_NEGATIVE,
    "penalty": CHOICE,
    "rescale": FLAG,
    "threshold": NUMBER,
    "label_smoothing": FRACTION,
    "activation": CHOICE,
}


def loss_options():
    return {
        "eta": 0.1,
        "clean_weight": 0.0,  # as mixed_target has no clean rows
        "penalty": "abs",
        "rescale": True,
        "threshold": 1.0,
        "label_smoothing": 0.0,
        "activation": "softmax",
    }


MIXER = {
    "alpha": without(NON_NEGATIVE, "infinite"),
    "beta": optional(POSITIVE),
    "per_sample": FLAG,
    "pairing": CHOICE,
    "prob": FRACTION,
    "lam_distribution": {"str": lambda v: "x", "number": lambda v: 0.5},
    "num_samples": {**COUNT, "one": lambda v: 1},
    "num_classes": optional(COUNT),
    "cutmix_alpha": optional(POSITIVE),
    "switch_prob": FRACTION,
    "mean": {"number": lambda v: 0.5, "str": lambda v: "0.5", "alone": lambda v: (0.5, 0.5), "empty": lambda v: ()},
    "std": {"alone": lambda v: (0.5, 0.5)},
    "dtype": {"str": lambda v: "float32", "int": lambda v: torch.int64, "complex": lambda v: torch.complex64},
    "memory_format": {"str": lambda v: "channels_last", "preserve": lambda v: torch.preserve_format},
    "inplace": FLAG,
    "keys": {"str": lambda v: "image", "number": lambda v: 1},
    "follow": {"str": lambda v: "ids", "number": lambda v: 1},
    "warmup_epochs": NON_NEGATIVE,
    "off_epoch": optional(NON_NEGATIVE),
    "generator": GENERATOR,
    "seed": {"str": lambda v: "0", "float": lambda v: 0.5},
    "same_draws": {**FLAG, "without a seed": lambda v: True},
}
MIXER_DEFAULTS = {
    "alpha": 1.0,
    "beta": None,
    "per_sample": False,
    "pairing": "random",
    "prob": 1.0,
    "lam_distribution": None,
    "num_samples": 2,
    "num_classes": None,
    "cutmix_alpha": None,
    "switch_prob": 0.5,
    "mean": None,
    "std": None,
    "dtype": None,
    "memory_format": None,
    "inplace": False,
    "keys": None,
    "follow": None,
    "warmup_epochs": 0,
    "off_epoch": None,
    "generator": None,
    "seed": None,
    "same_draws": False,
}
MIXER_SAYS = {"beta": "beta", "num_samples": "num_samples|num_classes"}
BATCH = {
    "x": {
        **without(FLOATS, "list", "int"),
        "list of numbers": lambda v: [1.0, 2.0],
        "one less": lambda v: v[1:],
        "empty dict": lambda v: {},
    },
    "labels": {
        **without(INTEGERS, "negative", "too large"),
        "soft complex": lambda v: rand(N, C).to(torch.complex64),
        "soft 3-d": lambda v: rand(N, C, 2),
    },
    "ids": {**optional(INTEGERS)},
    "out": {
        **optional(FLOATS),
        "too short": lambda v: v[:-1],
        "another shape": lambda v: v[..., 1:],
        "requires grad": lambda v: v.clone().requires_grad_(),
        "too many dimensions": lambda v: v.unsqueeze(0),
    },
}


def run(owner, **arguments):
    return owner(**arguments)


def nonsense(result):
    return lambda *args, **kwargs: result
