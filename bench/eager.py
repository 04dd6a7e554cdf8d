"""What a user writes today, in plain PyTorch: the formulations that every speedup is against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(x: Tensor, partner: Tensor, lam: Tensor | float) -> Tensor:
    """Mixup of a batch, eq. 1 of Zhang et al. (2018), as their code has it."""
    return lam * x + (1 - lam) * x[partner]


def mix_and_append_clean(x: Tensor, partner: Tensor, lam: Tensor | float) -> Tensor:
    """Mixed rows, then the clean rows after them, (2B, ...)."""
    return torch.cat([mix(x, partner, lam), x])


def normalise_and_mix(
    x: Tensor, partner: Tensor, lam: Tensor | float, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """uint8 images (B, C, H, W) to the model's batch: scaled to [0, 1], normalised per channel, mixed, cast."""
    return mix((x.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), partner, lam).to(dtype)


def mixupe_loss(
    logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    lam: Tensor | float,
    eta: Tensor,
    reg_weight: Tensor,
    num_mixed: int,
) -> Tensor:
    """MixupE's loss (Zou et al., 2023, eq. 5 and 7-9) on one (N, C) tensor of logits, mixed rows first, clean rows last."""
    logits = logits.float()  # as autocast does for a loss
    mixed, clean = logits[:num_mixed], logits[num_mixed:]
    own = F.cross_entropy(mixed, labels[:num_mixed])
    mix_loss = lam * own + (1 - lam) * F.cross_entropy(mixed, partner_labels[:num_mixed])
    y = F.one_hot(labels[num_mixed:], logits.shape[1]).float()
    q = ((y - clean.softmax(1)) * clean).sum(1)
    total = mix_loss + eta * reg_weight * q.abs().mean()
    return (mix_loss.abs() / total.abs()).detach() * total


def ce_entropy(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, H, lse) of each row, (N,) float32 each, for the targets λ·labels + (1 - λ)·partner_labels."""
    logits = logits.float()
    lse = logits.logsumexp(1)
    log_p = logits - lse.unsqueeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    own = F.nll_loss(log_p, labels, reduction="none")
    return lam * own + (1 - lam) * F.nll_loss(log_p, partner_labels, reduction="none"), entropy, lse


def ce_entropy_backward(
    grad_ce: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    entropy: Tensor,
    lse: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    lam: Tensor,
) -> Tensor:
    """The gradient of :func:`ce_entropy` written out, dz = p (g_ce - g_H (log p + H)) - g_ce y, (N, C) of logits' dtype."""
    log_p = logits.float() - lse.unsqueeze(1)
    dz = log_p.exp() * (grad_ce.unsqueeze(1) - grad_entropy.unsqueeze(1) * (log_p + entropy.unsqueeze(1)))
    dz = dz.scatter_add(1, labels.unsqueeze(1), -(grad_ce * lam).unsqueeze(1))
    return dz.scatter_add(1, partner_labels.unsqueeze(1), -(grad_ce * (1 - lam)).unsqueeze(1)).to(logits.dtype)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy with class indices (N,) or soft targets (N, C)."""
    return F.cross_entropy(logits.float(), target)
