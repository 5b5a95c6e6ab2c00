// The kernels of the ops, for any backend: tensors around each call of what runs a problem.
//
// A Backend has
//     static void prepare(const Tensor& result)             memory that is about to be written for the first time
//     static void check_labels(const Problem&)              before the logits are overwritten
//     static void elements(const Problem&, const Tensor& result)  problem.loss and problem.gradient, whichever is set
//     static void sum(const Problem&, const Tensor& total)        the sum of all losses; problem.gradient if set
//     static void rows(const Problem&, int64_t columns, const Tensor& loss)      problem.loss, one for each row
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "bind.h"

namespace fused_sce {

template <class Backend>
struct OpKernels {
  // Each is a boxed kernel: it takes all arguments from the stack first, then leaves the results there.
  static void loss(StableIValue* stack, uint64_t, uint64_t) {
    Values values{stack};
    const Arguments arguments(values);
    const Tensor& input = arguments.input;
    const Reduction reduction = reduction_of(arguments);
    if (reduction == Reduction::None && (arguments.options.divisor != 1 || arguments.count)) {
      fail("reduction none has neither divisor nor count");
    }
    // A row must stay together.
    const Layout layout = reduction == Reduction::Rows ? row_major(input) : layout_for(arguments, input);
    BoundProblem bound = bind(arguments, layout);
    const ScalarType dtype = result_type(arguments);
    if (reduction == Reduction::None) {
      const Tensor loss = new_result(input, layout, dtype);
      bound.problem.loss = result_of(loss);
      if (loss.numel() > 0) Backend::elements(bound.problem, loss);
      stack[0] = boxed(loss);
    } else if (reduction == Reduction::Rows) {
      const IntHeaderOnlyArrayRef sizes(input.sizes().data(), input.dim() - 1);
      const int64_t columns = input.size(input.dim() - 1);
      std::vector<int64_t> strides(layout.strides.begin(), layout.strides.end() - 1);
      for (int64_t& stride : strides) stride /= std::max<int64_t>(columns, 1);
      const Tensor loss = new_tensor(input, sizes, strides, dtype);
      bound.problem.loss = result_of(loss);
      if (loss.numel() > 0) Backend::rows(bound.problem, columns, loss);
      stack[0] = boxed(loss);
    } else {
      const Tensor total = new_scalar(input, dtype);
      Backend::sum(bound.problem, total);
      stack[0] = boxed(total);
    }
  }

  // kInto: the gradient goes into memory that the caller has, which is then the last argument and no result.
  template <bool kInto>
  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    Values values{stack};
    const Arguments arguments(values);
    const Tensor& input = arguments.input;
    OptionalTensor into;
    if (kInto) into = values.next<Tensor>();
    if (reduction_of(arguments) != Reduction::Sum) {
      fail("the gradient is made with the sum alone, got reduction ", arguments.reduction);
    }
    const Layout layout = layout_for(arguments, into.value_or(input));
    const Tensor gradient = into ? *into : new_result(input, layout, input.scalar_type());
    BoundProblem bound = bind(arguments, layout);
    if (kInto && check_gradient(arguments, layout, nullptr, gradient)) Backend::check_labels(bound.problem);
    const Tensor total = new_scalar(input, result_type(arguments));
    bound.problem.gradient = result_of(gradient);
    Backend::sum(bound.problem, total);
    stack[0] = boxed(total);
    if (!kInto) stack[1] = boxed(gradient);
  }

  template <bool kInto>
  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    Values values{stack};
    const Tensor grad_output = values.next<Tensor>();
    const Arguments arguments(values);
    const Tensor& input = arguments.input;
    OptionalTensor into;
    if (kInto) into = values.next<Tensor>();
    const bool is_made = kInto && values.next<bool>();
    const Layout layout = layout_for(arguments, into.value_or(input));
    const Tensor gradient = into ? *into : new_result(input, layout, input.scalar_type());
    BoundProblem bound = bind(arguments, layout, &grad_output);
    const bool is_in_place = kInto && check_gradient(arguments, layout, &grad_output, gradient);
    if (is_made && (is_in_place || bound.problem.upstream)) {
      fail("is_made needs a gradient apart from input, and one grad_output for all elements");
    }
    bound.problem.is_made = is_made;
    if (is_in_place) Backend::check_labels(bound.problem);
    bound.problem.gradient = result_of(gradient);
    if (bound.problem.numel > 0) Backend::elements(bound.problem, gradient);
    if (!kInto) stack[0] = boxed(gradient);
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("sigmoid_cross_entropy", &loss);
    m.impl("_sigmoid_cross_entropy_forward", &forward<false>);
    m.impl("_sigmoid_cross_entropy_forward_out", &forward<true>);
    m.impl("_sigmoid_cross_entropy_backward", &backward<false>);
    m.impl("_sigmoid_cross_entropy_backward_out", &backward<true>);
  }

 private:
  // The order in which elements follow one another. Targets that are given row by row need rows.
  static Layout layout_for(const Arguments& arguments, const Tensor& tensor) {
    return format_of(arguments) == TargetFormat::Dense ? layout_of(tensor) : row_major(tensor);
  }

  static StableIValue boxed(const Tensor& tensor) { return torch::stable::detail::from(tensor); }

  static Tensor new_result(const Tensor& input, const Layout& layout, ScalarType dtype) {
    const Tensor result = new_tensor(input, input.sizes(), layout.strides, dtype);
    Backend::prepare(result);
    return result;
  }

  static Tensor new_scalar(const Tensor& input, ScalarType dtype) { return new_tensor(input, {}, {}, dtype); }
};

}  // namespace fused_sce
