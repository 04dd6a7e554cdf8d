"""mix, and the two operators its gradients are made of. Per operator: schema, public function, fake, backward."""

import torch
from torch import Tensor

from .. import checks
from ..conventions import accumulate_dtype, row_format
from . import reference
from .registration import Function, below_autograd, call, define, differentiable


def _as_lam(lam: Tensor | float, like: Tensor, rows: int) -> Tensor:
    """λ as a tensor of the compute dtype on ``like``'s device: 0-d, or one per row."""
    compute = accumulate_dtype(like.dtype)
    if not isinstance(lam, Tensor):
        return torch.full((), checks.fraction("lam", lam), dtype=compute, device=like.device)
    checks.dtype("lam", lam, checks.LOGITS_DTYPES)
    if lam.dim():
        checks.shape("lam", lam, (rows,))
        checks.same_device("lam", lam, "x", like)
    return lam.to(like.device, compute)


def _mix_fake(x, partner, lam, rows=None, scale=None, shift=None, dtype=None, memory_format=None, box=None):
    reference.check_box(box, x)
    size = x.shape if rows is None else (rows.shape[0], *x.shape[1:])
    memory_format = memory_format or row_format(x)
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


mix_op = define(
    "mix(Tensor x, Tensor? partner, Tensor lam, Tensor? rows=None, Tensor? scale=None, Tensor? shift=None, "
    "ScalarType? dtype=None, MemoryFormat? memory_format=None, Tensor? box=None) -> Tensor",
    _mix_fake,
)
mix_out_op = define(
    "mix_out(Tensor x, Tensor? partner, Tensor lam, Tensor? rows=None, Tensor? scale=None, Tensor? shift=None, "
    "Tensor? box=None, *, Tensor(a!) out) -> ()",
    lambda *args, **kwargs: None,
)


