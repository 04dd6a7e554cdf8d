"""What is true on every one of several ranks: the loss of all rows, against one process. ``test_ranks`` runs these."""

import contextlib
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
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


def alone(batches, **options):
    """(loss, gradients, parts) of one process that has all rows."""
    model, criterion = network(), mk.MixupELoss(**{**OPTIONS, **options})
    x, target = joined(batches)
    loss = criterion(model(x), target)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], criterion.last


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


def full(parameters):
    return [grad.full_tensor() if hasattr(grad := p.grad, "full_tensor") else grad for p in parameters]


EVEN = [(6, 2), (6, 2), (6, 2)]
UNEVEN = [(6, 2), (9, 1), (3, 5)]
NO_CLEAN = [(6, 3), (5, 0), (4, 0)]
NO_ROWS = [(6, 3), (0, 0), (4, 2)]


def _batches(sizes, seed=10, **options):
    return [batch(seed + i, *size, **options) for i, size in enumerate(sizes[: dist.get_world_size()])]


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
    same_everywhere(got, *criterion.last)
    close(got, loss, "loss")
    for found, expected in zip(criterion.last, parts, strict=True):
        close(found, expected, "part")
    for found, expected in zip(full(model.parameters()), gradients, strict=True):
        close(found, expected, "gradient")


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
    same_everywhere(got, *step.last)
    close(got, loss, "loss")
    for found, expected in zip(step.last, parts, strict=True):
        close(found, expected, "part")
    for found, expected in zip(full(model.parameters()), gradients, strict=True):
        close(found, expected, "gradient")


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


# Classes over ranks ------------------------------------------------------------------------------------------------------


def sharded(classes, tensor, dim=-1):
    """This rank's part, as torch.chunk divides it; ranks after the last chunk have nothing."""
    rank, ranks = rank_and_ranks()
    each = math.ceil(classes / ranks)
    first = min(rank * each, classes)
    return tensor.narrow(dim, first, min(each, classes - first))


def logits_and_target(classes, rows=12, clean=4, soft=False, seed=3):
    generator = torch.Generator().manual_seed(seed)
    _, target = batch(seed, rows - clean, clean, classes, ignored=1)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    if soft:
        labels = torch.rand(2, rows, classes, generator=generator, dtype=torch.float64)
        labels /= labels.sum(-1, keepdim=True) * torch.tensor([1.0, 0.8], dtype=torch.float64).view(2, 1, 1)
        target = target._replace(labels=labels[0], partner_labels=labels[1])
    return logits, target


