"""csrc/row.h, called through the bindings, against float64 formulas: any split of a row, any logit. bfloat16 rows in halves
against the same in order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

row = pytest.importorskip(
    "mixupe_kernels._build",
    reason="editable installs alone have the bindings, if there are a C++ compiler and pybind11",
)

EPS = float(np.finfo(np.float32).eps)
logits = st.floats(-1e4, 1e4, width=32)
rows = st.lists(st.one_of(logits, st.just(-math.inf)), min_size=1, max_size=40).filter(lambda z: max(z) > -math.inf)


def truth(z):
    """(max, Σ e^{z-m}, Σ e^{z-m}(z-m)) in float64."""
    z = np.array(z, dtype=np.float64)
    d = z - z.max()
    e = np.exp(d)
    return z.max(), e.sum(), np.where(e == 0, 0, e * np.where(e == 0, 0, d)).sum()


def test_exp_keeps_its_stated_error():
    x = np.concatenate([np.linspace(-87, 0, 200_001), -np.logspace(-30, 0, 1001)]).astype(np.float32)
    computed = np.array([row.float32.exp(float(v)) for v in x], dtype=np.float64)
    assert np.abs(computed / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7


def test_exp_at_the_edges():
    for module in (row.float32, row.float64):
        assert module.exp(0.0) == 1.0
        assert module.exp(-math.inf) == 0.0
        assert math.isnan(module.exp(math.nan))
    assert row.float32.exp(-87.5) == 0.0  # under the floor: 0, not a subnormal


def test_log1p_keeps_its_stated_error():
    x = np.concatenate([np.linspace(0, 1, 20_001), np.logspace(-37, 0, 2001)]).astype(np.float32)
    computed = np.array([row.float32.log1p_unit(float(v)) for v in x], dtype=np.float64)
    expected = np.log1p(x.astype(np.float64))
    assert (np.abs(computed - expected) <= 4e-7 * expected).all()


def test_log_keeps_its_stated_error():
    x = np.concatenate([np.linspace(1, 20, 20_001), 1 + np.logspace(-7, 0, 2001), np.logspace(0, 38, 2001)])
    x = x.astype(np.float32)
    computed = np.array([row.float32.log(float(v)) for v in x], dtype=np.float64)
    expected = np.log(x.astype(np.float64))
    assert (np.abs(computed - expected) <= 4e-7 * expected).all()


@given(rows)
@settings(max_examples=300, deadline=None)
def test_stats_are_the_sums(z):
    top, total, weighted = truth(z)
    for module, eps in ((row.float32, EPS), (row.float64, 2**-50)):
        actual = module.stats(z)
        assert actual[0] == top
        assert abs(actual[1] - total) <= 8 * eps * len(z) * total
        # d itself is rounded to float32, which moves e·d by eps·d²: at most 1 ulp of 4/e² a term.
        assert abs(actual[2] - weighted) <= 8 * eps * len(z) * (1 + abs(weighted))


@given(rows, st.data())
@settings(max_examples=300, deadline=None)
def test_any_split_merges_to_the_whole(z, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(z)), max_size=5)))
    pieces = [z[a:b] for a, b in zip([0, *cuts], [*cuts, len(z)], strict=True)]
    order = data.draw(st.permutations(range(len(pieces))))
    merged = row.float64.stats(pieces[order[0]])
    for index in order[1:]:
        merged = row.float64.merge(merged, row.float64.stats(pieces[index]))
    top, total, weighted = truth(z)
    assert merged[0] == top
    assert merged[1] == pytest.approx(total, rel=1e-12)
    assert merged[2] == pytest.approx(weighted, rel=1e-12, abs=1e-12)


@given(rows)
@settings(max_examples=200, deadline=None)
def test_entropy_and_lse(z):
    _, total, weighted = truth(z)
    stats = row.float32.stats(z)
    assert row.float32.log_sum(stats) == pytest.approx(math.log(total), abs=2e-6 * (1 + len(z) * EPS / 1e-6))
    assert row.float32.entropy(stats) == pytest.approx(math.log(total) - weighted / total, abs=2e-5)


def test_masked_rows():
    masked = [-math.inf] * 3
    for module in (row.float32, row.float64):
        stats = module.stats(masked)
        assert stats == (-math.inf, 0.0, 0.0)
        assert module.merge(stats, module.stats([1.0, 2.0])) == module.stats([1.0, 2.0])
        assert math.isnan(module.entropy(stats))
        assert math.isnan(module.entropy(module.stats([1.0, math.nan])))
        assert math.isnan(module.entropy(module.stats([1.0, math.inf])))


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.tuples(*[st.floats(-3, 3)] * 3), st.floats(0, 2))
@settings(max_examples=200, deadline=None)
def test_softmax_gradient_is_the_formula(z, g, mass):
    z = np.array(z)
    lse = float(np.logaddexp.reduce(z))
    log_p = z - lse
    p = np.exp(log_p)
    entropy = float(-(p * log_p).sum())
    g_ce, g_h, g_lse = g
    expected = p * (g_ce * mass + g_lse - g_h * (log_p + entropy))
    actual = [row.float64.softmax_gradient(v, lse, mass, entropy, g) for v in z]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@given(st.floats(-700, 700), st.floats(0, 1), st.tuples(*[st.floats(-3, 3)] * 3))
@settings(max_examples=300, deadline=None)
def test_sigmoid_terms_are_the_formulas(z, y, g):
    sigma = 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))
    other = 1 / (1 + math.exp(z)) if z < 0 else math.exp(-z) / (1 + math.exp(-z))
    softplus, entropy = row.float64.sigmoid_terms(z)
    assert softplus == pytest.approx(float(np.logaddexp(0, z)), rel=1e-12, abs=1e-300)
    assert entropy == pytest.approx(float(np.logaddexp(0, -abs(z))) + abs(z) * min(sigma, other), rel=1e-9, abs=1e-300)
    g_ce, g_h, g_lse = g
    expected = g_ce * (sigma - y) + g_lse * sigma - g_h * z * sigma * other
    assert row.float64.sigmoid_gradient(z, y, g) == pytest.approx(expected, rel=1e-9, abs=1e-12)


PENALTIES = [
    lambda q, threshold: (abs(q), np.sign(q), True),
    lambda q, threshold: (-q, -1, True) if q < threshold else (0, 0, True),
    lambda q, threshold: (-q, -1, False),
]


@given(st.sampled_from(range(3)), st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 10))
@settings(max_examples=300, deadline=None)
def test_penalties_are_their_formulas_and_their_slopes_keep_as_signs(number, q, threshold, entropy):
    for at in (q, 0.0, threshold):
        value, slope, moves_entropy = row.float64.penalty(number, at, threshold)
        assert (value, slope, moves_entropy) == PENALTIES[number](at, threshold)
        kept = row.float64.split_sign(row.float64.sign_entropy(entropy, slope))
        assert kept == ((entropy, slope) if slope else (0, 0))


def test_penalties_hand_on_nan():
    assert row.penalty_count == len(PENALTIES)
    for number in range(row.penalty_count):
        value, slope, _ = row.float64.penalty(number, math.nan, 1.0)
        assert math.isnan(value) and math.isnan(slope)
    assert math.isnan(row.float64.penalty(row.penalty_count, 1.0, 1.0)[0])


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1))
def test_mix_is_the_formula(own, other, lam):
    assert row.float64.mix(own, other, lam) == pytest.approx(lam * own + (1 - lam) * other, rel=1e-12, abs=1e-9)


def test_triton_takes_lse_as_exact_up_to_where_this_does():
    pytest.importorskip("triton")
    from mixupe_kernels.ops.triton import backward

    assert row.lse_is_exact_to == (backward.LSE_IS_EXACT_TO.value, backward.LSE_IS_EXACT_TO_16_BITS.value)


def bfloat16_bits(values):
    """Upper halves of float32: the values rounded down to bfloat16."""
    return (np.asarray(values, dtype=np.float32).view(np.uint32) >> 16).tolist()


def bfloat16_values(bits):
    return (np.asarray(bits, dtype=np.uint32) << 16).view(np.float32)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=300, deadline=None)
def test_halves_of_bfloat16_rows_are_their_order(n, seed, data):
    bits = bfloat16_bits(np.random.default_rng(seed).normal(0, 4, n))
    columns = data.draw(st.lists(st.integers(0, n - 1), max_size=2))
    # The rounding instruction takes subnormal numbers for 0: none here.
    factor = data.draw(st.floats(2**-10, 2**10, width=32))
    arguments = (bits, columns, data.draw(st.floats(-8, 8, width=32, allow_subnormal=False)), factor)
    in_order, in_halves = row.bfloat16.row_in_order(*arguments), row.bfloat16.row_in_halves(*arguments)
    assert in_halves[0] == in_order[0] == bfloat16_values(bits).max()
    # Blocks are padded with -inf, halves with more of it.
    assert [v for v in in_halves[1] if v > -math.inf] == [v for v in in_order[1] if v > -math.inf]
    assert in_halves[2] == in_order[2]


@given(st.integers(row.bfloat16.shortest_in_halves, 400), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=300, deadline=None)
def test_gradients_in_halves_are_those_in_order(n, seed, data):
    z = bfloat16_values(bfloat16_bits(np.random.default_rng(seed).normal(0, 4, n)))
    columns = (data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1)))
    small = st.floats(-2, 2, width=32)
    numbers = [data.draw(st.floats(0, 1, width=32)) for _ in range(2)]
    numbers += [float(np.logaddexp.reduce(z))] + [data.draw(small) for _ in range(3)]
    in_order, in_halves = (
        bfloat16_values(row.bfloat16.gradient(halves, bfloat16_bits(z), columns, numbers)) for halves in (False, True)
    )
    # Half an ulp of bfloat16 each, since products and sums may be rounded once or twice in float32.
    np.testing.assert_allclose(in_halves, in_order, rtol=2**-7, atol=1e-6)
