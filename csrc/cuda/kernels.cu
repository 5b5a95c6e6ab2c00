// The CUDA kernels: launch and reduction. What a thread does in between is in thread.h, the formulas in ../formulas.
//
// Compile with --fmad=false: the formulas name every fused multiply-add, and results then have the CPU's bits.
#include <cub/block/block_reduce.cuh>
#include <cub/warp/warp_reduce.cuh>

#include "kernels.h"
#include "thread.h"

namespace fused_sce::cuda {
namespace {

__device__ int64_t thread_of_grid() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// The sum over all threads of the grid, over `divisor`, into `total`. Deterministic: blocks leave their sums in the
// workspace, and the last one to finish adds them in the order of their numbers.
__device__ void finish_sum(double sum, double divisor, const Result& total, double* workspace) {
  using BlockReduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename BlockReduce::TempStorage storage;
  __shared__ bool is_last;

  sum = BlockReduce(storage).Sum(sum);
  if (gridDim.x > 1) {
    unsigned* const counter = reinterpret_cast<unsigned*>(workspace);
    double* const partial_sums = workspace + 1;
    if (threadIdx.x == 0) {
      partial_sums[blockIdx.x] = sum;
      __threadfence();  // whoever sees the count sees the partial sum
      // The last increment wraps the counter to 0, ready for the next sum.
      is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    sum = 0.0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) sum += __ldcg(partial_sums + block);
    sum = BlockReduce(storage).Sum(sum);
  }
  if (threadIdx.x == 0) store_element(total, 0, sum / divisor);
}

// Blocks that must fit on a multiprocessor at once, which bounds a thread's registers (to 64 for 4, to 128 for 2). With
// these bounds nvcc 13.0 spills nothing from sm_75 to sm_120; left to choose, it spilled in a few kernels.
template <class Access>
constexpr int kResident = 2;
template <class Logits, class Target, bool kWeighted>
constexpr int kResident<Contiguous<Logits, Target, kWeighted>> = sizeof(Logits) == 8 ? 2 : 4;

template <class Access, Job kJob>
__global__ void __launch_bounds__(kThreads, kResident<Access>) problem_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ TwoPart<typename Access::T> scale,
    const __grid_constant__ Result total,
    int64_t threads,
    double* workspace) {
  const double sum = Access::template run<kJob>(problem, scale, share_of(problem.numel, thread_of_grid(), threads));
  if constexpr (makes_sum(kJob)) finish_sum(sum, problem.divisor, total, workspace);
}

// `team` threads (a power of two up to a warp, or the block) per row.
template <class Access>
__global__ void __launch_bounds__(kThreads, kResident<Access>)
    rows_kernel(const __grid_constant__ Problem problem, int64_t columns, int64_t count, int team) {
  using T = typename Access::T;
  using BlockReduce = cub::BlockReduce<double, kThreads>;
  using WarpReduce = cub::WarpReduce<double>;
  __shared__ union {
    typename BlockReduce::TempStorage block;
    typename WarpReduce::TempStorage warps[kThreads / 32];
  } storage;

  const int thread = int(threadIdx.x) % team;
  const int teams = kThreads / team;
  // All threads of a block stay to the end: each has a part in every reduction.
  for (int64_t first = int64_t(blockIdx.x) * teams; first < count; first += int64_t(gridDim.x) * teams) {
    const int64_t row = first + int(threadIdx.x) / team;
    double sum = 0.0;
    if (row < count) {
      const Share share = {row * columns, (row + 1) * columns, thread, team};
      sum = Access::template run<Job::Sum>(problem, {T(1), T(0)}, share);
    }
    if (team == kThreads) {
      sum = BlockReduce(storage.block).Sum(sum);
      __syncthreads();
    } else {
      sum = WarpReduce(storage.warps[threadIdx.x / 32]).HeadSegmentedSum(sum, thread == 0);
      __syncwarp();
    }
    if (thread == 0 && row < count) store_element(problem.loss, row, sum / problem.divisor);
  }
}

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(Stored* values, int64_t numel, const __grid_constant__ Operand factor) {
  scale_values(values, factor, share_of(numel, thread_of_grid(), int64_t(gridDim.x) * kThreads));
}

template <Job kJob>
cudaError_t launch(const Problem& problem, const Result& total, double* workspace, cudaStream_t stream) {
  const int blocks = num_blocks(problem);
  const int64_t threads = num_threads(problem, int64_t(blocks) * kThreads);
  choose_access<kJob>(problem, has_fixed_weights(problem, threads), [&](auto access, const Problem& accessed) {
    using Access = decltype(access);
    const auto scale = reciprocal<typename Access::T>(problem.divisor);
    problem_kernel<Access, kJob><<<blocks, kThreads, 0, stream>>>(accessed, scale, total, threads, workspace);
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t elements(const Problem& problem, cudaStream_t stream) {
  if (problem.numel == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  if (problem.loss) status = launch<Job::Loss>(problem, {}, nullptr, stream);
  if (problem.gradient && status == cudaSuccess) status = launch<Job::Gradient>(problem, {}, nullptr, stream);
  return status;
}

cudaError_t sum(const Problem& problem, const Result& total, double* workspace, cudaStream_t stream) {
  if (problem.gradient) return launch<Job::SumAndGradient>(problem, total, workspace, stream);
  return launch<Job::Sum>(problem, total, workspace, stream);
}

cudaError_t rows(const Problem& problem, int64_t columns, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int team = threads_per_row(columns, group_size(problem.logits.dtype));
  const int blocks = num_blocks(count, kThreads / team);
  // A thread's columns differ from group to group, so weights are read with each.
  choose_access<Job::Sum>(problem, std::false_type{}, [&](auto access, const Problem& accessed) {
    rows_kernel<decltype(access)><<<blocks, kThreads, 0, stream>>>(accessed, columns, count, team);
  });
  return cudaGetLastError();
}

cudaError_t scale(const Result& values, int64_t numel, const Operand& factor, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  const int blocks = num_blocks(divide_up(numel, group_size(values.dtype)), kThreads);
  visit_floating(values.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    scale_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<Stored*>(values.data), numel, factor);
  });
  return cudaGetLastError();
}

}  // namespace fused_sce::cuda
