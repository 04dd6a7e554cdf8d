"""torchvision's reference loop: a model of torchvision, v2.MixUp and v2.CutMix taken at random in the collate function.

What differs from the reference (references/classification/train.py):

    -    mixup_cutmix = get_mixup_cutmix(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=num_classes, use_v2=True)
    -    def collate_fn(batch):
    -        return mixup_cutmix(*default_collate(batch))
    -    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    +    mixup_fn = mk.MixupE(alpha=0.2, cutmix_alpha=1.0, pairing="roll", clean_fraction=1 / 4)
    +    criterion = mk.MixupELoss(clean_weight=1 / 4, label_smoothing=0.1)
         ...
    -            output = model(image)
    +            image, target = mixup_fn(image, target)
    +            output = mk.forward_mixupe(model, image, target)

The reference mixes in the workers; after the transfer, as here, it is faster. ``collate_fn=mk.Collate(mixup_fn)`` is the same
in the workers. Exponential moving averages, gradient clipping and AMP of the reference stay as they are.
"""

import torch
import torchvision
from rich.progress import track
from shared import Curve, arguments, error, images

import mixupe_kernels as mk


def main():
    args = arguments(__doc__, epochs=4)
    data, curve = images(args), Curve(args)
    train, test = data.loaders(args)
    model = torchvision.models.resnet18(num_classes=data.classes)
    model.conv1 = torch.nn.Conv2d(data.channels, 64, 3, padding=1, bias=False)  # small pictures
    model = mk.split_batch_norm(model)
    mixup_fn = mk.MixupE(alpha=0.2, cutmix_alpha=1.0, pairing="roll", clean_fraction=1 / 4)
    criterion = mk.MixupELoss(clean_weight=1 / 4, label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, epochs=args.epochs, steps_per_epoch=len(train))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for epoch in range(args.epochs):
        losses = []
        for image, target in track(train, f"epoch {epoch + 1}", transient=True):
            image, target = mixup_fn(image, target)
            output = mk.forward_mixupe(model, image, target)
            loss = criterion(output, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.detach())
        curve.add(
            loss=float(torch.stack(losses).mean()), error=error(model, test), error_of_average=error(average, test)
        )
    curve.save()


if __name__ == "__main__":
    main()
