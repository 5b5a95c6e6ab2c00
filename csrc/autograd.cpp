// Autograd of the ops. A C++ Function, because it is called for every small head: measured forward on a tiny input, 15
// us against 41 us for a Python Function and over 100 us for torch.library.register_autograd (torch 2.13, CPU).
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <utility>

#include "ops.h"

namespace fused_sce {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum class Reduction : int64_t { Elements, Rows, Sum };

// What forward saved.
struct Saved {
  Tensor input;
  Tensor target;
  OptionalTensor weight;
  OptionalTensor pos_weight;
  c10::SymInt divisor;
};

OptionalTensor optional_of(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Gradients as torch sees them: composed of differentiable ops, for create_graph and for the gradient by the target,
// where a kernel of our own would not pay. Both sigmoids are evaluated, so the tails are right here too; this and
// fused_sce/reference.py are the only places besides formulas/ where the formula stands.
Tensor upstream_factor(const Tensor& grad_output, const Saved& saved) {
  Tensor factor = saved.weight ? grad_output * *saved.weight : grad_output;
  return factor / at::Scalar(saved.divisor);
}

at::ScalarType computing_type(const Saved& saved) {
  const bool in_double = saved.input.scalar_type() == at::kDouble || saved.target.scalar_type() == at::kDouble;
  return in_double ? at::kDouble : at::kFloat;
}

// sigmoid(x) and sigmoid(-x) from e^-|x|: right in both tails, and so are their derivatives. at::sigmoid's is y (1 -
// y), 0 from y = 1 on. Not by abs, whose derivative at 0 is 0.
std::pair<Tensor, Tensor> sigmoids(const Tensor& x) {
  const Tensor positive = x > 0;
  const Tensor e = at::exp(at::where(positive, -x, x));
  const Tensor larger = 1 / (1 + e);
  const Tensor smaller = e * larger;
  return {at::where(positive, larger, smaller), at::where(positive, smaller, larger)};
}

Tensor differentiable_input_gradient(const Tensor& grad_output, const Saved& saved) {
  const at::ScalarType type = computing_type(saved);
  const Tensor x = saved.input.to(type);
  const Tensor t = saved.target.to(type);
  const Tensor positive = saved.pos_weight ? *saved.pos_weight * t : t;
  const auto [of_x, of_minus_x] = sigmoids(x);
  const Tensor gradient = (1 - t) * of_x - positive * of_minus_x;
  return (upstream_factor(grad_output.to(type), saved) * gradient).to(saved.input.scalar_type());
}

Tensor target_gradient(const Tensor& grad_output, const Saved& saved) {
  const at::ScalarType type = computing_type(saved);
  const Tensor x = saved.input.to(type);
  // d loss / d t = pos_weight softplus(-x) - softplus(x), which is -x without pos_weight
  const Tensor gradient = saved.pos_weight ? at::log_sigmoid(-x) - *saved.pos_weight * at::log_sigmoid(x) : -x;
  return (upstream_factor(grad_output.to(type), saved) * gradient).to(saved.target.scalar_type());
}

class SigmoidCrossEntropy : public torch::autograd::Function<SigmoidCrossEntropy> {
 public:
  // Compiled autograd may trace through backward; without this it breaks the graph here.
  static constexpr bool is_traceable = true;

  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& input,
      const Tensor& target,
      const OptionalTensor& weight,
      const OptionalTensor& pos_weight,
      int64_t reduction,
      c10::SymInt divisor,
      OptionalType dtype) {
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["divisor"] = divisor;
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor loss;
    Tensor gradient;
    switch (Reduction(reduction)) {
      case Reduction::Elements: loss = call_elementwise(input, target, weight, pos_weight, dtype); break;
      case Reduction::Rows: loss = call_rows(input, target, weight, pos_weight, divisor, dtype); break;
      case Reduction::Sum:
        // The gradient costs little while the inputs are at hand: x and t are read once, the gradient written once. Not
        // in float16: divided by a large batch it underflows there, before a GradScaler's factor could save it.
        if (input.requires_grad() && input.scalar_type() != at::kHalf) {
          std::tie(loss, gradient) = call_sum_with_gradient(input, target, weight, pos_weight, divisor, dtype);
        } else {
          loss = call_sum(input, target, weight, pos_weight, divisor, dtype);
        }
        break;
    }
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), pos_weight.value_or(Tensor())});
    // Not among the saved variables: backward gives this tensor away, and they would take that for a forbidden change.
    if (gradient.defined()) ctx->saved_data["gradient"] = gradient;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const variable_list tensors = ctx->get_saved_variables();
    const Saved saved = {
        tensors[0], tensors[1], optional_of(tensors[2]), optional_of(tensors[3]),
        ctx->saved_data["divisor"].toSymInt()};
    const bool by_rows = Reduction(ctx->saved_data["reduction"].toInt()) == Reduction::Rows;
    const Tensor grad_output = by_rows ? grad_outputs[0].unsqueeze(-1) : grad_outputs[0];

    Tensor grad_input;
    Tensor grad_target;
    if (ctx->needs_input_grad(0)) grad_input = input_gradient(ctx, grad_output, saved);
    if (ctx->needs_input_grad(1)) grad_target = target_gradient(grad_output, saved);
    return {grad_input, grad_target, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }

 private:
  static Tensor input_gradient(AutogradContext* ctx, const Tensor& grad_output, const Saved& saved) {
    if (at::GradMode::is_enabled()) return differentiable_input_gradient(grad_output, saved);
    const auto made = ctx->saved_data.find("gradient");
    if (made != ctx->saved_data.end()) {
      Tensor gradient = made->second.toTensor();
      if (at::isTensorSubclassLike(grad_output) || at::isTensorSubclassLike(gradient)) {
        return gradient * grad_output.to(gradient.scalar_type());  // traced: nothing in place
      }
      // The first backward gives away the tensor that forward made, scaled where it lies, without asking on the host
      // whether the factor is 1. A later backward of a retained graph computes the gradient anew.
      ctx->saved_data.erase(made);
      call_scale_(gradient, grad_output);
      return gradient;
    }
    return call_backward(grad_output, saved.input, saved.target, saved.weight, saved.pos_weight, saved.divisor);
  }
};

