// CPU entry points. Each call processes a range; the caller may run ranges on several threads at the same time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../formulas/focal.h"
#include "../problem.h"

namespace fused_sce::cpu {

// Elements whose losses are added into one partial sum. Fixed, so that the order of additions depends on the number of
// elements alone and not on the number of threads. A multiple of kBlock.
constexpr int64_t kChunk = 4096;

// Elements processed at a time. The eight float buffers of a block are 16 KiB and stay in the first-level cache.
constexpr int64_t kBlock = 512;

// The kernels of one instruction set.
struct Kernels {
  const char* isa;

  // Computes the results of chunks [begin, end) of the problem. Unless `partial_sums` is null, partial_sums[n] becomes
  // the sum of the losses of chunk begin + n. Returns whether no target is wrong (Problem::may_be_wrong); a problem
  // without results is checked for that alone.
  bool (*chunks)(const Problem& problem, int64_t begin, int64_t end, double* partial_sums);

  // Multiplies chunks [begin, end) of problem.gradient, not of float16, by a power of two. Returns whether that is
  // exact: false where a gradient is, or becomes, 0, subnormal, infinite or NaN.
  bool (*rescale)(const Problem& problem, int64_t begin, int64_t end, double factor);

  // Computes rows [begin, end) of `columns` elements each. problem.loss[row] becomes the sum of the losses of that row,
  // over divisor_of(problem). Returns what chunks() does.
  bool (*rows)(const Problem& problem, int64_t columns, int64_t begin, int64_t end);

  // How many elements of chunks [begin, end) count.
  int64_t (*count)(const Problem& problem, int64_t begin, int64_t end);
};

FUSED_SCE_INLINE int64_t num_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Adds numbers pairwise as they come, in an order that depends on their count alone: sums[n] is the sum of 2^n of them
// where bit n of `count` is set.
struct PairwiseSum {
  double sums[64];
  uint64_t count = 0;

  FUSED_SCE_MEMBER void add(double value) {
    int n = 0;
    for (; count >> n & 1; ++n) value += sums[n];
    sums[n] = value;
    ++count;
  }

  FUSED_SCE_MEMBER double total() const {
    double total = 0.0;
    for (int n = 0; n < 64; ++n) {
      if (count >> n & 1) total += sums[n];
    }
    return total;
  }
};

// The best kernels that this processor can run, or those that the environment variable FUSED_SCE_ISA names. Throws
// std::invalid_argument if the name is unknown or the processor lacks the instruction set.
const Kernels& kernels();

// The kernels that this processor can run, best first.
const std::vector<const Kernels*>& runnable_kernels();

// Their names, separated by spaces.
std::string available_isas();

}  // namespace fused_sce::cpu
