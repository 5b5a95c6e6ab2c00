// Chooses the instruction set, once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace fused_sce::cpu {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

// The kernels that this processor can run, best first.
const std::vector<const Kernels*>& runnable() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&avx512::kKernels);
    }
    if (has_avx2) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&baseline::kKernels);
    return found;
  }();
  return list;
}

const Kernels& choose() {
  const char* wanted = std::getenv("FUSED_SCE_ISA");
  if (!wanted || !*wanted) return *runnable().front();
  for (const Kernels* kernels : runnable()) {
    if (std::string(wanted) == kernels->isa) return *kernels;
  }
  throw std::invalid_argument(
      std::string("FUSED_SCE_ISA=") + wanted + ": this build and processor offer " + available_isas());
}

}  // namespace

const Kernels* runnable_kernels(int rank) { return size_t(rank) < runnable().size() ? runnable()[rank] : nullptr; }

const char* available_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : runnable()) joined += (joined.empty() ? "" : " ") + std::string(kernels->isa);
    return joined;
  }();
  return names.c_str();
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

double add_pairwise(const double* partial_sums, int64_t count) {
  if (count <= 0) return 0.0;
  if (count == 1) return partial_sums[0];
  const int64_t half = count / 2;
  return add_pairwise(partial_sums, half) + add_pairwise(partial_sums + half, count - half);
}

}  // namespace fused_sce::cpu
