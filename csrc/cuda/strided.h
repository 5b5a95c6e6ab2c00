// What one thread does for any problem: one element at a time, by strides. The arithmetic and the order of additions
// are those of contiguous.h.
#pragma once

#include <cstdint>

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
  int64_t upstream;
};

FUSED_SCE_INLINE void advance(const Problem& problem, int dim, int64_t by, Offsets& at) {
  at.logits += by * problem.logits.strides[dim];
  at.target += by * problem.target.strides[dim];
  at.weight += by * problem.weight.strides[dim];
  at.pos_weight += by * problem.pos_weight.strides[dim];
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

// Any problem. What it makes is decided at run time:
// problem.loss and problem.gradient of each element, whichever is set, and always the sum of the losses.
template <class Formula>
struct StridedLoop {
  using T = typename Formula::T;
  static constexpr int kMinBlocks = 2;  // launch.h

  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, ThreadRange range) {
    const int group = group_size(problem.logits.dtype);
    const int last = problem.ndim - 1;
    double sum = 0.0;
    for (int64_t begin = range.first(group); begin < range.end; begin += range.stride(group)) {
      const int64_t end = range.end - begin < group ? range.end : begin + group;
      Offsets at = offsets_of(problem, begin);
      GroupSum<Formula> group_sum;
      for (int64_t i = begin; i < end; ++i) {
        const Element<T> element = {
            load_element<T>(problem.logits, at.logits), load_target<T>(problem, at.target),
            load_weight<T>(problem.weight, at.weight), load_weight<T>(problem.pos_weight, at.pos_weight),
            bool(problem.pos_weight)};
        const LossAndGradient<T> result = group_sum.add(element, scale);
        if (problem.loss) store_element(problem.loss, i, result.loss * element.weight);
        if (problem.gradient) {
          T gradient = result.gradient * element.weight;
          if (problem.upstream) gradient *= load_element<T>(problem.upstream, at.upstream);
          store_element(problem.gradient, i, gradient);
        }

        if (++at.column == problem.sizes[last]) {
          at = offsets_of(problem, i + 1);
        } else {
          advance(problem, last, 1, at);
        }
      }
      sum += group_sum.value();
    }
    return sum;
  }
};

}  // namespace fused_sce::cuda
