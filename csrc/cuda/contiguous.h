// What one thread does for contiguous logits and targets, computed in float: all in registers, with wide loads and
// stores. Plain host-device functions of the thread's index, which tests/cpp/cuda_threads.cpp runs for every thread of
// a grid on a CPU. No CUDA header.
#pragma once

#include <cstdint>
#include <type_traits>

#include "formula.h"
#include "launch.h"
#include "memory.h"
#include "target.h"

namespace fused_sce::cuda {

// Logits and target contiguous, at most one weight and pos_weight for each column, at most an upstream gradient
// (launch.h: is_contiguous, threads_with_fixed_weights). `Target` is the target's type as it is stored, or ByteTarget
// or AnyTarget.
template <Output kOutput, class Logits, class Target, bool kMayBeWeighted>
struct ContiguousLoop {
  using T = float;
  using Formula = LossFormula<Logits, kOutput>;
  static constexpr int kGroup = 16 / sizeof(Logits);
  static constexpr bool kAnyTarget = std::is_same<Target, AnyTarget>::value;

  // Sums that are not finite are computed again (formula.h: kRecomputesNonFinite). With AnyTarget each group is checked
  // before its gradient is stored, which may overwrite the logits. Otherwise all groups of the thread are checked at
  // once, which saves 6 % of the instructions (bfloat16 logits, uint8 targets, sm_90) but reads logits again after the
  // gradient has been stored.
  static constexpr bool kChecksEachGroup = kAnyTarget && Formula::kRecomputesNonFinite;

  // launch.h. A thread has one group in flight, so 4 blocks have 32 KiB of float32 logits and targets, 24 KiB of 16-bit
  // logits and bytes. With two groups nvcc 13.0 loaded the second one late, in float32 on sm_90 at 158 to 265 of 594
  // instructions, where a thread waited again, and split its store in four.
  static constexpr int kMinBlocks = kAnyTarget && sizeof(Logits) == 2 ? 3 : 4;

  // Makes the output for a thread's range of elements; returns the sum of their losses if that is part of the output.
  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, ThreadRange range) {
    const int64_t stride = range.stride(kGroup);
    const bool is_aligned = is_aligned_from(problem, range.begin);
    int64_t i = range.first(kGroup);
    if (i >= range.end) return 0.0;
    Thread thread = thread_at(problem, scale, i);

    double sum = 0.0;
    const int64_t end_of_whole = range.end - (kGroup - 1);  // a group that begins before it is whole
    if (is_aligned) {
      for (; i < end_of_whole; i += stride) sum += run_group(thread, i, kGroup, true);
    }
    for (; i < range.end; i += stride) {
      sum += run_group(thread, i, range.end - i < kGroup ? int(range.end - i) : kGroup, is_aligned);
    }
    if constexpr (makes_sum(kOutput) && Formula::kRecomputesNonFinite && !kChecksEachGroup) {
      if (!is_finite(sum)) {
        sum = 0.0;
        for (i = range.first(kGroup); i < range.end; i += stride) {
          sum += recomputed_sum(problem, i, range.end - i < kGroup ? int(range.end - i) : kGroup);
        }
      }
    }
    thread.labels.expect_labels();
    return sum;
  }

 private:
  // Logits and targets of a group as they lie in memory, which takes fewer registers than numbers.
  struct LoadedGroup {
    Pack<Logits, kGroup> logits;
    TargetGroup<T, Target, kGroup> target;
  };

  // What a thread needs for each of its groups.
  struct Thread {
    const Problem& problem;
    TwoPart<T> scale;
    T weight[kGroup];  // of its columns
    T pos_weight[kGroup];
    LabelCheck labels;
  };

  struct GroupResult {
    T loss[kGroup];
    T gradient[kGroup];
  };

  // Whether all whole groups from element `begin` on can be loaded and stored wide.
  FUSED_SCE_INLINE bool is_aligned_from(const Problem& problem, int64_t begin) {
    return is_aligned_for_group(static_cast<const Logits*>(problem.logits.data) + begin, kGroup) &&
           is_target_aligned<Target>(problem, begin, kGroup) &&
           (kOutput == Output::Sum ||
            is_aligned_for_group(static_cast<const Logits*>(problem.gradient.data) + begin, kGroup));
  }

