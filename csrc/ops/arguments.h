// The arguments of the loss: each is named once in the schema and once in the struct, in the same order.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "../options.h"

namespace fused_sce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

//   count      one int64 element on the input's device. It divides as `divisor` does; 0 divides as 1.
//   mask       bool: where it is false, an element does not count.
//   label_alpha  the option `alpha` as a tensor
//   prior        the option `smoothing_prior` as a tensor
//   columns      of the target's values, and
//   rows         where each row of these begins, and the last ends: int64, of a target in the format "csr"
//   reduction  "none", "rows" (sum over the last dimension) or "sum" (over all).
//   dtype      of the loss. Default: the target's if it is floating point (as torch), else the input's.
#define FUSED_SCE_TENSORS                                                                                              \
  "Tensor input, Tensor target, Tensor? weight=None, Tensor? pos_weight=None, Tensor? count=None, Tensor? mask=None, " \
  "Tensor? label_alpha=None, Tensor? prior=None, Tensor? columns=None, Tensor? rows=None"
//   target_format  how the targets are given: problem.h
#define FUSED_SCE_FORMAT "str target_format='dense'"
#define FUSED_SCE_RESULT "str reduction='none', ScalarType? dtype=None"

// Takes the values of a call from the stack, one after the other.
struct Values {
  StableIValue* stack;

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*stack++);
  }
};

// Members take their values in the order in which they stand here.
struct Arguments {
  explicit Arguments(Values& values) : values(values) {}

  Values& values;
  Tensor input = values.next<Tensor>();
  Tensor target = values.next<Tensor>();
  OptionalTensor weight = values.next<OptionalTensor>();
  OptionalTensor pos_weight = values.next<OptionalTensor>();
  OptionalTensor count = values.next<OptionalTensor>();
  OptionalTensor mask = values.next<OptionalTensor>();
  OptionalTensor label_alpha = values.next<OptionalTensor>();
  OptionalTensor prior = values.next<OptionalTensor>();
  OptionalTensor columns = values.next<OptionalTensor>();
  OptionalTensor rows = values.next<OptionalTensor>();
  std::string reduction = values.next<std::string>();
  std::optional<ScalarType> dtype = values.next<std::optional<ScalarType>>();
  Options options = Options::next(values);
  std::string target_format = values.next<std::string>();
};

}  // namespace fused_sce
