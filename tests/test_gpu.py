"""What only a GPU shows: sizes past 2^31, CUDA graphs, no synchronisation, launches, a step.

``python -m bench gpu`` runs these and, on the same device, the operators' suite (tests/ops, its tests marked ``gpu``).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixupe_kernels as mk
from bench.timing import CudaTimer

from .cases import truth
from .conftest import ON_CUDA, serve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=ON_CUDA, ids=str)
def backend(request):
    """The name of each backend of a CUDA device in turn, in use, with the device as the default one."""
    with serve(request.param) as name:
        yield name


def mixed_target(rows, classes, num_mixed):
    labels, partner_labels = torch.randint(classes, (2, rows))
    partner_labels[num_mixed:] = labels[num_mixed:]
    lam = torch.full((rows,), 0.3)
    lam[num_mixed:] = 1
    return mk.MixedTarget(labels, partner_labels, lam, num_mixed, rows - num_mixed, torch.tensor(1 / 3))


def loss_and_gradient(logits, target, eta):
    loss = mk.mixupe_loss(logits, target, eta=eta)
    return loss, torch.autograd.grad(loss, logits)[0]


def need_memory(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory, {free / 2**30:.0f} are there")


# Sizes past 2^31 elements: offsets of 32 bits would wrap


def test_mix_of_more_than_2_to_the_31_elements(backend):
    need_memory(14)
    rows, length = 2**16 + 3, 2**15 + 8
    assert rows * length > 2**31
    x = torch.empty(rows, length, dtype=torch.bfloat16).normal_()
    partner, lam = torch.arange(rows).flip(0), torch.tensor(0.3)
    checked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    for pairing in (partner, "flip"):
        out = mk.mix(x, pairing, lam)
        pair = torch.cat([x[checked], x[partner[checked]]]).double()
        expected = truth("mix", pair, torch.arange(5, 10), lam, torch.arange(5))
        torch.testing.assert_close(out[checked].double(), expected, rtol=2**-8, atol=1e-6)
        del out


def test_loss_of_more_than_2_to_the_31_logits(backend):
    need_memory(16)
    rows, classes = 2**14 + 64, 2**17 + 1
    assert rows * classes > 2**31
    logits = torch.empty(rows, classes, dtype=torch.bfloat16).normal_()
    target = mixed_target(rows, classes, rows // 2)
    checked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    labels = (target.labels, target.partner_labels, target.lam)
    few = [values[checked] for values in labels]
    outputs = torch.ops.mixupe.ce_entropy(logits, *labels)
    exact = truth("ce_entropy", logits[checked], *few)
    for output, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(output[checked].double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, rows)
    dz = torch.ops.mixupe.ce_entropy_backward(*upstream, None, logits, *outputs[1:], *labels)
    expected = truth("ce_entropy_backward", *upstream[:, checked], None, logits[checked], *exact[1:], *few)
    torch.testing.assert_close(dz[checked].double(), expected, rtol=2**-7, atol=1e-7)
    del dz
    loss, gradient = loss_and_gradient(logits.requires_grad_(), target, 0.5)
    assert loss.isfinite() and gradient[checked].isfinite().all()


# CUDA graphs, synchronisation, repeatability, launches


def test_graph_replay_reads_fresh_lam_and_eta(backend):
    x, partner, lam = torch.randn(32, 3, 16, 16), torch.randperm(32), torch.tensor(0.3)
    weight, eta = torch.randn(3 * 16 * 16, 10).requires_grad_(), torch.tensor(0.1)
    labels = torch.randint(10, (32,))

    def step():
        mixed = torch.cat([mk.mix(x, partner, lam), x])
        both = torch.cat([lam.expand(32), torch.ones(32)])
        target = mk.MixedTarget(labels.repeat(2), torch.cat([labels[partner], labels]), both, 32, 32, eta)
        loss = mk.mixupe_loss(mixed.flatten(1) @ weight, target, eta=eta)
        return loss, torch.autograd.grad(loss, weight)[0]

    graph, replayed = captured(step)
    for fresh_lam, fresh_eta in ((0.3, 0.1), (0.9, 0.1), (0.5, 2.0)):
        lam.fill_(fresh_lam)
        eta.fill_(fresh_eta)
        graph.replay()
        for got, expected in zip(replayed, step(), strict=True):
            torch.testing.assert_close(got, expected)


def captured(step, *generators):
    """(A graph of the step, captured after one call on a stream of its own, and what the captured call returned.)"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_a_captured_step_draws_afresh_and_follows_epochs(backend):
    generator = torch.Generator("cuda").manual_seed(0)
    ramps = {"alpha": mk.LinearRamp(0.2, 1.0, last_epoch=4), "eta_ramp": mk.LinearRamp(0, 1, last_epoch=4)}
    mixer, criterion = mk.MixupE(**ramps, clean_fraction=0.25, generator=generator), mk.MixupELoss(eta=0.5)
    x, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    weight, rows = torch.randn(192, 10, requires_grad=True), torch.empty(40, 3, 8, 8)

    def step():
        mixed, target = mixer(x, labels, out=rows)
        logits = mixed.flatten(1) @ weight
        loss = criterion(logits, target)
        return loss, torch.autograd.grad(loss, weight)[0], logits, target

    graph, (loss, gradient, logits, target) = captured(step, generator)
    lams = set()
    for epoch in range(5):
        mixer.set_epoch(epoch)
        for size in range(1, 300):  # constants of other batches must not take the place of the graph's
            mk.Mixup(pairing="roll")(torch.randn(size, 2), torch.zeros(size, dtype=torch.int64))
        graph.replay()
        lams.add(float(target.lam[0]))
        assert float(target.reg_weight) == pytest.approx(mixer.plan.reg_weight)
        expected = criterion(logits.detach().requires_grad_(), target)
        torch.testing.assert_close(loss, expected)
        assert gradient.isfinite().all()
    assert len(lams) == 5


