// The sigmoid cross-entropy of one element and its gradient: the formula, once, for CPU and CUDA.
//
//     loss(x, t) = (1 - t) softplus(x) + p t softplus(-x)          x: logit, t: target, p: pos_weight
//     gradient   = (1 - t) sigmoid(x)  - p t sigmoid(-x)           d loss / d x
//
// with softplus(x) = max(x, 0) + log1p(e), sigmoid(|x|) = 1 / (1 + e), sigmoid(-|x|) = e / (1 + e), e = exp(-|x|). All
// of them come from the one exponential of a number that is never positive, so nothing overflows, and neither tail is
// the difference of two nearly equal numbers: `sigmoid(x) - t` loses every gradient beyond |x| = 17 in float, this
// loses none.
//
// Error bounds (ULP of the result; tests/test_numerics.py and tests/cpp/sweep.cpp enforce them):
//     float:  t in {0, 1}: loss and gradient 2 ULP for every logit (the worst of all 2^32 are 1.29 and 1.02, and 1.41
//             for the loss without fused multiply-add); results below the smallest normal float within one subnormal
//             step. t in between: 4 ULP of the sum of the two non-negative terms.
//     double: the same bounds.
//     inf:    with the matching target loss and gradient are 0. NaN in x or t gives NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "exp_log1p.h"
#include "special_functions.h"

namespace fused_sce {

// sigmoid(-|x|) = e / (1 + e).
template <class T>
FUSED_SCE_INLINE T smaller_sigmoid(TwoPart<T> e) {
  // The quotient of the upper parts, then one step of correction by what it leaves of e = q + q e, over 1 + e: that is
  // times sigmoid(|x|), which is 1 less the quotient. e.upper - q is exact, because q is at least half of e.upper (P.
  // H. Sterbenz, 1974), so that the rounding of 1 + e does not matter.
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

// The loss of one element and its derivative by the logit, from e = exp(-|x|). kPosWeight = false is p = 1,
// without its multiplications.
//
// Both are made of the slope, the gradient's limit where x is large and wrong, which is 1 - t or p t: for x >= 0
//     loss     = (1 - t) x + (1 - t + p t) log1p(e)
//     gradient = (1 - t) - (1 - t + p t) sigmoid(-|x|)
// and for x <= 0 the same with p t and |x|, the gradient negated. For a target of 0 or 1 one of both terms is 0; in
// between they cancel only where that is no more than an ULP of (1 - t) sigmoid(x) + p t sigmoid(-x), because
// sigmoid(-|x|) is at most a half.
template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight, TwoPart<T> e) {
  using Bits = typename Constants<T>::Bits;
  using SignedBits = typename Constants<T>::SignedBits;
  const TwoPart<T> log1p_e = log1p_of(e);
  const T negative = T(1) - t;
  const T positive = kPosWeight ? pos_weight * t : t;
  // By the sign bit, as at the end: for a zero of either sign both must go the same way.
  const T slope = bit_cast<SignedBits>(x) < 0 ? positive : negative;
  // 0 for a slope of 0 even if x is infinite: a sure and right logit costs nothing.
  const T linear = slope == T(0) ? T(0) : slope * std::fabs(x);

  T loss;
  if (kPosWeight) {
    loss = mul_add(negative + positive, log1p_e.upper + log1p_e.lower, linear);
  } else {
    // Both sums at once with one rounding that counts: the larger part plus the smaller, and what that addition lost.
    // What it added is at most log1p(1), or not a number if linear is infinite.
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
