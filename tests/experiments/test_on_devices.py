"""``--device``: networks, data and random numbers are where they are asked to be, and a step of training waits for nothing.

Shown on the ``meta`` device, where nothing has a value: what the host reads after training is given to it as ones.

``make test`` shows three of them; ``make test-matrix LEG=experiments`` shows all.
"""

import importlib
from typing import Any

import pytest
import torch
from torch.fx.experimental import _config
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import __main__ as command
from experiments import frame

from ..conftest import THOROUGH
from . import folders

META = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "equal")
# What is trained, by the part of its cell's name, and the folder that holds its set; the others train nothing.
TRAINED = {
    "table4": ("iris: full", None),
    "images": ("digits | small CNN | MixupE 1/4", None),
    "speech": ("VGG-11: MixupE 1/4", folders.utterances),
    "graphs": ("MixupE, α = 1", folders.graphs),
    "approximation": ("MixupE", None),
    "toy": ("boundary MixupE", None),
    "between": ("MixupE", None),
    "memorization": ("Mixup, α = 8, dropout", None),
    "adversarial": ("MixupE", None),
    "gan": ("ring 0.2", None),
    "ablation": ("inputs only, SC + KNN", None),
    "alpha": ("1", None),
    "variance": ("hessian", None),
    "perturbed": ("training", None),
    "learned": ("clean: learned", None),
}
CHEAP = ("images", "graphs", "learned")
WAITS = {"learned": 1}  # λ's laws are numbers, which are read after the one meta step of four steps


class OnMeta(torch.Generator):
    """The CPU's generator, which says that it is on the device it was asked for: meta has none, and its draws need none."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu"):
        self.asked = torch.device(device)

    device = property(lambda self: self.asked)


class Watch(TorchDispatchMode):
    """Notes what waits or lies elsewhere between ``zero_grad`` and ``step``, and lets the host read ones."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.in_step, self.steps = None, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name().split("::")[1].split(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in given if tensor.device == META]
        goes = torch.device(kwargs.get("device") or (given[0].device if given else META))
        to_host = bool(there) and name == "_to_copy" and goes.type == "cpu"
        reads = bool(there) and (to_host or name in READS)
        mixes = bool(there) and any(tensor.dim() and tensor.device != META for tensor in given)
        arrives = bool(given) and not there and goes == META
        if self.in_step and (reads or mixes or arrives):
            self.found.append(f"{name} {[str(tensor.device) for tensor in given]}")
        if to_host:
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        if reads and name != "nonzero":
            return 1
        if there and "dirichlet" in name:  # the device has no kernel of it
            return torch.empty_like(given[0])
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", TRAINED if THOROUGH else CHEAP)
def test_all_is_on_the_device(name, tmp_path, monkeypatch):
    watch, zero_grad = Watch(), torch.optim.Optimizer.zero_grad

    def begin(self, *args, **kwargs):
        watch.in_step = self
        assert all(p.device == META for group in self.param_groups for p in group["params"])
        zero_grad(self, *args, **kwargs)

    def end(optimizer, args, kwargs):
        if optimizer is watch.in_step:  # α's own steps lie within those of the network
            watch.in_step, watch.steps = None, watch.steps + 1

    for optimizer in (torch.optim.Adam, torch.optim.SGD):  # whose fused kernels the device does not have
        init = optimizer.__init__
        monkeypatch.setattr(optimizer, "__init__", lambda *args, init=init, fused=None, **kw: init(*args, **kw))
    monkeypatch.setattr(torch, "Generator", OnMeta)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", begin)
    part, make = TRAINED[name]
    data = make(tmp_path) if make else None
    options = frame.Options(quick=True, seeds=2, data=data, device=META, epochs=2)
    module = importlib.import_module(f"experiments.{name}")
    cell = next(cell for cell in module.cells(options) if part in cell)
    hook = register_optimizer_step_post_hook(end)
    try:
        with _config.patch(meta_nonzero_assume_all_nonzero=True), watch:
            rows = module.run(cell, options)
    finally:
        hook.remove()
    assert watch.steps >= 2 and rows
    assert len(watch.found) == WAITS.get(name, 0), watch.found


@pytest.mark.parametrize("text", ["gpu", "cuda:-1", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(capsys, text):
    with pytest.raises(SystemExit):
        command.main(["ablation", "--quick", "--device", text])
    said = capsys.readouterr().err
    assert f"argument --device: expected a device that torch has here, like cpu or cuda, got '{text}'" in said


def test_rows_of_a_device_are_its_own():
    assert (
        "device" not in frame.Options().settings
        and "device=cuda" in frame.Options(device=torch.device("cuda:1")).settings
    )


@pytest.mark.parametrize(
    "option, text, expected",
    [
        ("--epochs", "0", "a whole number of at least 1, got '0'"),
        ("--seeds", "x", "a whole number of at least 1, got 'x'"),
        ("--data", "nowhere", "a folder, got 'nowhere'"),
        ("--only", "nothing", "a part of a cell's name, got 'nothing'; the cells: ERM; mixup, AC + RP;"),
    ],
)
def test_other_options_are_refused_by_name(capsys, option, text, expected):
    with pytest.raises(SystemExit):
        command.main(["ablation", "--quick", option, text])
    assert f"argument {option}: expected {expected}" in capsys.readouterr().err


def test_a_run_in_pieces_ends_with_the_table(tmp_path, capsys):
    arguments = ["ablation", "--quick", "--seeds", "1", "--out", str(tmp_path), "--only"]
    assert command.main([*arguments, "noise"]) == 0
    assert [row["method"] for row in frame.read(tmp_path / "ablation.csv")] == ["noise 0.05", "noise 0.1", "noise 0.2"]
    assert "16 cells are left to be run before a table and a picture" in capsys.readouterr().out
    assert not (tmp_path / "ablation.png").exists()
    assert command.main(arguments[:-1]) == 0
    assert len(frame.read(tmp_path / "ablation.csv")) == 19 and (tmp_path / "ablation.png").exists()