def test_what_would_freeze_in_a_graph_asks_for_a_first_call(backend):
    logits, labels, criterion = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), mk.MixupELoss()
    with pytest.raises(RuntimeError, match="must be called once on cuda"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        criterion(logits, labels)
    criterion(logits, labels)


def test_constants_made_on_one_stream_serve_another(backend):
    x, labels = torch.randn(8, 3, 4, 4), torch.randint(10, (8,))
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    for size in range(1, 9):
        with torch.cuda.stream(other):
            torch.cuda._sleep(10_000_000)
            mk.Mixup(pairing="roll")(x[:size], labels[:size])
        _, target = mk.Mixup(pairing="roll")(x[:size], labels[:size])
        assert torch.equal(target.partner_labels, labels[:size].roll(1))


def test_a_lam_on_the_cpu_does_not_wait(backend):
    x, lam = torch.randn(8, 3), torch.tensor(0.3, device="cpu")
    expected = mk.mix(x, "flip", 0.3)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed = mk.mix(x, "flip", lam)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("cutmix_alpha", [None, 1.0])
@pytest.mark.parametrize("clean_fraction, split", [(1.0, False), (0.25, False), (0.25, True)])
def test_a_step_never_synchronises(backend, clean_fraction, split, cutmix_alpha):
    x, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    mixup_fn = mk.MixupE(alpha=1.0, clean_fraction=clean_fraction, split=split, cutmix_alpha=cutmix_alpha)
    criterion = mk.MixupELoss(eta=1e-2, clean_weight=clean_fraction)

    def step():
        mixed, target = mixup_fn(x, labels)
        criterion(model(mixed), target).backward()

    step()  # kernels compile and constants are made at the first call
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("shape", [(512, 1000), (64, 128256), (5, 20011)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_bit_for_bit(backend, shape, dtype):
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = mixed_target(*shape, shape[0] // 2)
    first, again = (loss_and_gradient(logits, target, 0.5) for _ in range(2))
    for value, repeated in zip(first, again, strict=True):
        assert torch.equal(value, repeated)
    x = torch.randn(64, 1000, requires_grad=True)
    many_to_one, lam = torch.randint(4, (64,)), torch.rand(64, requires_grad=True)
    upstream = torch.randn(64, 1000)
    first, again = (torch.autograd.grad(mk.mix(x, many_to_one, lam), (x, lam), upstream) for _ in range(2))
    for value, repeated in zip(first, again, strict=True):
        assert torch.equal(value, repeated)


def test_the_loss_takes_five_launches_at_most(backend):
    logits = torch.randn(512, 1000, requires_grad=True)
    target, eta, one = mixed_target(512, 1000, 256), torch.tensor(1e-3), torch.tensor(1.0)

    def step():
        torch.autograd.grad(mk.mixupe_loss(logits, target, eta=eta, clean_weight=0.25), logits, one)

    step()
    assert 2 <= CudaTimer().launches(step) <= 5


# Drop-in


@pytest.mark.parametrize("autocast", [False, True])
def test_training_steps_follow_the_written_out_loss(backend, autocast):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    x, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    mixup_fn, criterion = mk.MixupE(alpha=1.0), mk.MixupELoss(eta=0.1, clean_weight=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        mixed, target = mixup_fn(x, labels)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            logits = model(mixed)
        loss = criterion(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected, expected_gradient = written_out(logits.detach().double().requires_grad_(), target, 0.1, 0.25)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        rtol = 2**-7 if autocast else 1e-4
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-6)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()


def written_out(logits, target, eta, clean_weight):
    """MixupE, eq. 5 and 7-9, as the paper has them, with RegMixup's term."""
    mixed, clean = logits[: target.num_mixed], logits[-target.num_reg :]
    y = target.dense(logits.shape[1]).double()
    cross_entropy = F.cross_entropy(mixed, y[: target.num_mixed])
    cross_entropy = cross_entropy + clean_weight * F.cross_entropy(clean, y[-target.num_reg :])
    q = ((y[-target.num_reg :] - clean.softmax(1)) * clean).sum(1)
    total = cross_entropy + eta * target.reg_weight * q.abs().mean()
    loss = (cross_entropy.abs() / total.abs()).detach() * total
    return loss.detach(), torch.autograd.grad(loss, logits)[0]
