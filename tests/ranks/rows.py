"""The loss of all ranks' rows is that of one process."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

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
    network,
    rank_and_ranks,
    same_everywhere,
)


def alone(batches, **options):
    """(loss, gradients, parts) of one process that has all rows."""
    model, criterion = network(), mk.MixupELoss(**{**OPTIONS, **options})
    x, target = joined(batches)
    loss = criterion(model(x), target)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], criterion.last


def full(parameters):
    return [grad.full_tensor() if hasattr(grad := p.grad, "full_tensor") else grad for p in parameters]


EVEN = [(6, 2), (6, 2), (6, 2)]
UNEVEN = [(6, 2), (9, 1), (3, 5)]
NO_CLEAN = [(6, 3), (5, 0), (4, 0)]
NO_ROWS = [(6, 3), (0, 0), (4, 2)]


def _batches(sizes, seed=10, **options):
    return [batch(seed + i, *size, **options) for i, size in enumerate(sizes[: dist.get_world_size()])]


def _same(found, expected):
    """(loss, parts, model) on every rank are (loss, parts, gradients) of one process."""
    (loss, parts, model), (expected_loss, expected_parts, gradients) = found, expected
    same_everywhere(loss, *parts)
    close(loss, expected_loss, "loss")
    for one, other in zip(parts, expected_parts, strict=True):
        close(one, other, "part")
    for one, other in zip(full(model.parameters()), gradients, strict=True):
        close(one, other, "gradient")


def _check_loss(wrap, sizes, **options):
    rank, _ = rank_and_ranks()
    ignored = options.pop("ignored", 0)
    batches = _batches(sizes, ignored=ignored)
    loss, gradients, parts = alone(batches, **options)
    model = wrap(network())
    criterion = mk.MixupELoss(**{**OPTIONS, **options}, process_group=group())
    x, target = batches[rank]
    logits = model(x)
    with collectives("allreduce"):
        got = criterion(logits, target)
    got.backward()
    _same((got, criterion.last, model), (loss, parts, gradients))


def case_ddp_even():
    _check_loss(DistributedDataParallel, EVEN)


def case_ddp_uneven():
    for penalty in ("abs", "threshold", "linear_detached", torch.square):
        _check_loss(DistributedDataParallel, UNEVEN, penalty=penalty)


def case_ddp_without_clean_rows():
    _check_loss(DistributedDataParallel, NO_CLEAN)


def case_ddp_a_rank_without_rows():
    _check_loss(DistributedDataParallel, NO_ROWS)


def case_ddp_ignored_rows():
    _check_loss(DistributedDataParallel, UNEVEN, ignored=1)


def case_ddp_smoothing_and_no_rescaling():
    _check_loss(DistributedDataParallel, UNEVEN, label_smoothing=0.1, rescale=False, clean_weight=0.0)


def case_fsdp2():
    _check_loss(lambda model: fully_shard(fully_shard(model[0]) and model), UNEVEN)


def _check_accumulation(wrap, without_sync, micro_batches=3):
    rank, ranks = rank_and_ranks()
    sizes = [UNEVEN, EVEN, NO_CLEAN][:micro_batches]
    of_ranks = [_batches(size, seed=100 * k, ignored=k == 1) for k, size in enumerate(sizes)]
    loss, gradients, parts = alone([one for batches in of_ranks for one in batches])
    model, criterion = wrap(network()), mk.MixupELoss(**OPTIONS)
    mine = [batches[rank] for batches in of_ranks]
    step = mk.StepRows([target for _, target in mine], process_group=group())
    for k, (x, target) in enumerate(mine):
        last = k == len(mine) - 1
        with contextlib.nullcontext() if last else without_sync(model):
            logits = model(x)
            with collectives(*["allreduce"] * last):
                share = criterion(logits, target, step=step)
            share.backward()
    got = step.finish(model.parameters())
    _same((got, step.last, model), (loss, parts, gradients))


def case_accumulation_of_three():
    _check_accumulation(DistributedDataParallel, lambda model: model.no_sync())


def case_accumulation_of_one():
    _check_accumulation(DistributedDataParallel, lambda model: model.no_sync(), 1)


@contextlib.contextmanager
def _fsdp_without_sync(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def case_accumulation_with_fsdp2():
    _check_accumulation(fully_shard, _fsdp_without_sync)


def case_second_derivatives():
    rank, ranks = rank_and_ranks()
    batches = [(torch.randn(target.num_rows, CLASSES, dtype=torch.float64), target) for _, target in _batches(UNEVEN)]
    mixed = sum(target.num_mixed for _, target in batches[:rank])

    def gradients(logits, target, **options):
        logits = logits.clone().requires_grad_()
        loss = mk.mixupe_loss(logits, target, **OPTIONS, **options)
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), logits)[0]

    logits, target = batches[rank]
    own = slice(mixed, mixed + target.num_mixed)
    first, second = gradients(logits, target, process_group=group())
    wanted, wanted_second = gradients(*joined(batches))
    close(first[: target.num_mixed], ranks * wanted[own])
    close(second[: target.num_mixed], ranks**2 * wanted_second[own])


def case_linear_loss_of_all_rows():
    rank, ranks = rank_and_ranks()
    batches = _batches(UNEVEN)
    x, target = joined(batches)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    loss = mk.linear_mixupe_loss(x, weight, target, **OPTIONS)
    (expected,) = torch.autograd.grad(loss, weight)
    x, target = batches[rank]
    got = mk.linear_mixupe_loss(x, weight, target, **OPTIONS, process_group=group(), chunk_rows=3)
    (gradient,) = torch.autograd.grad(got, weight)
    dist.all_reduce(gradient)
    close(got, loss)
    close(gradient / ranks, expected)
