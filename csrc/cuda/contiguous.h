// What one thread does for contiguous logits and targets, computed in float: all in registers, with wide loads and
// several of them in flight. Plain host-device functions of the thread's index, which tests/cpp/cuda_threads.cpp runs
// for every thread of a grid on a CPU. No CUDA header.
#pragma once

#include <cstdint>
#include <type_traits>

#include "formula.h"
#include "launch.h"
#include "memory.h"
#include "target.h"

namespace fused_sce::cuda {

// Logits and target contiguous, at most one weight and pos_weight for each column, at most an upstream gradient
// (launch.h: is_contiguous, has_fixed_weights). `Target` is the target's type as it is stored, or ByteTarget or
// AnyTarget.
template <Output kOutput, class Logits, class Target, bool kMayBeWeighted>
struct ContiguousLoop {
  using T = float;
  using Formula = FormulaOf<Logits, kOutput>;
  static constexpr int kGroup = 16 / sizeof(Logits);
  static constexpr bool kAnyTarget = std::is_same<Target, AnyTarget>::value;
  // Groups of a thread that are loaded before the first of them is used. Weights take the registers of a second one.
  static constexpr int kInFlight = kMayBeWeighted || kAnyTarget ? 1 : 2;

  // Sums that are not finite are computed again (formula.h: kRecomputesNonFinite). With AnyTarget each group is checked
  // before its gradient is stored, which may overwrite the logits. Otherwise all groups of the thread are checked at
  // once, which saves 6 % of the instructions (bfloat16 logits, uint8 targets, sm_90) but reads logits again after the
  // gradient has been stored.
  static constexpr bool kChecksEachGroup = kAnyTarget && Formula::kRecomputesNonFinite;
  static constexpr int kMinBlocks = kAnyTarget && sizeof(Logits) == 2 ? 3 : 4;  // launch.h

  // Makes the output for a thread's range of elements; returns the sum of their losses if that is part of the output.
  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, ThreadRange range) {
    const int64_t stride = range.stride(kGroup);
    const bool is_aligned = is_aligned_from(problem, range.begin);
    int64_t i = range.first(kGroup);
    if (i >= range.end) return 0.0;
    const Weights weights = load_weights(problem, i);

    double sum = 0.0;
    if (is_aligned) {
      for (; i + (kInFlight - 1) * stride + kGroup <= range.end; i += kInFlight * stride) {
        LoadedGroup groups[kInFlight];
        FUSED_SCE_UNROLL
        for (int n = 0; n < kInFlight; ++n) groups[n] = load(problem, i + n * stride, kGroup, true);
        FUSED_SCE_UNROLL
        for (int n = 0; n < kInFlight; ++n) {
          sum += compute_and_store(problem, scale, weights, groups[n], i + n * stride, kGroup, true);
        }
      }
    }
    for (; i < range.end; i += stride) {
      const int count = range.end - i < kGroup ? int(range.end - i) : kGroup;
      const bool wide = is_aligned && count == kGroup;
      sum += compute_and_store(problem, scale, weights, load(problem, i, count, wide), i, count, wide);
    }
    if constexpr (makes_sum(kOutput) && Formula::kRecomputesNonFinite && !kChecksEachGroup) {
      if (!is_finite(sum)) {
        sum = 0.0;
        for (i = range.first(kGroup); i < range.end; i += stride) {
          sum += recomputed_sum(problem, i, range.end - i < kGroup ? int(range.end - i) : kGroup);
        }
      }
    }
    return sum;
  }

 private:
  // Logits and targets of a group as they lie in memory, which takes fewer registers than numbers.
  struct LoadedGroup {
    Pack<Logits, kGroup> logits;
    TargetGroup<T, Target, kGroup> target;
  };

  struct Weights {
    T weight[kGroup];
    T pos_weight[kGroup];
  };

  // Whether all whole groups from element `begin` on can be loaded and stored wide.
  FUSED_SCE_INLINE bool is_aligned_from(const Problem& problem, int64_t begin) {
    return is_aligned_for_group(static_cast<const Logits*>(problem.logits.data) + begin, kGroup) &&
           is_target_aligned<Target>(problem, begin, kGroup) &&
           (kOutput == Output::Sum ||
            is_aligned_for_group(static_cast<const Logits*>(problem.gradient.data) + begin, kGroup));
  }

  FUSED_SCE_INLINE LoadedGroup load(const Problem& problem, int64_t i, int count, bool wide) {
    return {
        load_pack<Logits, kGroup>(problem.logits.data, i, count, wide),
        load_target<T, Target, kGroup>(problem, i, count, wide)};
  }

