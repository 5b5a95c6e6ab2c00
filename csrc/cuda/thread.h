// What one CUDA thread does between the launch and the reduction, as plain host-device functions of the thread's index:
// tests/cpp/cuda_threads.cpp runs them for every thread of a grid on a CPU. No CUDA header.
//
// Elements are dealt out in groups of neighbours (launch.h: group_size), group g to thread g modulo the number of
// threads. Groups are counted from the first element and never shifted to an aligned address; instead each operand of a
// group is read with one wide load where its own address allows, else element by element. So which thread adds which
// losses in which order follows from the length and the type of the logits alone: a sum has the same bits for a slice
// that starts at an odd address, for a transposed tensor and for any target type.
//
// There are two ways through a problem: Contiguous, in registers and with several loads on their way at once, for what
// training asks for all day, and Strided, one element at a time, for everything. Both do the same arithmetic: that of
// the CPU kernels, bit for bit, but for sums over 16-bit logits and their gradients, which gpu16.h has a shorter
// formula for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../formulas/gpu16.h"
#include "../formulas/loss.h"
#include "../problem.h"
#include "launch.h"

// A loop over a group must be unrolled wholly: an array that is indexed at run time would lie in memory.
#if defined(__CUDACC__)
#define FUSED_SCE_UNROLL _Pragma("unroll")
#define FUSED_SCE_NO_UNROLL _Pragma("unroll 1")
#else
#define FUSED_SCE_UNROLL
#define FUSED_SCE_NO_UNROLL
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

// All elements, as one of `threads`; a thread beyond those has none.
FUSED_SCE_INLINE Share share_of(int64_t numel, int64_t thread, int64_t threads) {
  return {0, thread < threads ? numel : 0, thread, threads};
}

// A target of one byte that is to be a number: uint8, and bool once it is 0 or 1.
struct Label {
  uint8_t byte;
};

// A group as it lies in memory, aligned as one wide load wants it (of 16 bytes, several of which make up a larger
// group). Words and not elements, because a compiler that sees elements takes a register for each.
template <class Stored, int kGroup>
struct __attribute__((aligned(sizeof(Stored) * kGroup < 16 ? sizeof(Stored) * kGroup : 16), may_alias)) Pack {
  static constexpr int kBytes = int(sizeof(Stored)) * kGroup;
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;  // two bytes are the smallest group
  Word words[kBytes / sizeof(Word)];
};

template <class Stored>
FUSED_SCE_INLINE bool is_aligned_for_group(const Stored* address, int group) {
  const int bytes = int(sizeof(Stored)) * group;
  return reinterpret_cast<uintptr_t>(address) % (bytes < 16 ? bytes : 16) == 0;
}

// Element k of a pack. `k` is known when it is compiled.
template <class Stored, int kGroup>
FUSED_SCE_INLINE Stored element_of(const Pack<Stored, kGroup>& pack, int k) {
  using Word = typename Pack<Stored, kGroup>::Word;
  if constexpr (sizeof(Stored) == 8) {
    return bit_cast<Stored>(uint64_t(pack.words[2 * k]) | uint64_t(pack.words[2 * k + 1]) << 32);
  } else if constexpr (sizeof(Stored) == sizeof(uint32_t)) {
    return bit_cast<Stored>(pack.words[k]);
  } else {
    using Bits = std::conditional_t<sizeof(Stored) == 2, uint16_t, uint8_t>;
    constexpr int kPerWord = sizeof(Word) / sizeof(Stored);
    return bit_cast<Stored>(Bits(pack.words[k / kPerWord] >> (k % kPerWord * 8 * int(sizeof(Stored)))));
  }
}

template <class T, class Stored, int kGroup>
FUSED_SCE_INLINE void unpack(const Pack<Stored, kGroup>& pack, T (&values)[kGroup]) {
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) values[k] = load_as<T>(element_of(pack, k));
}

