"""The examples of the page on several ranks, from top to bottom, on each."""

import torch
from torch import nn

import mixupe_kernels as mk
from tests import test_readme

from .common import same_everywhere


def case_examples():
    text = test_readme.OF_RANKS.read_text()
    names = test_readme.given()
    names["model"] = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    mk.split_batch_norm(names["model"])
    for found in test_readme.BLOCK.finditer(text):
        names.update(test_readme.batch_of(names))
        line = text[: found.start(1)].count("\n")
        exec(compile("\n" * line + found[1], str(test_readme.OF_RANKS), "exec"), names)
        if "loss =" in found[1]:
            assert names["loss"].isfinite()
            same_everywhere(names["loss"])
    same_everywhere(*(parameter.grad for parameter in names["parallel"].parameters()))
    assert len(names["of_mixed"].labels) > len(names["x"]) and torch.isfinite(names["mixed"]).all()
