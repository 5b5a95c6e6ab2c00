// Losses and gradients of single elements, and values multiplied in place by a factor on the device.
#include "choose.h"
#include "kernels.h"
#include "reduce.h"

namespace fused_sce::cuda {
namespace {

template <class Loop>
__global__ void __launch_bounds__(kThreads, Loop::kMinBlocks) elements_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ TwoPart<typename Loop::T> of_divisor,
    int64_t threads) {
  if (is_done(problem)) return;
  const auto scale = scale_of_block(problem, of_divisor);
  Loop::run(problem, scale, range_of(problem.numel, thread_of_grid(), threads));
}

// One kernel for all types: it waits for memory, and finds out the type once.
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ Result values, int64_t numel, const __grid_constant__ Operand factor) {
  const ThreadRange range = range_of(numel, thread_of_grid(), int64_t(gridDim.x) * kThreads);
  visit_floating(
      values.dtype, [&](auto tag) { scale_values(static_cast<decltype(tag)*>(values.data), factor, range); });
}

}  // namespace

cudaError_t elements(const Problem& problem, cudaStream_t stream) {
  if (problem.numel == 0) return cudaSuccess;
  const int blocks = num_blocks(problem);
  const int64_t threads = num_threads(problem, int64_t(blocks) * kThreads);
  choose_loop<Output::Elements>(problem, threads, [&](auto loop) {
    using Loop = decltype(loop);
    const auto of_divisor = quotient_in_parts<typename Loop::T>(1.0, problem.options.divisor);
    elements_kernel<Loop><<<blocks, kThreads, 0, stream>>>(problem, of_divisor, threads);
  });
  return cudaGetLastError();
}

cudaError_t scale(const Result& values, int64_t numel, const Operand& factor, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  const int blocks = num_blocks(divide_up(numel, group_size(values.dtype)), kThreads);
  scale_kernel<<<blocks, kThreads, 0, stream>>>(values, numel, factor);
  return cudaGetLastError();
}

}  // namespace fused_sce::cuda
