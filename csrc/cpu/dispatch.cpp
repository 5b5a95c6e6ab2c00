// Chooses the instruction set, once per process.
#include <cstdlib>
#include <stdexcept>

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

const std::vector<const Kernels*>& runnable_kernels() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
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

std::string available_isas() {
  std::string names;
  for (const Kernels* kernels : runnable_kernels()) names += (names.empty() ? "" : " ") + std::string(kernels->isa);
  return names;
}

static const Kernels& choose() {
  const char* wanted = std::getenv("FUSED_SCE_ISA");
  if (!wanted || !*wanted) return *runnable_kernels().front();
  for (const Kernels* kernels : runnable_kernels()) {
    if (std::string(wanted) == kernels->isa) return *kernels;
  }
  throw std::invalid_argument(
      std::string("FUSED_SCE_ISA=") + wanted + ": this build and processor offer " + available_isas());
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_sce::cpu
