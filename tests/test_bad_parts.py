"""Nonsense that a function of the caller's returns, a pairing, a law, a penalty or a model, is refused by name."""

import pytest
import torch

import mixupe_kernels as mk

from .bad_values import C, N, images, labels, logits, mixed_target, nonsense, rand


def custom_pairings():
    for name, result in {
        "None": None,
        "number": 1,
        "list": [0, 1, 2, 3],
        "float": torch.zeros(N),
        "int32": torch.zeros(N, dtype=torch.int32),
        "bool": torch.zeros(N, dtype=torch.bool),
        "too long": torch.zeros(N + 1, dtype=torch.int64),
        "2-d": torch.zeros(N, 1, dtype=torch.int64),
        "negative": torch.full((N,), -1),
        "too large": torch.full((N,), N),
        "meta": torch.zeros(N, dtype=torch.int64, device="meta"),
    }.items():
        yield (
            f"pairing returns {name}",
            "pairing|partner",
            lambda result=result: mk.Mixup(pairing=nonsense(result))(images(), labels()),
        )


def custom_laws():
    for name, result in {
        "None": None,
        "number": 0.5,
        "int": torch.ones(N, dtype=torch.int64),
        "complex": torch.ones(N, dtype=torch.complex64),
        "too long": torch.full((N + 1,), 0.5),
        "below 0": torch.full((N,), -0.5),
        "above 1": torch.full((N,), 1.5),
        "NaN": torch.full((N,), float("nan")),
        "meta": torch.ones(N, device="meta"),
    }.items():
        law = mk.sampling.Custom(nonsense(result), expected_a_lambda=0.3)
        yield (
            f"law returns {name}",
            "lam|function|distribution",
            lambda law=law: mk.Mixup(lam_distribution=law, per_sample=True)(images(), labels()),
        )


def custom_parts():
    yield from custom_pairings()
    yield from custom_laws()
    for name, result in {"None": None, "number": 1.0, "str": "x", "too long": torch.ones(N + 1), "2-d": torch.ones(N, 1),
                         "int": torch.ones(N, dtype=torch.int64), "complex": torch.ones(N, dtype=torch.complex64),
                         "meta": torch.ones(N, device="meta")}.items():  # fmt: skip
        yield (
            f"penalty returns {name}",
            "penalty",
            lambda result=result: mk.mixupe_loss(logits(), mixed_target(), eta=0.1, penalty=nonsense(result)),
        )
    for name, result in {"None": None, "str": "x", "negative": -1.0, "NaN": float("nan")}.items():
        yield f"eta_ramp returns {name}", "eta_ramp", lambda result=result: mk.MixupE(eta_ramp=nonsense(result))
    for name, result in {"None": None, "list": [1], "3-d": rand(N, C, 1), "fewer rows": rand(1, C)}.items():
        yield (
            f"model of exact_q returns {name}",
            "model",
            lambda result=result: mk.exact_q(nonsense(result), rand(N, 5), labels(), torch.zeros(5)),
        )
    for name, q in {"None": "q", "list": [0.0] * N, "2-d": torch.ones(N, 1),
                    "int": torch.ones(N, dtype=torch.int64), "complex": torch.ones(N, dtype=torch.complex64),
                    "meta": torch.ones(N, device="meta"), "bool": torch.ones(N, dtype=torch.bool)}.items():  # fmt: skip
        yield f"q is {name}", r"\bq\b", lambda q=q: mk.MixupELoss(eta=0.1)(logits(), mixed_target(), q=q)


CUSTOM = list(custom_parts())


@pytest.mark.parametrize(("says", "call"), [row[1:] for row in CUSTOM], ids=[row[0] for row in CUSTOM])
def test_nonsense_of_a_custom_part_is_refused(says, call):
    with pytest.raises((TypeError, ValueError), match=says):
        call()
