// What one CUDA thread does between the launch and the reduction, as plain host-device functions of the thread's index:
// tests/cpp/cuda_threads.cpp runs them for every thread of a grid on a CPU. No CUDA header.
//
// Elements are dealt out in groups of neighbours (launch.h: group_size), group g to thread g modulo the number of
// threads. Groups are counted from the first element and never shifted to an aligned address; instead each operand of a
// group is read with one wide load where its own address allows, else element by element. So which thread adds which
// losses in which order follows from the length and the type of the logits alone: a sum has the same bits for a slice
// that starts at an odd address, for a transposed tensor and for any target type.
//
// There are two ways through a problem: Contiguous, in registers, for what training asks for all day, and Strided, one
// element at a time, for everything. Both do the same arithmetic, which is that of the CPU kernels.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "launch.h"

// A loop over a group must be unrolled wholly: an array that is indexed at run time would lie in memory.
#if defined(__CUDACC__)
#define FUSED_SCE_UNROLL _Pragma("unroll")
#else
#define FUSED_SCE_UNROLL
#endif

namespace fused_sce::cuda {

// What a launch is for.
enum class Job { Loss, Gradient, Sum, SumAndGradient };

FUSED_SCE_INLINE constexpr bool makes_gradient(Job job) { return job == Job::Gradient || job == Job::SumAndGradient; }
FUSED_SCE_INLINE constexpr bool makes_sum(Job job) { return job == Job::Sum || job == Job::SumAndGradient; }

// Elements [begin, end), as thread `thread` of the `threads` that divide them among themselves.
struct Share {
  int64_t begin;
  int64_t end;
  int64_t thread;
  int64_t threads;
};

// A group in memory, aligned as one wide load wants it (of 16 bytes, several of which make up a larger group).
template <class Stored, int kGroup>
struct alignas(sizeof(Stored) * kGroup < 16 ? sizeof(Stored) * kGroup : 16) Pack {
  Stored values[kGroup];
};

template <class Wanted>
FUSED_SCE_INLINE bool is_aligned_for(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(Wanted) == 0;
}

// The first `count` elements at `from`; the rest of the group is filled with `padding`.
template <class T, int kGroup, class Stored>
FUSED_SCE_INLINE void load_group(const Stored* from, int count, T padding, T (&values)[kGroup]) {
  using Packed = Pack<Stored, kGroup>;
  if (count == kGroup && is_aligned_for<Packed>(from)) {
    const Packed pack = *reinterpret_cast<const Packed*>(from);
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) values[k] = load_as<T>(pack.values[k]);
  } else {
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) values[k] = k < count ? load_as<T>(from[k]) : padding;
  }
}

template <class T, int kGroup>
FUSED_SCE_INLINE void load_group(const Operand& operand, int64_t index, int count, T (&values)[kGroup]) {
  visit(operand.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    load_group(static_cast<const Stored*>(operand.data) + index, count, T(0), values);
  });
}

template <class T, int kGroup, class Stored>
FUSED_SCE_INLINE void store_group(Stored* to, int count, const T (&values)[kGroup]) {
  using Packed = Pack<Stored, kGroup>;
  if (count == kGroup && is_aligned_for<Packed>(to)) {
    Packed pack;
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) pack.values[k] = StoreAs<Stored>::from(values[k]);
    *reinterpret_cast<Packed*>(to) = pack;
  } else {
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      if (k < count) to[k] = StoreAs<Stored>::from(values[k]);
    }
  }
}

template <class T, int kGroup>
FUSED_SCE_INLINE void store_group(const Result& result, int64_t index, int count, const T (&values)[kGroup]) {
  visit_floating(result.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    store_group(static_cast<Stored*>(result.data) + index, count, values);
  });
}

template <class T>
FUSED_SCE_INLINE T load_element(const Operand& operand, int64_t position) {
  T value = T(0);
  visit(operand.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    value = load_as<T>(static_cast<const Stored*>(operand.data)[position]);
  });
  return value;
}

template <class T>
FUSED_SCE_INLINE void store_element(const Result& result, int64_t position, T value) {
  visit_floating(result.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    static_cast<Stored*>(result.data)[position] = StoreAs<Stored>::from(value);
  });
}

// The loss, and the gradient over the divisor (`scale`: its reciprocal).
template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> compute(T logit, T target, T pos_weight, TwoPart<T> scale) {
  const LossAndGradient<T> result = sigmoid_cross_entropy<T, kPosWeight>(logit, target, pos_weight);
  return {result.loss, mul_add(result.gradient, scale.lower, result.gradient * scale.upper)};
}

template <class Stored>
struct ComputedIn {
  using Type = float;
};
template <>
struct ComputedIn<double> {
  using Type = double;
};

// Logits and target contiguous, no weights, at most an upstream gradient (launch.h: is_contiguous).
template <class Logits>
struct Contiguous {
  using T = typename ComputedIn<Logits>::Type;
  static constexpr int kGroup = 16 / sizeof(Logits);

