"""Mixing and the loss written out in plain torch, in float64: what every library's loop is compared with, gradients too."""

import torch
import torch.nn.functional as F

import mixupe_kernels as mk
from mixupe_kernels.batch.plan import Plan


def loss(logits, target, criterion):
    """L = η̂ (L_mix + γ L_clean + η w mean |H - CE|), as the papers say it, by autograd."""
    options = criterion.options
    smoothing, sigmoid = options.of_loss.label_smoothing, options.of_loss.sigmoid
    logits = logits.movedim(options.class_dim, -1)
    classes = logits.shape[-1]
    logits = logits.reshape(-1, classes)
    if not isinstance(target, mk.MixedTarget):  # validation: cross-entropy
        target = mk.MixedTarget(target, target, torch.ones(target.shape[:1]), target.shape[0], 0, 0.0)
    each = logits.shape[0] // target.shape[0]  # pixels of an image
    lam = target.lam.double().reshape(target.shape[0], -1).expand(-1, each).reshape(-1, 1)
    own, other = (dense(labels, classes, smoothing) for labels in (target.labels, target.partner_labels))
    soft = lam * own + (1 - lam) * other
    if sigmoid:
        entropy = (F.softplus(logits) - logits.sigmoid() * logits).sum(1)
        cross = (F.softplus(logits) - soft * logits).sum(1)
    else:
        log_p = logits.log_softmax(1)
        entropy, cross = -(log_p.exp() * log_p).sum(1), -(soft * log_p).sum(1)
    mixed, regularized = target.num_mixed * each, target.num_reg * each
    total = cross[:mixed].mean()
    if mixed < len(cross) and criterion.clean_weight:
        total = total + criterion.clean_weight * cross[mixed:].mean()
    if not regularized:
        return total
    q = (entropy - cross)[len(cross) - regularized :]
    whole = total + criterion.eta * float(target.reg_weight) * q.abs().mean()
    return (total.abs() / whole.abs()).detach() * whole


def dense(labels, classes, smoothing):
    if labels.is_floating_point():
        return labels.double().reshape(-1, classes) * (1 - smoothing) + smoothing / classes
    return F.one_hot(labels.reshape(-1), classes).double() * (1 - smoothing) + smoothing / classes


def rows(draw, x):
    """The rows of a draw from the samples x, float64."""
    count = len(draw.target.lam)
    own = torch.arange(count) if draw.rows is None else draw.rows
    partner = draw.batch - 1 - own if draw.partner is None else draw.partner
    if draw.plain:
        partner = own
    lam = draw.lam.double().expand(count).reshape(-1, *[1] * (x.dim() - 1))
    made = lam * x[own] + (1 - lam) * x[partner]
    if draw.box is not None:
        for row, (top, low, left, right) in enumerate(draw.box.expand(count, 4).tolist()):
            if row < draw.target.num_mixed:
                made[row, ..., top:low, left:right] = x[partner[row], ..., top:low, left:right]
    return made


class Enough(Exception):
    """Raised by the criterion after the last batch to be compared, if asked for."""


class Followed:
    """Counts and compares, within a block, what every mixer makes and every criterion returns.

    Attributes:
        mixed, losses: how many batches were compared, and losses of training on mixed targets.
        returned: the dtype that the loop gets its loss in, once that is compared: fastai's recorder takes float32 alone.
    """

    def __init__(self, monkeypatch, most=10):
        self.mixed = self.losses = 0
        self.most, self.stops, self.returned = most, False, torch.float64
        draws = []
        call, forward, plan_draw = mk.Mixup._batch, mk.MixupELoss.forward, Plan.draw

        def drawn(plan, *args, **kwargs):
            draws.append(plan_draw(plan, *args, **kwargs))
            return draws[-1]

        def batch(fn, *args):
            result, x = call(fn, *args), args[0]
            if draws and self.mixed < self.most:
                self.compare(draws[-1], x, result)
            return result

        def criterion(module, logits, target, q=None):
            value = forward(module, logits, target, q)
            if isinstance(target, mk.MixedTarget) and self.losses < self.most:
                assert logits.dtype is torch.float64, "compared in float64"
                again = logits.detach().requires_grad_()
                expected = loss(again, target, module)
                torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
                # With η̂ the value is |L₀| whatever R is; the gradient has it.
                (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
                (wanted,) = torch.autograd.grad(expected, again)
                torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
                self.losses += 1
            elif self.stops and self.losses == self.most:
                raise Enough
            return value.to(self.returned)

        monkeypatch.setattr(Plan, "draw", drawn)
        monkeypatch.setattr(mk.Mixup, "_batch", batch)
        monkeypatch.setattr(mk.MixupELoss, "forward", criterion)

    def compare(self, draw, x, result):
        made = result[0]
        pairs = [(x, made)] if isinstance(x, torch.Tensor) else []
        if isinstance(x, dict):
            pairs = [(x[key], made[key]) for key in x if isinstance(x[key], torch.Tensor)]
        elif isinstance(x, (tuple, list)):
            pairs = list(zip(x, made, strict=True))
        for samples, values in pairs:
            if samples.dtype is torch.float64:
                torch.testing.assert_close(values.detach(), rows(draw, samples.detach()), rtol=1e-12, atol=1e-12)
        self.mixed += 1
