"""Operators, called directly, refuse what they do not read right, the reference and compiled ones in the same words: each
message begins with the argument's name in the schema, and "must have dtype" marks a wrong dtype."""

import pytest
import torch

from mixupe_kernels.conventions import PENALTIES

ops = torch.ops.mixupe

# A compiled operator can only raise RuntimeError.
REFUSED = (RuntimeError, TypeError, ValueError)


def loss_arguments():
    """Of mixupe_loss and of mixupe_loss_with_gradient, by name."""
    return {
        "logits": torch.randn(4, 3),
        "labels": torch.tensor([0, 1, 2, 0]),
        "partner_labels": torch.tensor([1, 1, 0, 2]),
        "lam": torch.rand(4),
        "eta": torch.tensor(0.1),
        "reg_weight": torch.tensor(0.3),
        "num_mixed": 2,
        "num_reg": 2,
        "penalty": 0,
        "threshold": 1.0,
        "rescale": True,
        "label_smoothing": 0.0,
        "sigmoid": False,
        "clean_weight": 0.25,
    }


def call(operator, arguments):
    """The operator on the arguments that it takes, in their order."""
    if operator is ops.ce_entropy:
        names = ("logits", "labels", "partner_labels", "lam")
        options = (arguments.get("class_weight"), arguments["label_smoothing"])
        return operator(*[arguments[name] for name in names], *options)
    if operator is not ops.mixupe_loss_backward:
        return operator(*[value for name, value in arguments.items() if name != "class_weight"])
    saved = {"parts": torch.rand(7), "signed_entropy": torch.rand(4), "lse": torch.rand(4), "grad": torch.tensor(1.0)}
    values = {**saved, **arguments}
    names = "grad logits labels partner_labels lam parts signed_entropy lse num_mixed penalty label_smoothing"
    return operator(*[values[name] for name in names.split()])


SOFT = torch.rand(4, 3)
TARGETS = [
    ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, "logits must have dtype float32, .*, got int64"),
    ({"logits": torch.zeros(3)}, r"logits must have shape \(N, C\) with C >= 1, got \(3,\)"),
    ({"logits": torch.zeros(4, 0)}, r"logits must have shape \(N, C\) with C >= 1, got \(4, 0\)"),
    ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels must have dtype int64, got int32"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must have shape \(4,\), got \(3,\)"),
    ({"labels": torch.tensor([0, 1, 3, 0])}, r"labels must be a class in \[0, 2\], got 3"),
    ({"partner_labels": torch.zeros(4)}, "partner_labels must have dtype int64, got float32"),
    ({"partner_labels": torch.tensor([0, -1, 0, 0])}, r"partner_labels must be a class in \[0, 2\], got -1"),
    ({"partner_labels": None}, "partner_labels and lam must be given together"),
    ({"lam": None}, "partner_labels and lam must be given together"),
    ({"lam": torch.rand(4).double()}, "lam must have dtype float32, got float64"),
    ({"lam": torch.tensor(0.5)}, r"lam must have shape \(4,\), got \(\)"),
    ({"lam": torch.rand(1)}, r"lam must have shape \(4,\), got \(1,\)"),
    ({"lam": torch.tensor([0.5, 1.5, 0, 0])}, r"lam must be in \[0, 1\], got 1.5"),
    ({"lam": torch.tensor([0.5, 0, -1e-7, 0])}, r"lam must be in \[0, 1\], got -1"),
    ({"lam": torch.tensor([0.5, 0, torch.nan, 0])}, r"lam must be in \[0, 1\], got nan"),
    ({"labels": SOFT}, "lam must be None where labels are soft"),
    ({"labels": SOFT.double(), "partner_labels": None, "lam": None}, "labels must have dtype float32, got float64"),
    ({"labels": SOFT[:, :2], "partner_labels": None, "lam": None}, r"labels must have shape \(4, 3\), got \(4, 2\)"),
    ({"label_smoothing": 1.5}, r"label_smoothing must be a number in \[0, 1\], got 1.5"),
    ({"label_smoothing": float("nan")}, r"label_smoothing must be a number in \[0, 1\], got nan"),
]
LOSSES = [ops.ce_entropy, ops.mixupe_loss, ops.mixupe_loss_with_gradient, ops.mixupe_loss_backward]


