"""ce_entropy on shapes, scales, dtypes and targets that Hypothesis finds.

Apart from test_ops.py, whose tests also run on a GPU machine that has pytest and nothing more.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixupe_kernels.ops import reference

from .cases import DTYPES, TARGETS, assert_accurate, make_target, to_double

ops = torch.ops.mixupe


@given(
    rows=st.integers(1, 5),
    classes=st.integers(1, 70),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    shift=st.sampled_from([0.0, -50.0, 1e3]),
    kind=st.sampled_from(TARGETS),
    dtype=st.sampled_from(DTYPES),
    data_seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_ce_entropy_anywhere(rows, classes, scale, shift, kind, dtype, data_seed):
    torch.manual_seed(data_seed)
    logits = (torch.randn(rows, classes) * scale + shift).to(dtype)
    logits = logits.nan_to_num(posinf=6e4, neginf=-6e4)
    target = make_target(kind, (rows, classes), dtype)
    truth = reference.ce_entropy(logits.double(), *to_double(target))
    peer = reference.ce_entropy(logits, *target)
    for output, expected, torchs in zip(ops.ce_entropy(logits, *target), truth, peer, strict=True):
        # The floor: with p near 1, CE and H are log(1 + tiny), which one ulp of 1 bounds.
        assert_accurate(output, expected, torchs, ulps=8, floor=1.0)
