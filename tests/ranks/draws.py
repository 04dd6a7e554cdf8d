"""What ranks draw: from a seed, and from each other's batches."""

import torch
import torch.distributed as dist

import mixupe_kernels as mk

from .common import collectives, rank_and_ranks, refused, same_everywhere


def everyones(tensor):
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors


def draws(mixer, steps=2, rows=8):
    """λ and rows of a few batches, as one tensor."""
    x = torch.arange(rows, dtype=torch.float64).unsqueeze(1)
    return torch.cat([mixer(x, torch.zeros(rows, dtype=torch.int64))[0].flatten() for _ in range(steps)])


def all_differ(tensors):
    return not any(torch.equal(one, other) for i, one in enumerate(tensors) for other in tensors[:i])


def case_draws_of_a_seed():
    """Each rank, epoch and seed has its own; a rank's are the same each time."""
    found = []
    for seed in (0, 1):
        mixer = mk.MixupE(per_sample=True, clean_fraction=1 / 4, seed=seed)
        for epoch in range(3):
            mixer.set_epoch(epoch)
            first = draws(mixer)
            found += everyones(first)
            again = mk.MixupE(per_sample=True, clean_fraction=1 / 4, seed=seed)
            again.set_epoch(epoch)
            assert torch.equal(draws(again), first)
            again.set_epoch(epoch + 0.5)  # within the epoch they go on
            assert not torch.equal(draws(again), first)
    assert all_differ(found)


def case_the_same_draws_on_all_ranks():
    mixer = mk.Mixup(seed=3, same_draws=True)
    found = []
    for epoch in range(2):
        mixer.set_epoch(epoch)
        same_everywhere(draws(mixer))
        found.append(draws(mixer))
    assert all_differ(found)


def case_a_seed_resumes():
    rank, ranks = rank_and_ranks()
    mixer = mk.Mixup(seed=3)
    mixer.set_epoch(2)
    draws(mixer, 3)
    state = mixer.state_dict()
    going_on = draws(mixer)

    def resumed(state, **options):
        other = mk.Mixup(**{"seed": 3, **options})
        other.load_state_dict(state)
        assert (other.epoch, other.steps) == (2, 3)
        return draws(other)

    assert torch.equal(resumed(state), going_on)
    # The state of rank 0 alone, and one of another number of ranks: fresh draws, of each rank its own, the same each time.
    dist.broadcast_object_list(states := [state if rank == 0 else None], 0)
    for loaded in (states[0], {**state, "ranks": (rank, ranks + 1)}):
        found = resumed(loaded)
        assert torch.equal(resumed(loaded), found)
        assert all_differ(everyones(found))
    refused(ValueError, "seed must be 3", resumed, state, seed=4)
    generator = mk.Mixup(generator=torch.Generator().manual_seed(rank))
    state = generator.state_dict()
    generator.load_state_dict(state)
    refused(ValueError, "as many ranks", generator.load_state_dict, {**state, "ranks": (0, ranks + 1)})


def case_partners_across_ranks():
    """Each sample of all ranks is the partner of one sample, of any rank, with its own label."""
    rank, ranks = rank_and_ranks()
    rows = 6
    own = torch.arange(rank * rows, (rank + 1) * rows)
    across = False
    for dtype, shape in ((torch.float64, (3,)), (torch.float32, (3, 5, 2)), (torch.bfloat16, ())):
        mixer = mk.MixupE(
            clean_fraction=1 / 2, pairing="across_ranks", seed=1, lam_distribution=mk.sampling.Fixed(0.25)
        )
        for _ in range(2):
            x = own.to(dtype).view(rows, *[1] * len(shape)).expand(rows, *shape)
            mixed, target = mixer(x, own)
            n = target.num_mixed
            assert n == rows and torch.equal(target.labels[:n], own)
            assert torch.equal(
                torch.cat(everyones(target.partner_labels[:n])).sort().values, torch.arange(rows * ranks)
            )
            assert torch.equal(target.labels[n:], target.partner_labels[n:])
            expected = target.lam.double() * target.labels + (1 - target.lam.double()) * target.partner_labels
            got = mixed.double().flatten(1)[:, 0] if shape else mixed.double()
            torch.testing.assert_close(got, expected, rtol=8e-3, atol=0)
            across |= bool((target.partner_labels // rows != rank).any())
    assert across
    with collectives("alltoall_base"):
        batch, _ = mixer({"a": own.double(), "b": own.float().unsqueeze(1), "n": own}, own)
    assert torch.equal(batch["a"].float(), batch["b"].flatten())
    soft = torch.eye(rows * ranks)[own]
    _, target = mixer(own.double(), soft)
    assert torch.equal(
        target.partner_labels.argmax(1)[:rows].sort().values.unique(),
        target.partner_labels.argmax(1)[:rows].sort().values,
    )
    images = torch.randint(256, (rows, 3, 8, 8), dtype=torch.uint8)
    mixer = mk.Mixup(pairing="across_ranks", seed=1, cutmix_alpha=1.0, per_sample=False, dtype=torch.float32)
    assert mixer(images, own)[0].shape == images.shape
    mixer.enabled = False
    with collectives():
        mixer(images, own)
    refused(ValueError, "seed must be given", mk.Mixup, pairing="across_ranks")
    refused(ValueError, "num_samples must be 2", mk.Mixup, pairing="across_ranks", seed=1, num_samples=3, num_classes=4)
    mixer = mk.Mixup(pairing="across_ranks", seed=1)
    refused(ValueError, "x must not require", mixer, torch.zeros(rows, requires_grad=True), own)
    refused(ValueError, "only labels are given", mixer.draw, own)