def mix(x: Tensor, partner: Tensor | str, lam: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    r"""Mix each sample of a batch with its partner: :math:`\tilde x_i = λ_i x_i + (1 - λ_i) x_{partner(i)}`.

    Mixup (Zhang et al., 2018), eq. 1, in one pass. A sample of weight 0 is not read, so λ = 1 copies exactly.
    Differentiable, any number of times, in ``x`` and ``lam``.

    Args:
        x: (B, ...) of dtype float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        partner: (B,) int64 in [0, B), or ``"flip"`` for partner(i) = B - 1 - i.
            (B, K) int64 mixes K samples instead, with one weight for each in ``lam``.
        lam: weight of the own sample in [0, 1]: a float, a 0-d tensor or (B,); with a (B, K) partner, (B, K) weights.
        out: buffer to write, of x's shape and device (any of the dtypes above). With ``"flip"`` it may be ``x`` itself,
            which is then mixed in place. Not differentiable, as everywhere in PyTorch: x and lam must not require a gradient.

    Returns:
        (B, ...) of x's dtype, channels_last where x is.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for a wrong shape or device, a partner outside [0, B), λ outside [0, 1] or NaN, or with ``out`` a tensor
            that requires a gradient. On CUDA, values are checked by device-side asserts, which report later.
    """
    checks.tensor("x", x)
    checks.dtype("x", x, checks.LOGITS_DTYPES)
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    if isinstance(partner, str):
        checks.choice("partner", partner, ("flip",))
        partner = None
    else:
        checks.tensor("partner", partner)
        checks.dtype("partner", partner, (torch.int64,))
        checks.same_device("partner", partner, "x", x)
        if partner.dim() == 2:
            return _mix_many(x, partner, lam, out)
        checks.shape("partner", partner, x.shape[:1])
    lam = _as_lam(lam, x, x.shape[0])
    if out is None:
        return call(mix_op, x, partner, lam)
    check_out(out, x.shape, x)
    checks.no_gradient("out", x=x, lam=lam, out=out)
    call(mix_out_op, x, partner, lam, out=out)
    return out


def check_out(out: Tensor, size: tuple[int, ...], x: Tensor) -> None:
    checks.tensor("out", out)
    checks.shape("out", out, size)
    checks.dtype("out", out, checks.LOGITS_DTYPES)
    checks.same_device("out", out, "x", x)


def _mix_many(x: Tensor, partner: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    checks.shape("partner", partner, (x.shape[0], partner.shape[1]))
    checks.tensor("lam", weight)
    checks.dtype("lam", weight, checks.LOGITS_DTYPES)
    checks.shape("lam", weight, partner.shape)
    checks.same_device("lam", weight, "x", x)
    if out is not None:
        raise ValueError("out must be None with a (B, K) partner, got a tensor")
    rows, terms = partner.shape
    offsets = torch.arange(0, rows * terms + 1, max(terms, 1), device=x.device)[: rows + 1]
    if terms == 0:
        offsets = offsets.new_zeros(rows + 1)
    weight = weight.to(accumulate_dtype(x.dtype)).reshape(-1)
    return call(gather_sum_op, x, partner.reshape(-1), weight, offsets)


def _transpose(destination: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(order, offsets) that list, for each j < size, the t with destination_t = j, ascending in t."""
    ascending, order = destination.sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(size + 1, device=destination.device))


def _per_channel(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad * reference._per_channel(scale, grad).to(grad.dtype)


@differentiable
class _Mix(Function):
    operator = mix_op

    @staticmethod
    def forward(ctx, x, partner, lam, rows, scale, shift, dtype, memory_format, box):
        ctx.save_for_backward(x, partner, lam, rows, scale, box)
        return below_autograd(mix_op, (x, partner, lam, rows, scale, shift, dtype, memory_format, box))

    @staticmethod
    def backward(ctx, grad):
        x, partner, lam, rows, scale, box = ctx.saved_tensors
        # The result's dtype need not be x's: neither gradient may be rounded to the narrower one on the way.
        if scale is not None or grad.dtype != x.dtype:
            grad = grad.to(torch.promote_types(grad.dtype, accumulate_dtype(x.dtype)))
        grad = _per_channel(grad, scale)
        count = grad.shape[0]
        sequence = torch.arange(count, device=x.device)
        own = sequence if rows is None else rows
        other = reference._partner_of(x, partner, own)
        whole = grad
        if box is not None:
            inside = reference.inside_box(box, x)
            grad = torch.where(inside, 0, whole)
        dx = dlam = None
        if ctx.needs_input_grad[0]:
            weight = lam.to(accumulate_dtype(grad.dtype)).expand(count)
            terms, sums = grad, [(own, sequence, weight), (other, sequence, 1 - weight)]
            if box is not None:
                # The partner's pixels inside the box: the one case whose backward holds the gradient three times over.
                terms = torch.cat([grad, torch.where(inside, whole, 0)])
                sums.append((other, sequence + count, torch.ones_like(weight)))
            to, source, weight = (torch.cat(values) for values in zip(*sums, strict=True))
            order, offsets = _transpose(to, x.shape[0])
            dx = call(gather_sum_op, terms, source[order], weight[order], offsets).to(x.dtype)
        if ctx.needs_input_grad[2]:
            values = x.to(grad.dtype)
            if box is not None:
                values = torch.where(inside, 0, values)  # not read by the row that λ mixes, so it may be anything
            dlam = call(row_dot_op, grad, values, sequence, own) - call(row_dot_op, grad, values, sequence, other)
            dlam = (dlam if lam.dim() else dlam.sum()).to(lam.dtype)
        return dx, None, dlam, *[None] * 6


# mixed_target: what a batch's draw comes to, row by row ---------------------------------------------------------------

mixed_target_op = define(
    "mixed_target(Tensor labels, Tensor? partner, Tensor lam, Tensor rows, int num_mixed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda labels, partner, lam, rows, num_mixed: (
        lam.new_empty(rows.shape),
        *(labels.new_empty(rows.shape) for _ in range(3)),
    ),
)


@differentiable
class _MixedTarget(Function):
    operator = mixed_target_op

    @staticmethod
    def forward(ctx, labels, partner, lam, rows, num_mixed):
        ctx.save_for_backward(rows)
        ctx.lam_shape, ctx.num_mixed = lam.shape, num_mixed
        return below_autograd(mixed_target_op, (labels, partner, lam, rows, num_mixed))

    @staticmethod
    def backward(ctx, grad, *_):
        grad = grad[: ctx.num_mixed]
        if ctx.lam_shape:
            order, offsets = _transpose(ctx.saved_tensors[0][: ctx.num_mixed], ctx.lam_shape[0])
            dlam = call(gather_sum_op, grad, order, torch.ones_like(grad), offsets)
        else:
            dlam = grad.sum()
        return None, None, dlam, None, None


# gather_sum and row_dot: what gradients of mixing are made of, and mixing of more than two samples --------------------

gather_sum_op = define(
    "gather_sum(Tensor src, Tensor index, Tensor weight, Tensor offsets) -> Tensor",
    lambda src, index, weight, offsets: src.new_empty((offsets.shape[0] - 1, *src.shape[1:])),
)
row_dot_op = define(
    "row_dot(Tensor a, Tensor b, Tensor a_index, Tensor b_index) -> Tensor",
    lambda a, b, a_index, b_index: a.new_empty(a_index.shape, dtype=accumulate_dtype(a.dtype)),
)


@differentiable
class _GatherSum(Function):
    operator = gather_sum_op

    @staticmethod
    def forward(ctx, src, index, weight, offsets):
        ctx.save_for_backward(src, index, weight, offsets)
        return below_autograd(gather_sum_op, (src, index, weight, offsets))

    @staticmethod
    def backward(ctx, grad):
        src, index, weight, offsets = ctx.saved_tensors
        sequence = torch.arange(index.shape[0], device=index.device)
        segment = torch.searchsorted(offsets, sequence, right=True) - 1
        dsrc = dweight = None
        if ctx.needs_input_grad[0]:
            order, transposed = _transpose(index, src.shape[0])
            dsrc = call(gather_sum_op, grad, segment[order], weight[order], transposed)
        if ctx.needs_input_grad[2]:
            dweight = call(row_dot_op, grad, src, segment, index)
        return dsrc, None, dweight, None


@differentiable
class _RowDot(Function):
    operator = row_dot_op

    @staticmethod
    def forward(ctx, a, b, a_index, b_index):
        ctx.save_for_backward(a, b, a_index, b_index)
        return below_autograd(row_dot_op, (a, b, a_index, b_index))

    @staticmethod
    def backward(ctx, grad):
        a, b, a_index, b_index = ctx.saved_tensors
        gradients = []
        for needed, rows, own, other, other_index in (
            (ctx.needs_input_grad[0], a.shape[0], a_index, b, b_index),
            (ctx.needs_input_grad[1], b.shape[0], b_index, a, a_index),
        ):
            if needed:
                order, offsets = _transpose(own, rows)
                gradients.append(call(gather_sum_op, other, other_index[order], grad[order], offsets))
            else:
                gradients.append(None)
        return *gradients, None, None
