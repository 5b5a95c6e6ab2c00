// The sigmoid cross-entropy of one element and its gradient, for CPU and CUDA.
//
//     loss(x, t) = (1 - t) softplus(x) + p t softplus(-x)          x: logit, t: target, p: pos_weight
//     gradient   = (1 - t) sigmoid(x)  - p t sigmoid(-x)           d loss / d x
//
// with softplus(x) = max(x, 0) + log1p(e), sigmoid(|x|) = 1 / (1 + e), sigmoid(-|x|) = e / (1 + e), e = exp(-|x|). The
// exponent is never positive, so nothing overflows. Neither tail is the difference of two nearly equal numbers:
// `sigmoid(x) - t` loses every gradient beyond |x| = 17 in float, these formulas lose none.
//
// A factor of 0 (1 - t, p or t) leaves out what it multiplies, infinities and NaN included.
//
// Error bounds in ULP (tests/test_formulas.py and tests/cpp/sweep.cpp enforce them), float and double:
//     t in {0, 1}: loss and gradient 2 ULP for every logit. The worst of all 2^32 floats are 1.24 for the loss (1.27
//                  without fused multiply-add) and 1.02 for the gradient. Results below the smallest normal number are
//                  within one subnormal step.
//     in between:  4 ULP of the sum of the two non-negative terms.
//     with p:      as in between, if p t is no subnormal number. Where e is subnormal, its error times p, at most 2 p
//                  subnormal steps, is added.
//     infinite x:  with the matching target loss and gradient are 0.
//     infinite t:  without p, loss and gradient tend to those of softplus(x) - t x, infinite or, for x = 0, a loss of
//                  NaN. With p the loss is NaN.
//     NaN:         in x or t gives NaN, unless p = 0 and t = 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "exp_log1p.h"

