// fused_sce._C: loading it registers the ops; its attributes say what was built, usual_loss is the short way to the
// ops.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "shortcut.h"

#ifndef FUSED_SCE_CUDA_ARCHS
#define FUSED_SCE_CUDA_ARCHS ""
#endif
#ifndef FUSED_SCE_CUDA_VERSION
#define FUSED_SCE_CUDA_VERSION ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of fused_sce; importing this module registers torch.ops.fused_sce.";
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("cuda_version") = FUSED_SCE_CUDA_VERSION;  // of nvcc; empty: CPU only
  m.attr("cuda_archs") = FUSED_SCE_CUDA_ARCHS;      // as TORCH_CUDA_ARCH_LIST
  m.def("available_isas", &fused_sce::cpu::available_isas, "CPU instruction sets that can run here, best first.");
  m.def("isa", [] { return fused_sce::cpu::kernels().isa; }, "The CPU instruction set in use.");
  fused_sce::add_shortcut(m);
}
