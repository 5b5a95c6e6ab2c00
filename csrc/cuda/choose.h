// Which loop runs a problem: the only place where types become template arguments, and so where kernels multiply.
//
// Loops over contiguous memory exist for each type of logits that is computed in float. In double the arithmetic takes
// so long that strides add little, and so it does in the formulas of focal.h. Only for a sum with its gradient, which
// training asks for in every step, are there loops for one type of target: float, the logits' own type, and bytes. On
// sm_90 a turn executes 8 % (float32 logits, bytes) to 24 % (16-bit logits, float) fewer instructions than in the loop
// for any target. Each of them exists with and without weights: without, it executes 1 to 2 % fewer than the other one
// where there are none. Both are counted along the shortest path through the loop in the disassembly.
#pragma once

#include "contiguous.h"
#include "strided.h"

namespace fused_sce::cuda {

// Calls `action` with the loop for a problem that is not contiguous, or of the formulas of focal.h.
template <bool kSum, class Action>
void choose_strided_loop(const Problem& problem, Action&& action) {
  if (problem.is_focal()) {
    return problem.in_double ? action(StridedLoop<FocalFormula<double>>{}) : action(StridedLoop<FocalFormula<float>>{});
  }
  if (problem.in_double) return action(StridedLoop<FullFormula<double>>{});
  if constexpr (kSum) {
    if (problem.logits.dtype != DType::Float32) return action(StridedLoop<Formula16Bit>{});
  }
  action(StridedLoop<FullFormula<float>>{});
}

// Calls `action` with a value of the logits' type, for a problem computed in float.
template <class Action>
void choose_logits(const Problem& problem, Action&& action) {
  switch (problem.logits.dtype) {
    case DType::BFloat16: return action(BFloat16{});
    case DType::Float16: return action(Float16{});
    default: return action(float{});
  }
}

// Calls `action` with a loop for all elements of a problem, divided among `threads`.
template <Output kOutput, class Action>
void choose_loop(const Problem& problem, int64_t threads, Action&& action) {
  const bool is_weighted = problem.weight || problem.pos_weight;
  if (!is_contiguous(problem) || threads_with_fixed_weights(problem, threads) != threads) {
    return choose_strided_loop<makes_sum(kOutput)>(problem, action);
  }
  choose_logits(problem, [&](auto logits) {
    using Logits = decltype(logits);
    if constexpr (kOutput == Output::SumAndGradient) {
      // These loops may read 16-bit logits again when the gradient has already overwritten them. AnyTarget does not.
      const bool loses_logits = sizeof(Logits) == 2 && problem.gradient.data == problem.logits.data;
      const bool is_chosen = !loses_logits && choose_target<Logits>(problem, [&](auto target) {
        using Target = decltype(target);
        is_weighted ? action(ContiguousLoop<kOutput, Logits, Target, true>{})
                    : action(ContiguousLoop<kOutput, Logits, Target, false>{});
      });
      if (is_chosen) return;
    }
    action(ContiguousLoop<kOutput, Logits, AnyTarget, true>{});
  });
}

// Calls `action` with a loop for single rows. A thread's columns differ from group to group, so no weights stay in
// registers.
template <class Action>
void choose_row_loop(const Problem& problem, Action&& action) {
  if (!is_contiguous(problem) || problem.weight || problem.pos_weight) {
    return choose_strided_loop<true>(problem, action);
  }
  choose_logits(
      problem, [&](auto logits) { action(ContiguousLoop<Output::Sum, decltype(logits), AnyTarget, false>{}); });
}

}  // namespace fused_sce::cuda
