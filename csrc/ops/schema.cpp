// The schemas of the ops. Their kernels are registered by cpu/op.cpp and cuda/op.cpp; what the stable ABI has no words
// for (autograd, autocast, fakes, vmap) by fused_sce/_register.py.
#include <torch/csrc/stable/library.h>

#include "arguments.h"

// Tensors are positional, because DTensor and vmap ask for that. The options of the public op are keyword-only with
// defaults, so that a program exported by an older version still loads. Those of the private ops are positional,
// because looking for each by its name takes 0.15 us of a call.
#define FUSED_SCE_ARGUMENTS FUSED_SCE_TENSORS ", " FUSED_SCE_RESULT ", " FUSED_SCE_OPTIONS ", " FUSED_SCE_FORMAT

STABLE_TORCH_LIBRARY(fused_sce, m) {
  m.def(
      "sigmoid_cross_entropy(" FUSED_SCE_TENSORS ", *, " FUSED_SCE_RESULT ", " FUSED_SCE_OPTIONS ", " FUSED_SCE_FORMAT
      ") -> Tensor");

  // The loss (reduction "sum") and its gradient by the input, from one pass.
  m.def("_sigmoid_cross_entropy_forward(" FUSED_SCE_ARGUMENTS ") -> (Tensor, Tensor)");
  // The same with the gradient in memory that the caller has. It may be the input's.
  m.def("_sigmoid_cross_entropy_forward_out(" FUSED_SCE_ARGUMENTS ", *, Tensor(a!) gradient) -> Tensor");

  // The gradient by the input for a gradient of the loss that broadcasts to the input's shape. `is_made`: `gradient`
  // holds that for a grad_output of 1 already.
  m.def("_sigmoid_cross_entropy_backward(Tensor grad_output, " FUSED_SCE_ARGUMENTS ") -> Tensor");
  m.def(
      "_sigmoid_cross_entropy_backward_out(Tensor grad_output, " FUSED_SCE_ARGUMENTS
      ", *, Tensor(a!) gradient, bool is_made=False) -> ()");

  // On a CPU alone: how many elements count, as one int64. Plain torch took longer for it than the loss itself.
  m.def("_count(" FUSED_SCE_ARGUMENTS ") -> Tensor");

  // On a GPU alone: multiplies `self` by a tensor of one element without reading that on the host.
  m.def("_scale_(Tensor(a!) self, Tensor factor) -> ()");

  // What was built, as "name: value" lines.
  m.def("_cpu_build() -> str");
  m.def("_cuda_build() -> str");
}
