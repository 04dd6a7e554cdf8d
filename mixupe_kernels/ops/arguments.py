"""The arguments of the operators, said once: as NamedTuples, their checks, and the schemas that follow from them.

A function of ``reference`` takes these NamedTuples; the dispatcher passes flat lists. A ``Signature`` is read from the
function and leads from one to the other.
"""

import inspect
import math
from collections import namedtuple
from collections.abc import Callable
from itertools import islice
from string import ascii_lowercase
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .. import checks
from ..conventions import IGNORE_INDEX, PENALTIES, accumulate_dtype, check_range


def check_logits(logits: Tensor) -> None:
    checks.strided("logits", logits)
    checks.dtype("logits", logits, checks.LOGITS_DTYPES)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, C) with C >= 1, got {tuple(logits.shape)}")


def check_tensor(
    name: str, value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor, like_name: str = "logits"
) -> None:
    if value is not None:
        checks.strided(name, value)
        checks.dtype(name, value, (dtype,))
        checks.shape(name, value, shape)
        checks.same_device(name, value, like_name, like)


def check_upstream(grad: Tensor, logits: Tensor) -> None:
    check_tensor("grad", grad, accumulate_dtype(logits.dtype), (), logits)


def _check_of_rows(values: NamedTuple, logits: Tensor) -> None:
    for name, value in values._asdict().items():
        check_tensor(name, value, accumulate_dtype(logits.dtype), logits.shape[:1], logits)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:  # a number, or the compiler's symbol of one
        raise ValueError(f"label_smoothing must be a number in [0, 1], got {label_smoothing}")


def _check_penalty(penalty: int) -> None:
    if not 0 <= penalty < len(PENALTIES):
        raise ValueError(f"penalty must be in [0, {len(PENALTIES) - 1}], got {penalty}")


def _check_count(name: str, count: int, rows: int) -> None:
    if not 0 <= count <= rows:
        raise ValueError(f"{name} must be in [0, {rows}], got {count}")


class RowTarget(NamedTuple):
    """The targets of N rows: (N,) int64 class indices, two of them mixed by ``lam`` (N,), or dense (N, C).

    ``lam`` and dense labels have the dtype that the operator computes in. Beside dense labels ``lam`` is the share of each row
    that is not ignored: ``ops.ce_entropy`` and ``reference.kept_labels`` take it, operators do not.
    """

    labels: Tensor
    partner_labels: Tensor | None = None
    lam: Tensor | None = None

    # Not a property, nor are of_rows and of_backward: the compiler of torch 2.10 evaluates none of a NamedTuple.
    def is_dense(self) -> bool:
        return self.labels.dim() == 2

    def map(self, change: Callable[[Tensor], Tensor]) -> "RowTarget":
        """The target with ``change`` of each tensor in its place."""
        labels, partner_labels, lam = self
        return RowTarget(
            change(labels),
            None if partner_labels is None else change(partner_labels),
            None if lam is None else change(lam),
        )

    def check(self, logits: Tensor) -> None:
        """Raise for a dtype, shape or device that does not go with the logits (N, C)."""
        compute, rows = accumulate_dtype(logits.dtype), logits.shape[:1]
        if self.is_dense():
            if self.partner_labels is not None or self.lam is not None:
                raise ValueError("lam must be None where labels are soft")
            return check_tensor("labels", self.labels, compute, logits.shape, logits)
        if (self.partner_labels is None) != (self.lam is None):
            raise ValueError("partner_labels and lam must be given together")
        check_tensor("labels", self.labels, torch.int64, rows, logits)
        check_tensor("partner_labels", self.partner_labels, torch.int64, rows, logits)
        check_tensor("lam", self.lam, compute, rows, logits)

    def check_device(self, logits: Tensor) -> None:
        """Raise for a part on another device than the logits: for kernels of ``meta`` tensors, which look at no more."""
        for name, value in self._asdict().items():
            if value is not None:
                checks.same_device(name, value, "logits", logits)

    def check_values(self, classes: int, ignore_index: int) -> None:
        """Refuse labels outside [0, classes) other than ``ignore_index``, and λ outside [0, 1] or NaN."""
        if self.is_dense():
            return
        for name, labels in (("labels", self.labels), ("partner_labels", self.partner_labels)):
            if labels is not None:
                kept = labels.where(labels != ignore_index, 0)
                check_range(name, kept, 0, classes - 1, f"a class in [0, {classes - 1}]")
        if self.lam is not None:
            check_range("lam", self.lam, 0, 1, "in [0, 1]")


