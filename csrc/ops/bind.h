// From tensors to what the kernels read: every check of the arguments, once.
#pragma once

#include <list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../problem.h"
#include "arguments.h"

namespace fused_sce {

using torch::headeronly::IntHeaderOnlyArrayRef;

// The stable ABI knows no exception but this one; fused_sce/_checks.py finds the type and the words that people expect.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fused_sce: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The type of a tensor's elements. Throws for one that the kernels do not read.
DType dtype_of(const Tensor& tensor, const char* name);

enum class Reduction { None, Rows, Sum };

Reduction reduction_of(const Arguments& arguments);

// How the targets are given.
TargetFormat format_of(const Arguments& arguments);

// The dtype of the loss.
ScalarType result_type(const Arguments& arguments);

// How the elements of a tensor follow one another in memory, each beside the next.
struct Layout {
  std::vector<size_t> dims;      // outermost first
  std::vector<int64_t> strides;  // of each dimension
  bool is_row_major = true;
};

// That of the tensor, as torch.empty_like has it; row-major for one that overlaps itself or has gaps.
Layout layout_of(const Tensor& tensor);
Layout row_major(const Tensor& tensor);

// A problem, and the tensors made for it. It points at their memory and at that of the arguments.
struct BoundProblem {
  Problem problem;
  std::list<Tensor> copies;  // which stay where they are
};

// Checks the arguments and binds them, elements in the order of `layout`. `upstream` is a gradient of the loss that
// broadcasts to the input's shape.
BoundProblem bind(const Arguments& arguments, const Layout& layout, const Tensor* upstream = nullptr);

// Checks that `gradient` can take the gradient by the input: of its shape, dtype and device, dense in the order of
// `layout`, and apart from the memory of all arguments, `upstream` too, or exactly in that of the input. Returns
// whether it is the latter.
bool check_gradient(const Arguments& arguments, const Layout& layout, const Tensor* upstream, const Tensor& gradient);

// Checks that `factor` can scale `self`.
void check_scale(const Tensor& self, const Tensor& factor);

// A new tensor on the device of `like`.
Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype);

// Where a kernel writes to.
Result result_of(const Tensor& tensor);

}  // namespace fused_sce
