"""``--full``: every large network takes a step by the experiments' own command, at its real input size, on made-up files.

``make test-matrix LEG=experiments`` runs it, with torchvision and timm.
"""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from experiments import __main__ as command
from experiments import frame, graphs, images

from ..conftest import THOROUGH
from ..integrations import library
from . import folders

pytestmark = pytest.mark.skipif(not THOROUGH, reason="minutes; `make test-matrix LEG=experiments` runs it")


def imagenet(folder):
    return folders.imagenet(folder, each=1)


RECIPE, TWO_CALLS, REGULARIZED = "MixupE 1/4, γ = 1/4", "MixupE", "ERM + R"
# (set's folder, network, method, shape of an input, millions of parameters)
IMAGES = [
    (folders.cifar10, "cifar-10-batches-py", "PreActResNet-18", RECIPE, (3, 32, 32), 11.17),
    (folders.cifar100, "cifar-100-python", "PreActResNet-18", TWO_CALLS, (3, 32, 32), 11.22),
    (folders.cifar100, "cifar-100-python", "PreActResNet-34", RECIPE, (3, 32, 32), 21.33),
    (folders.cifar100, "cifar-100-python", "PreActResNet-50", REGULARIZED, (3, 32, 32), 23.70),
    (folders.cifar100, "cifar-100-python", "PreActResNet-101", RECIPE, (3, 32, 32), 42.70),
    (folders.cifar100, "cifar-100-python", "WRN-28-10", RECIPE, (3, 32, 32), 36.54),
    (folders.svhn, "svhn", "PreActResNet-18", RECIPE, (3, 32, 32), 11.17),
    (folders.tiny_imagenet, "tiny-imagenet-200", "PreActResNet-18", RECIPE, (3, 64, 64), 11.17),
    (imagenet, "imagenet", "ResNet-50", RECIPE, (3, 224, 224), 23.51),
    (imagenet, "imagenet", "ViT-B/16", RECIPE, (3, 224, 224), 85.80),
    (imagenet, "imagenet", "CoAtNet-0", RECIPE, (3, 224, 224), 24.27),
]
NEEDS = {"imagenet": "torchvision", "CoAtNet-0": "timm"}


class Run:
    """A command's steps, the shapes that its networks saw, and how many parameters they have."""

    def __init__(self, arguments):
        self.steps, self.shapes, self.sizes = 0, [], set()
        depth = register_module_forward_pre_hook(self.see)
        step = register_optimizer_step_post_hook(self.count)
        try:
            assert command.main(arguments) == 0
        finally:
            depth.remove()
            step.remove()

    def see(self, module, inputs):
        if inputs and isinstance(inputs[0], torch.Tensor):
            self.shapes.append(tuple(inputs[0].shape))

    def count(self, optimizer, args, kwargs):
        self.steps += 1
        self.sizes.add(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        assert all(
            p.grad is not None and p.grad.isfinite().all() for group in optimizer.param_groups for p in group["params"]
        )


def full(name, tmp_path, data=None, only=""):
    """The run of ``--full`` for one epoch of one seed, and its rows."""
    arguments = [name, "--full", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path / "out"), "--only", only]
    run = Run(arguments + (["--data", str(data)] if data else []))
    return run, frame.read(tmp_path / "out" / f"{name}.csv")


@pytest.mark.parametrize("make, data_set, network, method, shape, millions", IMAGES)
def test_a_step_of_each_network_of_images(tmp_path, make, data_set, network, method, shape, millions):
    for part, needed in NEEDS.items():
        if part in (data_set, network):
            library(needed)
    run, rows = full("images", tmp_path, make(tmp_path / "data"), f"{data_set} | {network} | {method}")
    assert run.shapes[0][1:] == shape
    assert run.steps == len({row["cell"] for row in rows})  # one of each cell: the epoch's only batch
    (size,) = run.sizes
    assert size / 1e6 == pytest.approx(millions, rel=2e-3)
    assert {row["network"] for row in rows} == {network} and {"end", "deformed"} == {row["kind"] for row in rows}
    assert all(row["test_loss"] > 0 and 0 <= row["error"] <= 100 for row in rows)


def test_each_large_network_is_tried():
    assert {network for _, _, network, *_ in IMAGES} == set(images.LARGE | images.IMAGENET)


@pytest.mark.parametrize("network, millions", [("LeNet", 16.29), ("VGG-11", 9.22), ("VGG-13", 9.41)])
def test_a_step_of_each_network_of_speech(tmp_path, network, millions):
    run, rows = full("speech", tmp_path, folders.commands(tmp_path / "data"), f"{network}: {RECIPE}")
    assert run.shapes[0][1:] == (1, 160, 101) and run.steps == 1 and rows[0]["data_set"] == "Google commands"
    (size,) = run.sizes
    assert size / 1e6 == pytest.approx(millions, rel=2e-3)


def test_ten_folds_of_graphs(tmp_path):
    run, rows = full("graphs", tmp_path, folders.graphs(tmp_path / "data"), "RINGS: MixupE, α = 1, η = 1")
    assert len(rows) == run.steps == graphs.FOLDS == 10 and graphs.LAYERS == 5


@pytest.mark.parametrize("name", [name for name in command.EXPERIMENTS if name not in ("images", "speech", "graphs")])
def test_the_other_experiments_have_it_too(tmp_path, name):
    module = __import__(f"experiments.{name}", fromlist=["cells"])
    cells = [str(cell) for cell in module.cells(frame.Options(full=True, seeds=1))]
    run, rows = full(name, tmp_path, None, cells[-1])
    assert rows and (run.steps or name in ("toy", "perturbed"))


def test_timm_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="CoAtNet-0 is timm's: pip install timm, or run the others by --only"):
        images.coatnet0(10)