  // The weights of a thread's columns, of which the first is that of element `i`.
  FUSED_SCE_INLINE Weights load_weights(const Problem& problem, int64_t i) {
    Weights weights = {};
    if (kMayBeWeighted && (problem.weight || problem.pos_weight)) {
      const int last = problem.ndim - 1;
      int64_t column = i % problem.sizes[last];
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        if (problem.weight) weights.weight[k] = load_computed<T>(problem.weight, column * problem.weight.strides[last]);
        if (problem.pos_weight) {
          weights.pos_weight[k] = load_computed<T>(problem.pos_weight, column * problem.pos_weight.strides[last]);
        }
        if (++column == problem.sizes[last]) column = 0;
      }
    }
    return weights;
  }

  // The output of the group at `i`; returns the sum of its losses.
  FUSED_SCE_INLINE double compute_and_store(
      const Problem& problem,
      TwoPart<T> scale,
      const Weights& weights,
      const LoadedGroup& group,
      int64_t i,
      int count,
      bool wide) {
    T target[kGroup];
    T loss[kGroup];
    T gradient[kGroup];
    convert(problem, group.target, target);
    double sum = 0.0;
    if constexpr (kOutput == Output::Elements) {
      // One after the other, because the op layer asks for one of them at a time: on sm_90 four float32 losses take 170
      // instructions, their gradients 130, and both together 240.
      if (problem.loss) {
        compute(problem, scale, weights, group.logits, target, loss, gradient);
        store_group(problem.loss, i, count, loss);
      }
      if (!problem.gradient) return 0.0;
      compute(problem, scale, weights, group.logits, target, loss, gradient);
      if (problem.upstream) multiply_by_upstream(problem, i, count, gradient);
    } else {
      compute(problem, scale, weights, group.logits, target, loss, gradient);
      typename Formula::Accumulator group_sum = 0;
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) group_sum += k < count ? typename Formula::Accumulator(loss[k]) : 0;
      sum = double(group_sum);
      if constexpr (kChecksEachGroup) {
        if (!is_finite(group_sum)) sum = recomputed_sum(problem, i, count);
      }
    }
    if constexpr (kOutput != Output::Sum) {
      store_pack(static_cast<Logits*>(problem.gradient.data), i, count, wide, gradient);
    }
    return sum;
  }

  FUSED_SCE_INLINE void compute(
      const Problem& problem,
      TwoPart<T> scale,
      const Weights& weights,
      const Pack<Logits, kGroup>& logits,
      const T (&target)[kGroup],
      T (&loss)[kGroup],
      T (&gradient)[kGroup]) {
    if (kMayBeWeighted && problem.pos_weight) {
      compute_with<true>(scale, weights, logits, target, loss, gradient);
    } else {
      compute_with<false>(scale, weights, logits, target, loss, gradient);
    }
    if (kMayBeWeighted && problem.weight) {
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        loss[k] *= weights.weight[k];
        gradient[k] *= weights.weight[k];
      }
    }
  }

  template <bool kPosWeight>
  FUSED_SCE_INLINE void compute_with(
      TwoPart<T> scale,
      const Weights& weights,
      const Pack<Logits, kGroup>& packed_logits,
      const T (&target)[kGroup],
      T (&loss)[kGroup],
      T (&gradient)[kGroup]) {
    T logits[kGroup];
    unpack(packed_logits, logits);
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      const LossAndGradient<T> result =
          Formula::template compute<kPosWeight>(logits[k], target[k], weights.pos_weight[k], scale);
      loss[k] = result.loss;
      gradient[k] = result.gradient;
    }
  }

  // The sum of the losses of a group again, from memory and in as little code as possible.
  FUSED_SCE_INLINE double recomputed_sum(const Problem& problem, int64_t begin, int count) {
    const int last = problem.ndim - 1;
    const bool has_pos_weight = kMayBeWeighted && problem.pos_weight;
    GroupSum<Formula> sum;
    FUSED_SCE_NO_UNROLL
    for (int64_t i = begin; i < begin + count; ++i) {
      const int64_t column = kMayBeWeighted ? i % problem.sizes[last] : 0;
      const T logit = load_as<T>(static_cast<const Logits*>(problem.logits.data)[i]);
      const T target = load_target<T>(problem, i);
      T weight = T(1);
      T pos_weight = T(1);
      if (kMayBeWeighted && problem.weight) {
        weight = load_computed<T>(problem.weight, column * problem.weight.strides[last]);
      }
      if (has_pos_weight) pos_weight = load_computed<T>(problem.pos_weight, column * problem.pos_weight.strides[last]);
      const T loss = has_pos_weight ? Formula::template compute<true>(logit, target, pos_weight, {}).loss
                                    : Formula::template compute<false>(logit, target, pos_weight, {}).loss;
      sum.add(loss, logit, target, weight, pos_weight, has_pos_weight);
    }
    return sum.value();
  }

  // `upstream` is of the type computed in or of the logits' type.
  FUSED_SCE_INLINE void multiply_by_upstream(const Problem& problem, int64_t i, int count, T (&gradient)[kGroup]) {
    if (problem.upstream.dtype == DType::Float32) {
      multiply_by<T>(problem.upstream, i, count, gradient);
    } else {
      multiply_by<Logits>(problem.upstream, i, count, gradient);
    }
  }

  template <class Stored>
  FUSED_SCE_INLINE void multiply_by(const Operand& factor, int64_t i, int count, T (&values)[kGroup]) {
    const Stored* const data = static_cast<const Stored*>(factor.data);
    T factors[kGroup];
    if (factor.contiguous) {
      const bool wide = count == kGroup && is_aligned_for_group(data + i, kGroup);
      unpack(load_pack<Stored, kGroup>(data, i, count, wide), factors);
    } else {
      const T factor_of_all = load_as<T>(data[0]);
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) factors[k] = factor_of_all;
    }
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) values[k] *= factors[k];
  }
};

}  // namespace fused_sce::cuda
