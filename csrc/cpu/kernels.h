// CPU entry points. Threads are the caller's business: each call does a range, and ranges may run at the same time.
#pragma once

#include <cstdint>

#include "../formulas/loss.h"
#include "../problem.h"

namespace fused_sce::cpu {

// Elements whose losses are added into one partial sum. Fixed, so that the order of additions depends on the number of
// elements alone, never on threads. A multiple of kBlock.
constexpr int64_t kChunk = 4096;

// Elements worked on at a time: the float buffers of one block, seven at most, are 14 KiB and stay in the first cache.
constexpr int64_t kBlock = 512;

// The kernels of one instruction set.
struct Kernels {
  const char* isa;

  // Results of the elements of chunks [begin, end) of the problem; `partial_sums`, unless null, gets the sum of the
  // losses of each chunk (partial_sums[chunk], float64).
  void (*chunks)(const Problem& problem, int64_t begin, int64_t end, double* partial_sums);

  // The loss summed over the last `columns` elements of each row, divided by problem.divisor, for rows [begin, end),
  // into problem.loss (one value per row).
  void (*rows)(const Problem& problem, int64_t columns, int64_t begin, int64_t end);
};

inline int64_t num_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The partial sums added pairwise, in an order that depends on their number alone.
double add_pairwise(const double* partial_sums, int64_t count);

// The kernels for this machine: the best its processor has, or what the environment variable FUSED_SCE_ISA names.
// Throws std::invalid_argument when that names none, or one that this processor lacks.
const Kernels& kernels();

// The kernels that this build has and this processor can run, best first: rank 0, 1, … Null past the last.
const Kernels* runnable_kernels(int rank);

// Their names, separated by spaces.
const char* available_isas();

}  // namespace fused_sce::cpu
