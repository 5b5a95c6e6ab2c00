// The kernels of the ops, for any backend: tensors around each call of what runs a problem.
//
// A Backend has
//     static void prepare(const Tensor& result)             memory that is about to be written for the first time
//     static void elements(const Problem&, const Tensor& result)  problem.loss and problem.gradient, whichever is set
//     static void sum(const Problem&, const Tensor& total)        the sum of all losses; problem.gradient if set
//     static void rows(const Problem&, int64_t columns, const Tensor& loss)      problem.loss, one for each row
#pragma once

#include <torch/csrc/stable/library.h>

#include "bind.h"

namespace fused_sce {

template <class Backend>
struct OpKernels {
  // Each is a boxed kernel: it takes all arguments from the stack first, then leaves the results there.
  static void loss(StableIValue* stack, uint64_t, uint64_t) {
    Values values{stack};
    const Arguments arguments(values);
    const Reduction reduction = reduction_of(arguments);
    if (reduction == Reduction::None && (arguments.options.divisor != 1 || arguments.count)) {
      fail("reduction none has neither divisor nor count");
    }
    BoundProblem bound = bind(arguments);
    const IntHeaderOnlyArrayRef sizes = arguments.input.sizes();
    const size_t dims = reduction == Reduction::Sum ? 0 : sizes.size() - (reduction == Reduction::Rows);
    const Tensor loss = new_tensor(arguments.input, IntHeaderOnlyArrayRef(sizes.data(), dims), result_type(arguments));
    if (reduction == Reduction::Sum) {
      Backend::sum(bound.problem, loss);
    } else if (loss.numel() > 0) {
      bound.problem.loss = result_of(loss);
      if (reduction == Reduction::Rows) {
        Backend::rows(bound.problem, sizes[dims], loss);
      } else {
        Backend::prepare(loss);
        Backend::elements(bound.problem, loss);
      }
    }
    stack[0] = boxed(loss);
  }

  // kInto: the gradient goes into memory that the caller has, which is then the last argument and no result.
  template <bool kInto>
  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    Values values{stack};
    const Arguments arguments(values);
    const Tensor gradient = kInto ? values.next<Tensor>() : new_gradient(arguments.input);
    BoundProblem bound = bind(arguments);
    if (kInto) check_gradient(arguments, nullptr, gradient);
    if (reduction_of(arguments) != Reduction::Sum) {
      fail("the gradient is made with the sum alone, got reduction ", arguments.reduction);
    }
    const Tensor total = new_tensor(arguments.input, IntHeaderOnlyArrayRef(), result_type(arguments));
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
    const Tensor gradient = kInto ? values.next<Tensor>() : new_gradient(arguments.input);
    BoundProblem bound = bind(arguments, &grad_output);
    if (kInto) check_gradient(arguments, &grad_output, gradient);
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
  static StableIValue boxed(const Tensor& tensor) { return torch::stable::detail::from(tensor); }

  static Tensor new_gradient(const Tensor& input) {
    const Tensor gradient = new_tensor(input, input.sizes(), input.scalar_type());
    Backend::prepare(gradient);
    return gradient;
  }
};

}  // namespace fused_sce