class RowOptions(NamedTuple):
    """How rows are counted: as ``torch.nn.functional.cross_entropy``'s, or of a ``sigmoid`` model."""

    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = IGNORE_INDEX
    sigmoid: bool = False

    def check(self, logits: Tensor) -> None:
        check_tensor("class_weight", self.class_weight, accumulate_dtype(logits.dtype), logits.shape[1:], logits)
        _check_smoothing(self.label_smoothing)


class RowOutputs(NamedTuple):
    """Cross-entropy, entropy and log-sum-exp of each row, (N,) each."""

    ce: Tensor
    entropy: Tensor
    lse: Tensor


class RowGradients(NamedTuple):
    """The gradients of ``RowOutputs``; one of None is zero."""

    grad_ce: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None

    def check(self, logits: Tensor) -> None:
        _check_of_rows(self, logits)


class RowStats(NamedTuple):
    """What the backward needs of a row beside its logits and target."""

    entropy: Tensor
    lse: Tensor

    def check(self, logits: Tensor) -> None:
        _check_of_rows(self, logits)


class LossArguments(NamedTuple):
    """What makes rows a MixupE loss: L_mix on the first ``num_mixed``, L_clean on all others, R on the last ``num_reg``.

    ``eta`` and ``reg_weight`` are 0-d, of the dtype that the operator computes in; ``penalty`` is a row of ``PENALTIES``;
    ``clean_weight`` is γ.
    """

    eta: Tensor
    reg_weight: Tensor
    num_mixed: int
    num_reg: int
    penalty: int = 0
    threshold: float = 1.0
    rescale: bool = True
    label_smoothing: float = 0.0
    sigmoid: bool = False
    clean_weight: float = 0.0

    def of_rows(self) -> RowOptions:
        return RowOptions(label_smoothing=self.label_smoothing, sigmoid=self.sigmoid)

    def of_backward(self) -> "LossBackwardOptions":
        return LossBackwardOptions(self.num_mixed, self.penalty, self.label_smoothing, self.sigmoid)

    def check(self, logits: Tensor) -> None:
        for name, value in (("eta", self.eta), ("reg_weight", self.reg_weight)):
            check_tensor(name, value, accumulate_dtype(logits.dtype), (), logits)
        _check_count("num_mixed", self.num_mixed, logits.shape[0])
        _check_count("num_reg", self.num_reg, logits.shape[0])
        _check_penalty(self.penalty)
        _check_smoothing(self.label_smoothing)
        if not 0 <= self.clean_weight < math.inf:
            raise ValueError(f"clean_weight must be a number >= 0, got {self.clean_weight}")
        if self.clean_weight and self.num_reg and self.num_mixed == logits.shape[0]:
            raise ValueError(
                'clean_weight must be 0 where R is of mixed rows (regularize="mixed"): no row is clean, got '
                f"{self.clean_weight}"
            )


class Parts(NamedTuple):
    """What a loss is made of, 0-d each: its terms and η̂, then what a row's numbers are multiplied by to be in it.

    ``of_mix`` is the factor of a mixed row's CE, ``of_clean`` of a clean row's, ``of_penalty`` of a regularized row's penalty.
    """

    mix_loss: Tensor
    clean_loss: Tensor
    reg: Tensor
    eta_hat: Tensor
    of_mix: Tensor
    of_clean: Tensor
    of_penalty: Tensor