  // A thread whose first element is `i`.
  FUSED_SCE_INLINE Thread thread_at(const Problem& problem, TwoPart<T> scale, int64_t i) {
    Thread thread = {problem, scale, {}, {}, {}};
    if (kMayBeWeighted && (problem.weight || problem.pos_weight)) {
      const int last = problem.ndim - 1;
      int64_t column = i % problem.sizes[last];
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        thread.weight[k] = load_weight<T>(problem.weight, column * problem.weight.strides[last]);
        thread.pos_weight[k] = load_weight<T>(problem.pos_weight, column * problem.pos_weight.strides[last]);
        if (++column == problem.sizes[last]) column = 0;
      }
    }
    return thread;
  }

  // Makes the output of the group at `i`, of which `count` elements are in the range; returns the sum of their losses.
  FUSED_SCE_INLINE double run_group(Thread& thread, int64_t i, int count, bool is_aligned) {
    const Problem& problem = thread.problem;
    const bool wide = is_aligned && count == kGroup;
    const LoadedGroup group = {
        load_pack<Logits, kGroup>(problem.logits.data, i, count, wide),
        load_target<T, Target, kGroup>(problem, i, count, wide, thread.labels)};
    double sum = 0.0;
    GroupResult result;
    if constexpr (kOutput == Output::Elements) {
      // One after the other, because the op layer asks for one of them at a time: on sm_90 four float32 losses take 170
      // instructions, their gradients 130, and both together 240.
      if (problem.loss) {
        result = compute_group<Formula>(thread, group);
        store_group(problem.loss, i, count, result.loss);
      }
      if (!problem.gradient) return 0.0;
      if (problem.upstream) {
        T upstream[kGroup];
        load_group(problem.upstream, i, count, upstream);
        result = compute_group<GradientFormula<Logits>>(thread, group, upstream);
      } else {
        result = compute_group<GradientFormula<Logits>>(thread, group);
      }
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) result.gradient[k] = is_zero_scale(thread.scale) ? 0 : result.gradient[k];
    } else {
      result = compute_group<Formula>(thread, group);
      typename Formula::Accumulator group_sum = 0;
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) group_sum += k < count ? typename Formula::Accumulator(result.loss[k]) : 0;
      sum = double(group_sum);
      if constexpr (kChecksEachGroup) {
        if (!is_finite(group_sum)) sum = recomputed_sum(problem, i, count);
      }
    }
    if constexpr (kOutput != Output::Sum) {
      store_pack(static_cast<Logits*>(problem.gradient.data), i, count, wide, result.gradient);
    }
    return sum;
  }

  // Losses times weights, and gradients times everything that multiplies them; `upstream` may be null.
  template <class F>
  FUSED_SCE_INLINE GroupResult compute_group(Thread& thread, const LoadedGroup& group, const T* upstream = nullptr) {
    const Problem& problem = thread.problem;
    T logits[kGroup];
    T target[kGroup];
    convert(problem, group.target, thread.labels, target);
    unpack(group.logits, logits);
    GroupResult result;
    const auto compute_with = [&](auto has_pos_weight) {
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        const LossAndGradient<T> each =
            F::template compute<decltype(has_pos_weight)::value>(logits[k], target[k], thread.pos_weight[k]);
        result.loss[k] = each.loss;
        result.gradient[k] = each.gradient;
      }
    };
    if (kMayBeWeighted && problem.pos_weight) {
      compute_with(std::true_type{});
    } else {
      compute_with(std::false_type{});
    }
    if (kMayBeWeighted && problem.weight) {
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        const T factor = upstream ? product_of_factors(thread.weight[k], upstream[k]) : thread.weight[k];
        result.loss[k] = product(thread.weight[k], result.loss[k]);
        result.gradient[k] = product_of_scaled<F>(factor, thread.scale, result.gradient[k]);
      }
    } else {
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        result.gradient[k] = upstream ? product_of_scaled<F>(upstream[k], thread.scale, result.gradient[k])
                                      : F::scaled(result.gradient[k], thread.scale);
      }
    }
    if constexpr (kAnyTarget) {
      if (group.target.others != 0) {
        FUSED_SCE_UNROLL
        for (int k = 0; k < kGroup; ++k) {
          if (group.target.others >> k & 1) result.loss[k] = result.gradient[k] = 0;
        }
      }
    }
    return result;
  }

  // The sum of the losses of a group again, from memory and in as little code as possible.
  FUSED_SCE_INLINE double recomputed_sum(const Problem& problem, int64_t begin, int count) {
    const int last = problem.ndim - 1;
    GroupSum<Formula> sum;
    LabelCheck labels;  // not asked again
    FUSED_SCE_NO_UNROLL
    for (int64_t i = begin; i < begin + count; ++i) {
      const SingleTarget<T> target = load_dense_target<T>(problem, i, i, labels);
      const T logit = load_as<T>(static_cast<const Logits*>(problem.logits.data)[i]);
      const T value = smoothed_target(problem.options, target.value);
      Element<T> element = {logit, value, T(1), T(1), T(1), false, false, target.counts};
      if (kMayBeWeighted) {
        const int64_t column = i % problem.sizes[last];
        element.weight = load_weight<T>(problem.weight, column * problem.weight.strides[last]);
        element.pos_weight = load_weight<T>(problem.pos_weight, column * problem.pos_weight.strides[last]);
        element.has_pos_weight = bool(problem.pos_weight);
      }
      sum.add(element);
    }
    return sum.value();
  }
};

// values[i] = product_of_factors(factor, values[i]) for a thread's range: a gradient of 0 may be what a weight of 0
// left out. For a factor of 1, the usual one, no value is read or written.
template <class Stored>
FUSED_SCE_INLINE void scale_values(Stored* values, const Operand& factor, ThreadRange range) {
  using T = std::conditional_t<std::is_same<Stored, double>::value, double, float>;
  constexpr int kGroup = 16 / sizeof(Stored);
  const T by = load_element<T>(factor, 0);
  if (by == T(1)) return;
  const bool is_aligned = is_aligned_for_group(values + range.begin, kGroup);
  for (int64_t i = range.first(kGroup); i < range.end; i += range.stride(kGroup)) {
    const int count = range.end - i < kGroup ? int(range.end - i) : kGroup;
    const bool wide = is_aligned && count == kGroup;
    T group[kGroup];
    unpack(load_pack<Stored, kGroup>(values, i, count, wide), group);
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) group[k] = product_of_factors(by, group[k]);
    store_pack(values, i, count, wide, group);
  }
}

}  // namespace fused_sce::cuda
