"""The plain loop: python examples/plain.py, or --data mnist, --data cifar10, --data FOLDER (train/ and val/ of classes).

Four lines differ from a loop without mixing; they are marked.
"""

import torch
from rich.progress import track
from shared import Curve, arguments, error, images, small_cnn

import mixupe_kernels as mk


def main():
    args = arguments(__doc__, epochs=15)
    data, curve = images(args), Curve(args)
    train, test = data.loaders(args)
    model = mk.split_batch_norm(small_cnn(data.channels, data.classes))  # 1: only for BatchNorm
    mixup_fn = mk.MixupE(alpha=1.0, clean_fraction=1 / 4)  # 2
    criterion = mk.MixupELoss(eta=1e-3, clean_weight=1 / 4)  # 3: was CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=args.epochs, steps_per_epoch=len(train))
    for epoch in range(args.epochs):
        losses = []
        for x, labels in track(train, f"epoch {epoch + 1}", transient=True):
            x, target = mixup_fn(x, labels)  # 4, and the model's call
            loss = criterion(mk.forward_mixupe(model, x, target), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())  # no item(): nothing waits for the device
        curve.add(loss=float(torch.stack(losses).mean()), error=error(model, test))
    curve.save()


if __name__ == "__main__":
    main()
