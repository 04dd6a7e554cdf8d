"""SyncBatchNorm, split: each kind of rows has the statistics of all ranks' rows of that kind."""

import torch
import torch.distributed as dist
from torch import nn

import mixupe_kernels as mk

from .common import (
    CLASSES,
    OPTIONS,
    WIDTH,
    batch,
    close,
    collectives,
    group,
    joined,
    rank_and_ranks,
    refused,
    same_everywhere,
)

CHANNELS = 3


def network(layer, **options):
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Linear(WIDTH, 4 * CHANNELS),
        nn.Unflatten(1, (CHANNELS, 4)),
        layer(CHANNELS, **options),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * CHANNELS, CLASSES),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _check(sizes, **options):
    rank, ranks = rank_and_ranks()
    of_steps = [[batch(50 * step + r, *size) for r, size in enumerate(sizes[:ranks])] for step in range(2)]
    whole, criterion = mk.split_batch_norm(network(nn.BatchNorm1d, **options)), mk.MixupELoss(**OPTIONS)
    for batches in of_steps:
        x, target = joined(batches)
        loss = criterion(mk.forward_mixupe(whole, x, target), target)
        loss.backward()
    model = mk.split_batch_norm(network(nn.SyncBatchNorm, **options))
    over = mk.MixupELoss(**OPTIONS, process_group=group())
    for batches in of_steps:
        x, target = batches[rank]
        got = over(mk.forward_mixupe(model, x, target), target)
        got.backward()
    close(got, loss)
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        # By hand, as DistributedDataParallel does on a device: on the CPU it refuses every SyncBatchNorm.
        dist.all_reduce(found.grad)
        close(found.grad / ranks, expected.grad, "gradient")
    for (name, found), expected in zip(model.named_buffers(), whole.buffers(), strict=True):
        close(found, expected, name)
        same_everywhere(found)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    close(model.eval()(x), whole.eval()(x))


def case_uneven_ranks():
    _check([(6, 2), (9, 4), (3, 5)])


def case_cumulative_statistics():
    _check([(6, 2), (9, 4), (3, 5)], momentum=None)


def case_without_weights_and_statistics():
    _check([(6, 2), (9, 4), (3, 5)], affine=False, track_running_stats=False)


def case_ranks_without_some_rows():
    """A rank without clean rows, one with a single one, and one without any rows."""
    _check([(6, 1), (4, 0), (0, 0)])


def case_only_mixed_rows():
    _check([(6, 0), (4, 0), (3, 0)])


def case_one_collective_each_way():
    rank, _ = rank_and_ranks()
    layer = mk.split_batch_norm(nn.SyncBatchNorm(WIDTH))
    x, target = batch(rank, 5, 3)
    x = x.float().requires_grad_()
    with collectives("allgather_base"):
        out = mk.forward_mixupe(layer, x, target)
    with collectives("allreduce"):
        out.square().sum().backward()


def case_a_group_of_some_ranks():
    """Groups of one rank: the layer is a split BatchNorm of its own rows."""
    rank, ranks = rank_and_ranks()
    groups = [dist.new_group([r]) for r in range(ranks)]
    alone = mk.split_batch_norm(nn.BatchNorm1d(WIDTH)).double()
    layer = mk.split_batch_norm(nn.SyncBatchNorm(WIDTH, process_group=groups[rank])).double()
    x, target = batch(rank, 5, 3)
    with collectives():
        close(mk.forward_mixupe(layer, x, target), mk.forward_mixupe(alone, x, target))


def case_statistics_of_plain_samples():
    """update_bn: all rows are clean, those of all ranks."""
    rank, ranks = rank_and_ranks()
    layer = mk.split_batch_norm(nn.SyncBatchNorm(WIDTH)).double()
    batches = [[batch(10 * step + r, 4 + r, 0)[0] for r in range(ranks)] for step in range(2)]
    torch.optim.swa_utils.update_bn([ofs[rank] for ofs in batches], layer)
    expected = nn.BatchNorm1d(WIDTH, momentum=None).double()
    for ofs in batches:
        expected(torch.cat(ofs))
    close(layer.running_mean, expected.running_mean)
    close(layer.running_var, expected.running_var)


def case_no_second_derivative():
    layer = mk.split_batch_norm(nn.SyncBatchNorm(CHANNELS)).double()
    x, target = batch(3, 6, 2)
    start = torch.randn(len(x), CHANNELS, dtype=torch.float64, requires_grad=True)
    rows = start * 1
    out = mk.forward_mixupe(layer, rows, target)
    (first,) = torch.autograd.grad(out.pow(3).sum(), rows, create_graph=True)
    refused(RuntimeError, "has no second derivative", torch.autograd.grad, (first * first.detach()).sum(), start)