class LossStats(NamedTuple):
    """What a loss keeps for its backward: ``Parts`` as one tensor, and two floats a row."""

    parts: Tensor
    signed_entropy: Tensor
    lse: Tensor

    def check(self, logits: Tensor) -> None:
        compute, rows = accumulate_dtype(logits.dtype), logits.shape[:1]
        check_tensor("parts", self.parts, compute, (len(Parts._fields),), logits)
        check_tensor("signed_entropy", self.signed_entropy, compute, rows, logits)
        check_tensor("lse", self.lse, compute, rows, logits)


class LossBackwardOptions(NamedTuple):
    """Those arguments of the loss that its backward takes: the rest is in ``LossStats``."""

    num_mixed: int
    penalty: int = 0
    label_smoothing: float = 0.0
    sigmoid: bool = False

    def of_rows(self) -> RowOptions:
        return RowOptions(label_smoothing=self.label_smoothing, sigmoid=self.sigmoid)

    def check(self, logits: Tensor) -> None:
        _check_count("num_mixed", self.num_mixed, logits.shape[0])
        _check_penalty(self.penalty)
        _check_smoothing(self.label_smoothing)


def check_box(box: Tensor | None, x: Tensor) -> None:
    if box is None:
        return
    checks.dtype("box", box, (torch.int64,))
    checks.shape("box", box, (4,))
    checks.same_device("box", box, "x", x)
    if x.dim() < 3:
        raise ValueError(f"box needs x of shape (B, ..., H, W), got {tuple(x.shape)}")