// Without the conversion instruction, which runs at an eighth of the speed of an addition: 2^23 with the byte in its
// last bits, less 2^23.
template <class T, int kGroup>
FUSED_SCE_INLINE void unpack(const Pack<Label, kGroup>& pack, T (&values)[kGroup]) {
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) {
#if defined(__CUDA_ARCH__)
    const uint32_t bits = __byte_perm(pack.words[k / 4], 0x4b000000u, 0x7440u | (k % 4));
#else
    const uint32_t bits = 0x4b000000u | element_of(pack, k).byte;
#endif
    values[k] = T(bit_cast<float>(bits) - 0x1p23f);
  }
}

// 1 for every byte that is not 0, four at a time: all are, for bools made by torch, but a view of other bytes may say
// otherwise.
template <int kGroup>
FUSED_SCE_INLINE void make_bool(Pack<Label, kGroup>& pack) {
  FUSED_SCE_UNROLL
  for (int n = 0; n < kGroup / 4; ++n) {
    const uint32_t word = pack.words[n];
    pack.words[n] = (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7 & 0x01010101u;
  }
}

template <class Stored, int kGroup, class T>
FUSED_SCE_INLINE Pack<Stored, kGroup> packed(const T (&values)[kGroup]) {
  Stored stored[kGroup];
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) stored[k] = StoreAs<Stored>::from(values[k]);
  Pack<Stored, kGroup> pack;
  memcpy(&pack, stored, sizeof(pack));
  return pack;
}

// A group at element `i` of an array, by wide loads.
template <class Stored, int kGroup>
FUSED_SCE_INLINE Pack<Stored, kGroup> load_pack(const void* data, int64_t i) {
  return *reinterpret_cast<const Pack<Stored, kGroup>*>(static_cast<const Stored*>(data) + i);
}

// The first `count` elements of a group, one by one; the rest are 0.
template <class Stored, int kGroup>
FUSED_SCE_INLINE Pack<Stored, kGroup> load_singly(const void* data, int64_t i, int count) {
  Stored stored[kGroup];
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) stored[k] = k < count ? static_cast<const Stored*>(data)[i + k] : Stored{};
  Pack<Stored, kGroup> pack;
  memcpy(&pack, stored, sizeof(pack));
  return pack;
}

// The first `count` elements of a group of any type; the rest are 0.
template <class T, int kGroup>
FUSED_SCE_INLINE void load_group(const Operand& operand, int64_t i, int count, T (&values)[kGroup]) {
  visit(operand.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    const bool is_whole = count == kGroup && is_aligned_for_group(static_cast<const Stored*>(operand.data) + i, kGroup);
    unpack(
        is_whole ? load_pack<Stored, kGroup>(operand.data, i) : load_singly<Stored, kGroup>(operand.data, i, count),
        values);
  });
}

template <class T, int kGroup, class Stored>
FUSED_SCE_INLINE void store_pack(Stored* to, const T (&values)[kGroup]) {
  *reinterpret_cast<Pack<Stored, kGroup>*>(to) = packed<Stored>(values);
}

template <class T, int kGroup, class Stored>
FUSED_SCE_INLINE void store_singly(Stored* to, int count, const T (&values)[kGroup]) {
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) to[k] = StoreAs<Stored>::from(values[k]);
  }
}

