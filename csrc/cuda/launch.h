// How a problem is dealt out to a grid: plain functions of lengths and types, no CUDA header, tested on any machine.
//
// Elements are dealt out in groups of neighbours (group_size), group g to thread g modulo the number of threads. Groups
// are counted from the first element and never shifted to an aligned address; each operand of a group is loaded wide
// where its own address is aligned, otherwise element by element. So which thread adds which losses in which order
// follows from the length, the type of the logits, the formula (group_size) and, with weights for each column, the
// number of columns (threads_with_fixed_columns): a sum has the same bits for a slice that starts at an odd address and
// for a target of any type and layout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

namespace fused_sce::cuda {

// Threads of a block. A kernel's loop says how many blocks must fit on a multiprocessor at once (kMinBlocks). That
// bounds a thread's registers: to 64 for 4 blocks, 80 for 3, 128 for 2, 255 for 1. With these bounds nvcc 13.0 spills
// nothing from sm_75 to sm_120; without them it spilled in a few kernels.
constexpr int kThreads = 256;

// Blocks of a launch, at most; beyond, each thread takes several groups. A constant and not a multiple of the device's
// multiprocessors, because the order of a sum's additions follows from it: the same on every card. 4096 blocks fill
// today's largest cards (170 multiprocessors, 8 blocks each) three times, so the last round is a small part.
constexpr int64_t kMaxBlocks = 4096;

constexpr int64_t divide_up(int64_t count, int64_t by) { return count / by + (count % by != 0); }

// Neighbouring elements that a thread takes at a time: 16 bytes of logits, the widest load of every architecture.
FUSED_SCE_INLINE constexpr int group_size(DType logits) {
  switch (logits) {
    case DType::Float64: return 2;
    case DType::BFloat16:
    case DType::Float16: return 8;
    default: return 4;
  }
}

// The same for a problem. The formulas of focal.h take so long that a thread takes single elements.
FUSED_SCE_INLINE int group_size(const Problem& problem) {
  return problem.is_focal() ? 1 : group_size(problem.logits.dtype);
}

// Blocks for `count` pieces of work, `per_block` of them each. At least one: the sum of nothing is written, too.
constexpr int num_blocks(int64_t count, int64_t per_block) {
  const int64_t blocks = divide_up(count, per_block);
  return int(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

inline int num_blocks(const Problem& problem) {
  return num_blocks(divide_up(problem.numel, group_size(problem)), kThreads);
}

// The workspace of a sum, in float64 words: the counter of finished blocks, then one partial sum for each. A single
// block needs none.
constexpr int64_t kMaxWorkspaceWords = 1 + kMaxBlocks;
inline int64_t workspace_words(const Problem& problem) {
  const int blocks = num_blocks(problem);
  return blocks > 1 ? 1 + blocks : 0;
}

// Threads that add up one row of `columns` elements: a power of two up to a warp, so that short rows share warps, or a
// whole block where each thread of a warp would have more than four groups.
constexpr int threads_per_row(int64_t columns, int group) {
  const int64_t groups = divide_up(columns, group);
  if (groups > 4 * 32) return kThreads;
  int threads = 1;
  while (threads < groups && threads < 32) threads *= 2;
  return threads;
}

// The elements [begin, end) of a grid-stride loop, for thread number `thread` of `threads`.
struct ThreadRange {
  int64_t begin;
  int64_t end;
  int64_t thread;
  int64_t threads;

  // Start of the thread's first group, and the distance to its next one.
  FUSED_SCE_MEMBER int64_t first(int group) const { return begin + thread * group; }
  FUSED_SCE_MEMBER int64_t stride(int group) const { return threads * group; }
};

// All elements, divided among `threads`. A thread beyond those has none.
FUSED_SCE_INLINE ThreadRange range_of(int64_t numel, int64_t thread, int64_t threads) {
  return {0, thread < threads ? numel : 0, thread, threads};
}

// Whether an operand has the same value all along the first `dims` dimensions.
inline bool is_constant(const Problem& problem, const Operand& operand, int dims) {
  if (!operand || problem.numel == 1) return true;
  if (operand.contiguous) return false;
  return std::all_of(operand.strides, operand.strides + dims, [](int64_t stride) { return stride == 0; });
}

// How many of `threads` may take part so that a thread has the same columns in each of its groups, and can keep their
// weights in registers: all where a thread has one group, else a multiple of the groups after which columns repeat. 0:
// there are more columns than that.
constexpr int64_t threads_with_fixed_columns(int64_t threads, int64_t numel, int group, int64_t columns) {
  if (divide_up(numel, group) <= threads) return threads;
  int64_t groups = columns;  // columns / gcd(columns, group); a group is a power of two
  for (int factor = 2; factor <= group && groups % 2 == 0; factor *= 2) groups /= 2;
  return threads / groups * groups;
}

// The same for the weights of a problem: `threads` itself where each of them can keep its columns' weights. 0 also
// where weights are not one for each column or one for all.
inline int64_t threads_with_fixed_weights(const Problem& problem, int64_t threads) {
  const int last = problem.ndim - 1;
  if (!is_constant(problem, problem.weight, last) || !is_constant(problem, problem.pos_weight, last)) return 0;
  const bool are_single =
      is_constant(problem, problem.weight, last + 1) && is_constant(problem, problem.pos_weight, last + 1);
  const int64_t columns = are_single ? 1 : problem.sizes[last];
  return threads_with_fixed_columns(threads, problem.numel, group_size(problem), columns);
}

// Threads among which a problem is divided, of those `launched` for it.
inline int64_t num_threads(const Problem& problem, int64_t launched) {
  const int64_t fixed = threads_with_fixed_weights(problem, launched);
  return fixed > 0 ? fixed : launched;
}

// Whether ContiguousLoop can run the problem, apart from its weights. It has no registers for rare options of the
// target.
inline bool is_contiguous(const Problem& problem) {
  const bool has_rare_options = problem.prior || problem.options.has_threshold || problem.options.check_target;
  return problem.format == TargetFormat::Dense && !has_rare_options && !problem.is_focal() && !problem.in_double &&
         problem.logits.contiguous && problem.target.contiguous && (problem.upstream.contiguous || !problem.upstream) &&
         (problem.mask.contiguous || !problem.mask);
}

}  // namespace fused_sce::cuda
