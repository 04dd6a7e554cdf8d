"""The drop-in pair in whole training loops: learning, compiled, under AMP, distributed, sharing seeds."""

import pytest
import torch
from torch import nn

import mixupe_kernels as mk

pytestmark = pytest.mark.thorough  # an emulated device trains for 45 s here, what the operators' suite has shown

POLICIES = {
    "full": {},
    "sample": {"clean_fraction": 1 / 8},
    "split": {"clean_fraction": 1 / 4, "split": True},
    "mixed": {"regularize": "mixed"},
    "interval": {"interval": 3},
    "per sample": {"per_sample": True, "pairing": "flip"},
}


def clusters(rows=256):
    """Three well separated clouds of points."""
    labels = torch.randint(3, (rows,))
    return torch.randn(rows, 8) * 0.3 + nn.functional.one_hot(labels, 8) * 2.0, labels


def train(policy, steps=60, wrap=lambda model: model, seed=3):
    torch.manual_seed(seed)
    x, labels = clusters()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    wrapped = wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    mixup_fn = mk.MixupE(0.4, generator=torch.Generator().manual_seed(seed), **POLICIES[policy])
    criterion = mk.MixupELoss(eta=0.1)
    for _ in range(steps):
        inputs, target = mixup_fn(x, labels)
        optimizer.zero_grad()
        criterion(wrapped(inputs), target).backward()
        optimizer.step()
    accuracy = (model(x).argmax(1) == labels).float().mean()
    return accuracy, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_learns(backend, policy):
    accuracy, _ = train(policy)
    assert accuracy > 0.95


def test_the_same_seed_trains_the_same_model(backend):
    for first, second in zip(train("sample")[1], train("sample")[1], strict=True):
        assert torch.equal(first, second)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, parallel = train("split", steps=5, wrap=nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(parallel, train("split", steps=5)[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_autocast_learns(backend):
    def wrap(model):
        def forward(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(x)

        return forward

    accuracy, _ = train("sample", wrap=wrap)
    assert accuracy > 0.95


@pytest.mark.parametrize("policy", ["full", "split", "mixed"])
def test_the_drop_in_example_compiles_whole(backend, policy):
    x, labels = clusters(32)
    model = nn.Linear(8, 3)
    mixup_fn, criterion = mk.MixupE(1.0, **POLICIES[policy]), mk.MixupELoss(eta=0.1)

    def step(x, labels):
        inputs, target = mixup_fn(x, labels)
        return criterion(model(inputs), target)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for function in (step, compiled):
        torch.manual_seed(5)
        loss = function(x, labels)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*losses)
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, graph)