template <class T, int kGroup>
FUSED_SCE_INLINE void store_group(const Result& result, int64_t i, int count, const T (&values)[kGroup]) {
  visit_floating(result.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    Stored* const to = static_cast<Stored*>(result.data) + i;
    if (count == kGroup && is_aligned_for_group(to, kGroup)) {
      store_pack(to, values);
    } else {
      store_singly(to, count, values);
    }
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

template <class Stored>
struct ComputedIn {
  using Type = float;
};
template <>
struct ComputedIn<double> {
  using Type = double;
};

FUSED_SCE_INLINE bool is_finite(double value) { return value - value == 0.0; }

// loss.h's formula for every type, with the sum of a group's losses in double. The gradient is divided by the divisor,
// whose reciprocal `scale` is.
template <class Computed>
struct Exact {
  using T = Computed;
  using GroupSum = double;
  static constexpr bool kNeedsMending = false;

  template <bool kPosWeight>
  FUSED_SCE_INLINE LossAndGradient<T> compute(T logit, T target, T pos_weight, TwoPart<T> scale) {
    const LossAndGradient<T> result = sigmoid_cross_entropy<T, kPosWeight>(logit, target, pos_weight);
    return {result.loss, mul_add(result.gradient, scale.lower, result.gradient * scale.upper)};
  }

  template <bool kPosWeight>
  FUSED_SCE_INLINE T mended(T loss, T, T, T) {
    return loss;
  }
};

// The shorter formula for 16-bit logits, with the sum of a group's losses in float.
struct Rounded {
  using T = float;
  using GroupSum = float;
  static constexpr bool kNeedsMending = true;

  template <bool kPosWeight>
  FUSED_SCE_INLINE LossAndGradient<float> compute(float logit, float target, float pos_weight, TwoPart<float> scale) {
    const LossAndGradient<float> result = sigmoid_cross_entropy_16bit<kPosWeight>(logit, target, pos_weight);
    return {result.loss, result.gradient * scale.upper};
  }

  // The loss where the formula gives NaN for an infinite logit.
  template <bool kPosWeight>
  FUSED_SCE_INLINE float mended(float loss, float logit, float target, float pos_weight) {
    if (loss == loss) return loss;
    return sigmoid_cross_entropy<float, kPosWeight>(logit, target, pos_weight).loss;
  }

  template <bool kPosWeight>
  FUSED_SCE_INLINE float mended_loss(float logit, float target, float pos_weight) {
    const float loss = sigmoid_cross_entropy_16bit<kPosWeight>(logit, target, pos_weight).loss;
    return mended<kPosWeight>(loss, logit, target, pos_weight);
  }
};

// Losses and gradients on their own (reduction "none") are the CPU's bits: a loss may be wanted in float32.
template <class Formula, Job kJob>
using FormulaFor = std::conditional_t<makes_sum(kJob), Formula, Exact<typename Formula::T>>;

template <class Logits>
using FormulaOf =
    std::conditional_t<std::is_floating_point<Logits>::value, Exact<typename ComputedIn<Logits>::Type>, Rounded>;

// A target of any type, found out at run time.
struct AnyTarget {};

// Logits and target contiguous, at most one weight and pos_weight for each column, at most an upstream gradient
// (launch.h: is_contiguous, has_fixed_weights). `Target` is the target's type, as it is stored, or AnyTarget.
template <class Logits, class Target, bool kWeighted>
struct Contiguous {
  using T = typename ComputedIn<Logits>::Type;
  static constexpr int kGroup = 16 / sizeof(Logits);
  // Groups of a thread that are loaded before the first of them is used.
  static constexpr int kInFlight = kWeighted || std::is_same<Target, AnyTarget>::value ? 1 : 2;

  // Does the job for a thread's share of the elements; returns the sum of their losses where the job makes one.
  template <Job kJob>
  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, Share share) {
    const int64_t step = share.threads * kGroup;
    const bool is_wide = loads_are_wide(problem, share.begin);
    int64_t i = share.begin + share.thread * kGroup;
    if (i >= share.end) return 0.0;
    const Weights weights = load_weights(problem, i);

    double sum = 0.0;
    if (is_wide) {
      for (; i + (kInFlight - 1) * step + kGroup <= share.end; i += kInFlight * step) {
        Raw raw[kInFlight];
        FUSED_SCE_UNROLL
        for (int n = 0; n < kInFlight; ++n) raw[n] = load(problem, i + n * step, kGroup, true);
        FUSED_SCE_UNROLL
        for (int n = 0; n < kInFlight; ++n) {
          sum += finish<kJob>(problem, scale, weights, raw[n], i + n * step, kGroup, true);
        }
      }
    }
    for (; i < share.end; i += step) {
      const int count = share.end - i < kGroup ? int(share.end - i) : kGroup;
      const bool is_whole = is_wide && count == kGroup;
      const Raw raw = load(problem, i, count, is_whole);
      sum += finish<kJob>(problem, scale, weights, raw, i, count, is_whole);
    }
    if constexpr (makes_sum(kJob) && FormulaOf<Logits>::kNeedsMending) {
      // One question for all of the thread's elements instead of one for each.
      if (!is_finite(sum)) sum = mended_sum(problem, share);
    }
    return sum;
  }

 private:
  static constexpr bool kAnyTarget = std::is_same<Target, AnyTarget>::value;
  using InGroup = std::conditional_t<kAnyTarget, T, Target>;

  struct Values {
    T values[kGroup];
  };

  // A group as it lies in memory; a target of unknown type is converted when it is loaded.
  struct Raw {
    Pack<Logits, kGroup> logits;
    std::conditional_t<kAnyTarget, Values, Pack<InGroup, kGroup>> target;
  };

  struct Weights {
    T weight[kGroup];
    T pos_weight[kGroup];
  };

  // Groups are whole numbers of wide loads, so that one is aligned where all are.
  FUSED_SCE_INLINE bool loads_are_wide(const Problem& problem, int64_t begin) {
    return is_aligned_for_group(static_cast<const Logits*>(problem.logits.data) + begin, kGroup) &&
           (kAnyTarget || is_aligned_for_group(static_cast<const InGroup*>(problem.target.data) + begin, kGroup)) &&
           is_aligned_for_group(static_cast<const Logits*>(problem.gradient.data) + begin, kGroup);
  }

  FUSED_SCE_INLINE Raw load(const Problem& problem, int64_t i, int count, bool is_whole) {
    Raw raw;
    raw.logits = is_whole ? load_pack<Logits, kGroup>(problem.logits.data, i)
                          : load_singly<Logits, kGroup>(problem.logits.data, i, count);
    if constexpr (kAnyTarget) {
      load_group(problem.target, i, count, raw.target.values);
    } else {
      raw.target = is_whole ? load_pack<Target, kGroup>(problem.target.data, i)
                            : load_singly<Target, kGroup>(problem.target.data, i, count);
    }
    return raw;
  }

  // The weights of a thread's columns, of which the first is that of element `i`.
  FUSED_SCE_INLINE Weights load_weights(const Problem& problem, int64_t i) {
    Weights weights = {};
    if constexpr (kWeighted) {
      const int last = problem.ndim - 1;
      int64_t column = i % problem.sizes[last];
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        if (problem.weight) weights.weight[k] = load_element<T>(problem.weight, column * problem.weight.strides[last]);
        if (problem.pos_weight) {
          weights.pos_weight[k] = load_element<T>(problem.pos_weight, column * problem.pos_weight.strides[last]);
        }
        if (++column == problem.sizes[last]) column = 0;
      }
    }
    return weights;
  }

  // Computes and stores the group at `i`; returns the sum of its losses.
  template <Job kJob>
  FUSED_SCE_INLINE double finish(
      const Problem& problem,
      TwoPart<T> scale,
      const Weights& weights,
      Raw raw,
      int64_t i,
      int count,
      bool is_whole) {
    if constexpr (std::is_same<Target, Label>::value) {
      if (problem.target.dtype == DType::Bool) make_bool(raw.target);
    }
    T loss[kGroup];
    T gradient[kGroup];
    double sum;
    if (kWeighted && problem.pos_weight) {
      sum = compute<kJob, true>(problem, scale, weights, raw, count, loss, gradient);
    } else {
      sum = compute<kJob, false>(problem, scale, weights, raw, count, loss, gradient);
    }

    if (kJob == Job::Loss) store_group(problem.loss, i, count, loss);
    if (kJob == Job::Gradient && problem.upstream) multiply_by_upstream(problem, i, count, gradient);
    if (makes_gradient(kJob)) {
      Logits* const to = static_cast<Logits*>(problem.gradient.data) + i;
      if (is_whole) {
        store_pack(to, gradient);
      } else {
        store_singly(to, count, gradient);
      }
    }
    return sum;
  }

  template <Job kJob, bool kPosWeight>
  FUSED_SCE_INLINE double compute(
      const Problem& problem,
      TwoPart<T> scale,
      const Weights& weights,
      const Raw& raw,
      int count,
      T (&loss)[kGroup],
      T (&gradient)[kGroup]) {
    using Formula = FormulaFor<FormulaOf<Logits>, kJob>;
    T logits[kGroup];
    T target[kGroup];
    unpack(raw.logits, logits);
    if constexpr (kAnyTarget) {
      memcpy(target, raw.target.values, sizeof(target));
    } else {
      unpack(raw.target, target);
    }
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      const LossAndGradient<T> result =
          Formula::template compute<kPosWeight>(logits[k], target[k], weights.pos_weight[k], scale);
      loss[k] = result.loss;
      gradient[k] = result.gradient;
    }
    if (kWeighted && problem.weight) {
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        loss[k] *= weights.weight[k];
        gradient[k] *= weights.weight[k];
      }
    }
    if (!makes_sum(kJob)) return 0.0;

    typename Formula::GroupSum sum = 0;
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) sum += k < count ? typename Formula::GroupSum(loss[k]) : 0;
    return double(sum);
  }

  // The sum of a share again, from memory and in as little code as possible: for a NaN or an infinite logit among the
  // elements, or a group whose sum is too large for float.
  FUSED_SCE_INLINE double mended_sum(const Problem& problem, Share share) {
    const int last = problem.ndim - 1;
    double sum = 0.0;
    for (int64_t begin = share.begin + share.thread * kGroup; begin < share.end; begin += share.threads * kGroup) {
      FUSED_SCE_NO_UNROLL
      for (int64_t i = begin; i < begin + kGroup && i < share.end; ++i) {
        const T logit = load_element<T>(problem.logits, i);
        const T target = load_element<T>(problem.target, i);
        const int64_t column = kWeighted ? i % problem.sizes[last] : 0;
        T loss;
        if (kWeighted && problem.pos_weight) {
          const T pos_weight = load_element<T>(problem.pos_weight, column * problem.pos_weight.strides[last]);
          loss = Rounded::mended_loss<true>(logit, target, pos_weight);
        } else {
          loss = Rounded::mended_loss<false>(logit, target, T(1));
        }
        if (kWeighted && problem.weight) loss *= load_element<T>(problem.weight, column * problem.weight.strides[last]);
        sum += double(loss);
      }
    }
    return sum;
  }

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
template <class AnyFormula>
struct Strided {
  using T = typename AnyFormula::T;

