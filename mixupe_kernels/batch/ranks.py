"""One exchange of a batch between ranks: each sample of each rank goes to the sample that it is the partner of."""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from .. import checks
from ..conventions import row_format
from .plan import Draw, Plan, plain_draw

_ALIGNED = 16  # bytes, so that any dtype can be read where a sample's part begins


def exchanged(
    plan: Plan, draw: Callable[..., Draw], tensors: list[Tensor], labels: Tensor
) -> tuple[list[Tensor], Callable[..., Draw]]:
    """The tensors (B, ...) with the partners' rows after their own, (2B, ...), and ``draw`` that knows those rows' labels.

    The tensors as they are where nothing is mixed.

    Raises:
        RuntimeError: without a process group, or in a data loader's worker.
        ValueError: for a tensor that requires a gradient.
    """
    seeds = plan.seeds
    if draw is plain_draw or not plan.active or labels.shape[0] == 0 or seeds is None:
        return tensors, draw
    if get_worker_info() is not None:
        raise RuntimeError(
            "pairing='across_ranks' must be used where the process group is, not in a data loader's worker"
        )
    if not dist.is_initialized():
        raise RuntimeError("pairing='across_ranks' must be used after torch.distributed.init_process_group")
    for value in tensors:
        checks.no_gradient("pairing='across_ranks'", x=value)
    own, ranks = labels.shape[0], dist.get_world_size()
    generator = torch.Generator("cpu").manual_seed(seeds.of_partners(int(plan.progress.own)))
    partner = torch.randperm(own * ranks, generator=generator, device="cpu")
    *tensors, labels = _with_partners([*tensors, labels], partner.view(ranks, own), dist.get_rank())
    return tensors, functools.partial(draw, others=labels[own:])


def _with_partners(tensors: list[Tensor], partner: Tensor, rank: int) -> list[Tensor]:
    """The tensors with the rows ``partner[rank]``, of all ranks' samples counted on, after their own: one all-to-all of bytes."""
    ranks, own = partner.shape
    device = tensors[0].device
    owner = partner // own
    # What this rank owns, in the order in which each other one wants it; what it gets is in the order of the owners.
    wanted = owner == rank
    sent = (partner[wanted] % own).to(device)
    place = own + owner[rank].argsort(stable=True).to(device)
    widths = [-(-value[0].numel() * value.element_size() // _ALIGNED) * _ALIGNED for value in tensors]
    outgoing = torch.empty((own, sum(widths)), dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)
    for packed, value in zip(outgoing.split(widths, 1), tensors, strict=True):
        _of_bytes(packed, value).copy_(value.index_select(0, sent).flatten(1) if value.dim() > 1 else value[sent, None])
    to_ranks, from_ranks = wanted.sum(1).tolist(), torch.bincount(owner[rank], minlength=ranks).tolist()
    dist.all_to_all_single(incoming, outgoing, from_ranks, to_ranks)
    joined = []
    for packed, value in zip(incoming.split(widths, 1), tensors, strict=True):
        both = torch.empty(
            (2 * own, *value.shape[1:]), dtype=value.dtype, device=device, memory_format=row_format(value)
        )
        both[:own] = value
        both[place] = _of_bytes(packed, value).view(own, *value.shape[1:])
        joined.append(both)
    return joined


def _of_bytes(packed: Tensor, like: Tensor) -> Tensor:
    """(B, elements of a sample) in the dtype of ``like``, a view of (B, bytes)."""
    count = like[0].numel()
    return packed.view(like.dtype)[:, :count]
