// CUDA entry points. Each launches one kernel on `stream` of the current device, never waits for it, and returns the
// launch's status. Pointers are to memory of that device, problem.count too. A gradient has the logits' type and may
// lie in their memory; with 16-bit logits that costs 20 to 32 % more instructions (choose.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace fused_sce::cuda {

// problem.loss and problem.gradient of each element, whichever is set.
cudaError_t elements(const Problem& problem, cudaStream_t stream);

// The sum of all losses over divisor_of(problem), into the one value of `total`; problem.gradient with it, if set. The
// order of additions, and so every bit of the result, follows from the number of elements, the type of the logits,
// whether the loss is one of focal.h, and, with a weight or pos_weight for each column, the number of columns
// (launch.h). `workspace` has workspace_words(problem) float64 words. The first must be 0 and is 0 again when the
// kernel ends; no other kernel may use them meanwhile.
cudaError_t sum(const Problem& problem, const Result& total, double* workspace, cudaStream_t stream);

// The loss summed over the last `columns` elements of each of `count` rows, over divisor_of(problem), into
// problem.loss.
cudaError_t rows(const Problem& problem, int64_t columns, int64_t count, cudaStream_t stream);

// values[i] *= factor for `numel` values; factor is one value on the device, and where that is 1 nothing is touched.
cudaError_t scale(const Result& values, int64_t numel, const Operand& factor, cudaStream_t stream);

}  // namespace fused_sce::cuda
