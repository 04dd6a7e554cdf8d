"""Mixers do not depend on torch's default dtype and device: λ is float32, and everything is on the batch's device."""

import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels import conventions

OPTIONS = [
    {},
    {"alpha": 0.3, "per_sample": True, "prob": 0.5},
    {"clean_fraction": 1 / 4},
    {"clean_fraction": 1 / 4, "split": True, "pairing": "different_class"},
    {"cutmix_alpha": 0.5, "prob": 0.9},
    {"num_samples": 3, "num_classes": 5, "prob": 0.8},
    {"mean": (0.1, 0.2), "std": (0.3, 0.4)},
    {"alpha": 0.001, "pairing": "same_class"},
    {"lam_distribution": mk.sampling.WShaped(), "pairing": "derangement"},
    {"lam_distribution": mk.sampling.DLambda(0.5), "pairing": "flip"},
    {"lam_distribution": mk.sampling.Uniform(0.1, 0.9), "pairing": "roll"},
    {"lam_distribution": mk.sampling.Fixed(0.3)},
    {"pairing": mk.pairing.Neighbors(torch.arange(12).roll(1).unsqueeze(1))},
]


class Defaults:
    """torch's default dtype and device, changed for a while."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        self.dtype, self.device = dtype, device

    def __enter__(self):
        torch.set_default_dtype(self.dtype)
        torch.set_default_device(self.device)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize(
    "defaults", [Defaults(torch.bfloat16), Defaults(torch.float16), Defaults(torch.float64), Defaults(device="meta")]
)
def test_the_same_batch_whatever_the_defaults(options, defaults, backend):
    x, labels = torch.randn(12, 2, 6, 4), torch.randint(5, (12,))

    def batches():
        generator = torch.Generator("cpu").manual_seed(0)
        fn = mk.MixupE(**options, generator=generator)
        fn.set_epoch(1)
        return [fn(x, labels) for _ in range(3)]

    expected = batches()
    conventions._tensors.clear()
    with defaults:
        found = batches()
    again = batches()  # nothing that the defaults left behind
    for (rows, target), (wanted, wanted_target) in zip(found + again, expected * 2, strict=True):
        assert torch.equal(rows, wanted) and rows.dtype == torch.float32
        assert target.lam.dtype == torch.float32 and torch.equal(target.lam, wanted_target.lam)
        assert torch.equal(target.labels, wanted_target.labels) and target.labels.dtype == wanted_target.labels.dtype
        assert target.reg_weight == wanted_target.reg_weight


def test_plain_samples_under_a_default_dtype():
    fn = mk.Mixup()
    fn.enabled = False
    with Defaults(torch.bfloat16):
        _, target = fn(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    assert target.lam.dtype == torch.float32


def test_a_float64_batch_takes_the_exact_weight():
    _, target = mk.MixupE(0.3)(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    assert float(target.reg_weight) == mk.expected_a_lambda(0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_laws_whatever_the_default_dtype(dtype):
    laws = [mk.sampling.Beta(1.0), mk.sampling.Custom(lambda size, generator, device: torch.rand(size))]
    with Defaults(dtype):
        for law in laws:
            assert law.sample((3,), None, torch.device("cpu")).dtype == torch.float32
