"""timm's training, with its models, optimizers, schedules and averages: python examples/timm_train.py --data cifar10

What differs from timm's own script (train.py), whose options --mixup, --cutmix, --mixup-prob, --mixup-mode stay:

    -        mixup_fn = Mixup(**mixup_args)
    +        mixup_fn, criterion = mk.like_timm(**mixup_args, clean_fraction=1 / 4)     # needs no timm
    -            collate_fn = FastCollateMixup(**mixup_args)                             # with the prefetcher
    +            collate_fn = mixupe_kernels.integrations.timm.FastCollate(mixup_fn)
    -        train_loss_fn = SoftTargetCrossEntropy()
    +        train_loss_fn = criterion
    -            output = model(input)
    +            output = mk.forward_mixupe(model, input, target)
    +    model = mk.split_batch_norm(model)                                              # for BatchNorm, before DDP

``mixup_fn.mixup_enabled = False`` at --mixup-off-epoch, ``loader_train.mixup_enabled``, ModelEmaV3, gradient checkpointing and
accumulation work as they did; the validation's loss stays nn.CrossEntropyLoss().
"""

import timm
import torch
from rich.progress import track
from shared import Curve, arguments, error, images
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import mixupe_kernels as mk

MIXUP = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1}
OFF = 0.75  # of the epochs, after which nothing is mixed


def main():
    args = arguments(__doc__, epochs=6, data="digits")
    data, curve = images(args), Curve(args)
    train, test = data.loaders(args)
    model = timm.create_model("resnet18", num_classes=data.classes, in_chans=data.channels)
    model.conv1 = torch.nn.Conv2d(data.channels, 64, 3, padding=1, bias=False)  # small pictures
    model = mk.split_batch_norm(model)
    mixup_fn, criterion = mk.like_timm(**MIXUP, num_classes=data.classes, clean_fraction=1 / 4)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-4, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=args.epochs, warmup_t=1, warmup_lr_init=0.01)
    average = ModelEmaV3(model, decay=0.9)
    for epoch in range(args.epochs):
        if epoch >= OFF * args.epochs:
            mixup_fn.mixup_enabled = False
        losses = []
        for input, target in track(train, f"epoch {epoch + 1}", transient=True):
            input, target = mixup_fn(input, target)
            output = mk.forward_mixupe(model, input, target)
            loss = criterion(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.append(loss.detach())
        schedule.step(epoch + 1)
        curve.add(
            loss=float(torch.stack(losses).mean()),
            error=error(model, test),
            error_of_average=error(average.module, test),
        )
        average.module.eval()
    curve.save()


if __name__ == "__main__":
    main()