  // Does the job for a thread's share of the elements; returns the sum of their losses where the job makes one.
  template <Job kJob>
  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, Share share) {
    // A logit that is sure and right: its loss is exactly 0, so that the sum may take in the padding of the last group.
    constexpr T kPadding = -Constants<T>::kLargest;

    double sum = 0.0;
    for (int64_t i = share.begin + share.thread * kGroup; i < share.end; i += share.threads * kGroup) {
      const int count = share.end - i < kGroup ? int(share.end - i) : kGroup;
      T logits[kGroup];
      T target[kGroup];
      load_group(static_cast<const Logits*>(problem.logits.data) + i, count, kPadding, logits);
      load_group(problem.target, i, count, target);

      T loss[kGroup];
      T gradient[kGroup];
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        const LossAndGradient<T> result = compute<T, false>(logits[k], target[k], T(1), scale);
        loss[k] = result.loss;
        gradient[k] = result.gradient;
      }

      if (kJob == Job::Loss) store_group(problem.loss, i, count, loss);
      if (kJob == Job::Gradient && problem.upstream) multiply_by_upstream(problem, i, count, gradient);
      if (makes_gradient(kJob)) store_group(problem.gradient, i, count, gradient);
      if (makes_sum(kJob)) {
        FUSED_SCE_UNROLL
        for (int k = 0; k < kGroup; ++k) sum += double(loss[k]);
      }
    }
    return sum;
  }

 private:
  FUSED_SCE_INLINE void multiply_by_upstream(const Problem& problem, int64_t i, int count, T (&gradient)[kGroup]) {
    T upstream[kGroup];
    if (problem.upstream.contiguous) {
      load_group(problem.upstream, i, count, upstream);
    } else {
      const T value = load_element<T>(problem.upstream, 0);
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) upstream[k] = value;
    }
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) gradient[k] *= upstream[k];
  }
};

// Where an element of a strided problem lies.
struct Position {
  int64_t column;  // along the last dimension
  int64_t logits;
  int64_t target;
  int64_t weight;
  int64_t pos_weight;
  int64_t upstream;
};

FUSED_SCE_INLINE void step(const Problem& problem, int dim, int64_t by, Position& at) {
  at.logits += by * problem.logits.strides[dim];
  at.target += by * problem.target.strides[dim];
  at.weight += by * problem.weight.strides[dim];
  at.pos_weight += by * problem.pos_weight.strides[dim];
  at.upstream += by * problem.upstream.strides[dim];
}

FUSED_SCE_INLINE Position position_of(const Problem& problem, int64_t index) {
  Position at = {};
  for (int dim = problem.ndim - 1; dim > 0; --dim) {
    const int64_t outer = index / problem.sizes[dim];
    const int64_t place = index - outer * problem.sizes[dim];
    if (dim == problem.ndim - 1) at.column = place;
    step(problem, dim, place, at);
    index = outer;
  }
  if (problem.ndim == 1) at.column = index;
  step(problem, 0, index, at);
  return at;
}

// Any problem whose operands all have strides (launch.h: with_strides).
template <class Computed>
struct Strided {
  using T = Computed;

  template <Job kJob>
  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, Share share) {
    const int group = group_size(problem.logits.dtype);
    const int last = problem.ndim - 1;
    double sum = 0.0;
    for (int64_t begin = share.begin + share.thread * group; begin < share.end; begin += share.threads * group) {
      const int64_t end = share.end - begin < group ? share.end : begin + group;
      Position at = position_of(problem, begin);
      for (int64_t i = begin; i < end; ++i) {
        const T logit = load_element<T>(problem.logits, at.logits);
        const T target = load_element<T>(problem.target, at.target);
        LossAndGradient<T> result;
        if (problem.pos_weight) {
          result = compute<T, true>(logit, target, load_element<T>(problem.pos_weight, at.pos_weight), scale);
        } else {
          result = compute<T, false>(logit, target, T(1), scale);
        }
        if (problem.weight) {
          const T weight = load_element<T>(problem.weight, at.weight);
          result.loss *= weight;
          result.gradient *= weight;
        }

        if (kJob == Job::Loss) store_element(problem.loss, i, result.loss);
        if (kJob == Job::Gradient && problem.upstream) {
          result.gradient *= load_element<T>(problem.upstream, at.upstream);
        }
        if (makes_gradient(kJob)) store_element(problem.gradient, i, result.gradient);
        if (makes_sum(kJob)) sum += double(result.loss);

        if (++at.column == problem.sizes[last]) {
          at = position_of(problem, i + 1);
        } else {
          step(problem, last, 1, at);
        }
      }
    }
    return sum;
  }
};

// Calls `action` with the way through the problem that fits it, and with the problem as that way reads it.
template <class Action>
void choose_access(const Problem& problem, Action&& action) {
  if (!is_contiguous(problem)) {
    if (problem.in_double) {
      action(Strided<double>{}, with_strides(problem));
    } else {
      action(Strided<float>{}, with_strides(problem));
    }
    return;
  }
  visit_floating(problem.logits.dtype, [&](auto tag) { action(Contiguous<decltype(tag)>{}, problem); });
}

// values[i] *= factor for a share of an array. For a factor of 1, the usual one, no memory is touched.
template <class Stored>
FUSED_SCE_INLINE void scale_values(Stored* values, const Operand& factor, Share share) {
  using T = typename ComputedIn<Stored>::Type;
  constexpr int kGroup = 16 / sizeof(Stored);
  const T by = load_element<T>(factor, 0);
  if (by == T(1)) return;
  for (int64_t i = share.begin + share.thread * kGroup; i < share.end; i += share.threads * kGroup) {
    const int count = share.end - i < kGroup ? int(share.end - i) : kGroup;
    T group[kGroup];
    load_group(values + i, count, T(0), group);
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) group[k] *= by;
    store_group(values + i, count, group);
  }
}

}  // namespace fused_sce::cuda