class Mixing(NamedTuple):
    """How N rows are made of samples x: λ_i f(x[rows_i]) + (1 - λ_i) f(x[partner_i]), f(v) = v·scale + shift per channel (dim 1).

    ``partner`` is (N,) int64, None for the flip of all samples; ``lam`` 0-d or (N,); ``rows`` (N,) int64, None for all in
    their order; ``scale`` and ``shift`` are one number a channel, None for x as it is.
    """

    partner: Tensor | None
    lam: Tensor
    rows: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def check(self, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """Raise for a dtype, shape or device that does not go with x (B, ...) and with the result's ``dtype``."""
        checks.dtype("x", x, _MIXABLE)
        if dtype is not None and dtype not in _MIXABLE:
            checks.dtype("dtype", x.new_empty((), dtype=dtype), _MIXABLE)
        if x.dim() == 0:
            raise ValueError("x must have a batch dimension, got a 0-d tensor")
        count = x.shape[:1] if self.rows is None else (self.rows.numel(),)
        for name, index in (("rows", self.rows), ("partner", self.partner)):
            check_tensor(name, index, torch.int64, count, x, "x")
        compute = accumulate_dtype(x.dtype)
        _check_weights(self.lam, compute, count, x, "x")
        if (self.scale is None) != (self.shift is None):
            raise ValueError("scale and shift must be given together")
        if self.scale is not None:
            if x.dim() < 2:
                raise ValueError("scale and shift must be None where x has no channels (dimension 1)")
            for name, factors in (("scale", self.scale), ("shift", self.shift)):
                check_tensor(name, factors, compute, x.shape[1:2], x, "x")


_MIXABLE = (*checks.LOGITS_DTYPES, torch.uint8)


def _check_weights(lam: Tensor, dtype: torch.dtype, count: tuple[int, ...], like: Tensor, like_name: str) -> None:
    """λ of all rows, or one for each."""
    one = lam.dim() == 0 or lam.shape == (1,)
    check_tensor("lam", lam, dtype, lam.shape if one else count, like, like_name)


def check_target(labels: Tensor, partner: Tensor | None, lam: Tensor, rows: Tensor, num_mixed: int) -> None:
    """Raise for arguments of ``mixed_target`` that do not go together."""
    for name, value in (("labels", labels), ("rows", rows)):
        check_tensor(name, value, torch.int64, (value.numel(),), labels, "labels")
    check_tensor("partner", partner, torch.int64, labels.shape, labels, "labels")
    compute = torch.float64 if lam.dtype is torch.float64 else torch.float32
    _check_weights(lam, compute, labels.shape, labels, "labels")
    _check_count("num_mixed", num_mixed, rows.shape[0])


def check_sum(src: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> None:
    """Raise for arguments of ``gather_sum`` that do not go together."""
    checks.dtype("src", src, checks.LOGITS_DTYPES)
    for name, value in (("index", index), ("offsets", offsets)):
        check_tensor(name, value, torch.int64, (value.numel(),), src, "src")
    check_tensor("weight", weight, accumulate_dtype(src.dtype), index.shape, src, "src")


def check_products(a: Tensor, b: Tensor, a_index: Tensor, b_index: Tensor) -> None:
    """Raise for arguments of ``row_dot`` that do not go together."""
    for name, value in (("a", a), ("b", b)):
        checks.dtype(name, value, _MIXABLE)
    checks.shape("b", b, (*b.shape[:1], *a.shape[1:]))
    checks.same_device("b", b, "a", a)
    check_tensor("a_index", a_index, torch.int64, a_index.shape[:1], a, "a")
    check_tensor("b_index", b_index, torch.int64, a_index.shape, b, "b")


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",  # counts of rows are symbols where a graph serves changing batch sizes
    float: "float",
    bool: "bool",
    torch.dtype | None: "ScalarType?",
    torch.memory_format | None: "MemoryFormat?",
}


def _fields(kind: Any) -> dict[str, Any]:
    """Name → annotation of a NamedTuple's fields; nothing for other types."""
    return inspect.get_annotations(kind) if isinstance(kind, type) and issubclass(kind, tuple) else {}


def _flat_class(name: str, names: list[str], defaults: list) -> Any:
    """A namedtuple, whose fields are known only at run time: to a type checker it may have any."""
    return namedtuple(name, names, defaults=defaults)  # noqa: PYI024


class Signature:
    """An operator's arguments, read from the function that defines it.

    ``schema`` is the dispatcher's, ``Flat`` a namedtuple of its flat arguments. Keyword-only arguments are those that the
    operator writes.
    """

    def __init__(self, function: Callable):
        self.name = function.__name__
        signature = inspect.signature(function)
        taken = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        written = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        self._kinds = [(p.annotation, len(_fields(p.annotation))) for p in taken]
        flat: list[tuple[str, Any, Any]] = []
        for parameter in taken:
            fields = _fields(parameter.annotation)
            defaults = getattr(parameter.annotation, "_field_defaults", {})
            flat += [(name, kind, defaults.get(name, parameter.empty)) for name, kind in fields.items()]
            if not fields:
                flat.append((parameter.name, parameter.annotation, parameter.default))
        # A default stands only if every argument after it has one.
        required = max((i + 1 for i, (*_, default) in enumerate(flat) if default is inspect.Parameter.empty), default=0)
        names, defaults = [name for name, *_ in flat], [default for *_, default in flat[required:]]
        self.Flat = _flat_class(self.name, names, defaults)
        arguments = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind, _ in flat]
        arguments[required:] = [f"{text}={value}" for text, value in zip(arguments[required:], defaults, strict=True)]
        if written:
            optional = ("?" if p.annotation == Tensor | None else "" for p in written)
            named = zip(ascii_lowercase, optional, written, strict=False)
            arguments += ["*", *(f"Tensor({alias}!){mark} {p.name}" for alias, mark, p in named)]
        result = signature.return_annotation
        outputs = 0 if result is None else len(_fields(result) or get_args(result))
        returned = "Tensor" if result is Tensor else f"({', '.join(['Tensor'] * outputs)})"
        self.schema = f"{self.name}({', '.join(arguments)}) -> {returned}"

    def pack(self, *flat: Any) -> list:
        """The function's arguments from flat ones, with the defaults that the dispatcher drops from their end."""
        values = iter(self.Flat(*flat))
        return [kind(*islice(values, size)) if size else next(values) for kind, size in self._kinds]

    def gradients(self, **named: Tensor | None) -> tuple:
        """What a backward returns: the named gradients in their places, None in all others."""
        return tuple(named.get(name) for name in self.Flat._fields)

    def taking_flat(self, function: Callable) -> Callable:
        """``function``, which has the signature read here, as one of flat arguments."""
        if not any(size for _, size in self._kinds):
            return function

        def packed(*flat, **written):
            return function(*self.pack(*flat), **written)

        return packed
