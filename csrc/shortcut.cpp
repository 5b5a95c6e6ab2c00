// A loss of plain tensors without a detour: calling an op as torch.ops.fused_sce.* parses its arguments by schema,
// after fused_sce/functional.py has checked them, and for the head of a ResNet that takes longer than the kernel. Here
// both are a few comparisons. What is not plain is left to the long way, which knows the exceptions and explains the
// errors.
#include "shortcut.h"

#include <ATen/ExpandUtils.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops.h"

namespace fused_sce {
namespace {

using at::Tensor;

#ifdef FUSED_SCE_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// No transform, mode or tracer wants to see the call as Python made it.
bool nobody_listens() {
  return !at::impl::torch_function_mode_enabled() && !at::tracer::impl::is_dispatch_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Neither a subclass nor a dual tensor of forward-mode AD, and dense.
bool is_plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& tensor = THPVariable_Unpack(object);
  return tensor.layout() == c10::kStrided && !tensor.is_nested() && !tensor._fw_grad(0).defined();
}

// A weight that may be taken as it is. The kernels have no gradient by it.
bool is_plain_factor(PyObject* object, const Tensor& input) {
  if (object == Py_None) return true;
  if (!is_plain(object)) return false;
  const Tensor& factor = THPVariable_Unpack(object);
  return factor.device() == input.device() && !factor.is_complex() &&
         at::is_expandable_to(factor.sizes(), input.sizes()) &&
         !(factor.requires_grad() && c10::GradMode::is_enabled());
}

OptionalTensor optional_factor(PyObject* object) {
  return object == Py_None ? std::nullopt : OptionalTensor(THPVariable_Unpack(object));
}

// usual_loss(input, target, weight, pos_weight, reduction, soft_margin) -> Tensor | None
PyObject* usual_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "usual_loss takes 6 arguments, got ", count);
  if (!nobody_listens() || !is_plain(args[0]) || !is_plain(args[1])) Py_RETURN_NONE;
  const Tensor& input = THPVariable_Unpack(args[0]);
  const Tensor& target = THPVariable_Unpack(args[1]);
  const bool has_kernels = input.is_cpu() || (kWithCuda && input.is_cuda());
  if (!has_kernels || !input.is_floating_point() || target.is_complex() || target.device() != input.device() ||
      target.sizes() != input.sizes() || !is_plain_factor(args[2], input) || !is_plain_factor(args[3], input)) {
    Py_RETURN_NONE;
  }
  const OptionalTensor weight = optional_factor(args[2]);
  const OptionalTensor pos_weight = optional_factor(args[3]);

  // MultiLabelSoftMarginLoss: a sum over samples of means over labels, and a result of the promoted dtype.
  const bool soft_margin = args[5] == Py_True;
  if (soft_margin && (input.dim() == 0 || target.scalar_type() != input.scalar_type() ||
                      (weight && weight->scalar_type() != input.scalar_type()))) {
    Py_RETURN_NONE;
  }
  if (!PyUnicode_Check(args[4])) Py_RETURN_NONE;
  int64_t divisor = 0;
  if (PyUnicode_CompareWithASCIIString(args[4], "mean") == 0) {
    divisor = input.numel();
  } else if (PyUnicode_CompareWithASCIIString(args[4], "sum") == 0) {
    divisor = soft_margin ? input.size(-1) : 1;
  } else {
    Py_RETURN_NONE;
  }

  Tensor loss;
  {
    const pybind11::gil_scoped_release no_gil;
    loss = call_sum(input, target, weight, pos_weight, divisor, std::nullopt);
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"usual_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&usual_loss)), METH_FASTCALL,
     "The loss of plain tensors with reduction mean or sum; None: not that case."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_shortcut(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw pybind11::error_already_set();
}

}  // namespace fused_sce