Tensor differentiable(
    const Tensor& input,
    const Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    Reduction reduction,
    c10::SymInt divisor,
    OptionalType dtype) {
  return SigmoidCrossEntropy::apply(input, target, weight, pos_weight, int64_t(reduction), std::move(divisor), dtype);
}

bool needs_graph(
    const Tensor& input,
    const Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight) {
  if (!at::GradMode::is_enabled()) return false;
  for (const OptionalTensor& constant : {weight, pos_weight}) {
    TORCH_CHECK(
        !(constant && constant->requires_grad()),
        "this op has no gradient by weight or pos_weight; fused_sce.functional has, outside of TorchScript");
  }
  return input.requires_grad() || target.requires_grad();
}

Tensor elementwise_autograd(
    const Tensor& input,
    const Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    OptionalType dtype) {
  if (needs_graph(input, target, weight, pos_weight)) {
    return differentiable(input, target, weight, pos_weight, Reduction::Elements, 1, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_elementwise(input, target, weight, pos_weight, dtype);
}

Tensor rows_autograd(
    const Tensor& input,
    const Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    c10::SymInt divisor,
    OptionalType dtype) {
  if (needs_graph(input, target, weight, pos_weight)) {
    return differentiable(input, target, weight, pos_weight, Reduction::Rows, std::move(divisor), dtype);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_rows(input, target, weight, pos_weight, std::move(divisor), dtype);
}

Tensor sum_autograd(
    const Tensor& input,
    const Tensor& target,
    const OptionalTensor& weight,
    const OptionalTensor& pos_weight,
    c10::SymInt divisor,
    OptionalType dtype) {
  if (needs_graph(input, target, weight, pos_weight)) {
    return differentiable(input, target, weight, pos_weight, Reduction::Sum, std::move(divisor), dtype);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_sum(input, target, weight, pos_weight, std::move(divisor), dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_sce, Autograd, m) {
  m.impl("sigmoid_cross_entropy", &elementwise_autograd);
  m.impl("sigmoid_cross_entropy_rows", &rows_autograd);
  m.impl("sigmoid_cross_entropy_sum", &sum_autograd);
}

}  // namespace fused_sce