namespace fused_sce {

// e / (1 + e), and what its correction and log1p(e) have in common.
template <class T>
struct Quotient {
  T ratio;   // that of the upper parts, rounded; with clip in focal.h within a few ULP
  T larger;  // 1 - ratio, near sigmoid(|x|) = 1 / (1 + e)
  T gap;  // e.upper - ratio, exact where ratio is at least half of e.upper (P. H. Sterbenz, 1974), as a rounded one is
  T residual;  // gap - ratio e.upper, which is (1 + e) times the rounding error of ratio
};

template <class T>
FUSED_SCE_INLINE Quotient<T> quotient_of(TwoPart<T> e, T ratio) {
  const T gap = e.upper - ratio;
  return {ratio, T(1) - ratio, gap, residual_of_product(ratio, e.upper, gap)};
}

template <class T>
FUSED_SCE_INLINE Quotient<T> quotient_of(TwoPart<T> e) {
  return quotient_of(e, quotient(e.upper, T(1) + e.upper));
}

// sigmoid(-|x|) = e / (1 + e), within 1.03 ULP: the ratio and its correction (residual + e.lower / (1 + e)) / (1 + e).
// The rounding of 1 + e does not matter.
template <class T>
FUSED_SCE_INLINE T smaller_sigmoid(TwoPart<T> e, const Quotient<T>& parts) {
  return mul_add(mul_add(e.lower, parts.larger, parts.residual), parts.larger, parts.ratio);
}

// log1p(e) + (sum - e.upper) + lost, where `sum` is a rounded sum with e.upper in it and `lost` its rounding error.
//
// Of L = log1p(e) the ratio w = e / (1 + e) is 1 - exp(-L), so e - w = 2 cosh(L) - 2 and e + w = 2 sinh(L), and
//     L = e - (e - w) (1/2 + (e + w) P(e - w)),    P = (sinh(L) - L) / (4 sinh(L) (cosh(L) - 1)).
// P is even in L, so it is a function of cosh(L), analytic but for cosh(L) <= -1. That is e - w <= -4, far from
// [0, 1/2]: five coefficients do what takes nine for the series in e, whose singularity is e = -1.
template <class T>
FUSED_SCE_INLINE T add_log1p(T sum, T lost, TwoPart<T> e, const Quotient<T>& parts) {
  const T p = Constants<T>::log1p_of_gap(parts.gap);
  const T slope = e.upper + parts.ratio;
  // In double 1/2 stays apart from what is rounded: the worst loss is 1.13 ULP instead of 1.33, for two operations
  // more.
  constexpr bool kApart = std::is_same<T, double>::value;
  const T factor = kApart ? T(0.5) + slope * p : mul_add(slope, p, T(0.5));
  // The effect of e.lower, by the derivative 1 / (1 + e), and that of the rounding of the ratio on the gap.
  const T small = mul_add(mul_add(parts.residual, factor, e.lower), parts.larger, lost);
  if (kApart) return sum + mul_add(-parts.gap, T(0.5), mul_add(-parts.gap, slope * p, small));
#if FUSED_SCE_HAS_FMA
  return sum + mul_add(-parts.gap, factor, small);
#else  // half of the gap is exact, and the rounding error of the other product is small
  return sum + ((small - parts.gap * (factor - T(0.5))) - parts.gap * T(0.5));
#endif
}

// log1p(e).
template <class T>
FUSED_SCE_INLINE T log1p_of(TwoPart<T> e, const Quotient<T>& parts) {
  return add_log1p(e.upper, T(0), e, parts);
}

// linear + log1p(e), linear >= 0 for t in [0, 1].
template <class T>
FUSED_SCE_INLINE T sum_of(T linear, TwoPart<T> e, const Quotient<T>& parts) {
  // `lost` is exact unless linear > e.upper (T. J. Dekker, 1971). Then its error is at most half an ULP of the sum. An
  // infinite sum makes NaN of it, which any finite number may replace. parts.larger will do: it is at least 1/2, so for
  // t in [0, 1] above any other `lost`. GCC 12 makes one instruction of this, but not with a constant.
  const T sum = e.upper + linear;
  const T lost = linear - (sum - e.upper);
  return add_log1p(sum, lost < parts.larger ? lost : parts.larger, e, parts);
}

template <class T>
struct LossAndGradient {
  T loss;
  T gradient;
};

// The size of a gradient with the sign of the logit.
template <class T>
FUSED_SCE_INLINE T with_sign_of(T x, T size) {
  using Bits = typename Constants<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  return bit_cast<T>(bit_cast<Bits>(size) ^ (bit_cast<Bits>(x) & kSign));
}

// Tests the sign bit, as with_sign_of() does, so that both treat -0 as negative.
template <class T>
FUSED_SCE_INLINE bool is_negative(T x) {
  return bit_cast<typename Constants<T>::SignedBits>(x) < 0;
}

// Both are computed from the slope u: 1 - t for x >= 0, p t for x < 0. It is what the size of the gradient tends to for
// large |x|. With v for the other one of the two
//     loss     = u (|x| + log1p(e)) + v log1p(e)
//     gradient = u sigmoid(|x|) - v sigmoid(-|x|), negated for x < 0
// and without p, where u + v = 1,
//     loss     = u |x| + log1p(e)
//     gradient = u - sigmoid(-|x|), negated for x < 0.
// For t in {0, 1} one of the two terms is 0. For t in between they may cancel, but as sigmoid(-|x|) <= 1/2 the error is
// small against (1 - t) sigmoid(x) + p t sigmoid(-x).

// With p, from log1p(e) and sigmoid(-|x|). kSelect = false is ordinary multiplication, which is faster. Unless that
// gives NaN, the results are equal, but a 0 may have the other sign, as for a target below 0 with p = 0.
template <class T, bool kSelect = true>
FUSED_SCE_INLINE LossAndGradient<T> weighted_loss_and_gradient(T x, T t, T pos_weight, T log1p_e, T smaller) {
  const T negative = T(1) - t;
  const T positive = kSelect ? product_of_factors(t, pos_weight) : t * pos_weight;
  const T slope = is_negative(x) ? positive : negative;
  const T other = is_negative(x) ? negative : positive;
  const T softplus = std::fabs(x) + log1p_e;
  const T larger = T(1) - smaller;
  const T loss =
      kSelect ? add_product(product(slope, softplus), other, log1p_e) : mul_add(other, log1p_e, slope * softplus);
  const T size =
      kSelect ? add_product(product(slope, larger), other, -smaller) : mul_add(other, -smaller, slope * larger);
  return {loss, with_sign_of(x, size)};
}

// Loss and gradient of one element from e = exp(-|x|). kPosWeight = false is p = 1, without the multiplications;
// kSelect as above.
template <class T, bool kPosWeight, bool kSelect = true>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight, TwoPart<T> e) {
  const Quotient<T> parts = quotient_of(e);
  const T smaller = smaller_sigmoid(e, parts);
  if (kPosWeight) return weighted_loss_and_gradient<T, kSelect>(x, t, pos_weight, log1p_of(e, parts), smaller);
  const T slope = is_negative(x) ? t : T(1) - t;
  return {sum_of(product(slope, std::fabs(x)), e, parts), with_sign_of(x, slope - smaller)};
}

template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight) {
  return sigmoid_cross_entropy<T, kPosWeight>(x, t, pos_weight, exp_of(reduce_argument(x)));
}

}  // namespace fused_sce
