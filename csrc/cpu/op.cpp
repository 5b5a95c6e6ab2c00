// The ops on CPU tensors.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "../ops/kernels.h"
#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_sce {
namespace {

// About 40 us of work with AVX2: less is not worth waking a second thread.
constexpr int64_t kElementsPerThread = 32768;
constexpr int64_t kChunksPerThread = kElementsPerThread / cpu::kChunk;

// Chunks whose partial sums are in memory at a time (512 KiB).
constexpr int64_t kChunksPerSum = 65536;

struct CpuBackend {
  // Asks the operating system to back a large result with large pages.
  //
  // malloc takes each result beyond 32 MiB as untouched pages from the system, and the first write to each 4 KiB is a
  // page fault: 9,606 of them for 1024 x 9605 float32 logits, more than half of the time of loss and gradient. With
  // pages of 2 MiB there are about 400. By default Linux uses large pages only where a program asks for them
  // (/sys/kernel/mm/transparent_hugepage/enabled: madvise).
  static void prepare([[maybe_unused]] const Tensor& result) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLargePage = uintptr_t(2) << 20;
    const size_t bytes = size_t(result.numel()) * result.element_size();
    // The whole large pages inside the memory: others may share the pages at its ends. Fewer than two are not worth the
    // call.
    if (bytes < 2 * kLargePage) return;
    const uintptr_t data = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const uintptr_t begin = (data + kLargePage - 1) & ~(kLargePage - 1);
    const uintptr_t end = (data + bytes) & ~(kLargePage - 1);
    if (end >= begin + 2 * kLargePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }

  static void check_labels(const Problem& problem) {
    if (!problem.may_be_wrong()) return;
    Problem without_results = problem;
    without_results.loss = without_results.gradient = {};
    run(without_results, 0, cpu::num_chunks(problem.numel), nullptr);
  }

  static void elements(const Problem& problem, const Tensor&) {
    if (!is_done(problem) && !is_rescaled(problem)) run(problem, 0, cpu::num_chunks(problem.numel), nullptr);
  }

  static void sum(const Problem& problem, const Tensor& total) {
    const int64_t chunks = cpu::num_chunks(problem.numel);
    double few[16];
    std::vector<double> many(chunks > 16 ? std::min(chunks, kChunksPerSum) : 0);
    double* const partial_sums = chunks > 16 ? many.data() : few;
    cpu::PairwiseSum sum;
    for (int64_t begin = 0; begin < chunks; begin += kChunksPerSum) {
      const int64_t end = std::min(begin + kChunksPerSum, chunks);
      run(problem, begin, end, partial_sums);
      for (int64_t n = 0; n < end - begin; ++n) sum.add(partial_sums[n]);
    }
    const double loss = sum.total() / divisor_of(problem);
    const Result result = result_of(total);
    visit_floating(
        result.dtype, [&](auto tag) { *static_cast<decltype(tag)*>(result.data) = store_as<decltype(tag)>(loss); });
  }

  static void rows(const Problem& problem, int64_t columns, const Tensor& loss) {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns));
    parallel(0, loss.numel(), grain, [&](const cpu::Kernels& kernels, int64_t begin, int64_t end) {
      return kernels.rows(problem, columns, begin, end);
    });
  }

 private:
  // Whether a gradient that is made could be multiplied by its factor without a rounding: powers of two, which gradient
  // accumulation and loss scaling use. To compute it anew takes 1.4 times as long, forward included.
  static bool is_rescaled(const Problem& problem) {
    int exponent = 0;
    const double factor = factor_of(problem);
    if (!problem.is_made || std::fabs(std::frexp(factor, &exponent)) != 0.5 || std::abs(exponent) > 100) return false;
    if (problem.gradient.dtype == DType::Float16) return false;  // never made in forward
    std::atomic<bool> is_exact = true;
    const cpu::Kernels& kernels = cpu::kernels();
    torch::stable::parallel_for(0, cpu::num_chunks(problem.numel), kChunksPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end && is_exact; ++chunk) {
        if (!kernels.rescale(problem, chunk, chunk + 1, factor)) is_exact = false;
      }
    });
    return is_exact;
  }

  // Chunks [begin, end) on all threads.
  static void run(const Problem& problem, int64_t begin, int64_t end, double* partial_sums) {
    parallel(begin, end, kChunksPerThread, [&](const cpu::Kernels& kernels, int64_t from, int64_t to) {
      return kernels.chunks(problem, from, to, partial_sums ? partial_sums + (from - begin) : nullptr);
    });
  }

  // Calls `action` for ranges of [begin, end), which returns whether no target is wrong. Threads must not
  // throw: the stable ABI would lose the message.
  template <class Action>
  static void parallel(int64_t begin, int64_t end, int64_t grain, const Action& action) {
    const cpu::Kernels& kernels = cpu::kernels();
    std::atomic<bool> all_good = true;
    torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
      if (!action(kernels, from, to)) all_good = false;
    });
    if (!all_good) {
      fail(
          "an integer target must be 0 or 1 everywhere, a soft one with check_target in [0, 1], and an index that of a "
          "column, once in its row");
    }
  }
};

#if defined(__clang__)
#define FUSED_SCE_COMPILER "clang " __clang_version__
#else
#define FUSED_SCE_COMPILER "gcc " __VERSION__
#endif

void count(StableIValue* stack, uint64_t, uint64_t) {
  Values values{stack};
  const Arguments arguments(values);
  const bool is_dense = format_of(arguments) == TargetFormat::Dense;
  const BoundProblem bound = bind(arguments, is_dense ? layout_of(arguments.input) : row_major(arguments.input));
  std::atomic<int64_t> total = 0;
  const cpu::Kernels& kernels = cpu::kernels();
  torch::stable::parallel_for(
      0, cpu::num_chunks(bound.problem.numel), kChunksPerThread,
      [&](int64_t begin, int64_t end) { total += kernels.count(bound.problem, begin, end); });
  const Tensor result = new_tensor(arguments.input, {}, {}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = total;
  stack[0] = torch::stable::detail::from(result);
}

void build(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(
      std::string("compiler: " FUSED_SCE_COMPILER "\nisa: ") + cpu::kernels().isa + "\nisas: " + cpu::available_isas());
}

}  // namespace
}  // namespace fused_sce

STABLE_TORCH_LIBRARY_IMPL(fused_sce, CPU, m) {
  fused_sce::OpKernels<fused_sce::CpuBackend>::register_all(m);
  m.impl("_count", &fused_sce::count);
}
STABLE_TORCH_LIBRARY_IMPL(fused_sce, CompositeExplicitAutograd, m) { m.impl("_cpu_build", &fused_sce::build); }
