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
//     t in {0, 1}: loss and gradient 2 ULP for every logit. The worst of all 2^32 floats are 1.29 for the loss (1.41
//                  without fused multiply-add) and 1.02 for the gradient. Results below the smallest normal number are
//                  within one subnormal step.
//     in between:  4 ULP of the sum of the two non-negative terms.
//     with p:      as in between, if p t is no subnormal number. Where e is subnormal, its error times p, at most 2 p
//                  subnormal steps, is added.
//     infinite x:  with the matching target loss and gradient are 0.
//     infinite t:  loss and gradient tend to those of softplus(x) - t x, infinite or, for x = 0, a loss of NaN.
//     NaN:         in x or t gives NaN, unless p = 0 and t = 1.
#pragma once

#include <cmath>
#include <cstdint>

#include "exp_log1p.h"

namespace fused_sce {

// sigmoid(-|x|) = e / (1 + e), within 1.03 ULP.
template <class T>
FUSED_SCE_INLINE T corrected_sigmoid(TwoPart<T> e, T ratio) {
  // q = the quotient of the upper parts, corrected by (e - q - q e) / (1 + e). Here e.upper - q is exact, because q is
  // at least half of e.upper (P. H. Sterbenz, 1974), so the rounding of 1 + e does not matter. The factor 1 / (1 + e)
  // is sigmoid(|x|) = 1 - q.
  const T larger = T(1) - ratio;
  const T residual = residual_of_product(ratio, e.upper, e.upper - ratio);
  return mul_add(mul_add(e.lower, larger, residual), larger, ratio);
}

template <class T>
FUSED_SCE_INLINE T smaller_sigmoid(TwoPart<T> e) {
  return corrected_sigmoid(e, quotient(e.upper, T(1) + e.upper));
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

// linear + log1p(e), linear >= 0, with one rounding that matters: that of the sum of the two larger parts, whose error
// follows from it (T. J. Dekker, 1971). The error is NaN if linear is infinite.
template <class T>
FUSED_SCE_INLINE T sum_of(T linear, TwoPart<T> log1p_e) {
  const bool is_linear_larger = linear > log1p_e.upper;
  const T first = is_linear_larger ? linear : log1p_e.upper;
  const T second = is_linear_larger ? log1p_e.upper : linear;
  const T sum = first + second;
  const T lost = second - (sum - first);
  return sum + ((lost == lost ? lost : T(0)) + log1p_e.lower);
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

// With p, from log1p(e) and sigmoid(-|x|). kSelect = false is ordinary multiplication, faster and the same bits unless
// the result is NaN.
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
  const TwoPart<T> log1p_e = log1p_of(e);
  const T smaller = smaller_sigmoid(e);
  if (kPosWeight) {
    return weighted_loss_and_gradient<T, kSelect>(x, t, pos_weight, log1p_e.upper + log1p_e.lower, smaller);
  }

  const T slope = is_negative(x) ? t : T(1) - t;
  return {sum_of(product(slope, std::fabs(x)), log1p_e), with_sign_of(x, slope - smaller)};
}

template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight) {
  return sigmoid_cross_entropy<T, kPosWeight>(x, t, pos_weight, exp_of(reduce_argument(x)));
}

}  // namespace fused_sce
