"""Accelerate's loop: python examples/accelerate_loop.py, or torchrun --nproc-per-node 2 examples/accelerate_loop.py

The mixer stands between the prepared loader and the model, also with dispatch_batches: nothing mixed is cut in parts then.
"""

import torch
from accelerate import Accelerator
from rich.progress import track
from shared import Curve, arguments, images, small_cnn

import mixupe_kernels as mk


def main():
    args = arguments(__doc__, epochs=12)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    data, curve = images(args), Curve(args)
    model = mk.split_batch_norm(small_cnn(data.channels, data.classes))  # before prepare
    mixup_fn, criterion = mk.MixupE(alpha=1.0, clean_fraction=1 / 4), mk.MixupELoss(eta=1e-3, clean_weight=1 / 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    train, test = data.loaders(args)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    for epoch in range(args.epochs):
        losses = []
        for x, labels in track(train, f"epoch {epoch + 1}", transient=True, disable=not accelerator.is_main_process):
            with accelerator.accumulate(model):
                x, target = mixup_fn(x, labels)
                loss = criterion(mk.forward_mixupe(model, x, target), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            pairs = [accelerator.gather_for_metrics((model(x).argmax(1), labels)) for x, labels in test]
        model.train()
        wrong = torch.cat([found != labels for found, labels in pairs])
        if accelerator.is_main_process:
            curve.add(loss=float(torch.stack(losses).mean()), error=100 * float(wrong.double().mean()))
    if accelerator.is_main_process:
        curve.save()


if __name__ == "__main__":
    main()
