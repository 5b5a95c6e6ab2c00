// The ops as C++ functions that go through the dispatcher: calling a kernel directly would hide the call from
// torch.compile, export and DTensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace fused_sce {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalType = std::optional<c10::ScalarType>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline at::Tensor call_elementwise(
    const at::Tensor& input,
    const at::Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    OptionalType dtype) {
  static const auto op = find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, OptionalType)>(
      "fused_sce::sigmoid_cross_entropy");
  return op.call(input, target, weight, pos_weight, dtype);
}

using Reducing = at::Tensor(
    const at::Tensor&,
    const at::Tensor&,
    const OptionalTensor&,
    const OptionalTensor&,
    c10::SymInt,
    OptionalType);

inline at::Tensor call_rows(
    const at::Tensor& input,
    const at::Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    c10::SymInt divisor,
    OptionalType dtype) {
  static const auto op = find_op<Reducing>("fused_sce::sigmoid_cross_entropy_rows");
  return op.call(input, target, weight, pos_weight, std::move(divisor), dtype);
}

inline at::Tensor call_sum(
    const at::Tensor& input,
    const at::Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    c10::SymInt divisor,
    OptionalType dtype) {
  static const auto op = find_op<Reducing>("fused_sce::sigmoid_cross_entropy_sum");
  return op.call(input, target, weight, pos_weight, std::move(divisor), dtype);
}

inline std::tuple<at::Tensor, at::Tensor> call_sum_with_gradient(
    const at::Tensor& input,
    const at::Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    c10::SymInt divisor,
    OptionalType dtype) {
  static const auto op = find_op<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, c10::SymInt, OptionalType)>(
      "fused_sce::_sigmoid_cross_entropy_sum_with_gradient");
  return op.call(input, target, weight, pos_weight, std::move(divisor), dtype);
}

inline at::Tensor call_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    c10::SymInt divisor) {
  static const auto op = find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
      c10::SymInt)>("fused_sce::_sigmoid_cross_entropy_backward");
  return op.call(grad_output, input, target, weight, pos_weight, std::move(divisor));
}

inline void call_scale_(const at::Tensor& self, const at::Tensor& factor) {
  static const auto op = find_op<void(const at::Tensor&, const at::Tensor&)>("fused_sce::_scale_");
  op.call(self, factor);
}

}  // namespace fused_sce