@pytest.mark.parametrize("change, message", TARGETS)
@pytest.mark.parametrize("operator", LOSSES, ids=str)
@pytest.mark.refuses
def test_targets_are_refused(backend, operator, change, message):
    with pytest.raises(REFUSED, match=f"^{message}"):
        call(operator, {**loss_arguments(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eta": torch.rand(1)}, r"eta must have shape \(\), got \(1,\)"),
        ({"eta": torch.tensor(0.1).double()}, "eta must have dtype float32, got float64"),
        ({"reg_weight": torch.rand(4)}, r"reg_weight must have shape \(\), got \(4,\)"),
        ({"num_reg": -1}, r"num_reg must be in \[0, 4\], got -1"),
        ({"clean_weight": -0.5}, "clean_weight must be a number >= 0, got -0.5"),
        ({"clean_weight": float("inf")}, "clean_weight must be a number >= 0, got inf"),
        ({"clean_weight": float("nan")}, "clean_weight must be a number >= 0, got nan"),
        ({"num_mixed": 4}, r"clean_weight must be 0 where R is of mixed rows \(regularize=\"mixed\"\): .*, got 0.25"),
    ],
)
@pytest.mark.parametrize("operator", LOSSES[1:3], ids=str)
def test_numbers_of_a_loss_are_refused(backend, operator, change, message):
    with pytest.raises(REFUSED, match=f"^{message}"):
        call(operator, {**loss_arguments(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"penalty": len(PENALTIES)}, r"penalty must be in \[0, 2\], got 3"),
        ({"penalty": -1}, r"penalty must be in \[0, 2\], got -1"),
        ({"num_mixed": 5}, r"num_mixed must be in \[0, 4\], got 5"),
    ],
)
@pytest.mark.parametrize("operator", LOSSES[1:], ids=str)
def test_numbers_of_a_loss_and_its_backward_are_refused(backend, operator, change, message):
    with pytest.raises(REFUSED, match=f"^{message}"):
        call(operator, {**loss_arguments(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": torch.rand(1)}, r"grad must have shape \(\), got \(1,\)"),
        ({"parts": torch.rand(4)}, r"parts must have shape \(7,\), got \(4,\)"),
        ({"signed_entropy": torch.rand(3)}, r"signed_entropy must have shape \(4,\), got \(3,\)"),
        ({"lse": torch.rand(4).double()}, "lse must have dtype float32, got float64"),
    ],
)
def test_what_a_backward_keeps_is_checked(backend, change, message):
    with pytest.raises(REFUSED, match=f"^{message}"):
        call(ops.mixupe_loss_backward, {**loss_arguments(), **change})


def test_class_weights_are_checked(backend):
    with pytest.raises(REFUSED, match=r"^class_weight must have shape \(3,\), got \(4,\)"):
        call(ops.ce_entropy, {**loss_arguments(), "class_weight": torch.rand(4)})
    with pytest.raises(REFUSED, match="^class_weight must have dtype float32, got float64"):
        call(ops.ce_entropy, {**loss_arguments(), "class_weight": torch.rand(3).double()})


X, PARTNER, LAM = torch.randn(4, 3), torch.tensor([1, 0, 3, 2]), torch.rand(4)


@pytest.mark.parametrize(
    "operator, arguments, message",
    [
        (ops.mix, (X.long(), PARTNER, LAM), "x must have dtype float32, .*, uint8, got int64"),
        (ops.mix, (X[0, 0], None, LAM), "x must have a batch dimension"),
        (ops.mix, (X, PARTNER.int(), LAM), "partner must have dtype int64, got int32"),
        (ops.mix, (X, PARTNER[:3], LAM), r"partner must have shape \(4,\), got \(3,\)"),
        (ops.mix, (X, PARTNER, LAM.double()), "lam must have dtype float32, got float64"),
        (ops.mix, (X, PARTNER, LAM[:3]), r"lam must have shape \(4,\), got \(3,\)"),
        (ops.mix, (X, PARTNER, LAM, PARTNER.float()), "rows must have dtype int64, got float32"),
        (ops.mix, (X, PARTNER, LAM, None, LAM, LAM), r"scale must have shape \(3,\), got \(4,\)"),
        (ops.mix, (X, PARTNER, LAM, None, None, None, torch.int8), "dtype must have dtype float32, .*, got int8"),
        (ops.gather_sum, (X.long(), PARTNER, LAM, PARTNER), "src must have dtype float32, .*, got int64"),
        (ops.gather_sum, (X, PARTNER, LAM[:3], torch.tensor([0, 4])), r"weight must have shape \(4,\), got \(3,\)"),
        (ops.row_dot, (X.long(), X, PARTNER, PARTNER), "a must have dtype float32, .*, got int64"),
        (ops.row_dot, (X, X, PARTNER, PARTNER[:3]), r"b_index must have shape \(4,\), got \(3,\)"),
        (ops.mixed_target, (PARTNER, PARTNER, LAM.half(), PARTNER, 2), "lam must have dtype float32, got float16"),
        (ops.mixed_target, (PARTNER, PARTNER, LAM, PARTNER, 5), r"num_mixed must be in \[0, 4\], got 5"),
    ],
)
def test_batches_are_refused(backend, operator, arguments, message):
    with pytest.raises(REFUSED, match=f"^{message}"):
        operator(*arguments)
