"""Segmentation: CutMix cuts the maps of classes with their images: python examples/segmentation.py

Pictures of four digits, each pixel to be named: background or the digit. Real data: --data FOLDER of images/*.png and
masks/*.png (of the same names and one size, a class a grey value, 255 for ignored pixels), which needs torchvision.
"""

from pathlib import Path

import torch
from rich.progress import track
from shared import Curve, arguments
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mixupe_kernels as mk


def four_digits(count):
    """(count, 1, 24, 24) pictures and (count, 24, 24) classes: 0 for background, 1 + digit."""
    x, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    pictures, maps = torch.zeros(count, 24, 24), torch.zeros(count, 24, 24, dtype=torch.int64)
    for top in (0, 12):
        for left in (0, 12):
            chosen = torch.randint(len(x), (count,), generator=generator)
            down, across = (top + 4 * torch.rand(count, generator=generator)).long(), left + 2
            for row in range(count):
                picture = x[chosen[row]].view(8, 8) / 16
                place = (row, slice(down[row], down[row] + 8), slice(across, across + 8))
                pictures[place], maps[place] = picture.float(), (picture > 0.3) * (1 + labels[chosen[row]])
    noise = 0.1 * torch.randn(pictures.shape, generator=generator)
    return (pictures + noise).unsqueeze(1).to(torch.get_default_dtype()), maps


def folder(path):
    from torchvision.io import ImageReadMode, decode_image

    names = sorted(file.name for file in (Path(path) / "images").glob("*.png"))
    pictures = torch.stack([decode_image(f"{path}/images/{name}", ImageReadMode.RGB) for name in names])
    maps = torch.cat([decode_image(f"{path}/masks/{name}", ImageReadMode.GRAY) for name in names]).long()
    return pictures.to(torch.get_default_dtype()) / 255, maps.where(maps != 255, -100)


def network(channels, classes, width=24):
    layers = []
    for before, dilation in ((channels, 1), (width, 2), (width, 4), (width, 1)):
        layers += [nn.Conv2d(before, width, 3, padding=dilation, dilation=dilation, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, classes, 1))


def main():
    args = arguments(__doc__, epochs=8, data="four digits")
    x, maps = four_digits(900) if args.data == "four digits" else folder(args.data)
    curve, held = Curve(args), len(x) // 4
    train = DataLoader(TensorDataset(x[held:], maps[held:]), args.batch_size // 2, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(x[:held], maps[:held]), 128)
    model = mk.split_batch_norm(network(x.shape[1], int(maps.max()) + 1))
    mixup_fn = mk.MixupE(cutmix_alpha=1.0, switch_prob=1.0, clean_fraction=1 / 4)
    criterion = mk.MixupELoss(eta=1e-3, clean_weight=1 / 4, class_dim=1)  # logits (N, C, H, W), labels (N, H, W)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(args.epochs):
        losses = []
        for pictures, labels in track(train, f"epoch {epoch + 1}", transient=True):
            pictures, target = mixup_fn(pictures, labels)
            loss = criterion(mk.forward_mixupe(model, pictures, target), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            right = torch.cat([(model(p).argmax(1) == m)[m > 0] for p, m in test])
        model.train()
        curve.add(loss=float(torch.stack(losses).mean()), error=100 * (1 - float(right.double().mean())))
    curve.save()


if __name__ == "__main__":
    main()
