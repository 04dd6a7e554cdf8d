"""A whole training step of the tabular network: batch, model, loss, backward, optimizer."""

import pytest
import torch

from .. import models, step_methods

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WAYS = (
    "Mixup eager",
    "Mixup",
    "MixupE, authors' form",
    "MixupE full",
    "MixupE sample 1/4",
    "MixupE split 1/4",
    "MixupE mixed",
)


class Device(str):
    """A device's name, whose clock conftest.py looks for."""

    @property
    def device(self) -> str:
        return str(self)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("device", list(map(Device, DEVICES)), ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_step_of_the_mlp(benchmark, way, device, compiled):
    benchmark.group = f"step of MLP 64-128-128-10, {'compiled, ' if compiled else ''}{device}"
    benchmark.name = way
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = models.mlp(64, 10).to(device)
    method = step_methods.make_methods(model, 10, 100, torch.zeros(64, device=device))[way]
    objective = torch.compile(method.objective) if compiled else method.objective
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, labels = torch.randn(100, 64, device=device), torch.randint(10, (100,), device=device)

    def step() -> None:
        batch = method.prepare(x, labels)
        optimizer.zero_grad(set_to_none=True)
        objective(*batch).backward()
        optimizer.step()

    benchmark(step)