  template <Job kJob>
  FUSED_SCE_INLINE double run(const Problem& problem, TwoPart<T> scale, Share share) {
    using Formula = FormulaFor<AnyFormula, kJob>;
    const int group = group_size(problem.logits.dtype);
    const int last = problem.ndim - 1;
    double sum = 0.0;
    double mended_sum = 0.0;
    for (int64_t begin = share.begin + share.thread * group; begin < share.end; begin += share.threads * group) {
      const int64_t end = share.end - begin < group ? share.end : begin + group;
      Position at = position_of(problem, begin);
      typename Formula::GroupSum group_sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        LossAndGradient<T> result = compute<Formula>(problem, at, scale);
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
        if (makes_sum(kJob)) group_sum += typename Formula::GroupSum(result.loss);
        if (makes_sum(kJob) && Formula::kNeedsMending) mended_sum += double(result.loss);

        if (++at.column == problem.sizes[last]) {
          at = position_of(problem, i + 1);
        } else {
          step(problem, last, 1, at);
        }
      }
      sum += double(group_sum);
    }
    return Formula::kNeedsMending && !is_finite(sum) ? mended_sum : sum;
  }

 private:
  template <class Formula>
  FUSED_SCE_INLINE LossAndGradient<T> compute(const Problem& problem, const Position& at, TwoPart<T> scale) {
    const T logit = load_element<T>(problem.logits, at.logits);
    const T target = load_element<T>(problem.target, at.target);
    LossAndGradient<T> result;
    if (problem.pos_weight) {
      const T pos_weight = load_element<T>(problem.pos_weight, at.pos_weight);
      result = Formula::template compute<true>(logit, target, pos_weight, scale);
      result.loss = Formula::template mended<true>(result.loss, logit, target, pos_weight);
    } else {
      result = Formula::template compute<false>(logit, target, T(1), scale);
      result.loss = Formula::template mended<false>(result.loss, logit, target, T(1));
    }
    return result;
  }
};

