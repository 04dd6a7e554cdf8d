"""mix, and the two operators its gradients are made of. Per operator: schema, public function, fake, backward."""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..conventions import accumulate_dtype, moved, row_format
from . import reference
from .arguments import check_box
from .registration import call, define, differentiable, keep, kept, signature_of


def _as_lam(lam: Tensor | float, like: Tensor, rows: int) -> Tensor:
    """λ as a tensor of the compute dtype on ``like``'s device: 0-d, or one per row."""
    compute = accumulate_dtype(like.dtype)
    if not isinstance(lam, Tensor):
        return torch.full((), checks.fraction("lam", lam), dtype=compute, device=like.device)
    checks.tensor("lam", lam)
    checks.dtype("lam", lam, checks.LOGITS_DTYPES)
    if lam.dim():
        checks.shape("lam", lam, (rows,))
        checks.same_device("lam", lam, "x", like)
    return moved("lam", lam, like.device, compute)


def _mix_fake(x, partner, lam, rows=None, scale=None, shift=None, dtype=None, memory_format=None, box=None):
    check_box(box, x)
    size = x.shape if rows is None else (rows.shape[0], *x.shape[1:])
    memory_format = memory_format or row_format(x)
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


mix_op = define(reference.mix, _mix_fake)
mix_out_op = define(reference.mix_out, lambda *_, out: None)
mixed_target_op = define(
    reference.mixed_target,
    lambda labels, partner, lam, rows, num_mixed: (
        lam.new_empty(rows.shape),
        *(labels.new_empty(rows.shape) for _ in range(3)),
    ),
)
gather_sum_op = define(
    reference.gather_sum,
    lambda src, index, weight, offsets: src.new_empty((offsets.shape[0] - 1, *src.shape[1:])),
)
row_dot_op = define(
    reference.row_dot,
    lambda a, b, a_index, b_index: a.new_empty(a_index.shape, dtype=accumulate_dtype(a.dtype)),
)
_mix, _mixed_target, _gather_sum, _row_dot = (
    signature_of(operator) for operator in (mix_op, mixed_target_op, gather_sum_op, row_dot_op)
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
    index = None
    if isinstance(partner, str):
        checks.choice("partner", partner, ("flip",))
    else:
        index = checks.tensor("partner", partner)
        checks.dtype("partner", partner, (torch.int64,))
        checks.same_device("partner", partner, "x", x)
        if partner.dim() == 2:
            return _mix_many(x, partner, lam, out)
        checks.shape("partner", partner, x.shape[:1])
    lam = _as_lam(lam, x, x.shape[0])
    if out is None:
        return call(mix_op, x, index, lam)
    check_out(out, x.shape, x)
    checks.no_gradient("out", x=x, lam=lam, out=out)
    call(mix_out_op, x, index, lam, out=out)
    return out


def check_out(out: Tensor, size: tuple[int, ...], x: Tensor) -> None:
    checks.tensor("out", out)
    checks.shape("out", out, size)
    checks.dtype("out", out, checks.LOGITS_DTYPES)
    checks.same_device("out", out, "x", x)
    checks.writable("out", out)


def _mix_many(x: Tensor, partner: Tensor, lam: Tensor | float, out: Tensor | None) -> Tensor:
    checks.shape("partner", partner, (x.shape[0], partner.shape[1]))
    weight = checks.tensor("lam", lam)
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


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    return values if scale is None else values * reference.per_channel(scale, values).to(values.dtype)


def _both_rows(arguments: Any) -> tuple[Tensor, Tensor]:
    """(own row, partner's row) of each row of a mix."""
    own = reference.rows_of(arguments.x, arguments.rows)
    return own, reference.partner_of(arguments.x, arguments.partner, own)


@differentiable(mix_op, "x", "lam")
class _Mix(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, _mix.Flat(*inputs))

    @staticmethod
    def backward(ctx, grad):
        given, needed = kept(ctx), _mix.Flat(*ctx.needs_input_grad)
        x, lam, box = given.x, given.lam, given.box
        # The result's dtype need not be x's: neither gradient may be rounded to the narrower one on the way.
        if given.scale is not None or grad.dtype != x.dtype:
            grad = grad.to(torch.promote_types(grad.dtype, accumulate_dtype(x.dtype)))
        grad = _scaled(grad, given.scale)
        count = grad.shape[0]
        sequence = torch.arange(count, device=x.device)
        own, other = _both_rows(given)
        whole = grad
        if box is not None:
            inside = reference.inside_box(box, x)
            grad = torch.where(inside, 0, whole)
        dx = dlam = None
        if needed.x:
            weight = lam.to(accumulate_dtype(grad.dtype)).expand(count)
            terms, sums = grad, [(own, sequence, weight), (other, sequence, 1 - weight)]
            if box is not None:
                # The partner's pixels inside the box: the one case whose backward holds the gradient three times over.
                terms = torch.cat([grad, torch.where(inside, whole, 0)])
                sums.append((other, sequence + count, torch.ones_like(weight)))
            to, source, weight = (torch.cat(values) for values in zip(*sums, strict=True))
            order, offsets = _transpose(to, x.shape[0])
            dx = call(gather_sum_op, terms, source[order], weight[order], offsets).to(x.dtype)
        if needed.lam:
            values = x.to(grad.dtype)
            if box is not None:
                values = torch.where(inside, 0, values)  # not read by the row that λ mixes, so it may be anything
            dlam = call(row_dot_op, grad, values, sequence, own) - call(row_dot_op, grad, values, sequence, other)
            dlam = (dlam if lam.dim() else dlam.sum()).to(lam.dtype)
        return _mix.gradients(x=dx, lam=dlam)

    @staticmethod
    def jvp(given, *tangents):
        moved = _mix.Flat(*tangents)
        x, terms = given.x, []
        if moved.x is not None:
            still = None if given.shift is None else torch.zeros_like(given.shift)
            layout = given.memory_format or row_format(x)
            terms.append(call(mix_op, *given._replace(x=moved.x, shift=still, memory_format=layout)))
        if moved.lam is not None:
            own, other = _both_rows(given)
            compute = accumulate_dtype(x.dtype)
            gap = _scaled(x[own].to(compute) - x[other].to(compute), given.scale)
            if given.box is not None:
                gap = torch.where(reference.inside_box(given.box, x), 0, gap)
            weight = moved.lam.to(compute).expand(own.shape[0]).view(-1, *[1] * (x.dim() - 1))
            terms.append((weight * gap).to(given.dtype or x.dtype))
        return sum(terms[1:], terms[0])


@differentiable(mixed_target_op, "lam")
class _MixedTarget(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, _mixed_target.Flat(*inputs))

    @staticmethod
    def backward(ctx, grad, *_):
        given = kept(ctx)
        grad = grad[: given.num_mixed]
        if given.lam.dim():
            order, offsets = _transpose(given.rows[: given.num_mixed], given.lam.shape[0])
            dlam = call(gather_sum_op, grad, order, torch.ones_like(grad), offsets)
        else:
            dlam = grad.sum()
        return _mixed_target.gradients(lam=dlam)

    @staticmethod
    def jvp(given, *tangents):
        moved = _mixed_target.Flat(*tangents)
        clean = torch.arange(given.rows.shape[0], device=given.rows.device) >= given.num_mixed
        lam = torch.where(clean, 0.0, moved.lam[given.rows] if moved.lam.dim() else moved.lam)
        return lam, None, None, None


# gather_sum and row_dot: what gradients of mixing are made of, and mixing of more than two samples --------------------


@differentiable(gather_sum_op, "src", "weight")
class _GatherSum(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, _gather_sum.Flat(*inputs))

    @staticmethod
    def backward(ctx, grad):
        src, index, weight, offsets = kept(ctx)
        needed = _gather_sum.Flat(*ctx.needs_input_grad)
        sequence = torch.arange(index.shape[0], device=index.device)
        segment = torch.searchsorted(offsets, sequence, right=True) - 1
        dsrc = dweight = None
        if needed.src:
            order, transposed = _transpose(index, src.shape[0])
            dsrc = call(gather_sum_op, grad, segment[order], weight[order], transposed)
        if needed.weight:
            dweight = call(row_dot_op, grad, src, segment, index)
        return _gather_sum.gradients(src=dsrc, weight=dweight)

    @staticmethod
    def jvp(given, *tangents):
        moved = _gather_sum.Flat(*tangents)
        named = {"src": moved.src, "weight": moved.weight}
        return sum(call(gather_sum_op, *given._replace(**{k: v})) for k, v in named.items() if v is not None)


@differentiable(row_dot_op, "a", "b")
class _RowDot(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, _row_dot.Flat(*inputs))

    @staticmethod
    def backward(ctx, grad):
        given, needed = kept(ctx), _row_dot.Flat(*ctx.needs_input_grad)
        da = db = None
        if needed.a:
            order, offsets = _transpose(given.a_index, given.a.shape[0])
            da = call(gather_sum_op, given.b, given.b_index[order], grad[order], offsets)
        if needed.b:
            order, offsets = _transpose(given.b_index, given.b.shape[0])
            db = call(gather_sum_op, given.a, given.a_index[order], grad[order], offsets)
        return _row_dot.gradients(a=da, b=db)

    @staticmethod
    def jvp(given, *tangents):
        moved = _row_dot.Flat(*tangents)
        named = {"a": moved.a, "b": moved.b}
        return sum(call(row_dot_op, *given._replace(**{k: v})) for k, v in named.items() if v is not None)
