"""The loss of divided classes is that of one process."""

import math

import torch
import torch.distributed as dist
from torch import nn

import mixupe_kernels as mk

from .common import OPTIONS, WIDTH, batch, close, collectives, group, refused, same_everywhere, sharded


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
        target.labels[1], target.partner_labels[:3] = options["ignore_index"], options["ignore_index"]
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


def case_no_second_derivative():
    """Asked for, it raises, also by torch.autograd.grad of inputs that the loss depends on in another way."""
    logits, target = logits_and_target(12)
    shards = mk.ClassShards(12, group())
    mine = sharded(12, logits).requires_grad_()
    weight = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for inputs, loss in (
        (mine, mk.mixupe_loss(mine, target, **OPTIONS, class_shards=shards)),
        (mine, mk.ce_entropy(mine, target, class_shards=shards).lse.sum()),
        (whole := logits.clone().requires_grad_(), mk.linear_mixupe_loss(
            whole, sharded(12, weight, 0), target, **OPTIONS, class_shards=shards)),
        (whole, mk.linear_mixupe_loss(whole, weight, target, **OPTIONS, process_group=group())),
    ):  # fmt: skip
        (first,) = torch.autograd.grad(loss, inputs, create_graph=True)
        once_more = (first * inputs).sum()
        refused(RuntimeError, "has no second derivative", torch.autograd.grad, once_more, inputs)


def case_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

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