// Calls `action` with the target types that have kernels of their own for these logits: float, the logits' own, and
// bytes. The others convert as they load, and so do all if not kMany.
template <class Logits, bool kMany, class Action>
void visit_target(DType target, Action&& action) {
  if constexpr (kMany && !std::is_same<Logits, double>::value) {
    switch (target) {
      case DType::Float32: return action(float{});
      case DType::Bool:
      case DType::UInt8: return action(Label{});
      case DType::BFloat16:
        if constexpr (std::is_same<Logits, BFloat16>::value) return action(BFloat16{});
        break;
      case DType::Float16:
        if constexpr (std::is_same<Logits, Float16>::value) return action(Float16{});
        break;
      default: break;
    }
  }
  action(AnyTarget{});
}

// Calls `action` with the way through the problem that fits it and the job, and with the problem as that way reads it.
// `keeps_weights`: whether the threads can keep the weights in registers (launch.h: has_fixed_weights); a
// std::false_type for rows, where they never can.
template <Job kJob, class KeepsWeights, class Action>
void choose_access(const Problem& problem, KeepsWeights keeps_weights, Action&& action) {
  constexpr bool kMayKeepWeights = !std::is_same<KeepsWeights, std::false_type>::value;
  const bool is_weighted = problem.weight || problem.pos_weight;
  if (!is_contiguous(problem) || (is_weighted && !keeps_weights)) {
    const Problem strided = with_strides(problem);
    if (problem.in_double) {
      action(Strided<Exact<double>>{}, strided);
    } else if (problem.logits.dtype == DType::Float32) {
      action(Strided<Exact<float>>{}, strided);
    } else {
      action(Strided<FormulaFor<Rounded, kJob>>{}, strided);
    }
    return;
  }
  visit_floating(problem.logits.dtype, [&](auto tag) {
    using Logits = decltype(tag);
    // Where time matters target types have kernels of their own; that is not worth it for losses one by one, sums by
    // rows, and the weighted gradient of reduction "none" or float16.
    constexpr bool kManyTargets = kMayKeepWeights && kJob != Job::Loss;
    if constexpr (kMayKeepWeights) {
      if (is_weighted) {
        const auto act = [&](auto target) { action(Contiguous<Logits, decltype(target), true>{}, problem); };
        return visit_target<Logits, makes_sum(kJob)>(problem.target.dtype, act);
      }
    }
    const auto act = [&](auto target) { action(Contiguous<Logits, decltype(target), false>{}, problem); };
    visit_target<Logits, kManyTargets>(problem.target.dtype, act);
  });
}

// values[i] *= factor for a share of an array. For a factor of 1, the usual one, no memory is touched.
template <class Stored>
FUSED_SCE_INLINE void scale_values(Stored* values, const Operand& factor, Share share) {
  using T = typename ComputedIn<Stored>::Type;
  constexpr int kGroup = 16 / sizeof(Stored);
  const T by = load_element<T>(factor, 0);
  if (by == T(1)) return;
  const bool is_wide = is_aligned_for_group(values + share.begin, kGroup);
  for (int64_t i = share.begin + share.thread * kGroup; i < share.end; i += share.threads * kGroup) {
    const int count = share.end - i < kGroup ? int(share.end - i) : kGroup;
    const bool is_whole = is_wide && count == kGroup;
    T group[kGroup];
    unpack(is_whole ? load_pack<Stored, kGroup>(values, i) : load_singly<Stored, kGroup>(values, i, count), group);
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) group[k] *= by;
    if (is_whole) {
      store_pack(values + i, group);
    } else {
      store_singly(values + i, count, group);
    }
  }
}

}  // namespace fused_sce::cuda