def _check_terms(classes, soft=False, **options):
    logits, target = logits_and_target(classes, soft=soft)
    if options.get("ignore_index", -100) != -100:  # what another rank's class would be called among its own
        own = math.ceil(classes / dist.get_world_size()) + options["ignore_index"]
        target = target._replace(
            labels=target.labels.where(target.labels != -100, own), partner_labels=target.labels.abs()
        )
    logits.requires_grad_()
    wanted = mk.ce_entropy(logits, target, **options)
    weights = torch.rand(3, len(logits), generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    (gradient,) = torch.autograd.grad([(v * w).sum() for v, w in zip(wanted, weights, strict=True)], logits)
    mine = sharded(classes, logits.detach()).requires_grad_()
    with collectives("allgather_base"):
        got = mk.ce_entropy(mine, target, class_shards=mk.ClassShards(classes, group()), **options)
    (own,) = torch.autograd.grad([(v * w).sum() for v, w in zip(got, weights, strict=True)], mine)
    same_everywhere(*got)
    for name, found, expected in zip(got._fields, got, wanted, strict=True):
        close(found, expected, name)
    close(own, sharded(classes, gradient), "gradient")


def case_terms_of_class_indices():
    for classes in (1, 5, 1000, 21841):
        _check_terms(classes)
        _check_terms(classes, label_smoothing=0.1)
    weight = torch.rand(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _check_terms(1000, class_weight=weight, label_smoothing=0.1)
    _check_terms(1000, class_weight=weight, ignore_index=3)


def case_terms_of_soft_labels():
    for classes in (5, 1000):
        _check_terms(classes, soft=True)
        _check_terms(classes, soft=True, label_smoothing=0.1)


def case_terms_of_absent_classes():
    """Logits of -∞: some of every rank's, all of some rank's."""

    def some(logits):
        return logits.masked_fill(torch.arange(logits.shape[1]) % 3 == 2, -torch.inf)

    def of_one_rank(logits):
        return logits.masked_fill(torch.arange(logits.shape[1]) < math.ceil(1000 / dist.get_world_size()), -torch.inf)

    for change in (some, of_one_rank):
        logits, target = logits_and_target(1000)
        present = change(logits)[0].isfinite().nonzero().flatten()
        labels = present[torch.randint(len(present), (2, len(logits)), generator=torch.Generator().manual_seed(6))]
        target = target._replace(labels=labels[0], partner_labels=labels[1])
        logits = change(logits).requires_grad_()
        loss = mk.mixupe_loss(logits, target, **OPTIONS)
        (gradient,) = torch.autograd.grad(loss, logits)
        mine = sharded(1000, logits.detach()).requires_grad_()
        got = mk.mixupe_loss(mine, target, **OPTIONS, class_shards=mk.ClassShards(1000, group()))
        (own,) = torch.autograd.grad(got, mine)
        close(got, loss)
        close(own, sharded(1000, gradient))


def case_loss_of_divided_classes():
    for classes in (1000, 21841):
        for options in ({}, {"penalty": "linear_detached", "label_smoothing": 0.1}, {"penalty": torch.square}):
            for soft in (False, True):
                logits, target = logits_and_target(classes, soft=soft)
                logits.requires_grad_()
                criterion = mk.MixupELoss(**OPTIONS, **options)
                loss = criterion(logits, target)
                (gradient,) = torch.autograd.grad(loss, logits)
                mine = sharded(classes, logits.detach()).requires_grad_()
                over = mk.MixupELoss(**OPTIONS, **options, class_shards=mk.ClassShards(classes, group()))
                with collectives("allgather_base"):
                    got = over(mine, target)
                with collectives():
                    (own,) = torch.autograd.grad(got, mine)
                same_everywhere(got, *over.last)
                close(got, loss, (classes, options, soft))
                close(own, sharded(classes, gradient), (classes, options, soft))


def case_multilabel_loss_of_divided_classes():
    logits, target = logits_and_target(1000, soft=True)
    logits.requires_grad_()
    options = {**OPTIONS, "activation": "sigmoid", "label_smoothing": 0.1}
    loss = mk.mixupe_loss(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    mine = sharded(1000, logits.detach()).requires_grad_()
    got = mk.mixupe_loss(mine, target, **options, class_shards=mk.ClassShards(1000, group()))
    (own,) = torch.autograd.grad(got, mine)
    same_everywhere(got)
    close(got, loss)
    close(own, sharded(1000, gradient))


def case_linear_loss_of_divided_classes():
    for classes, bias, soft, smoothing in (
        (1000, True, False, 0.0),
        (1000, False, True, 0.1),
        (21841, True, False, 0.1),
    ):
        generator = torch.Generator().manual_seed(5)
        hidden = torch.randn(12, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        given = torch.randn(classes, WIDTH + 1, generator=generator, dtype=torch.float64)
        weight, offset = given[:, :WIDTH].clone().requires_grad_(), given[:, WIDTH].clone().requires_grad_()
        _, target = logits_and_target(classes, soft=soft)
        options = {**OPTIONS, "label_smoothing": smoothing}
        leaves = [hidden, weight] + [offset] * bias
        loss = mk.mixupe_loss(nn.functional.linear(hidden, weight, offset if bias else None), target, **options)
        expected = torch.autograd.grad(loss, leaves)
        mine = [hidden] + [sharded(classes, leaf.detach(), 0).requires_grad_() for leaf in leaves[1:]]
        with collectives("allgather_base"):
            got = mk.linear_mixupe_loss(
                *mine[:2],
                target,
                bias=mine[2] if bias else None,
                chunk_rows=5,
                class_shards=mk.ClassShards(classes, group()),
                **options,
            )
        with collectives("allreduce"):
            found = torch.autograd.grad(got, mine)
        same_everywhere(got, found[0])
        close(got, loss)
        close(found[0], expected[0], "hidden")
        for part, whole in zip(found[1:], expected[1:], strict=True):
            close(part, sharded(classes, whole, 0), "weight")


def case_dtensors():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = logits_and_target(1000)
    logits.requires_grad_()
    loss = mk.mixupe_loss(logits, target, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, logits)
    divided = distribute_tensor(logits.detach(), mesh, [Shard(-1)]).requires_grad_()
    got = mk.MixupELoss(**OPTIONS)(divided, target)
    (own,) = torch.autograd.grad(got, divided)
    close(got, loss)
    close(own.full_tensor(), gradient)
    close(mk.ce_entropy(divided, target).ce, mk.ce_entropy(logits, target).ce)
    weight = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hidden = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    weight.requires_grad_()
    loss = mk.linear_mixupe_loss(hidden, weight, target, **OPTIONS)
    expected = torch.autograd.grad(loss, [hidden, weight])
    parts = (
        distribute_tensor(hidden.detach(), mesh, [Replicate()]).requires_grad_(),
        distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_(),
    )
    got = mk.linear_mixupe_loss(*parts, target, **OPTIONS)
    close(got, loss)
    for part, whole in zip(torch.autograd.grad(got, parts), expected, strict=True):
        close(part.full_tensor(), whole)
    wrong = distribute_tensor(logits.detach(), mesh, [Shard(0)])
    refused(ValueError, r"logits must be divided by Shard\(-1\)", mk.mixupe_loss, wrong, target, **OPTIONS)


def refused(kind, message, function, *args, **named):
    import re

    try:
        function(*args, **named)
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"{message} was not said")


def case_bad_arguments():
    logits, target = logits_and_target(1000)
    mine, shards = sharded(1000, logits), mk.ClassShards(1000, group())
    refused(TypeError, "process_group must be a", mk.mixupe_loss, logits, target, **OPTIONS, process_group="world")
    refused(TypeError, "class_shards must be Class", mk.mixupe_loss, logits, target, **OPTIONS, class_shards=3)
    refused(TypeError, "step must be StepRows", mk.MixupELoss(), logits, target, step=3)
    refused(ValueError, "num_classes must be an int >= 1", mk.ClassShards, 0)
    refused(ValueError, "logits must have", mk.mixupe_loss, logits, target, **OPTIONS, class_shards=shards)
    bad = target._replace(labels=target.labels + 1000)
    refused(ValueError, "target.labels must be a class in .0, 999", mk.ce_entropy, mine, bad, class_shards=shards)
    learned = target._replace(lam=target.lam.clone().requires_grad_())
    refused(ValueError, "must not require a gradient", mk.ce_entropy, mine, learned, class_shards=shards)
    refused(ValueError, "class_dim must be -1", mk.ce_entropy, mine, target, class_dim=0, class_shards=shards)
    refused(
        ValueError, "inplace_backward must be False", mk.mixupe_loss, mine, target, **OPTIONS, class_shards=shards,
        inplace_backward=True,
    )  # fmt: skip
    refused(ValueError, "targets must hold", mk.StepRows, [])
    refused(TypeError, "targets must be MixedTargets", mk.StepRows, [target.labels])
    step = mk.StepRows([target])
    refused(RuntimeError, "1 micro-batches are left", step.finish)
    refused(ValueError, "target.labels", mk.mixupe_loss, logits, bad, **OPTIONS, step=step)
    mk.mixupe_loss(logits, target, **OPTIONS, step=step)
    refused(RuntimeError, "one more", mk.mixupe_loss, logits, target, **OPTIONS, step=step)
    close(step.finish(), mk.mixupe_loss(logits, target, **OPTIONS))
    refused(RuntimeError, "finished already", step.finish)
    grad = torch.func.grad(lambda z: mk.mixupe_loss(z, target, **OPTIONS, process_group=group()))
    refused(ValueError, "under a transform of torch.func", grad, logits)
