// How a problem is dealt out to a grid: plain functions of lengths and types, no CUDA header, tested on any machine.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fused_sce::cuda {

// Threads of a block.
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

// Blocks for `count` pieces of work, `per_block` of them each. At least one: the sum of nothing is written, too.
constexpr int num_blocks(int64_t count, int64_t per_block) {
  const int64_t blocks = divide_up(count, per_block);
  return int(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

constexpr int num_blocks(const Problem& problem) {
  return num_blocks(divide_up(problem.numel, group_size(problem.logits.dtype)), kThreads);
}

// The workspace of a sum, in float64 words: the counter of finished blocks, then one partial sum for each. A single
// block needs none.
constexpr int64_t kMaxWorkspaceWords = 1 + kMaxBlocks;
constexpr int64_t workspace_words(const Problem& problem) {
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

// One value for all elements, read at position 0.
inline bool is_single(const Problem& problem, const Operand& operand) {
  if (problem.numel == 1) return true;
  if (operand.contiguous) return false;
  for (int dim = 0; dim < problem.ndim; ++dim) {
    if (operand.strides[dim] != 0) return false;
  }
  return true;
}

// Whether thread.h's Contiguous can run the problem; Strided can run any.
inline bool is_contiguous(const Problem& problem) {
  const bool upstream = !problem.upstream || problem.upstream.contiguous || is_single(problem, problem.upstream);
  return problem.logits.contiguous && problem.target.contiguous && !problem.weight && !problem.pos_weight && upstream &&
         problem.in_double == (problem.logits.dtype == DType::Float64);
}

// The problem as Strided reads it: contiguous operands have strides, too.
inline Problem with_strides(Problem problem) {
  for (Operand* operand : {&problem.logits, &problem.target, &problem.weight, &problem.pos_weight, &problem.upstream}) {
    if (!operand->contiguous) continue;
    int64_t stride = 1;
    for (int dim = problem.ndim - 1; dim >= 0; --dim) {
      operand->strides[dim] = stride;
      stride *= problem.sizes[dim];
    }
  }
  return problem;
}

}  // namespace fused_sce::cuda
