"""The networks of the papers' experiments, in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(features: int, classes: int, hidden: int = 128) -> nn.Sequential:
    """The tabular network of MixupE, §4.2: two hidden layers of 128 units with ReLU. (N, features) → (N, classes)."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def lenet(height: int = 160, width: int = 101, classes: int = 30) -> nn.Sequential:
    """LeNet for spectrograms (MixupE, §4.3; LeCun et al., 1998): two 5×5 convolutions of 20 channels, then 1000 units.

    (N, 1, height, width) → (N, classes).
    """
    units = 20 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(units, 1000), nn.ReLU(), nn.Linear(1000, classes),
    )  # fmt: skip


def _convolution(channels: int, out: int, size: int, stride: int = 1, flat: bool = False) -> nn.Conv2d:
    """A size×size convolution without bias; 1×size for signals, which are images of height 1 (``flat``)."""
    height, step = (1, (1, stride)) if flat else (size, stride)
    return nn.Conv2d(channels, out, (height, size), step, (height // 2, size // 2), bias=False)


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each convolution (He et al., 2016, "Identity Mappings in Deep Residual Networks").

    ``bottleneck`` is 1×1, 3×3, 1×1 with four times as many output channels, else two 3×3.
    """

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool, flat: bool = False):
        super().__init__()
        out = 4 * width if bottleneck else width
        plan = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        sizes = [channels, *[width] * (len(plan) - 1), out]
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[:-1])
        self.convolutions = nn.ModuleList(
            _convolution(sizes[i], sizes[i + 1], kernel, step, flat) for i, (kernel, step) in enumerate(plan)
        )
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = _convolution(channels, out, 1, stride, flat)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](x))
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.convolutions[0](out)
        for norm, convolution in zip(self.norms[1:], self.convolutions[1:], strict=True):
            out = convolution(F.relu(norm(out)))
        return out + residual


def _preact_resnet(
    blocks: Sequence[int],
    bottleneck: bool,
    classes: int,
    base: int = 64,
    inputs: int = 3,
    flat: bool = False,
    stem: int = 0,
) -> nn.Sequential:
    """``stem``: the first convolution's channels, if they are not ``base``."""
    channels = stem or base
    layers = [_convolution(inputs, channels, 3, flat=flat)]
    for stage, count in enumerate(blocks):
        width = base * 2**stage
        for index in range(count):
            layers.append(PreActBlock(channels, width, 2 if stage and not index else 1, bottleneck, flat))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(
        *layers,
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def small_cnn(classes: int = 10, flat: bool = False) -> nn.Sequential:
    """Three convolutions of 16, 32 and 32 channels with BatchNorm, for grey images: (N, 1, H, W) → (N, classes).

    ``flat`` is for signals, (N, 1, 1, W).
    """
    layers, channels = [], 1
    for width, size, stride in ((16, 5, 2), (32, 3, 2), (32, 3, 1)):
        layers += [_convolution(channels, width, size, stride, flat), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def narrow_preact_resnet(classes: int = 10, flat: bool = False) -> nn.Sequential:
    """A PreActResNet of three blocks, 16, 32 and 64 channels wide, for grey images: (N, 1, H, W) → (N, classes).

    ``flat`` is for signals, (N, 1, 1, W).
    """
    return _preact_resnet((1, 1, 1), False, classes, base=16, inputs=1, flat=flat)


def preact_resnet18(classes: int = 100) -> nn.Sequential:
    """PreActResNet-18 for 32×32 images (MixupE, §4.1). (N, 3, 32, 32) → (N, classes)."""
    return _preact_resnet((2, 2, 2, 2), False, classes)


def preact_resnet34(classes: int = 100) -> nn.Sequential:
    """PreActResNet-34 for 32×32 images (MixupE, §4.1). (N, 3, 32, 32) → (N, classes)."""
    return _preact_resnet((3, 4, 6, 3), False, classes)


def preact_resnet101(classes: int = 100) -> nn.Sequential:
    """PreActResNet-101 for 32×32 images (MixupE, §4.1). (N, 3, 32, 32) → (N, classes)."""
    return _preact_resnet((3, 4, 23, 3), True, classes)


def wide_resnet28_10(classes: int = 100) -> nn.Sequential:
    """WRN-28-10 for 32×32 images (Zagoruyko and Komodakis, 2016; MixupE, §4.1). (N, 3, 32, 32) → (N, classes)."""
    return _preact_resnet((4, 4, 4), False, classes, base=160, stem=16)


def preact_resnet50(classes: int = 100) -> nn.Sequential:
    """PreActResNet-50 for 32×32 images (MixupE, §4.1). (N, 3, 32, 32) → (N, classes)."""
    return _preact_resnet((3, 4, 6, 3), True, classes)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, stride in the 3×3 one (He et al., 2016; Goyal et al., 2017)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50 (He et al., 2016) for 224×224 images. (N, 3, H, W) → (N, classes)."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            layers.append(Bottleneck(channels, 64 * 2**stage, 2 if stage and not index else 1))
            channels = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.inward(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.outward(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """A transformer's encoder block with layer norm before each half (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.first_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.second_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021): patches, a class token, learned positions, pre-norm blocks."""

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, classes: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_b16(classes: int = 1000) -> VisionTransformer:
    """ViT-B/16 for 224×224 images. (N, 3, 224, 224) → (N, classes)."""
    return VisionTransformer(image=224, patch=16, width=768, depth=12, heads=12, classes=classes)
