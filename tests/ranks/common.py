"""Batches, and what is asserted of all ranks."""

import contextlib
import math
import re

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mixupe_kernels as mk

CLASSES, WIDTH = 7, 5
OPTIONS = {"eta": 0.3, "clean_weight": 0.25}


def group():
    return dist.group.WORLD


def rank_and_ranks():
    return dist.get_rank(), dist.get_world_size()


def network(seed=1):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(seed, mixed, clean, classes=CLASSES, ignored=0):
    """Rows and target of one rank's batch, the same wherever it is made."""
    generator = torch.Generator().manual_seed(seed)
    count = mixed + clean
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    labels, partner = (torch.randint(classes, (count,), generator=generator) for _ in range(2))
    lam = torch.rand(count, generator=generator, dtype=torch.float64)
    labels[:ignored] = -100
    labels[mixed : mixed + ignored] = -100
    partner[mixed:], lam[mixed:] = labels[mixed:], 1.0
    return x, mk.MixedTarget(labels, partner, lam, mixed, clean, 1 / 3 if clean else 0.0)


def joined(batches):
    """One batch of the rows of several: mixed rows first."""
    parts = [
        (x[rows], target.rows(*bounds))
        for kind in range(2)
        for x, target in batches
        for bounds in [((0, target.num_mixed), (target.num_mixed, target.num_rows))[kind]]
        for rows in [slice(*bounds)]
    ]
    parts = [(x, target) for x, target in parts if target.num_rows]
    target = mk.MixedTarget.cat([target._replace(reg_weight=1 / 3) for _, target in parts])
    return torch.cat([x for x, _ in parts]), target


def close(got, want, what=""):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=lambda text: f"{what}: {text}")


def same_everywhere(*tensors):
    """The same bits on every rank."""
    for tensor in tensors:
        mine = tensor.detach().contiguous()
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
        assert all(torch.equal(mine.nan_to_num(), other.nan_to_num()) for other in everyones), everyones


class _Collectives(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.overloadpacket.__name__.strip("_"))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def collectives(*expected):
    """Which collectives begin within, by the dispatcher's names."""
    mode = _Collectives()
    mode.names = []
    with mode:
        yield
    assert mode.names == list(expected), mode.names


def refused(kind, message, function, *args, **named):
    try:
        function(*args, **named)
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"{message} was not said")


def sharded(classes, tensor, dim=-1):
    """This rank's part, as torch.chunk divides it; ranks after the last chunk have nothing."""
    rank, ranks = rank_and_ranks()
    each = math.ceil(classes / ranks)
    first = min(rank * each, classes)
    return tensor.narrow(dim, first, min(each, classes - first))
