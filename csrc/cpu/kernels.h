// CPU entry points. Each call processes a range; the caller may run ranges on several threads at the same time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../formulas/loss.h"
#include "../problem.h"

namespace fused_sce::cpu {

// Elements whose losses are added into one partial sum. Fixed, so that the order of additions depends on the number of
// elements alone and not on the number of threads. A multiple of kBlock.
constexpr int64_t kChunk = 4096;

// Elements processed at a time. The seven float buffers of a block are 14 KiB and stay in the first-level cache.
constexpr int64_t kBlock = 512;

// The kernels of one instruction set.
struct Kernels {
  const char* isa;

  // Computes the results of chunks [begin, end) of the problem. Unless `partial_sums` is null, partial_sums[chunk]
  // becomes the sum of the losses of that chunk.
  void (*chunks)(const Problem& problem, int64_t begin, int64_t end, double* partial_sums);

  // Computes rows [begin, end) of `columns` elements each. problem.loss[row] becomes the sum of the losses of that row,
  // divided by problem.options.divisor.
  void (*rows)(const Problem& problem, int64_t columns, int64_t begin, int64_t end);
};

FUSED_SCE_INLINE int64_t num_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Adds the partial sums pairwise, in an order that depends on `count` alone.
double add_pairwise(const double* partial_sums, int64_t count);

// The best kernels that this processor can run, or those that the environment variable FUSED_SCE_ISA names. Throws
// std::invalid_argument if the name is unknown or the processor lacks the instruction set.
const Kernels& kernels();

// The kernels that this processor can run, best first.
const std::vector<const Kernels*>& runnable_kernels();

// Their names, separated by spaces.
std::string available_isas();

}  // namespace fused_sce::cpu
