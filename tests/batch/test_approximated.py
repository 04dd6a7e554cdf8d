"""Approximated Mixup, and the moments of θ that it is made with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import mixupe_kernels as mk
from mixupe_kernels import sampling

CPU = torch.device("cpu")
LAWS = [
    sampling.Beta(0.5), sampling.Beta(1.0), sampling.Beta(8.0), sampling.Beta(0.01), sampling.Beta(0.4, 2.5),
    sampling.Beta(30.0, 2.0), sampling.Beta(0.2, fold="max"), sampling.HalfBeta(2.0), sampling.DLambda(0.3, 2.0),
    sampling.WShaped(), sampling.WShaped(3.0), sampling.Uniform(), sampling.Uniform(0.1, 0.3), sampling.Uniform(0.2, 0.9),
    sampling.Uniform(0.5, 0.5), sampling.Fixed(0.3), sampling.Fixed(0.5),
    sampling.Custom(lambda size, generator, device: torch.rand(size, generator=generator) ** 2),
]  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=lambda law: "Custom" if isinstance(law, sampling.Custom) else repr(law))
def test_moments_of_theta_are_those_of_what_is_drawn(law):
    lam = law.sample((400_000,), torch.Generator().manual_seed(0), CPU).double()
    theta = torch.maximum(lam, 1 - lam)
    error = theta.std() / len(theta) ** 0.5
    assert abs(theta.mean() - law.theta_mean) <= 4 * error + 3e-4 * isinstance(law, sampling.Custom) + 1e-7
    square = (theta - theta.mean()) ** 2
    spread = square.std() / len(theta) ** 0.5
    assert abs(square.mean() - law.theta_variance) <= 4 * spread + 3e-4 * isinstance(law, sampling.Custom) + 1e-7


def test_the_papers_moments():
    law = sampling.Beta(0.5)
    assert (round(law.theta_mean, 4), round(law.theta_variance, 4)) == (0.8183, 0.0237)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 200), st.floats(0.05, 200))
def test_theta_mean_of_any_beta(alpha, beta):
    law = stats.beta(alpha, beta)
    # E[θ] = 1/2 and the integral of P(|λ − 1/2| > t).
    tail, _ = integrate.quad(lambda t: law.cdf(0.5 - t) + law.sf(0.5 + t), 0, 0.5, epsabs=1e-10, limit=200)
    assert sampling.Beta(alpha, beta).theta_mean == pytest.approx(0.5 + tail, abs=1e-7)


def test_theta_does_not_show_in_a_law_s_name():
    law = LAWS[-1]
    assert law.theta_mean > 0.5 and "theta" not in repr(law)


def test_it_is_the_mean_of_mixup():
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    y = torch.nn.functional.one_hot(labels).double()
    law = sampling.Beta(0.7)
    shrunk, target = mk.ApproximatedMixup(x.mean(0), y.mean(0), law)(x, labels)
    # Mixing with each row in turn at the mean θ is the mean over partners and θ, for the mix is linear in both.
    rows = torch.arange(5)
    mixed = torch.stack([mk.mix(x, torch.full((5,), j), torch.full((5,), law.theta_mean)) for j in rows])
    torch.testing.assert_close(shrunk, mixed.mean(0), rtol=0, atol=1e-7)
    labelled = torch.stack([mk.mix_labels(labels, torch.full((5,), j), law.theta_mean, 3) for j in rows])
    torch.testing.assert_close(target.float(), labelled.mean(0))
    torch.testing.assert_close(target.sum(1), torch.ones(5, dtype=torch.float64))


def test_ends_and_shapes():
    x, mean, shares = torch.randn(4, 1, 2, 2), torch.randn(1, 2, 2), torch.tensor([0.25, 0.75])
    soft = torch.rand(4, 2)
    same, target = mk.ApproximatedMixup(mean, shares, 1.0)(x, soft)
    assert torch.equal(same, x) and torch.equal(target, soft)
    constant, target = mk.ApproximatedMixup(mean, shares, 0)(x, soft)
    assert torch.equal(constant, mean.expand(4, 1, 2, 2)) and torch.equal(target, shares.expand(4, 2))
    empty, target = mk.ApproximatedMixup(mean, shares, 0.5)(x[:0], soft[:0])
    assert empty.shape == (0, 1, 2, 2) and target.shape == (0, 2)
    half, _ = mk.ApproximatedMixup(mean, shares, 0.5)(x.bfloat16(), soft)
    assert half.dtype == torch.bfloat16


def test_a_criterion_takes_its_target():
    approximated = mk.ApproximatedMixup(torch.zeros(3), torch.full((4,), 0.25), mk.sampling.Beta(1.0))
    x, target = approximated(torch.randn(6, 3), torch.randint(4, (6,)))
    logits = torch.randn(6, 4, requires_grad=True)
    loss = mk.MixupELoss()(logits, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.0], torch.ones(2), 0.5), TypeError, "x_mean must be a torch.Tensor"),
        ((torch.zeros(3), torch.ones(2, dtype=torch.int64), 0.5), TypeError, "y_mean must have dtype"),
        ((torch.zeros(3), torch.ones(2, 1), 0.5), ValueError, r"y_mean must have shape \(C,\)"),
        ((torch.zeros(3), torch.ones(2), 1.5), ValueError, r"theta must be a number in \[0, 1\], got 1.5"),
        ((torch.zeros(3), torch.ones(2), "Beta"), TypeError, "theta must be"),
    ],
)
def test_bad_means_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        mk.ApproximatedMixup(*arguments)


@pytest.mark.parametrize(
    ("x", "labels", "error", "words"),
    [
        (torch.zeros(2, 4), torch.zeros(2).long(), ValueError, r"x must have shape \(2, 3\), got \(2, 4\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), TypeError, "x must have dtype"),
        (torch.zeros(()), torch.zeros(2).long(), ValueError, "x must have shape"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, "labels must have 2 rows"),
        (torch.zeros(2, 3), torch.tensor([0, 2]), ValueError, r"labels must be a class in \[0, 1\], got 2"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "labels must have dtype int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), ValueError, r"labels must have shape \(2, 2\), got \(2, 3\)"),
    ],
)
def test_bad_batches_are_refused(x, labels, error, words):
    with pytest.raises(error, match=words):
        mk.ApproximatedMixup(torch.zeros(3), torch.full((2,), 0.5), 0.5)(x, labels)
