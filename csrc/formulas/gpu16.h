// The same function for logits of 16 bits on a GPU, where memory would otherwise wait for arithmetic: a third of the
// operations. The loss is within 2^-20 + |x| 2^-23 of the exact one, relatively (subnormal: within one step), which
// counts where many are added up to a float; gradients rounded to 16 bits are within 0.51 ULP. Both for t in {0, 1},
// every logit, and a `Unit` that errs as far as it may (tests/cpp/cuda_threads.cpp); t in between: as above, by the sum
// of the two terms. The loss is NaN where a logit is infinite and its label matches: the caller must notice.
//
// With u = [x >= 0] - t (times p where that is negative), which is the slope of above with the sign of the gradient:
//     loss     = u x + (1 - t + p t) log1p(e)
//     gradient = u   - (1 - t + p t) copysign(sigmoid(-|x|), x)
#pragma once

#include <cmath>
#include <cstdint>

#include "loss.h"

namespace fused_sce {

template <bool kPosWeight, class Unit = SpecialFunctions>
FUSED_SCE_INLINE LossAndGradient<float> sigmoid_cross_entropy_16bit(float x, float t, float pos_weight) {
  // exp(-|x|) as the square of its root, which is a normal number where the square is not.
  const float root = Unit::exp2(std::fabs(x) * -0.72134752f);  // log2(e) / 2
  const float e = root * root;
  // By the sign bit: zeros of either sign must go the same way here and in the gradient.
  const bool is_negative = bit_cast<int32_t>(x) < 0;
  float slope = (is_negative ? 0.0f : 1.0f) - t;
  float total = 1.0f;
  if (kPosWeight) {
    const float positive = pos_weight * t;
    slope = is_negative ? -positive : slope;
    total = (1.0f - t) + positive;
  }

  // log1p(e) / e on [0, 1], largest relative error 2^-24.8
  float log1p_by_e = mul_add(0.005365422461f, e, -0.03006830066f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.07920882851f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.1375418752f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.1915384829f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.2485721707f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.3332132995f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.4999964833f);
  log1p_by_e = mul_add(log1p_by_e, e, 1.0f);

  const float weighted = kPosWeight ? total * e : e;
  const float signed_e = bit_cast<float>(bit_cast<uint32_t>(weighted) ^ (bit_cast<uint32_t>(x) & 0x80000000u));
  return {mul_add(weighted, log1p_by_e, slope * x), mul_add(-signed_e, Unit::reciprocal(1.0f + e), slope)};
}

}  // namespace fused_sce
