"""Schedules: warm-up, off_epoch, ramps of alpha and η, and runs that resume where they stopped."""

import io

import pytest
import torch

import mixupe_kernels as mk


def test_linear_ramp():
    ramp = mk.LinearRamp(1.0, 3.0, 2, last_epoch=6)
    assert [ramp(epoch) for epoch in (0, 2, 3, 4.5, 6, 9)] == [1.0, 1.0, 1.5, 2.25, 3.0, 3.0]
    assert mk.LinearRamp(0, 1, last_epoch=4)(1) == 0.25


def test_warm_up_and_off_epoch():
    fn = mk.MixupE(warmup_epochs=2, off_epoch=4)
    x, labels = torch.randn(4, 2), torch.arange(4)
    rows = []
    for epoch in range(6):
        fn.set_epoch(epoch)
        rows.append(len(fn(x, labels)[0]))
    assert rows == [4, 4, 8, 8, 4, 4]
    fn.set_epoch(3)
    fn.enabled = False
    assert not fn.active and fn(x, labels)[0] is x
    assert len(mk.MixupE(warmup_epochs=1)(x, labels)[0]) == 4  # before any set_epoch it is epoch 0


def test_ramp_of_alpha_moves_the_law_and_the_weight():
    fn = mk.MixupE(mk.LinearRamp(0.5, 2.0, last_epoch=3))
    x, labels = torch.randn(4, 2), torch.arange(4)
    for epoch, alpha in ((0, 0.5), (1, 1.0), (3, 2.0), (7, 2.0)):
        fn.set_epoch(epoch)
        assert fn.lam_distribution.alpha == fn.lam_distribution.beta == alpha
        assert float(fn(x, labels)[1].reg_weight) == pytest.approx(mk.expected_a_lambda(alpha))
    skewed = mk.Mixup(mk.LinearRamp(0.5, 2.0, last_epoch=3), beta=3.0)
    assert (skewed.lam_distribution.alpha, skewed.lam_distribution.beta) == (0.5, 3.0)
    many = mk.Mixup(mk.LinearRamp(0.5, 2.0, last_epoch=3), num_samples=3, num_classes=4)
    many.set_epoch(1)
    assert many.lam_distribution.alpha == 1.0


@pytest.mark.parametrize("ramp", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"num_samples": 3, "num_classes": 4, "prob": 0.5}])
def test_a_ramp_of_alpha_may_begin_or_end_at_0(ramp, options):
    fn = mk.MixupE(mk.LinearRamp(*ramp, last_epoch=2), **options)
    x, labels = torch.randn(4, 2), torch.arange(4)
    for epoch in range(4):
        fn.set_epoch(epoch)
        rows, target = fn(x, labels)
        if fn.alpha(epoch) == 0:
            assert torch.equal(rows[:4], x) and bool((target.lam == 1).all()) and float(target.reg_weight) == 0
            torch.testing.assert_close(target.dense(4)[:4], torch.eye(4))
        else:
            assert float(target.reg_weight) > 0


def test_alpha_of_0_is_no_mixing():
    x, labels = torch.randn(4, 2), torch.arange(4)
    rows, target = mk.Mixup(0)(x, labels)
    assert torch.equal(rows, x) and bool((target.lam == 1).all())


def test_ramp_of_eta_is_a_factor_of_the_regularizer():
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    losses = {}
    for epoch in (0, 1, 4):
        fn = mk.MixupE(eta_ramp=mk.LinearRamp(0, 1, last_epoch=4), generator=torch.Generator().manual_seed(0))
        fn.set_epoch(epoch)
        rows, target = fn(x, labels)
        losses[epoch] = mk.mixupe_loss(rows, target, eta=0.4, rescale=False)
        plain_target = target._replace(reg_weight=mk.expected_a_lambda(1.0))
        torch.testing.assert_close(
            losses[epoch], mk.mixupe_loss(rows, plain_target, eta=0.4 * epoch / 4, rescale=False)
        )
    assert losses[0] < losses[1] < losses[4]
    # A batch drawn before keeps its weight when the epoch turns.
    fn = mk.MixupE(eta_ramp=mk.LinearRamp(0, 1, last_epoch=4))
    _, before = fn(x, labels)
    fn.set_epoch(4)
    assert float(before.reg_weight) == 0


@pytest.mark.parametrize("options", [{}, {"clean_fraction": 1 / 4}, {"interval": 3}, {"per_sample": True, "prob": 0.5}])
def test_a_resumed_run_draws_the_same_batches(options):
    x, labels = torch.randn(16, 2), torch.arange(16)

    def make(seed):
        ramp = mk.LinearRamp(0.2, 1.0, last_epoch=2)
        return mk.MixupE(ramp, warmup_epochs=1, generator=torch.Generator().manual_seed(seed), **options)

    def run(fn, epochs):
        batches = []
        for epoch in epochs:
            fn.set_epoch(epoch)
            batches += [fn(x, labels) for _ in range(4)]
        return batches

    whole = run(make(0), range(4))
    first = make(0)
    run(first, range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(99)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.epoch == 1 and second.steps == first.steps
    for (rows, target), (expected, expected_target) in zip(run(second, range(2, 4)), whole[8:], strict=True):
        assert torch.equal(rows, expected) and torch.equal(target.lam, expected_target.lam)
        assert target.num_reg == expected_target.num_reg and float(target.reg_weight) == float(
            expected_target.reg_weight
        )


def test_state_without_a_generator_and_enabled():
    fn = mk.MixupE()
    fn.enabled = False
    fn.set_epoch(2.5)
    other = mk.MixupE()
    other.load_state_dict(fn.state_dict())
    assert (other.enabled, other.epoch) == (False, 2.5) and fn.state_dict()["generator"] is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mk.LinearRamp(0, 1, 3, last_epoch=3), ValueError, "last_epoch must be a number > first_epoch = 3"),
        (lambda: mk.LinearRamp(float("inf"), 1, last_epoch=3), ValueError, "start must be a finite number"),
        (lambda: mk.LinearRamp(0, "1", last_epoch=3), TypeError, "stop must be a finite number"),
        (lambda: mk.MixupE(warmup_epochs=-1), ValueError, "warmup_epochs must be a number >= 0"),
        (lambda: mk.MixupE(off_epoch="never"), TypeError, "off_epoch"),
        (lambda: mk.MixupE().set_epoch(-1), ValueError, "epoch must be a number >= 0"),
        (lambda: mk.MixupE(eta_ramp=0.5), TypeError, "eta_ramp must be a function of the epoch"),
        (lambda: mk.MixupE(eta_ramp=lambda epoch: -1.0), ValueError, r"eta_ramp\(epoch\) must be a number >= 0"),
        (lambda: mk.MixupE(mk.LinearRamp(1, -1, last_epoch=1)), ValueError, "alpha must be a number >= 0, got -1"),
        (
            lambda: mk.MixupE(mk.LinearRamp(1, 2, last_epoch=1), lam_distribution=mk.sampling.Uniform()),
            ValueError,
            "alpha must be a number where lam_distribution is given",
        ),
        (
            lambda: mk.MixupE().load_state_dict({"epoch": 0}),
            ValueError,
            r"\['enabled', 'generator', 'steps'\] are missing",
        ),
        (
            lambda: mk.MixupE().load_state_dict(mk.MixupE(generator=torch.Generator()).state_dict()),
            ValueError,
            "generator must be given where the saved one had one",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
