"""MixupE on several processes: digits of scikit-learn, a CNN with BatchNorm, DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Every process trains on its share of the digits; the loss, its means and η̂ are those of all processes' rows, so that the
gradient is that of one process with the whole batch. Under gloo on CPUs; on GPUs write backend="nccl", and move model and
batch to torch.device("cuda", LOCAL_RANK). It takes half a minute on two cores.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mixupe_kernels as mk


def digits():
    """(training set, test set) of images (1, 8, 8) and their labels; the same split on every rank."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return TensorDataset(images[:1000], labels[:1000]), TensorDataset(images[1000:], labels[1000:])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )


@torch.no_grad()
def error(model, data):
    """Test error in percent."""
    model.eval()
    images, labels = data.tensors
    wrong = (model(images).argmax(1) != labels).float().mean()
    model.train()
    return 100 * wrong.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="samples of one process in a step")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    torch.manual_seed(given.seed)  # the same weights everywhere; DistributedDataParallel would see to it, too
    train, test = digits()
    sampler = DistributedSampler(train, seed=given.seed, drop_last=True)
    loader = DataLoader(train, given.batch, sampler=sampler, drop_last=True)

    # Each process draws its own λ and partners: from the seed, with rank and epoch mixed in.
    mixup_fn = mk.MixupE(alpha=1.0, clean_fraction=1 / 4, seed=given.seed)
    # Means and η̂ over the rows of all processes, by one all-reduce of 48 bytes a step.
    criterion = mk.MixupELoss(eta=1e-3, clean_weight=1 / 4, process_group=dist.group.WORLD)
    # For statistics over all processes, on GPUs: nn.SyncBatchNorm.convert_sync_batchnorm(network()) within the brackets.
    model = mk.split_batch_norm(network())
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = given.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)

    begun = time.monotonic()
    for epoch in range(given.epochs):
        sampler.set_epoch(epoch)
        mixup_fn.set_epoch(epoch)
        for images, labels in loader:
            x, target = mixup_fn(images, labels)
            loss = criterion(mk.forward_mixupe(parallel, x, target), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if rank == 0:
            seconds = time.monotonic() - begun
            left = seconds / (epoch + 1) * (given.epochs - epoch - 1)
            print(
                f"epoch {epoch + 1:2}/{given.epochs}  loss {loss.item():.3f}  test error {error(model, test):5.2f} %"
                f"  {seconds:4.0f} s, {left:.0f} s left",
                flush=True,
            )

    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyones = [torch.empty_like(weights) for _ in range(ranks)]
    dist.all_gather(everyones, weights)
    if rank == 0:
        same = all(torch.equal(weights, other) for other in everyones)
        print(f"{ranks} processes, weights {'the same' if same else 'DIFFERENT'} on all of them")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
