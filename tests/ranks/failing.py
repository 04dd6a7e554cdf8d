"""A rank that fails while others wait for it, and one that never comes."""

import time

import torch
import torch.distributed as dist

import mixupe_kernels as mk

from .common import batch, group


def case_one_rank_fails():
    x, target = batch(1, 4, 2)
    if dist.get_rank() == 1:
        target = target._replace(labels=target.labels + 100)
    mk.mixupe_loss(torch.zeros(6, 7, dtype=torch.float64), target, eta=0.1, process_group=group())


def case_after():
    raise AssertionError("not to be reached")


def case_a_rank_is_late():
    time.sleep(600)
