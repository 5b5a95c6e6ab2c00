// Which formula a kernel computes, and how it adds up losses.
//
// Both formulas do the arithmetic of the CPU kernels bit for bit, except for sums over 16-bit logits and the gradients
// made with them: gpu16.h has a shorter formula for these.
#pragma once

#include <type_traits>

#include "../formulas/gpu16.h"
#include "../formulas/loss.h"

namespace fused_sce::cuda {

// What a loop over elements makes.
enum class Output {
  Elements,       // problem.loss and problem.gradient of each element, whichever is set
  Sum,            // the sum of the losses
  SumAndGradient  // that and problem.gradient
};

FUSED_SCE_INLINE constexpr bool makes_sum(Output output) { return output != Output::Elements; }

template <class T>
FUSED_SCE_INLINE bool is_finite(T value) {
  return value - value == T(0);
}

// loss.h for every type. The losses of a group are added in double. `scale` is the reciprocal of the divisor.
template <class Computed>
struct FullFormula {
  using T = Computed;
  using Accumulator = double;
  static constexpr bool kRecomputesNonFinite = false;

  template <bool kPosWeight>
  FUSED_SCE_INLINE LossAndGradient<T> compute(T logit, T target, T pos_weight, TwoPart<T> scale) {
    const LossAndGradient<T> result = sigmoid_cross_entropy<T, kPosWeight>(logit, target, pos_weight);
    return {result.loss, mul_add(result.gradient, scale.lower, result.gradient * scale.upper)};
  }
};

// gpu16.h for 16-bit logits. The losses of a group are added in float.
struct Formula16Bit {
  using T = float;
  using Accumulator = float;
  // The sum of a group is not finite for a NaN or infinite logit, or where it is too large for float. Then the group's
  // losses are computed again, by loss.h where gpu16.h gives NaN, and added in double.
  static constexpr bool kRecomputesNonFinite = true;

  template <bool kPosWeight>
  FUSED_SCE_INLINE LossAndGradient<float> compute(float logit, float target, float pos_weight, TwoPart<float> scale) {
    const LossAndGradient<float> result = sigmoid_cross_entropy_16bit<kPosWeight>(logit, target, pos_weight);
    return {result.loss, result.gradient * scale.upper};
  }
};

// What one element's loss follows from.
template <class T>
struct Element {
  T logit;
  T target;
  T weight;
  T pos_weight;
  bool has_pos_weight;
};

// Loss and gradient before they are multiplied by the weight.
template <class Formula, class T>
FUSED_SCE_INLINE LossAndGradient<T> compute(const Element<T>& element, TwoPart<T> scale) {
  return element.has_pos_weight
             ? Formula::template compute<true>(element.logit, element.target, element.pos_weight, scale)
             : Formula::template compute<false>(element.logit, element.target, element.pos_weight, scale);
}

// The sum of the losses of a group, added element by element.
template <class Formula>
class GroupSum {
  using T = typename Formula::T;

 public:
  // Returns what compute() does.
  FUSED_SCE_MEMBER LossAndGradient<T> add(const Element<T>& element, TwoPart<T> scale) {
    const LossAndGradient<T> result = compute<Formula>(element, scale);
    sum_ += typename Formula::Accumulator(result.loss * element.weight);
    if constexpr (Formula::kRecomputesNonFinite) {
      const bool is_nan = result.loss != result.loss;
      const T loss = is_nan ? compute<FullFormula<float>>(element, {}).loss : result.loss;
      recomputed_ += double(loss * element.weight);
    }
    return result;
  }

  FUSED_SCE_MEMBER double value() const {
    return Formula::kRecomputesNonFinite && !is_finite(sum_) ? recomputed_ : double(sum_);
  }

 private:
  typename Formula::Accumulator sum_ = 0;
  double recomputed_ = 0.0;
};

// Losses and gradients of single elements are the CPU's bits, because a loss of 16-bit logits may be wanted in float32.
template <class Logits, Output kOutput>
using FormulaOf =
    std::conditional_t<makes_sum(kOutput) && !std::is_same<Logits, float>::value, Formula16Bit, FullFormula<float>>;

}  // namespace fused_sce::cuda
