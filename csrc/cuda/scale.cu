// Values multiplied in place by a factor on the device.
#include "contiguous.h"
#include "kernels.h"

namespace fused_sce::cuda {
namespace {

// One kernel for all types: it waits for memory, and finds out the type once.
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ Result values, int64_t numel, const __grid_constant__ Operand factor) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const ThreadRange range = range_of(numel, thread, int64_t(gridDim.x) * kThreads);
  visit_floating(values.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    scale_values(static_cast<Stored*>(values.data), factor, range);
  });
}

}  // namespace

cudaError_t scale(const Result& values, int64_t numel, const Operand& factor, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  const int blocks = num_blocks(divide_up(numel, group_size(values.dtype)), kThreads);
  scale_kernel<<<blocks, kThreads, 0, stream>>>(values, numel, factor);
  return cudaGetLastError();
}

}  // namespace fused_sce::cuda
