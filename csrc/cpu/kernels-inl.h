// The CPU kernels, compiled once per instruction set: the including file defines FUSED_SCE_ISA, and FUSED_SCE_TARGET if
// the compiler's own target is not meant.
//
// Elements are processed in blocks of kBlock. Operands that are not arrays of the computing type are gathered into
// buffers, loops over plain arrays compute loss and gradient (the compiler vectorises them; there are no intrinsics),
// and results of another type are scattered. So every type, stride and broadcast costs one small loop, and the formula
// is compiled once, not once per combination.

// Every standard header comes before the target region. Inside, the compiler would build its inline functions for that
// instruction set, and the linker could use them on machines without it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#define FUSED_SCE_STRING_(name) #name
#define FUSED_SCE_STRING(name) FUSED_SCE_STRING_(name)
#define FUSED_SCE_PRAGMA_(...) _Pragma(#__VA_ARGS__)
#define FUSED_SCE_PRAGMA(...) FUSED_SCE_PRAGMA_(__VA_ARGS__)

#if defined(FUSED_SCE_TARGET) && defined(__clang__)
FUSED_SCE_PRAGMA(clang attribute push(__attribute__((target(FUSED_SCE_TARGET))), apply_to = function))
#elif defined(FUSED_SCE_TARGET)
FUSED_SCE_PRAGMA(GCC push_options)
FUSED_SCE_PRAGMA(GCC target(FUSED_SCE_TARGET))
#endif

#include "kernels.h"

