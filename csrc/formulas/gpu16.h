// Loss and gradient for 16-bit logits on a GPU, with a third of the operations of loss.h: with more of them the kernel
// would not keep up with memory.
//
// Error bounds (tests/test_formulas.py enforces them, for a special-function unit with the largest errors it may have):
//     loss:     relative error 2^-20 + |x| 2^-23; below the smallest normal float within one subnormal step. Sums need
//               more than 16 bits of each loss.
//     gradient: rounded to 16 bits within 0.51 ULP.
// They hold for t in {0, 1} and every logit. For t in between loss and gradient are within 2^-20 + |x| 2^-23 times the
// sum of the sizes of their two terms. Without p the loss is NaN if a logit is infinite and its target matches: the
// caller must handle this case.
//
// With p the terms are those of loss.h. Without p, let u = 1 - t for x >= 0 and u = -t for x < 0, which is the slope
// with the sign of the gradient:
//     loss     = u x + log1p(e)
//     gradient = u - copysign(sigmoid(-|x|), x)
#pragma once

#include <cmath>
#include <cstdint>

#include "loss.h"

namespace fused_sce {

template <bool kPosWeight, class Unit = SpecialFunctions>
FUSED_SCE_INLINE LossAndGradient<float> sigmoid_cross_entropy_16bit(float x, float t, float pos_weight) {
  // exp(-|x|) as the square of its root: the root is a normal number even where exp(-|x|) is not.
  const float root = Unit::exp2(std::fabs(x) * -0.72134752f);  // log2(e) / 2
  const float e = root * root;

  // log1p(e) / e on [0, 1], largest relative error 2^-24.8
  float log1p_by_e = mul_add(0.005365422461f, e, -0.03006830066f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.07920882851f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.1375418752f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.1915384829f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.2485721707f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.3332132995f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.4999964833f);
  log1p_by_e = mul_add(log1p_by_e, e, 1.0f);

  const float reciprocal = Unit::reciprocal(1.0f + e);
  if (kPosWeight) return weighted_loss_and_gradient(x, t, pos_weight, e * log1p_by_e, e * reciprocal);
  const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
  // Tests the sign bit, as the gradient does, so that both treat -0 as negative.
  const float slope = (sign ? 0.0f : 1.0f) - t;
  const float signed_e = bit_cast<float>(bit_cast<uint32_t>(e) ^ sign);
  return {mul_add(e, log1p_by_e, slope * x), mul_add(-signed_e, reciprocal, slope)};
}

}  // namespace fused_sce
