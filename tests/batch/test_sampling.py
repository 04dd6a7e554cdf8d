"""Distributions of λ: each sampler against its law, and the regularizer's weight under it."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

import mixupe_kernels as mk
from mixupe_kernels import sampling

CPU = torch.device("cpu")
DRAWS = 20_000


def half(law):
    """The law of max(λ, 1 - λ)."""
    return lambda value: np.maximum(law.cdf(value) - law.cdf(1 - np.asarray(value)), 0)


def ks_pvalue(lam, cdf):
    """Kolmogorov-Smirnov test of float32 draws, at the points it can tell: all above 1 - 2^-25 are 1, below 1e-45 are 0."""
    values, count = np.sort(lam.double().numpy()), len(lam)
    exact, below = cdf(values), np.arange(count) / count
    gap = np.maximum(np.abs(below + 1 / count - exact), np.abs(exact - below))[(values < 1) & (values > 1e-37)]
    return stats.kstwo.sf(gap.max(), count)


def d_lambda(alpha, beta):
    first, second = stats.beta(alpha + 1, beta), stats.beta(beta + 1, alpha)
    total = alpha + beta
    return lambda value: alpha / total * first.cdf(value) + beta / total * second.cdf(value)


def w_shaped(value):
    law = stats.beta(0.5, 0.5)
    return (law.cdf(2 * value) + law.cdf(2 * value - 1)) / 2


# (distribution, exact cumulative distribution function)
LAWS = [
    (sampling.Beta(1.0), stats.beta(1, 1).cdf),
    (sampling.Beta(0.2), stats.beta(0.2, 0.2).cdf),
    (sampling.Beta(0.4, 2.5), stats.beta(0.4, 2.5).cdf),
    (sampling.Beta(0.09, 3.0), stats.beta(0.09, 3.0).cdf),
    (sampling.Beta(0.02), stats.beta(0.02, 0.02).cdf),
    (sampling.Beta(0.01, 0.015), stats.beta(0.01, 0.015).cdf),
    (sampling.Beta(8.0, 8.0), stats.beta(8, 8).cdf),
    (sampling.Beta(0.5, fold="max"), half(stats.beta(0.5, 0.5))),
    (sampling.HalfBeta(2.0), half(stats.beta(2, 2))),
    (sampling.DLambda(1.0), d_lambda(1, 1)),
    (sampling.DLambda(0.3, 2.0), d_lambda(0.3, 2)),
    (sampling.WShaped(), w_shaped),
    (sampling.Uniform(), stats.uniform().cdf),
    (sampling.Uniform(0.25, 0.75), stats.uniform(0.25, 0.5).cdf),
    (sampling.Custom(lambda size, generator, device: torch.rand(size, generator=generator) ** 2), lambda v: v**0.5),
]


# Without the address that a lambda's repr ends in, which differs between the processes that share the tests.
LAW_NAMES = [repr(law).split("(function=")[0] for law, _ in LAWS]


@pytest.mark.parametrize(("distribution", "cdf"), LAWS, ids=LAW_NAMES)
def test_sampler_holds_to_its_law(distribution, cdf):
    lam = distribution.sample((DRAWS,), torch.Generator().manual_seed(1), CPU)
    assert lam.dtype == torch.float32 and lam.shape == (DRAWS,)
    assert bool(((lam >= 0) & (lam <= 1)).all())
    assert ks_pvalue(lam, cdf) > 1e-3


def test_ks_finds_a_wrong_law():
    lam = sampling.Beta(0.2).sample((DRAWS,), torch.Generator().manual_seed(1), CPU)
    assert ks_pvalue(lam, stats.beta(0.22, 0.22).cdf) < 1e-3


@pytest.mark.parametrize(("distribution", "cdf"), LAWS, ids=LAW_NAMES)
def test_weight_is_twice_the_mean_of_lam_times_its_complement(distribution, cdf):
    # E[λ(1 - λ)] = ∫ (2λ - 1) F(λ) dλ over [0, 1], by parts.
    exact = 2 * integrate.quad(lambda value: (2 * value - 1) * float(cdf(value)), 0, 1, limit=400, points=[0.5])[0]
    error = 4 * distribution.expected_a_lambda_error
    assert distribution.expected_a_lambda == pytest.approx(exact, abs=1e-6 + error)


def test_beta_of_tiny_parameters_is_not_degenerate():
    lam = sampling.Beta(1e-3).sample((DRAWS,), torch.Generator().manual_seed(0), CPU)
    assert bool(lam.isfinite().all())
    # The mass sits on both ends; P(λ < 1/2) = 1/2.
    assert abs((lam < 0.5).double().mean().item() - 0.5) < 4 * 0.5 / DRAWS**0.5


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_fixed(value):
    distribution = sampling.Fixed(value)
    assert torch.equal(distribution.sample((5,), None, CPU), torch.full((5,), value))
    assert distribution.expected_a_lambda == pytest.approx(2 * value * (1 - value))
    folded = sampling.Fixed(value, fold="max").sample((), None, CPU)
    assert folded.item() == pytest.approx(max(value, 1 - value))


@given(alpha=st.floats(1e-3, 1e3), beta=st.floats(1e-3, 1e3))
def test_expected_a_lambda(alpha, beta):
    total = alpha + beta
    own = alpha / total * (beta / (total + 1)) + beta / total * (
        alpha / (total + 1)
    )  # E[1 - λ] under D_λ, term by term
    assert mk.expected_a_lambda(alpha, beta) == pytest.approx(own, rel=1e-12)
    assert mk.expected_a_lambda(alpha) == pytest.approx(alpha / (2 * alpha + 1), rel=1e-12)
    assert mk.expected_a_lambda(alpha) == pytest.approx(
        1 - (alpha + 1) / (2 * alpha + 1), rel=1e-6
    )  # the authors' code


def test_d_lambda_mean_is_one_minus_the_weight():
    lam = sampling.DLambda(0.4, 1.5).sample((200_000,), torch.Generator().manual_seed(3), CPU)
    assert (1 - lam).mean().item() == pytest.approx(
        mk.expected_a_lambda(0.4, 1.5), abs=4 * lam.std().item() / 200_000**0.5
    )


@pytest.mark.parametrize(("alpha", "terms"), [(1.0, 2), (0.5, 3), (0.05, 4), (3.0, 5)])
def test_dirichlet(alpha, terms):
    distribution = sampling.Dirichlet(alpha, terms)
    weights = distribution.sample((DRAWS,), torch.Generator().manual_seed(0), CPU)
    assert weights.shape == (DRAWS, terms)
    torch.testing.assert_close(weights.sum(1), torch.ones(DRAWS))
    for column in (0, terms - 1):
        marginal = stats.beta(alpha, alpha * (terms - 1))
        assert ks_pvalue(weights[:, column], marginal.cdf) > 1e-3
    product = terms * (weights[:, 0] * (1 - weights[:, 0])).double()
    assert distribution.expected_a_lambda == pytest.approx(
        product.mean().item(), abs=4 * product.std().item() / DRAWS**0.5
    )
    if terms == 2:
        assert distribution.expected_a_lambda == pytest.approx(mk.expected_a_lambda(alpha))


def test_seed_decides():
    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        return [law.sample((7,), generator, CPU) for law, _ in LAWS]

    assert all(torch.equal(a, b) for a, b in zip(draws(5), draws(5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draws(5), draws(6), strict=True))


def test_custom_weight_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    sampling.Custom(lambda size, generator, device: torch.rand(size))  # ignores the generator
    assert torch.equal(before, torch.get_rng_state())


def test_custom_gives_its_error():
    law = sampling.Custom(lambda size, generator, device: torch.rand(size, generator=generator))
    assert 0 < law.expected_a_lambda_error < 2.5e-4
    assert abs(law.expected_a_lambda - 1 / 3) < 4 * law.expected_a_lambda_error
    assert sampling.Custom(law.function, 1 / 3).expected_a_lambda_error == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sampling.Beta(0), ValueError, "alpha must be a number > 0, got 0"),
        (lambda: sampling.Beta(1, float("nan")), ValueError, "beta"),
        (lambda: sampling.Beta("1"), TypeError, "alpha"),
        (lambda: sampling.Beta(1, fold="min"), ValueError, "fold must be one of 'none', 'max', got 'min'"),
        (lambda: sampling.Uniform(0.6, 0.4), ValueError, "low must be at most high = 0.4, got 0.6"),
        (lambda: sampling.Uniform(0, 1.5), ValueError, "high"),
        (lambda: sampling.Fixed(1.1), ValueError, "value"),
        (lambda: sampling.WShaped(-1), ValueError, "alpha"),
        (lambda: sampling.Dirichlet(1, 0), ValueError, "num_samples"),
        (lambda: sampling.Custom(3), TypeError, "function must be callable"),
        (
            lambda: sampling.Custom(lambda *_: torch.full(_[0], 2.0)),
            ValueError,
            r"values of function\(size, generator, device\) must be in \[0, 1\]",
        ),
        (lambda: sampling.Custom(lambda *_: torch.zeros(3)), ValueError, "shape"),
        (lambda: sampling.Custom(lambda *_: torch.zeros(_[0]), 0.7), ValueError, "expected_a_lambda"),
        (lambda: mk.Mixup(lam_distribution=0.3), TypeError, "lam_distribution"),
        (lambda: mk.Mixup(lam_distribution=sampling.Dirichlet()), TypeError, "num_samples= is for more"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pickles():
    for law in (
        sampling.Beta(0.3, 2.0),
        sampling.HalfBeta(),
        sampling.DLambda(),
        sampling.WShaped(),
        sampling.Dirichlet(1, 3),
    ):
        copy = pickle.loads(pickle.dumps(law))
        draw, again = (item.sample((4,), torch.Generator().manual_seed(0), CPU) for item in (law, copy))
        assert torch.equal(draw, again) and repr(copy) == repr(law)


def test_caller_s_distribution_object():
    class Halves:
        expected_a_lambda = 0.5

        def sample(self, size, generator, device):
            return torch.full(size, 0.5, device=device)

    x = torch.randn(6, 2)
    mixed, target = mk.MixupE(lam_distribution=Halves(), pairing="flip")(x, torch.arange(6))
    torch.testing.assert_close(mixed[:6], (x + x.flip(0)) / 2)
    assert float(target.reg_weight) == 0.5