namespace fused_sce::cpu::FUSED_SCE_ISA {
namespace {

#include "target-inl.h"

// Writes an array of T to elements [begin, begin + count) of a result.
template <class T>
void scatter(const Result& result, int64_t begin, int64_t count, const T* values) {
  visit_floating(result.dtype, [&](auto tag) {
    using To = decltype(tag);
    To* to = static_cast<To*>(result.data) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = store_as<To>(values[i]);
  });
}

// The memory of an operand's next block, to be prefetched.
struct Upcoming {
  const char* data;
  int64_t element_size;  // 0: unknown, prefetch nothing
};

Upcoming upcoming(const Problem& problem, const Operand& operand, int64_t begin) {
  if (!operand.contiguous || begin >= problem.numel) return {nullptr, 0};
  const int64_t size = visit(operand.dtype, [](auto tag) { return int64_t(sizeof(tag)); });
  return {static_cast<const char*>(operand.data) + begin * size, size};
}

// Elements prefetched at a time: 64 of them fill as many cache lines of 64 bytes as one element has bytes.
constexpr int64_t kPrefetchStep = 64;

// Prefetches elements [first, first + kPrefetchStep) of the next block.
FUSED_SCE_INLINE void fetch(Upcoming upcoming, int64_t first) {
  for (int64_t line = 0; line < upcoming.element_size; ++line) {
    __builtin_prefetch(upcoming.data + first * upcoming.element_size + line * 64);
  }
}

// The value where all bits of the mask are set, 0 where none is.
template <class T>
T masked(T value, typename Constants<T>::Bits mask) {
  return bit_cast<T>(bit_cast<typename Constants<T>::Bits>(value) & mask);
}

// The work of one block: arrays of `count` <= kBlock elements. The results must not overlap the inputs.
template <class T>
struct Work {
  int64_t count;
  const T* logits;
  const T* target;
  const T* pos_weight;                        // null: 1
  const typename Constants<T>::Bits* counts;  // as in Block; null: all count
  const Modulation<T>* modulation;            // null: the formula is that of loss.h
  const T* alpha = nullptr;                   // null: 1
  TwoPart<T> scale;                           // of the gradient
  T* loss;                                    // null: not wanted
  T* gradient;                                // null: not wanted
  Upcoming next_logits;
  Upcoming next_target = {nullptr, 0};
};

// The first two loops of `compute`: exp(-|x|) = upper + lower.
template <class T>
FUSED_SCE_INLINE void exponentials(const Work<T>& work, T* __restrict__ upper, T* __restrict__ lower) {
  T largest = Constants<T>::kLargest;
  asm("" : "+m"(largest));  // as far as the compiler knows, a variable: see reduce_argument()
  for (int64_t i = 0; i < work.count; ++i) {
    const ReducedArgument<T> reduced = reduce_argument(work.logits[i], largest);
    upper[i] = reduced.remainder;
    lower[i] = reduced.scale;
  }
  for (int64_t i = 0; i < work.count; ++i) {
    const TwoPart<T> e = exp_of(ReducedArgument<T>{upper[i], lower[i]});
    upper[i] = e.upper;
    lower[i] = e.lower;
  }
}

// Calls `loop(begin, count)` for all elements of the block, and prefetches the next block's inputs between them.
template <class T, class Loop>
FUSED_SCE_INLINE void with_prefetch(const Work<T>& work, const Loop& loop) {
  int64_t begin = 0;
  for (; begin + kPrefetchStep <= work.count; begin += kPrefetchStep) {
    fetch(work.next_logits, begin);
    fetch(work.next_target, begin);
    loop(begin, kPrefetchStep);
  }
  loop(begin, work.count - begin);
}

// 0 for the elements that do not count.
template <class T>
void zero_others(int64_t count, const typename Constants<T>::Bits* __restrict__ counts, T* __restrict__ values) {
  for (int64_t i = 0; i < count; ++i) values[i] = masked(values[i], counts[i]);
}

// The third loop of `compute`, over exp(-|x|) = upper + lower.
template <class T, bool kPosWeight, bool kSelect, bool kLeavesOut, bool kLoss, bool kGradient>
FUSED_SCE_INLINE void loss_and_gradient(
    int64_t count,
    const T* __restrict__ logits,
    const T* __restrict__ target,
    const T* __restrict__ pos_weight,
    const typename Constants<T>::Bits* __restrict__ counts,
    const T* __restrict__ upper,
    const T* __restrict__ lower,
    TwoPart<T> scale,
    T* __restrict__ loss,
    T* __restrict__ gradient) {
  for (int64_t i = 0; i < count; ++i) {
    const T t = kLeavesOut ? masked(target[i], counts[i]) : target[i];  // NaN would cost time, see compute()
    const LossAndGradient<T> result = sigmoid_cross_entropy<T, kPosWeight, kSelect>(
        logits[i], t, kPosWeight ? pos_weight[i] : T(1), {upper[i], lower[i]});
    const T scaled_gradient = scaled(result.gradient, scale);
    if (kLoss) loss[i] = kLeavesOut ? masked(result.loss, counts[i]) : result.loss;
    if (kGradient) gradient[i] = kLeavesOut ? masked(scaled_gradient, counts[i]) : scaled_gradient;
  }
}

template <class T>
bool has_nan(int64_t count, const T* values) {
  typename Constants<T>::Bits found = 0;  // as wide as the values: GCC 12 does not vectorise it for a bool
  for (int64_t i = 0; i < count; ++i) found |= values[i] != values[i] ? 1 : 0;
  return found != 0;
}

// The formula over arrays. docs/performance.md has what else was tried.
//
// Three loops are faster than one. The whole formula is a dependency chain of more than 100 cycles and 70 instructions.
// A processor's reorder window holds about three such iterations, so the latency of the chain decides. The window holds
// three times as many iterations of a loop of a third of the length, at the price of a few loads and stores. Measured
// before add_log1p(), with AVX-512 (Intel Cascade Lake, operands in the cache), ns per element: one loop 1.67,
// two 1.30, three 1.23.
//
// The third loop computes longest, so it prefetches the inputs of the next block: at 1024 x 9605 1.39 ns instead of
// 1.75, without a gradient 1.01 instead of 1.41. Prefetching in the first loop, which waits for memory itself, was
// slower (1.5 to 2.0).
template <class T, bool kPosWeight, bool kLoss, bool kGradient>
void compute(const Work<T>& work) {
  alignas(64) T upper[kBlock];
  alignas(64) T lower[kBlock];
  exponentials(work, upper, lower);
  const auto third_loop_of = [&](int64_t begin, int64_t count, auto select, auto leaves_out) {
    loss_and_gradient<T, kPosWeight, decltype(select)::value, decltype(leaves_out)::value, kLoss, kGradient>(
        count, work.logits + begin, work.target + begin, kPosWeight ? work.pos_weight + begin : nullptr,
        decltype(leaves_out)::value ? work.counts + begin : nullptr, upper + begin, lower + begin, work.scale,
        kLoss ? work.loss + begin : nullptr, kGradient ? work.gradient + begin : nullptr);
  };
  const auto third_loop = [&](int64_t begin, int64_t count, auto select) {
    work.counts ? third_loop_of(begin, count, select, std::true_type{})
                : third_loop_of(begin, count, select, std::false_type{});
  };
  with_prefetch(work, [&](int64_t begin, int64_t count) { third_loop(begin, count, std::false_type{}); });
  // A block with NaN in it is computed again, so that the usual one does without the selections: they took 30 % of the
  // time.
  if (!kPosWeight) return;
  if ((kLoss && has_nan(work.count, work.loss)) || (kGradient && has_nan(work.count, work.gradient))) {
    third_loop(0, work.count, std::true_type{});
  }
}

#include "focal-inl.h"

template <class T, bool kPosWeight>
void compute_results(const Work<T>& work) {
  if (work.loss && work.gradient) {
    compute<T, kPosWeight, true, true>(work);
  } else if (work.loss) {
    compute<T, kPosWeight, true, false>(work);
  } else {
    compute<T, kPosWeight, false, true>(work);
  }
}

// Makes work.loss and work.gradient, whichever is wanted.
template <class T>
void compute_block(const Work<T>& work) {
  if (!work.loss && !work.gradient) return;
  if (work.modulation) return compute_focal(work);
  work.pos_weight ? compute_results<T, true>(work) : compute_results<T, false>(work);
}

// values[i] = factor[i] * values[i], see product().
template <class T>
void multiply(int64_t count, const T* __restrict__ factor, T* __restrict__ values) {
  for (int64_t i = 0; i < count; ++i) values[i] = product(factor[i], values[i]);
}

// The same with factors times `scale`.
template <class T>
void multiply(int64_t count, const T* __restrict__ factor, TwoPart<T> scale, T* __restrict__ values) {
  for (int64_t i = 0; i < count; ++i) values[i] = scaled_product(factor[i], scale, values[i]);
}

// The buffers of one block. The alignment keeps each vector inside one cache line, which saves 15 % of the time.
template <class T>
struct Block {
  alignas(64) T logits[kBlock];
  alignas(64) T target[kBlock];
  alignas(64) T weight[kBlock];
  alignas(64) T pos_weight[kBlock];
  alignas(64) T alpha[kBlock];
  alignas(64) T upstream[kBlock];
  alignas(64) T loss[kBlock];
  alignas(64) T gradient[kBlock];
  alignas(64) typename Constants<T>::Bits counts[kBlock];  // all ones where an element counts, else 0
};

// What all blocks of a problem have in common.
template <class T>
struct Job {
  const Problem& problem;
  TwoPart<T> scale = gradient_scale<T>(problem);
  Modulation<T> modulation = modulation_of<T>(problem.options, bool(problem.alpha));
  bool all_good = true;  // so far: no target is wrong
  // Whether targets are checked after they are gathered: gather() checks dense integers that all count.
  bool checks_values = problem.options.check_target || (is_integer(problem.target.dtype) &&
                                                        (problem.leaves_out() || problem.format == TargetFormat::Csr));
};

// Computes elements [begin, begin + count), count <= kBlock. Writes the gradient to problem.gradient if it is wanted,
// and the loss to block.loss if `want_loss`.
template <class T>
void compute_elements(Job<T>& job, int64_t begin, int64_t count, bool want_loss, Block<T>& block) {
  const Problem& problem = job.problem;
  const bool leaves_out = problem.leaves_out();
  const T* target = gather_target(problem, begin, count, block.target, &job.all_good, !leaves_out);
  const auto* const counts = leaves_out ? block.counts : nullptr;
  if (leaves_out) find_counted(problem, begin, count, target, block.weight, block.counts);
  if (job.checks_values && !are_valid(problem, count, target, counts)) job.all_good = false;
  if (!want_loss && !problem.gradient) return;
  // Not directly into the memory of the logits: the results of `compute` must not overlap its inputs.
  const bool direct = problem.gradient.dtype == kDTypeOf<T> && problem.gradient.data != problem.logits.data;
  T* const gradient = direct ? static_cast<T*>(problem.gradient.data) + begin : block.gradient;
  const bool has_factors = problem.weight || problem.upstream;
  const bool is_zero = is_zero_scale(job.scale);

  Work<T> work;
  work.count = count;
  work.logits = gather(problem, problem.logits, begin, count, block.logits);
  const T* const prior = problem.prior ? gather(problem, problem.prior, begin, count, block.weight) : nullptr;
  work.target = change_target(problem.options, count, target, prior, block.target);
  work.pos_weight = problem.pos_weight ? gather(problem, problem.pos_weight, begin, count, block.pos_weight) : nullptr;
  work.counts = counts;
  work.modulation = problem.is_focal() ? &job.modulation : nullptr;
  if (problem.alpha) {
    work.alpha = gather(problem, problem.alpha, begin, count, block.alpha);
  } else if (problem.options.has_alpha) {
    fill(block.alpha, count, T(problem.options.alpha));
    work.alpha = block.alpha;
  }
  work.scale = has_factors ? quotient_in_parts<T>(1.0, 1.0) : job.scale;
  work.loss = want_loss ? block.loss : nullptr;
  work.gradient = problem.gradient && !is_zero ? gradient : nullptr;
  work.next_logits = upcoming(problem, problem.logits, begin + kBlock);
  if (problem.format == TargetFormat::Dense) {
    work.next_target = upcoming(problem, problem.target, begin + kBlock);
  }
  compute_block(work);

  const T* factor = nullptr;
  if (problem.weight) {
    factor = gather(problem, problem.weight, begin, count, block.weight);
    if (work.loss) multiply(count, factor, work.loss);
    if (work.loss && leaves_out) zero_others(count, block.counts, work.loss);
  }
  if (!problem.gradient) return;
  if (problem.upstream) {
    const T* upstream = gather(problem, problem.upstream, begin, count, block.upstream);
    if (factor) {
      for (int64_t i = 0; i < count; ++i) block.weight[i] = product_of_factors(factor[i], upstream[i]);
      factor = block.weight;
    } else {
      factor = upstream;
    }
  }
  if (is_zero) {
    for (int64_t i = 0; i < count; ++i) gradient[i] = T(0);
  } else if (factor) {
    multiply(count, factor, job.scale, gradient);
    if (leaves_out) zero_others(count, block.counts, gradient);
  }
  if (!direct) scatter(problem.gradient, begin, count, gradient);
}

// A sum in sixteen float64 lanes: sixteen fill the widest vector unit, and all units get the same sum. Each array is
// added up by itself, so that even the sum of a long row of equal losses is off by few ULP of float64.
struct Lanes {
  static constexpr int kCount = 16;
  double sum[kCount] = {};

