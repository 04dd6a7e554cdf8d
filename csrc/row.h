// The arithmetic of one row of logits and of one mixed element, once for every backend: host and device, float and
// double. Loops, layouts and dtypes belong to the backends; this file needs nothing but <cmath>.
//
// z logits, p = softmax(z), y targets, CE = -Σ y log p, H = -Σ p log p, lse = log Σ e^z, q̂ = H - CE (+ (Σy - 1)·lse).
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define MIXUPE_FN __host__ __device__ __forceinline__
#else
#define MIXUPE_FN inline __attribute__((always_inline))
#endif

namespace mixupe {

// exp

// Below this, e^x is 0 to the operators: it is under the smallest normal float (e^-87.34), so that a logit of -∞ adds
// 0 to every sum and the product of e^x with a clamped x is never 0·∞.
template <typename T>
MIXUPE_FN T exp_floor() {
  return sizeof(T) == 8 ? T(-708) : T(-87);
}

// d clamped to where e^d is 0, so that its product with that is 0, too; NaN passes through. Not clamped to exp_floor itself:
// where both compared with one number, GCC 12 made the additions of sums conditional (1.05 of the time of a row of 1000).
template <typename T>
MIXUPE_FN T clamp_exponent(T d) {
#ifdef __CUDA_ARCH__
  return fmax(d, 2 * exp_floor<T>());  // one instruction; a NaN is found by what it is multiplied with
#else
  return d < 2 * exp_floor<T>() ? 2 * exp_floor<T>() : d;
#endif
}

// e^x for x up to about 88, written so that compilers vectorize it: 2^n · e^r with r = x - n·log 2 in ±log(2)/2, and
// e^r by a polynomial of degree 6 fitted for least relative error (3.1e-9; with rounding 1.2e-7, which
// tests/test_row.py holds it to).
MIXUPE_FN float exp_fast(float x) {
#ifdef __CUDA_ARCH__
  float e_x;  // what would be subnormal is 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e_x) : "f"(x * 1.44269504f));
  return e_x;
#else
  const float shifter = 12582912.f;  // 1.5·2^23: adding it rounds to an integer, held in the low bits
  const float shifted = x * 1.44269504f + shifter;
  const float n = shifted - shifter;
  const float r = (x - n * 0.693145752f) - n * 1.4286068e-6f;  // log 2 in two parts: the first times n is exact
  float tail = 0.0013814535923302174f;
  tail = tail * r + 0.00836874544620514f;
  tail = tail * r + 0.04166839271783829f;
  tail = tail * r + 0.1666652113199234f;
  tail = tail * r + 0.4999999403953552f;
  const float e_r = (tail * r + 1.f) * r + 1.f;
  // Times 2^n by adding n to the exponent: the shifter's own bits are shifted out. This may make a number of a NaN that has
  // low bits; the callers multiply by x, too.
  unsigned exponent, bits;
  __builtin_memcpy(&exponent, &shifted, sizeof exponent);
  __builtin_memcpy(&bits, &e_r, sizeof bits);
  bits += exponent << 23;
  float e_x;
  __builtin_memcpy(&e_x, &bits, sizeof e_x);
  return x < exp_floor<float>() ? 0.f : e_x;
#endif
}

MIXUPE_FN double exp_fast(double x) { return x < exp_floor<double>() ? 0. : std::exp(x); }

// log(1 + e) for e in [0, 1]: 2·atanh(t), t = e / (2 + e) ≤ 1/3, by its series; the first term left out is under 2e-9.
MIXUPE_FN float log1p_unit(float e) {
  const float t = e / (2.f + e), u = t * t;
  float series = 1.f / 15;
  series = series * u + 1.f / 13;
  series = series * u + 1.f / 11;
  series = series * u + 1.f / 9;
  series = series * u + 1.f / 7;
  series = series * u + 1.f / 5;
  series = series * u + 1.f / 3;
  return 2.f * (t + t * u * series);
}

MIXUPE_FN double log1p_unit(double e) { return std::log1p(e); }

// log x for x >= 1: of a power of two, exact, and of what is left, in [1, 2).
MIXUPE_FN float log_fast(float x) {
#ifdef __CUDA_ARCH__
  return std::log(x);
#else
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  bits = (bits & 0x7fffffu) | 0x3f800000u;
  float mantissa;
  __builtin_memcpy(&mantissa, &bits, sizeof mantissa);
  return static_cast<float>(exponent) * 0.69314718f + log1p_unit(mantissa - 1.f);
#endif
}

MIXUPE_FN double log_fast(double x) { return std::log(x); }

// Softmax rows

// max m, Σ e^{z-m}, Σ e^{z-m}(z-m): all that CE, H and lse need, mergeable over any split of the row.
template <typename T>
struct Stats {
  T max, sum, weighted;
};

template <typename T>
MIXUPE_FN Stats<T> empty_stats() {
  return {T(-INFINITY), T(0), T(0)};
}

// Adds one logit to the sums of a row whose maximum is known; returns its e^{z-m}.
template <typename T>
MIXUPE_FN T add_logit(T z, T max, T& sum, T& weighted) {
  const T d = z - max;
  const T e = exp_fast(d);
  sum += e;
  weighted += e * clamp_exponent(d);
  return e;
}

// What to subtract from logits whose maximum is `max`: -∞ (every class so far masked) would make -∞ - -∞.
template <typename T>
MIXUPE_FN T finite_shift(T max) {
  return max == T(-INFINITY) ? T(0) : max;
}

template <typename T>
MIXUPE_FN Stats<T> merge(Stats<T> a, Stats<T> b) {
  const T max = a.max > b.max ? a.max : b.max;
  const T da = clamp_exponent(a.max - finite_shift(max)), db = clamp_exponent(b.max - finite_shift(max));
  const T ea = exp_fast(a.max - finite_shift(max)), eb = exp_fast(b.max - finite_shift(max));
  return {max, a.sum * ea + b.sum * eb, ea * (a.weighted + da * a.sum) + eb * (b.weighted + db * b.sum)};
}

// log Σ e^{z-m}: lse without the shift. A row of nothing but -∞ and one with a NaN have no softmax: NaN, as torch.softmax
// gives. Of the two sums, the weighted one tells a NaN. Any other sum has the maximum's 1 in it.
template <typename T>
MIXUPE_FN T log_sum(Stats<T> s) {
  return s.sum == T(0) || s.weighted != s.weighted ? T(NAN) : log_fast(s.sum);
}

template <typename T>
MIXUPE_FN T entropy(Stats<T> s, T log_sum) {
  return log_sum - s.weighted / s.sum;
}

// w·v where a weight of 0 hides even an infinite v.
template <typename T>
MIXUPE_FN T weigh(T w, T v) {
  return w == T(0) ? T(0) : w * v;
}

// The row's gradient: dz_k = p_k [g_ce·Σy + g_lse - g_H (log p_k + H)] - g_ce·y_k = p_k (level - slope·log p_k) - g_ce·y_k.
template <typename T>
struct RowGradient {
  T ce, entropy, lse;
};

template <typename T>
MIXUPE_FN T gradient_level(RowGradient<T> g, T target_mass, T entropy) {
  return g.ce * target_mass + g.lse - g.entropy * entropy;
}

// Its part without labels, of p (or a multiple of p, with level and slope divided by the same).
template <typename T>
MIXUPE_FN T probability_gradient(T p, T log_p, T level, T slope) {
  return p * (level - slope * clamp_exponent(log_p));
}

// A row's softmax gradient: dz = p (level - slope·log p) - ce·y with p = e^{z - shift} and log p = z - shift. `shift` is lse, or
// the maximum with the rest of lse put into level and slope.
template <typename T>
struct SoftmaxGradient {
  T shift, level, slope, ce;
};

// lse up to here, rounded, is exact enough for a gradient of logits of this type: p is off by half an ulp of lse. Up to 8 that is
// 2^-22 of p, which keeps within 4 times PyTorch's error and 4 ulps; up to 16, 2^-21 did not. Of 16-bit logits it may be 2^-20,
// half of what random calls are held to, and no more, although their gradient is rounded to 2^-9 or 2^-12 of itself: it is p - y,
// and small beside p where the two are close. float64 is as float32, in its own ulps. The same numbers are LSE_IS_EXACT_TO and
// LSE_IS_EXACT_TO_16_BITS of ops/triton/backward.py.
template <typename L>
constexpr double lse_is_exact_to = sizeof(L) == 2 ? 32 : 8;

// Whether a row's sums have to be made again for its gradient. NaN is no reason to.
template <typename L, typename T>
MIXUPE_FN bool lse_lost_digits(T lse) {
  return std::fabs(lse) > T(lse_is_exact_to<L>);
}

// The gradient from a row's sums, which no shift of all logits rounds: p = e^{z-m} / sum, log p = (z - m) - log sum.
template <typename T, typename Sum>
MIXUPE_FN SoftmaxGradient<T> gradient_of_sums(Stats<Sum> s, Sum log_total, T level, RowGradient<T> g) {
  const Sum slope = g.entropy / s.sum;
  return {T(finite_shift(s.max)), T(level / s.sum + slope * log_total), T(slope), g.ce};
}

template <typename T>
MIXUPE_FN T softmax_gradient(T z, T lse, T level, T slope) {
  return probability_gradient(exp_fast(z - lse), z - lse, level, slope);
}

// Sigmoid elements: with e = e^{-|z|}, softplus = max(z, 0) + log1p(e), H = log1p(e) + |z|·e/(1 + e), σ(1-σ) = e/(1 + e)².

template <typename T>
MIXUPE_FN void add_sigmoid_logit(T z, T& softplus, T& entropy) {
  const T magnitude = z < T(0) ? -z : z;
  const T e = exp_fast(-magnitude), log_term = log1p_unit(e);
  softplus += (z < T(0) ? T(0) : z) + log_term;
  entropy += log_term - clamp_exponent(-magnitude) * e / (T(1) + e);
}

template <typename T>
MIXUPE_FN T sigmoid_gradient(T z, T y, RowGradient<T> g) {
  const T magnitude = z < T(0) ? -z : z;
  const T e = exp_fast(-magnitude), inverse = T(1) / (T(1) + e);
  const T sigma = z < T(0) ? e * inverse : inverse;
  const T bounded = z < T(0) ? clamp_exponent(z) : -clamp_exponent(-z);
  return g.ce * (sigma - y) + g.lse * sigma - g.entropy * bounded * e * inverse * inverse;
}

// Targets as two columns of weight λ and 1 - λ, plus label smoothing spread over every class.

template <typename T>
struct Labels {
  long long own, partner;
  T own_weight, partner_weight;
  T uniform;  // weight of every class (times its class weight)
  T kept;     // share of the row's labels that is not ignored
};

template <typename T>
MIXUPE_FN Labels<T> labels(long long own, long long partner, T lam, long long ignore_index, T label_smoothing,
                           long long classes) {
  const bool keep_own = own != ignore_index, keep_partner = partner != ignore_index;
  const T kept = keep_own && keep_partner ? T(1) : (keep_own ? lam : T(0)) + (keep_partner ? T(1) - lam : T(0));
  return {keep_own ? own : 0,
          keep_partner ? partner : 0,
          keep_own ? lam * (T(1) - label_smoothing) : T(0),
          keep_partner ? (T(1) - lam) * (T(1) - label_smoothing) : T(0),
          kept * label_smoothing / T(classes),
          kept};
}

// The loss: L = η̂ (L_mix + γ L_clean + η R), R = w · mean penalty(q̂)   (MixupE, eq. 7-9; γ as in RegMixup)

// What a penalty makes of q̂, and whether H has a gradient of its own in it (or only CE, as if y - p were a constant).
template <typename T>
struct Penalty {
  T value, slope;
  bool moves_entropy;
};

// The penalties: a row each, numbered as reference.PENALTIES. A slope is -1, 0 or 1, because sign_entropy keeps it as a sign.
constexpr long long penalty_count = 3;

template <typename T>
MIXUPE_FN Penalty<T> penalty_of(int number, T q, T threshold) {
  if (q != q) return {q, q, true};
  switch (number) {
    case 0: return {q < T(0) ? -q : q, T(q > T(0)) - T(q < T(0)), true};             // abs
    case 1: return {q < threshold ? -q : T(0), q < threshold ? T(-1) : T(0), true};  // threshold
    case 2: return {-q, T(-1), false};                                               // linear_detached
    default: return {T(NAN), T(NAN), true};                                          // refused by the operators
  }
}

// All that the backward has to keep of a row beside lse: H times the penalty's slope, and ∞ where that is 0, since H then
// has no part in the gradient. A zero has a sign, too, and rounding may have made H negative.
template <typename T>
MIXUPE_FN T sign_entropy(T entropy, T slope) {
  return slope == T(0) ? T(INFINITY) : slope * std::fabs(entropy);
}

template <typename T>
struct SignedEntropy {
  T entropy, slope;
};

template <typename T>
MIXUPE_FN SignedEntropy<T> split_sign(T signed_entropy) {
  if (std::isinf(signed_entropy)) return {T(0), T(0)};
  return {std::fabs(signed_entropy), std::signbit(signed_entropy) ? T(-1) : T(1)};
}

template <typename T>
MIXUPE_FN T q_hat(T ce, T entropy, T lse, T target_mass) {
  return entropy - ce + weigh(target_mass - T(1), lse);
}

// η̂ = |L₀| / |L₀ + η R| with L₀ = L_mix + γ L_clean, 1 where the denominator is 0.
template <typename T>
MIXUPE_FN T rescale_factor(T cross_entropy, T total) {
  return total == T(0) ? T(1) : std::fabs(cross_entropy) / std::fabs(total);
}

// What a loss is made of: sums of CE and kept shares of the mixed rows and of the clean ones, sum and number of the regularized
// rows' penalties.
struct LossSums {
  double mix, rows_mix, clean, rows_clean, reg, rows_reg;
};

// The weights of a loss: η, w and γ.
struct LossWeights {
  double eta, reg, clean;
};

// A loss's parts, as arguments.Parts: L_mix, L_clean, R, η̂, then ∂L/∂CE of a mixed row and of a clean one, ∂L/∂penalty of a row of R.
enum LossPart { mix_loss, clean_loss, reg_loss, eta_hat, of_mix, of_clean, of_penalty, loss_parts };

// The loss, and its parts. A mean over no rows is 0, and so is what a γ of 0 weighs, even an infinite CE.
template <typename T>
MIXUPE_FN T loss_of_sums(const LossSums& sums, const LossWeights& weights, bool rescale, T* parts) {
  const double per_mix = sums.rows_mix > 0 ? 1 / sums.rows_mix : 0;
  const double per_clean = sums.rows_clean > 0 ? 1 / sums.rows_clean : 0;
  const double per_reg = sums.rows_reg > 0 ? weights.reg / sums.rows_reg : 0;
  const double mix = sums.mix * per_mix, clean = sums.clean * per_clean, reg = sums.reg * per_reg;
  const double cross_entropy = mix + weigh(weights.clean, clean), total = cross_entropy + weights.eta * reg;
  const double factor = rescale ? rescale_factor(cross_entropy, total) : 1;
  parts[mix_loss] = T(mix), parts[clean_loss] = T(clean), parts[reg_loss] = T(reg), parts[eta_hat] = T(factor);
  parts[of_mix] = T(factor * per_mix), parts[of_clean] = T(weigh(weights.clean, factor * per_clean));
  parts[of_penalty] = T(factor * weights.eta * per_reg);
  return T(factor * total);
}

// Gradients of the row's CE, H and lse: `ce` is ∂L/∂CE of a row of its kind, `reg` ∂L/∂penalty of a row of R.
template <typename T>
MIXUPE_FN RowGradient<T> loss_gradient(T ce, T reg, T slope, T target_mass, int penalty) {
  const T g_q = weigh(slope, reg);
  return {ce - g_q, penalty_of(penalty, T(0), T(0)).moves_entropy ? g_q : T(0), g_q * (target_mass - T(1))};
}

// Mixing: λ·own + (1 - λ)·other

template <typename T>
MIXUPE_FN T mix(T own, T other, T lam) {
  return lam * own + (T(1) - lam) * other;
}

}  // namespace mixupe
