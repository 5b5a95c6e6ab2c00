// The sum of all losses, alone or with the gradient.
//
// Compile with --fmad=false, like every .cu file here: the formulas name every fused multiply-add, and results then
// have the CPU's bits.
#include "choose.h"
#include "kernels.h"
#include "reduce.h"

namespace fused_sce::cuda {
namespace {

template <class Loop>
__global__ void __launch_bounds__(kThreads, Loop::kMinBlocks) sum_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ TwoPart<typename Loop::T> of_divisor,
    const __grid_constant__ Result total,
    int64_t threads,
    double* workspace) {
  const auto scale = scale_of_block(problem, of_divisor);
  const double sum = Loop::run(problem, scale, range_of(problem.numel, thread_of_grid(), threads));
  reduce_grid(sum, problem, total, workspace);
}

template <Output kOutput>
cudaError_t launch(const Problem& problem, const Result& total, double* workspace, cudaStream_t stream) {
  const int blocks = num_blocks(problem);
  const int64_t threads = num_threads(problem, int64_t(blocks) * kThreads);
  choose_loop<kOutput>(problem, threads, [&](auto loop) {
    using Loop = decltype(loop);
    const auto of_divisor = quotient_in_parts<typename Loop::T>(1.0, problem.options.divisor);
    sum_kernel<Loop><<<blocks, kThreads, 0, stream>>>(problem, of_divisor, total, threads, workspace);
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t sum(const Problem& problem, const Result& total, double* workspace, cudaStream_t stream) {
  if (problem.gradient) return launch<Output::SumAndGradient>(problem, total, workspace, stream);
  return launch<Output::Sum>(problem, total, workspace, stream);
}

}  // namespace fused_sce::cuda