  template <class T>
  void add(const T* values, int64_t count) {
    double part[kCount] = {};
    int64_t i = 0;
    for (; i + kCount <= count; i += kCount) {
      for (int lane = 0; lane < kCount; ++lane) part[lane] += double(values[i + lane]);
    }
    for (int lane = 0; i + lane < count; ++lane) part[lane] += double(values[i + lane]);
    for (int lane = 0; lane < kCount; ++lane) sum[lane] += part[lane];
  }

  double total() {
    for (int width = kCount / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
    }
    return sum[0];
  }
};

template <class T>
bool chunks_as(const Problem& problem, int64_t begin, int64_t end, double* partial_sums) {
  Block<T> block;
  Job<T> job{problem};
  const bool want_loss = partial_sums || problem.loss;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t chunk_end = (chunk + 1) * kChunk < problem.numel ? (chunk + 1) * kChunk : problem.numel;
    Lanes lanes;
    for (int64_t i = chunk * kChunk; i < chunk_end; i += kBlock) {
      const int64_t count = chunk_end - i < kBlock ? chunk_end - i : kBlock;
      compute_elements(job, i, count, want_loss, block);
      if (problem.loss) scatter(problem.loss, i, count, block.loss);
      if (partial_sums) lanes.add(block.loss, count);
    }
    if (partial_sums) partial_sums[chunk - begin] = lanes.total();
  }
  return job.all_good;
}

template <class T>
bool rows_as(const Problem& problem, int64_t columns, int64_t begin, int64_t end) {
  Block<T> block;
  Job<T> job{problem};
  // Short rows share a block: a head with five labels would otherwise fill no vector.
  const int64_t rows_per_block = columns > 0 && columns <= kBlock ? kBlock / columns : 1;
  for (int64_t row = begin; row < end; row += rows_per_block) {
    const int64_t rows = end - row < rows_per_block ? end - row : rows_per_block;
    if (rows_per_block > 1) compute_elements(job, row * columns, rows * columns, true, block);
    for (int64_t k = 0; k < rows; ++k) {
      PairwiseSum sum;
      if (rows_per_block > 1) {
        Lanes lanes;
        lanes.add(block.loss + k * columns, columns);
        sum.add(lanes.total());
      }
      for (int64_t chunk = 0; rows_per_block == 1 && chunk < columns; chunk += kChunk) {
        const int64_t chunk_end = chunk + kChunk < columns ? chunk + kChunk : columns;
        Lanes lanes;
        for (int64_t i = chunk; i < chunk_end; i += kBlock) {
          const int64_t count = chunk_end - i < kBlock ? chunk_end - i : kBlock;
          compute_elements(job, row * columns + i, count, true, block);
          lanes.add(block.loss, count);
        }
        sum.add(lanes.total());
      }
      const double loss = sum.total() / divisor_of(problem);
      scatter(problem.loss, row + k, 1, &loss);
    }
  }
  return job.all_good;
}

bool rescale(const Problem& problem, int64_t begin, int64_t end, double factor) {
  const int64_t first = begin * kChunk;
  const int64_t last = end * kChunk < problem.numel ? end * kChunk : problem.numel;
  return visit_floating(problem.gradient.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    using T = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
    constexpr T kSmallest = sizeof(T) == 8 ? T(0x1p-1022) : T(0x1p-126f);
    constexpr T kLargest = sizeof(T) == 8 ? T(0x1p1023) : T(0x1p127f);
    Stored* const values = static_cast<Stored*>(problem.gradient.data);
    typename Constants<T>::Bits inexact = 0;  // not a bool, see has_nan()
    for (int64_t i = first; i < last; ++i) {
      const T before = load_as<T>(values[i]);
      const T after = before * T(factor);
      const T smaller = std::fabs(before) < std::fabs(after) ? std::fabs(before) : std::fabs(after);
      inexact |= smaller >= kSmallest && std::fabs(after) <= kLargest ? 0 : 1;
      values[i] = store_as<Stored>(after);
    }
    return inexact == 0;
  });
}

