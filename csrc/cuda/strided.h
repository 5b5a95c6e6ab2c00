// What one thread does for any problem: one element at a time, by strides. The arithmetic and the order of additions
// are those of contiguous.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "formula.h"
#include "launch.h"
#include "memory.h"
#include "target.h"

namespace fused_sce::cuda {

// Where an element's operands lie.
struct Offsets {
  int64_t column;  // along the last dimension
  int64_t logits;
  int64_t target;
  int64_t weight;
  int64_t pos_weight;
  int64_t mask;
  int64_t alpha;
  int64_t prior;
  int64_t upstream;
};

FUSED_SCE_INLINE void advance(const Problem& problem, int dim, int64_t by, Offsets& at) {
  at.logits += by * problem.logits.strides[dim];
  at.target += by * problem.target.strides[dim];
  at.weight += by * problem.weight.strides[dim];
  at.pos_weight += by * problem.pos_weight.strides[dim];
  at.mask += by * problem.mask.strides[dim];
  at.alpha += by * problem.alpha.strides[dim];
  at.prior += by * problem.prior.strides[dim];
  at.upstream += by * problem.upstream.strides[dim];
}

FUSED_SCE_INLINE Offsets offsets_of(const Problem& problem, int64_t index) {
  Offsets at = {};
  for (int dim = problem.ndim - 1; dim > 0; --dim) {
    const int64_t outer = index / problem.sizes[dim];
    const int64_t place = index - outer * problem.sizes[dim];
    if (dim == problem.ndim - 1) at.column = place;
    advance(problem, dim, place, at);
    index = outer;
  }
  if (problem.ndim == 1) at.column = index;
  advance(problem, 0, index, at);
  return at;
}

// A target as the formula gets it.
template <class T>
FUSED_SCE_INLINE T changed_target(const Problem& problem, T target, T prior) {
  const Options& options = problem.options;
  if (options.label_smoothing != 0.0) {
    target = problem.prior ? smoothed_target(options, target, prior) : smoothed_target(options, target);
  }
  return options.has_threshold ? binary_target(options, target) : target;
}

// A gradient times everything that multiplies it.
template <class Formula, class T>
FUSED_SCE_INLINE T
times_factors(const Problem& problem, const Element<T>& element, const Offsets& at, T gradient, TwoPart<T> scale) {
  if (is_zero_scale(scale)) return T(0);
  if (!problem.weight && !problem.upstream) return Formula::scaled(gradient, scale);
  T factor = element.weight;
  if (problem.upstream) factor = product_of_factors(factor, load_element<T>(problem.upstream, at.upstream));
  return product_of_scaled<Formula>(factor, scale, gradient);
}

// Any problem. What it makes is decided at run time:
// problem.loss and problem.gradient of each element, whichever is set, and always the sum of the losses.
template <class Formula>
struct StridedLoop {
  using T = typename Formula::T;
  // launch.h. The formulas of focal.h need more than 128 registers.
  static constexpr int kMinBlocks = std::is_same<Formula, FocalFormula<T>>::value ? 1 : 2;

  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, ThreadRange range) {
    const int group = group_size(problem);
    const int last = problem.ndim - 1;
    double sum = 0.0;
    LabelCheck labels;
    const auto modulation = modulation_of<T>(problem.options, bool(problem.alpha));
    for (int64_t begin = range.first(group); begin < range.end; begin += range.stride(group)) {
      const int64_t end = range.end - begin < group ? range.end : begin + group;
      Offsets at = offsets_of(problem, begin);
      GroupSum<Formula> group_sum;
      for (int64_t i = begin; i < end; ++i) {
        const SingleTarget<T> target = load_target<T>(problem, i, at.target, at.mask, labels);
        const T prior = problem.prior ? load_weight<T>(problem.prior, at.prior) : T(0);
        const T value = changed_target(problem, target.value, prior);
        const Element<T> element = {
            load_element<T>(problem.logits, at.logits),
            value,
            load_weight<T>(problem.weight, at.weight),
            load_weight<T>(problem.pos_weight, at.pos_weight),
            problem.alpha ? load_weight<T>(problem.alpha, at.alpha) : T(problem.options.alpha),
            bool(problem.pos_weight),
            problem.has_alpha(),
            target.counts};
        const LossAndGradient<T> result = group_sum.add(element, modulation);
        if (problem.loss) store_element(problem.loss, i, element.counted(product(element.weight, result.loss)));
        if (problem.gradient) {
          T gradient = times_factors<Formula>(problem, element, at, result.gradient, scale);
          if constexpr (std::is_same<Formula, FullFormula<float>>::value) {
            if (problem.logits.dtype != DType::Float32) {  // see GradientFormula
              gradient = compute<Formula16Bit>(element, modulation).gradient;
              gradient = times_factors<Formula16Bit>(problem, element, at, gradient, scale);
            }
          }
          store_element(problem.gradient, i, element.counted(gradient));
        }

        if (++at.column == problem.sizes[last]) {
          at = offsets_of(problem, i + 1);
        } else {
          advance(problem, last, 1, at);
        }
      }
      sum += group_sum.value();
    }
    labels.expect_labels();
    return sum;
  }
};

}  // namespace fused_sce::cuda
