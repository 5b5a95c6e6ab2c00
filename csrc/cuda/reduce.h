// Device code around the threads' work: thread numbers, the divisor, and sums over blocks and grids, by CUB.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/warp/warp_reduce.cuh>

#include "launch.h"
#include "memory.h"

namespace fused_sce::cuda {

static __device__ __forceinline__ int64_t thread_of_grid() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// The scale of a gradient: `of_divisor`, which the host computed, unless there is a count or a factor on the device.
// Then one thread of the block computes it, because double arithmetic is slow on many cards.
template <class T>
__device__ __forceinline__ TwoPart<T> scale_of_block(const Problem& problem, TwoPart<T> of_divisor) {
  if (!problem.count && !problem.factor) return of_divisor;
  __shared__ TwoPart<T> scale;
  if (threadIdx.x == 0) scale = gradient_scale<T>(problem);
  __syncthreads();
  return scale;
}

using BlockReduce = cub::BlockReduce<double, kThreads>;
using WarpReduce = cub::WarpReduce<double>;

// The sum over all threads of the grid, over the problem's divisor, into `total`. Deterministic: blocks leave their
// sums in the workspace, and the last one to finish adds them in the order of their numbers.
static __device__ __forceinline__ void
reduce_grid(double sum, const Problem& problem, const Result& total, double* workspace) {
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
      __threadfence();  // by the thread that counted: the barrier passes on to the block what it may see
    }
    __syncthreads();
    if (!is_last) return;
    sum = 0.0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) sum += __ldcg(partial_sums + block);
    sum = BlockReduce(storage).Sum(sum);
  }
  if (threadIdx.x == 0) store_element(total, 0, sum / divisor_of(problem));
}

// The sum over the `team` threads of a row, of which this is number `thread`: a power of two up to a warp, or the whole
// block. All threads of the block must call it. Only thread 0 of a team gets the sum.
static __device__ __forceinline__ double reduce_team(double sum, int thread, int team) {
  __shared__ union {
    typename BlockReduce::TempStorage block;
    typename WarpReduce::TempStorage warps[kThreads / 32];
  } storage;
  if (team == kThreads) {
    sum = BlockReduce(storage.block).Sum(sum);
    __syncthreads();
  } else {
    sum = WarpReduce(storage.warps[threadIdx.x / 32]).HeadSegmentedSum(sum, thread == 0);
    __syncwarp();
  }
  return sum;
}

}  // namespace fused_sce::cuda