template <class T>
int64_t count_as(const Problem& problem, int64_t begin, int64_t end) {
  alignas(64) T target_buffer[kBlock];
  alignas(64) T mask_buffer[kBlock];
  const int64_t last = end * kChunk < problem.numel ? end * kChunk : problem.numel;
  int64_t total = 0;
  for (int64_t i = begin * kChunk; i < last; i += kBlock) {
    const int64_t count = last - i < kBlock ? last - i : kBlock;
    bool all_good = true;  // the loss asks
    const T* const target = gather_target(problem, i, count, target_buffer, &all_good, false);
    typename Constants<T>::Bits found = 0;  // not an int, see has_nan()
    for_each_that_counts(
        problem, i, count, target, mask_buffer, [&](int64_t, bool counts) { found += counts ? 1 : 0; });
    total += int64_t(found);
  }
  return total;
}

int64_t count(const Problem& problem, int64_t begin, int64_t end) {
  return problem.in_double ? count_as<double>(problem, begin, end) : count_as<float>(problem, begin, end);
}

bool chunks(const Problem& problem, int64_t begin, int64_t end, double* partial_sums) {
  const auto run = problem.in_double ? chunks_as<double> : chunks_as<float>;
  return run(problem, begin, end, partial_sums);
}

bool rows(const Problem& problem, int64_t columns, int64_t begin, int64_t end) {
  const auto run = problem.in_double ? rows_as<double> : rows_as<float>;
  return run(problem, columns, begin, end);
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {FUSED_SCE_STRING(FUSED_SCE_ISA), chunks, rescale, rows, count};

}  // namespace fused_sce::cpu::FUSED_SCE_ISA

#if defined(FUSED_SCE_TARGET) && defined(__clang__)
FUSED_SCE_PRAGMA(clang attribute pop)
#elif defined(FUSED_SCE_TARGET)
FUSED_SCE_PRAGMA(GCC pop_options)
#endif
