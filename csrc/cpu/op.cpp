// The ops on CPU tensors.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
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

struct CpuBackend {
  // Asks the operating system to back a large result with large pages.
  //
  // malloc takes each result beyond 32 MiB as untouched pages from the system, and the first write to each 4 KiB is a
  // page fault: 9,606 of them for 1024 x 9605 float32 logits, more than half of the time of loss and gradient. With
  // pages of 2 MiB there are 37. By default Linux uses large pages only where a program asks for them
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

  static void elements(const Problem& problem, const Tensor&) { run(problem, nullptr); }

  static void sum(const Problem& problem, const Tensor& total) {
    const int64_t chunks = cpu::num_chunks(problem.numel);
    double few[16];
    std::vector<double> many(chunks > 16 ? chunks : 0);
    double* const partial_sums = chunks > 16 ? many.data() : few;
    run(problem, partial_sums);
    const double loss = cpu::add_pairwise(partial_sums, chunks) / divisor_of(problem);
    const Result result = result_of(total);
    visit_floating(
        result.dtype, [&](auto tag) { *static_cast<decltype(tag)*>(result.data) = store_as<decltype(tag)>(loss); });
  }

  static void rows(const Problem& problem, int64_t columns, const Tensor& loss) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(
        0, loss.numel(), grain, [&](int64_t begin, int64_t end) { kernels.rows(problem, columns, begin, end); });
  }

 private:
  static void run(const Problem& problem, double* partial_sums) {
    const cpu::Kernels& kernels = cpu::kernels();
    torch::stable::parallel_for(0, cpu::num_chunks(problem.numel), kChunksPerThread, [&](int64_t begin, int64_t end) {
      kernels.chunks(problem, begin, end, partial_sums);
    });
  }
};

#if defined(__clang__)
#define FUSED_SCE_COMPILER "clang " __clang_version__
#else
#define FUSED_SCE_COMPILER "gcc " __VERSION__
#endif

void build(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(
      std::string("compiler: " FUSED_SCE_COMPILER "\nisa: ") + cpu::kernels().isa + "\nisas: " + cpu::available_isas());
}

}  // namespace
}  // namespace fused_sce

STABLE_TORCH_LIBRARY_IMPL(fused_sce, CPU, m) { fused_sce::OpKernels<fused_sce::CpuBackend>::register_all(m); }
STABLE_TORCH_LIBRARY_IMPL(fused_sce, CompositeExplicitAutograd, m) { m.impl("_cpu_build", &fused_sce::build); }
