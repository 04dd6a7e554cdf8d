"""The README's examples run, and its figures are those of bench/results."""

import re
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example):
    model = torch.nn.Linear(6, 4)
    labels = torch.randint(4, (16,))
    names = {
        "mk": mk,
        "torch": torch,
        "images": torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8),
        "labels": labels,
        "model": model,
        "loader": [(torch.randn(16, 6), labels) for _ in range(2)],
        "logits": model(torch.randn(16, 6)),
        "target": mk.MixedTarget(labels, labels.flip(0), torch.rand(16), 12, 4, 0.3),
    }
    exec(example, names)
    for name in ("loss", "mixup_loss", "regmixup", "confidence_penalty", "z_loss"):
        if name in names:
            assert names[name].isfinite()
    if "loss" in names:
        assert model.weight.grad.abs().sum() > 0


def test_figures_are_the_measured_ones():
    from bench import report

    assert report.updated(README) == README, "run `python -m bench report`"
