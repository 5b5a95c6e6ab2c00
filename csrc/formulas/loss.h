// The sigmoid cross-entropy of one element and its gradient, for CPU and CUDA.
//
//     loss(x, t) = (1 - t) softplus(x) + p t softplus(-x)          x: logit, t: target, p: pos_weight
//     gradient   = (1 - t) sigmoid(x)  - p t sigmoid(-x)           d loss / d x
//
// with softplus(x) = max(x, 0) + log1p(e), sigmoid(|x|) = 1 / (1 + e), sigmoid(-|x|) = e / (1 + e), e = exp(-|x|). The
// exponent is never positive, so nothing overflows. Neither tail is the difference of two nearly equal numbers:
// `sigmoid(x) - t` loses every gradient beyond |x| = 17 in float, these formulas lose none.
//
// Error bounds in ULP (tests/test_formulas.py and tests/cpp/sweep.cpp enforce them), float and double:
//     t in {0, 1}: loss and gradient 2 ULP for every logit. The worst of all 2^32 floats are 1.29 for the loss (1.41
//                  without fused multiply-add) and 1.02 for the gradient. Results below the smallest normal number are
//                  within one subnormal step.
//     in between:  4 ULP of the sum of the two non-negative terms.
//     with p:      as in between, if p t is no subnormal number. Where e is subnormal, its error times p, at most 2 p
//                  subnormal steps, is added.
//     infinite x:  with the matching target loss and gradient are 0.
//     NaN:         in x or t gives NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "exp_log1p.h"

namespace fused_sce {

// sigmoid(-|x|) = e / (1 + e), within 1.03 ULP.
template <class T>
FUSED_SCE_INLINE T smaller_sigmoid(TwoPart<T> e) {
  // q = the quotient of the upper parts, corrected by (e - q - q e) / (1 + e). Here e.upper - q is exact, because q is
  // at least half of e.upper (P. H. Sterbenz, 1974), so the rounding of 1 + e does not matter. The factor 1 / (1 + e)
  // is sigmoid(|x|) = 1 - q.
  const T ratio = quotient(e.upper, T(1) + e.upper);
  const T larger = T(1) - ratio;
  const T residual = residual_of_product(ratio, e.upper, e.upper - ratio);
  return mul_add(mul_add(e.lower, larger, residual), larger, ratio);
}

template <class T>
struct LossAndGradient {
  T loss;
  T gradient;
};

// Loss and gradient of one element from e = exp(-|x|). kPosWeight = false is p = 1, without the multiplications.
//
// Both are computed from the slope: 1 - t for x >= 0, p t for x < 0. It is what the size of the gradient tends to for
// large |x|. For x >= 0
//     loss     = (1 - t) x + (1 - t + p t) log1p(e)
//     gradient = (1 - t) - (1 - t + p t) sigmoid(-|x|)
// and for x < 0 the same with p t and |x|, the gradient negated. For t in {0, 1} one of the two terms is 0. For t in
// between they may cancel, but as sigmoid(-|x|) <= 1/2 the error is small against (1 - t) sigmoid(x) + p t sigmoid(-x).
template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight, TwoPart<T> e) {
  using Bits = typename Constants<T>::Bits;
  using SignedBits = typename Constants<T>::SignedBits;
  const TwoPart<T> log1p_e = log1p_of(e);
  const T negative = T(1) - t;
  const T positive = kPosWeight ? pos_weight * t : t;
  // Tests the sign bit, as the gradient's sign at the end does, so that both treat -0 as negative.
  const T slope = bit_cast<SignedBits>(x) < 0 ? positive : negative;
  // 0 for a slope of 0 even if x is infinite, where the product would be NaN.
  const T linear = slope == T(0) ? T(0) : slope * std::fabs(x);

  T loss;
  if (kPosWeight) {
    loss = mul_add(negative + positive, log1p_e.upper + log1p_e.lower, linear);
  } else {
    // The sum of linear and both parts of log1p with one rounding that matters: larger + smaller, and the error of that
    // addition (T. J. Dekker, 1971). If linear is infinite, `added` is NaN.
    const T larger = linear > log1p_e.upper ? linear : log1p_e.upper;
    const T smaller = linear > log1p_e.upper ? log1p_e.upper : linear;
    const T sum = larger + smaller;
    const T added = sum - larger;
    const T lost = added < T(1) ? smaller - added : T(0);
    loss = sum + (lost + log1p_e.lower);
  }

  const T size = kPosWeight ? mul_add(-(negative + positive), smaller_sigmoid(e), slope) : slope - smaller_sigmoid(e);
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  return {loss, bit_cast<T>(bit_cast<Bits>(size) ^ (bit_cast<Bits>(x) & kSign))};
}

template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight) {
  return sigmoid_cross_entropy<T, kPosWeight>(x, t, pos_weight, exp_of(reduce_argument(x)));
}

}  // namespace fused_sce
