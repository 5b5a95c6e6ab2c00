// Which formula a kernel computes, and how it adds up losses.
//
// The arithmetic is that of the CPU kernels bit for bit, with two exceptions: sums of loss.h over 16-bit logits and its
// gradients in 16 bits have a shorter formula (gpu16.h), and product_of_scaled() leaves out less.
#pragma once

#include <type_traits>

#include "../formulas/focal.h"
#include "../formulas/gpu16.h"
#include "../formulas/loss.h"
#include "../problem.h"

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

// loss.h for every type. The losses of a group are added in double.
template <class Computed>
struct FullFormula {
  using T = Computed;
  using Accumulator = double;
  static constexpr bool kRecomputesNonFinite = false;

  template <bool kPosWeight>
  FUSED_SCE_INLINE LossAndGradient<T> compute(T logit, T target, T pos_weight) {
    return sigmoid_cross_entropy<T, kPosWeight>(logit, target, pos_weight);
  }

  FUSED_SCE_INLINE T scaled(T value, TwoPart<T> scale) { return fused_sce::scaled(value, scale); }
};

// focal.h for every type. The losses of a group are added in double.
template <class Computed>
struct FocalFormula {
  using T = Computed;
  using Accumulator = double;
  static constexpr bool kRecomputesNonFinite = false;

  FUSED_SCE_INLINE T scaled(T value, TwoPart<T> scale) { return fused_sce::scaled(value, scale); }
};

// gpu16.h for 16-bit logits. The losses of a group are added in float.
struct Formula16Bit {
  using T = float;
  using Accumulator = float;
  // The sum of a group is not finite for a NaN or infinite logit, or where it is too large for float. Then the group's
  // losses are computed again, by loss.h where gpu16.h gives NaN, and added in double.
  static constexpr bool kRecomputesNonFinite = true;

  template <bool kPosWeight>
  FUSED_SCE_INLINE LossAndGradient<float> compute(float logit, float target, float pos_weight) {
    return sigmoid_cross_entropy_16bit<kPosWeight>(logit, target, pos_weight);
  }

  FUSED_SCE_INLINE float scaled(float value, TwoPart<float> scale) { return value * scale.upper; }
};

// As scaled_product() in floats.h, but a product of factor and scale that is too small for any number is not yet 0: to
// leave out infinities there as well would cost registers that the kernels do not have.
template <class Formula, class T>
FUSED_SCE_INLINE T product_of_scaled(T factor, TwoPart<T> scale, T value) {
  return factor == T(0) ? T(0) : Formula::scaled(factor, scale) * value;
}

// What one element's loss follows from.
template <class T>
struct Element {
  T logit;
  T target;
  T weight;
  T pos_weight;
  T alpha;
  bool has_pos_weight;
  bool has_alpha;
  bool counts;

  // A loss or a gradient, 0 where the element does not count.
  FUSED_SCE_MEMBER T counted(T value) const { return counts ? value : T(0); }
};

// Loss and gradient before they are multiplied by weights. `modulation` is for focal.h.
template <class Formula, class T>
FUSED_SCE_INLINE LossAndGradient<T> compute(const Element<T>& element, const Modulation<T>& modulation) {
  if constexpr (std::is_same<Formula, FocalFormula<T>>::value) {
    return focal_loss(modulation, element.logit, element.target, element.pos_weight, element.has_alpha, element.alpha);
  } else {
    return element.has_pos_weight ? Formula::template compute<true>(element.logit, element.target, element.pos_weight)
                                  : Formula::template compute<false>(element.logit, element.target, element.pos_weight);
  }
}

// The sum of the losses of a group, added element by element.
template <class Formula>
class GroupSum {
  using T = typename Formula::T;

 public:
  // Returns what compute() does.
  FUSED_SCE_MEMBER LossAndGradient<T> add(const Element<T>& element, const Modulation<T>& modulation = {}) {
    const LossAndGradient<T> result = compute<Formula>(element, modulation);
    if (!element.counts) return result;
    sum_ += typename Formula::Accumulator(product(element.weight, result.loss));
    if constexpr (Formula::kRecomputesNonFinite) {
      const bool is_nan = result.loss != result.loss;
      const T loss = is_nan ? compute<FullFormula<float>>(element, modulation).loss : result.loss;
      recomputed_ += double(product(element.weight, loss));
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

// A gradient has the logits' type, so for 16 bits the shorter formula is good enough. It gives each backward pass the
// bits of the forward pass. Losses of single elements are the CPU's bits: they may be wanted in float32.
template <class Logits>
using GradientFormula = std::conditional_t<std::is_same<Logits, float>::value, FullFormula<float>, Formula16Bit>;

template <class Logits, Output kOutput>
using LossFormula = std::conditional_t<makes_sum(kOutput), GradientFormula<Logits>, FullFormula<float>>;

}  // namespace fused_sce::cuda
