"""Other libraries' kernels and functions for the same job, those that can be imported here."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

NUM_CLASSES = 1000  # timm and torchvision mix soft labels in the same call


def _attribute(module: str, name: str):
    """``module.name``, or None where it cannot be had; libraries raise more than ImportError when versions clash."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def mixers(batch: int, device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Name -> (x to mixed x, the partners it uses). λ is drawn inside; timm mixes in place."""
    found = {}
    labels = torch.randint(0, NUM_CLASSES, (batch,), device=device)
    sequence = torch.arange(batch, device=device)
    timm = _attribute("timm.data", "Mixup")
    if timm is not None and batch % 2 == 0:
        mixer = timm(mixup_alpha=1.0, num_classes=NUM_CLASSES, label_smoothing=0.0)
        found["timm"] = (lambda x: mixer(x, labels)[0], sequence.flip(0))
    v2 = _attribute("torchvision.transforms.v2", "MixUp")
    if v2 is not None:
        transform = v2(alpha=1.0, num_classes=NUM_CLASSES)
        found["torchvision"] = (lambda x: transform(x, labels)[0], sequence.roll(1))
    return found


def index_losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> mean cross-entropy of (logits, class indices)."""
    found = {}
    liger = _attribute("liger_kernel.transformers", "LigerCrossEntropyLoss")
    if liger is not None:
        found["Liger"] = liger()
    flash = _attribute("flash_attn.losses.cross_entropy", "CrossEntropyLoss")
    if flash is not None:
        found["flash-attention"] = flash()
    quack = _attribute("quack", "cross_entropy")
    if quack is not None:
        found["QuACK"] = lambda logits, target: quack(logits, target, reduction="mean")
    return found


def soft_losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> mean cross-entropy of (logits, soft targets)."""
    timm = _attribute("timm.loss", "SoftTargetCrossEntropy")
    return {} if timm is None else {"timm": timm()}
