// Losses and gradients of single elements.
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
  const auto scale = gradient_scale(problem, of_divisor);
  Loop::run(problem, scale, range_of(problem.numel, thread_of_grid(), threads));
}

}  // namespace

cudaError_t elements(const Problem& problem, cudaStream_t stream) {
  if (problem.numel == 0) return cudaSuccess;
  const int blocks = num_blocks(problem);
  const int64_t threads = num_threads(problem, int64_t(blocks) * kThreads);
  choose_loop<Output::Elements>(problem, threads, [&](auto loop, const Problem& chosen) {
    using Loop = decltype(loop);
    const auto of_divisor = reciprocal<typename Loop::T>(problem.options.divisor);
    elements_kernel<Loop><<<blocks, kThreads, 0, stream>>>(chosen, of_divisor, threads);
  });
  return cudaGetLastError();
}

}  // namespace fused_sce::cuda
