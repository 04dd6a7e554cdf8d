"""Models with BatchNorm, batches of two kinds of rows for them, and one step of training."""

import torch
from torch import nn

import mixupe_kernels as mk


def target_of(rows, num_mixed):
    labels = torch.arange(rows) % 5
    return mk.MixedTarget(labels, labels.flip(0), torch.rand(rows), num_mixed, rows - num_mixed, 0.5)


def batch(**options):
    x, labels = torch.randn(24, 6, dtype=torch.float64), torch.randint(5, (24,))
    return mk.MixupE(alpha=1.0, **options)(x, labels)


def randomised(norm):
    """A layer whose parameters and statistics are not those it starts with."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5)
    return norm


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def images(rows=20, num_mixed=14):
    return torch.randn(rows, 3, 6, 6), target_of(rows, num_mixed)


def statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


def step(call, model, x, target):
    """Logits and the gradients of one loss; ``call`` may wrap the model."""
    model.zero_grad()
    logits = mk.forward_mixupe(call, x, target)
    mk.MixupELoss(eta=0.5)(logits, target).backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]
