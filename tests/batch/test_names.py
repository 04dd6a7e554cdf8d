"""What a user of another library writes first is answered by what to write."""

import pickle

import pytest
import torch

import mixupe_kernels as mk


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mk.MixupE(mixup_alpha=0.8), "MixupE has no argument 'mixup_alpha', write alpha=, or .*like_timm"),
        (lambda: mk.Mixup(mode="elem"), "Mixup has no argument 'mode', write per_sample=True"),
        (lambda: mk.MixupE(1.0, label_smoothing=0.1), "write it as an argument of MixupELoss"),
        (lambda: mk.MixupE(clean_fracton=1 / 4), "MixupE has no argument 'clean_fracton', write clean_fraction="),
        (lambda: mk.Mixup(clean_fraction=1 / 4), "write MixupE, which has it, for Mixup"),
        (lambda: mk.Mixup(xyz=1), "Mixup has no argument 'xyz', write one of alpha, beta, per_sample"),
        (lambda: mk.MixupELoss(smoothing=0.1), "MixupELoss has no argument 'smoothing', write label_smoothing="),
        (lambda: mk.MixupELoss(reduction="mean"), "write nothing: the loss is the mean over the rows"),
    ],
)
def test_a_wrong_keyword_is_answered(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_missing_attribute_is_not_set():
    fn = mk.Mixup()
    with pytest.raises(AttributeError, match="a Mixup has no attribute 'mixup_enable' to set; it has .*mixup_enabled"):
        fn.mixup_enable = False


def test_mixup_enabled_is_enabled():
    fn = mk.MixupE()
    fn.mixup_enabled = False
    assert not fn.enabled and not fn.mixup_enabled and not fn.active
    x, target = fn(torch.randn(4, 2), torch.arange(4))
    assert target.num_reg == 0
    fn.enabled = True
    assert fn.mixup_enabled


def test_subclasses_and_copies():
    class Mine(mk.MixupE):
        def __init__(self, strength):
            super().__init__(strength, clean_fraction=1 / 4)

    assert Mine(strength=0.5).alpha == 0.5
    assert pickle.loads(pickle.dumps(mk.MixupE(0.5))).alpha == 0.5
