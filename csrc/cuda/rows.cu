// The sum of the losses of each row.
#include "choose.h"
#include "kernels.h"
#include "reduce.h"

namespace fused_sce::cuda {
namespace {

// `team` threads (launch.h: threads_per_row) for each of `count` rows.
template <class Loop>
__global__ void __launch_bounds__(kThreads, Loop::kMinBlocks) rows_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ Result sums,
    int64_t columns,
    int64_t count,
    int team) {
  using T = typename Loop::T;
  const int thread = int(threadIdx.x) % team;
  const int teams = kThreads / team;
  // All threads of a block stay to the end: each takes part in every reduction.
  for (int64_t first = int64_t(blockIdx.x) * teams; first < count; first += int64_t(gridDim.x) * teams) {
    const int64_t row = first + int(threadIdx.x) / team;
    double sum = 0.0;
    if (row < count) {
      const ThreadRange range = {row * columns, (row + 1) * columns, thread, team};
      sum = Loop::run(problem, {}, range);
    }
    sum = reduce_team(sum, thread, team);
    if (thread == 0 && row < count) store_element(sums, row, sum / divisor_of(problem));
  }
}

}  // namespace

cudaError_t rows(const Problem& problem, int64_t columns, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int team = threads_per_row(columns, group_size(problem));
  const int blocks = num_blocks(count, kThreads / team);
  Problem without_elements = problem;
  without_elements.loss = {};
  choose_row_loop(without_elements, [&](auto loop) {
    rows_kernel<decltype(loop)><<<blocks, kThreads, 0, stream>>>(without_elements, problem.loss, columns, count, team);
  });
  return cudaGetLastError();
}

}  // namespace fused_sce::cuda
