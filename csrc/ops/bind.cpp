#include "bind.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace fused_sce {
namespace {

using torch::headeronly::DeviceType;
using torch::stable::Device;

struct Named {
  const char* name = nullptr;
  const Tensor* tensor = nullptr;
  Operand* operand = nullptr;
  // Asked for once: each question is a call through the stable ABI.
  IntHeaderOnlyArrayRef sizes = {};
  IntHeaderOnlyArrayRef strides = {};
};

// The tensors of a problem that broadcast to the logits: input, target, weight, pos_weight, mask, alpha,
// prior, upstream.
struct Operands {
  Named each[8];
  int count = 0;

  void add(const char* name, const Tensor& tensor, Operand& operand) { each[count++] = {name, &tensor, &operand}; }
  Named* begin() { return each; }
  Named* end() { return each + count; }
};

// Numbers, and the shape of a tensor, as an error message shows them.
std::string list_of(IntHeaderOnlyArrayRef numbers) {
  std::string list;
  for (const int64_t number : numbers) list += (list.empty() ? "" : ", ") + std::to_string(number);
  return "[" + list + "]";
}

std::string shape_of(const Tensor& tensor) { return list_of(tensor.sizes()); }

// The device of a tensor, as an error message shows it.
std::string device_of(const Tensor& tensor) {
  const Device device = tensor.device();
  const std::string index = device.has_index() ? ":" + std::to_string(device.index()) : "";
  return (tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda" : "another device") + index;
}

constexpr const char* kFloatingTypes = "float32, float64, bfloat16 or float16";

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

bool broadcasts_to(IntHeaderOnlyArrayRef own, IntHeaderOnlyArrayRef sizes) {
  if (own.size() > sizes.size()) return false;
  const size_t missing = sizes.size() - own.size();
  for (size_t dim = 0; dim < own.size(); ++dim) {
    if (own[dim] != 1 && own[dim] != sizes[dim + missing]) return false;
  }
  return true;
}

// Whether a tensor is one value, expanded or not.
bool is_single(const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != 0) return false;
  }
  return true;
}

// The strides of a tensor whose dimensions lie in memory in the order of `dims`, each beside the next.
std::vector<int64_t> strides_in_order(IntHeaderOnlyArrayRef sizes, const std::vector<size_t>& dims) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t stride = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    strides[*dim] = stride;
    stride *= std::max<int64_t>(sizes[*dim], 1);
  }
  return strides;
}

// Whether a tensor has the strides, where they matter.
bool has_strides(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef own, IntHeaderOnlyArrayRef strides) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] != 1 && own[dim] != strides[dim]) return false;
  }
  return true;
}

// The stride of an operand, broadcast to `dims` dimensions, along dimension `dim` of these.
int64_t broadcast_stride(const Named& each, size_t dims, size_t dim) {
  const size_t missing = dims - each.sizes.size();
  return dim < missing || each.sizes[dim - missing] == 1 ? 0 : each.strides[dim - missing];
}

// Takes the dimensions in the order of `layout`, drops those of size 1, and merges neighbours wherever the strides of
// every operand allow it. False: more than kMaxDims are left.
bool merge_dimensions(IntHeaderOnlyArrayRef sizes, const Layout& layout, Operands& operands, Problem& problem) {
  const size_t dims = sizes.size();
  for (Named& each : operands) each.strides = each.tensor->strides();
  problem.ndim = 0;
  for (const size_t dim : layout.dims) {
    if (sizes[dim] == 1) continue;
    const bool joins = problem.ndim > 0 && std::all_of(operands.begin(), operands.end(), [&](const Named& each) {
                         const int64_t stride = broadcast_stride(each, dims, dim);
                         return each.operand->strides[problem.ndim - 1] == stride * sizes[dim];
                       });
    if (joins) {
      problem.sizes[problem.ndim - 1] *= sizes[dim];
    } else if (problem.ndim == kMaxDims) {
      return false;
    } else {
      problem.sizes[problem.ndim++] = sizes[dim];
    }
    for (const Named& each : operands) {
      each.operand->strides[problem.ndim - 1] = broadcast_stride(each, dims, dim);
    }
  }
  if (problem.ndim == 0) {
    problem.ndim = 1;
    problem.sizes[0] = 1;
  }
  return true;
}

// The tensor, broadcast, and in memory as `layout` says.
Tensor materialized(const Tensor& tensor, const Tensor& input, const Layout& layout) {
  Tensor copy = new_tensor(input, input.sizes(), layout.strides, tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Whether an operand lies across the problem: each element of a row in another cache line, whose other elements belong
// to other rows. Gathered row by row, a transposed int8 target takes 14 times as long as the whole loss, and one with
// the channels first beside logits with the channels last 1.2 to 2.3 ns per element; torch's copy, which goes by tiles,
// takes 0.4 to 2.4 ns.
bool lies_across(const Problem& problem, const Operand& operand, int64_t element_size) {
  constexpr int64_t kLine = 64;
  const int last = problem.ndim - 1;
  return !operand.contiguous && operand.strides[last] * element_size >= kLine &&
         std::any_of(operand.strides, operand.strides + last, [&](int64_t stride) {
           return stride != 0 && stride * element_size < kLine;
         });
}

// The ignore_value as targets of a type hold it. A number that these cannot hold equals none of them.
double as_stored(double value, DType target) {
  if (target != DType::Float32 && target != DType::BFloat16 && target != DType::Float16) return value;
  const double stored =
      visit_floating(target, [&](auto tag) { return load_as<double>(store_as<decltype(tag)>(value)); });
  return std::isinf(stored) ? value : stored;
}

// The memory of a tensor: never null, which would mean an absent one.
const void* data_of(const Tensor& tensor, const char* name) {
  static const char kEmpty = 0;
  const void* data = tensor.const_data_ptr();
  if (!data && tensor.numel() > 0) fail(name, " has no memory: its storage was resized to 0 bytes");
  return data ? data : &kEmpty;
}

// The first byte of a tensor's elements and the byte after the last. Empty tensors have none.
std::pair<const char*, const char*> extent_of(const Tensor& tensor) {
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return {begin, begin + (last + 1) * int64_t(tensor.element_size())};
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto [a_begin, a_end] = extent_of(a);
  const auto [b_begin, b_end] = extent_of(b);
  return a_begin < b_end && b_begin < a_end;
}

void check_same_device(const Tensor& tensor, const char* name, const Tensor& input) {
  if (tensor.device() == input.device()) return;
  fail(
      "Expected all tensors to be on the same device, but input is on ", device_of(input), " and ", name, " is on ",
      device_of(tensor));
}

// A tensor of indices, as int64 numbers one after the other.
const int64_t* indices_of(const Tensor& tensor, const char* name, const Tensor& input, BoundProblem& bound) {
  const DType dtype = dtype_of(tensor, name);
  if (!is_integer(dtype)) fail(name, " must have an integer dtype, got ", tensor.scalar_type());
  check_same_device(tensor, name, input);
  data_of(tensor, name);
  Tensor kept = dtype == DType::Int64 ? tensor : torch::stable::to(tensor, ScalarType::Long);
  bound.copies.push_back(torch::stable::contiguous(kept));
  return static_cast<const int64_t*>(data_of(bound.copies.back(), name));
}

// The targets of a format that gives them row by row.
void bind_rows(const Arguments& arguments, BoundProblem& bound) {
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  Problem& problem = bound.problem;
  if (input.dim() == 0) fail("input must have a last dimension for target_format ", arguments.target_format);
  problem.columns = input.size(input.dim() - 1);
  // The shape of the target: that of the input, the last dimension left out or another.
  const bool has_last = problem.format == TargetFormat::Packed || problem.format == TargetFormat::IndexList;
  const auto fits = [&] {
    if (target.dim() != input.dim() - (has_last ? 0 : 1)) return false;
    for (int64_t dim = 0; dim < input.dim() - 1; ++dim) {
      if (target.size(dim) != input.size(dim)) return false;
    }
    return problem.format != TargetFormat::Packed || target.size(target.dim() - 1) == (problem.columns + 7) / 8;
  };
  if (problem.format == TargetFormat::Csr) {
    if (input.dim() != 2 || !arguments.columns || !arguments.rows)
      fail("a sparse target needs an input of shape (N, C)");
    if (arguments.rows->numel() != input.size(0) + 1 || arguments.columns->numel() != target.numel()) {
      fail("a sparse target must have the shape of the input, ", shape_of(input));
    }
    check_same_device(target, "target", input);
    problem.values = target.numel();
    problem.value_columns = indices_of(*arguments.columns, "columns", input, bound);
    problem.row_begins = indices_of(*arguments.rows, "rows", input, bound);
    bound.copies.push_back(torch::stable::contiguous(target));
    problem.target.data = data_of(bound.copies.back(), "target");
    problem.target.dtype = dtype_of(target, "target");
    return;
  }
  if (!fits()) {
    fail(
        "Target size (", shape_of(target), ") does not fit input size (", shape_of(input), ") and target_format ",
        arguments.target_format);
  }
  if (problem.format == TargetFormat::Packed) {
    if (target.scalar_type() != ScalarType::Byte) fail("a packed target must have dtype uint8");
    check_same_device(target, "target", input);
    bound.copies.push_back(torch::stable::contiguous(target));
    problem.target.data = data_of(bound.copies.back(), "target");
    problem.target.dtype = DType::Bool;
    return;
  }
  problem.target.data = indices_of(target, "target", input, bound);
  problem.target.dtype = DType::Bool;
  if (problem.format == TargetFormat::IndexList) {
    problem.list_length = target.size(target.dim() - 1);
  } else if (problem.options.has_ignore_value) {
    const double index = problem.options.ignore_value;
    problem.has_ignored_index = std::fabs(index) < 0x1p62 && index == std::floor(index);
    problem.ignored_index = problem.has_ignored_index ? int64_t(index) : 0;
    problem.options.ignore_value = NAN;
  }
}

}  // namespace

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::Float32;
    case ScalarType::Double: return DType::Float64;
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Half: return DType::Float16;
    case ScalarType::Bool: return DType::Bool;
    case ScalarType::Byte: return DType::UInt8;
    case ScalarType::Char: return DType::Int8;
    case ScalarType::Short: return DType::Int16;
    case ScalarType::Int: return DType::Int32;
    case ScalarType::Long: return DType::Int64;
    default:
      fail(
          name, " must have dtype ", kFloatingTypes, ", bool or a signed integer or uint8, got ", tensor.scalar_type());
  }
}

Reduction reduction_of(const Arguments& arguments) {
  if (arguments.reduction == "none") return Reduction::None;
  if (arguments.reduction == "sum") return Reduction::Sum;
  if (arguments.reduction != "rows") fail("reduction must be none, rows or sum, got ", arguments.reduction);
  if (arguments.input.dim() == 0) fail("input must have a last dimension to sum over, but it is a scalar");
  return Reduction::Rows;
}

TargetFormat format_of(const Arguments& arguments) {
  const std::string& name = arguments.target_format;
  if (name == "dense") return TargetFormat::Dense;
  if (name == "class_index") return TargetFormat::ClassIndex;
  if (name == "packed") return TargetFormat::Packed;
  if (name == "index_list") return TargetFormat::IndexList;
  if (name == "csr") return TargetFormat::Csr;
  fail("target_format must be dense, class_index, packed, index_list or csr, got ", name);
}

ScalarType result_type(const Arguments& arguments) {
  const ScalarType target = arguments.target.scalar_type();
  const ScalarType type = arguments.dtype.value_or(is_floating(target) ? target : arguments.input.scalar_type());
  if (!is_floating(type)) fail("dtype must be ", kFloatingTypes, ", got ", type);
  return type;
}

Layout row_major(const Tensor& tensor) {
  Layout layout;
  layout.dims.resize(tensor.dim());
  std::iota(layout.dims.begin(), layout.dims.end(), size_t(0));
  layout.strides = strides_in_order(tensor.sizes(), layout.dims);
  return layout;
}

Layout layout_of(const Tensor& tensor) {
  Layout layout = row_major(tensor);
  if (tensor.is_contiguous()) return layout;
  const IntHeaderOnlyArrayRef strides = tensor.strides();
  Layout by_stride = layout;
  std::stable_sort(
      by_stride.dims.begin(), by_stride.dims.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  by_stride.strides = strides_in_order(tensor.sizes(), by_stride.dims);
  by_stride.is_row_major = false;
  return has_strides(tensor.sizes(), strides, by_stride.strides) ? by_stride : layout;
}

BoundProblem bind(const Arguments& arguments, const Layout& layout, const Tensor* upstream) {
  const Tensor& input = arguments.input;
  const IntHeaderOnlyArrayRef sizes = input.sizes();
  const ScalarType input_type = input.scalar_type();
  if (!is_floating(input_type)) fail("input must have dtype ", kFloatingTypes, ", got ", input_type);
  BoundProblem bound;
  Problem& problem = bound.problem;
  problem.format = format_of(arguments);
  const bool is_dense = problem.format == TargetFormat::Dense;
  if (is_dense && !arguments.target.sizes().equals(sizes)) {
    fail("Target size (", shape_of(arguments.target), ") must be the same as input size (", shape_of(input), ")");
  }
  problem.numel = input.numel();
  problem.options = arguments.options;
  problem.in_double = input_type == ScalarType::Double || arguments.target.scalar_type() == ScalarType::Double;
  const ScalarType computing_type = problem.in_double ? ScalarType::Double : ScalarType::Float;

  Operands operands;
  operands.add("input", input, problem.logits);
  if (is_dense) operands.add("target", arguments.target, problem.target);
  if (arguments.weight) operands.add("weight", *arguments.weight, problem.weight);
  if (arguments.pos_weight) operands.add("pos_weight", *arguments.pos_weight, problem.pos_weight);
  if (arguments.mask) operands.add("mask", *arguments.mask, problem.mask);
  if (arguments.label_alpha) operands.add("label_alpha", *arguments.label_alpha, problem.alpha);
  if (arguments.prior) operands.add("prior", *arguments.prior, problem.prior);
  const bool has_factor = upstream && is_single(*upstream);
  if (upstream) operands.add("grad_output", *upstream, has_factor ? problem.factor : problem.upstream);

  const auto replace = [&](Named& each, Tensor tensor) {
    bound.copies.push_back(std::move(tensor));
    each.tensor = &bound.copies.back();
  };
  bool all_contiguous = true;
  for (Named& each : operands) {
    data_of(*each.tensor, each.name);  // before a copy is made of it
    // As elsewhere in torch, a scalar tensor may stay on the CPU.
    if (!input.is_cpu() && each.tensor->dim() == 0 && each.tensor->is_cpu()) {
      replace(each, torch::stable::to(*each.tensor, input.device()));
    }
    check_same_device(*each.tensor, each.name, input);
    each.sizes = each.tensor->sizes();
    if (!broadcasts_to(each.sizes, sizes)) {
      fail(each.name, " of shape ", shape_of(*each.tensor), " does not broadcast to input's shape ", shape_of(input));
    }
    each.operand->dtype = dtype_of(*each.tensor, each.name);
    if (each.operand == &problem.mask && each.operand->dtype != DType::Bool) {
      fail("mask must have dtype bool, got ", each.tensor->scalar_type());
    }
    if (each.operand == &problem.alpha && !is_floating(each.tensor->scalar_type())) {
      fail("label_alpha must have dtype ", kFloatingTypes, ", got ", each.tensor->scalar_type());
    }
    // Converted here once rather than in every kernel: a weight is small as a rule. A gradient of the loss may be as
    // large as the logits and have their type, so the kernels read that type as well.
    const ScalarType type = each.tensor->scalar_type();
    const bool is_weight = each.operand == &problem.weight || each.operand == &problem.pos_weight ||
                           each.operand == &problem.alpha || each.operand == &problem.prior;
    const bool is_upstream = each.operand == &problem.upstream || each.operand == &problem.factor;
    if (type != computing_type && (is_weight || (is_upstream && type != input_type))) {
      replace(each, torch::stable::to(*each.tensor, computing_type));
      each.operand->dtype = problem.in_double ? DType::Float64 : DType::Float32;
    }
  }
  if (has_factor) {
    const Named& factor = operands.each[--operands.count];
    problem.factor.data = data_of(*factor.tensor, factor.name);
  }

  for (Named& each : operands) {
    each.operand->contiguous =
        each.sizes.equals(sizes) && (layout.is_row_major ? each.tensor->is_contiguous()
                                                         : has_strides(sizes, each.tensor->strides(), layout.strides));
    all_contiguous = all_contiguous && each.operand->contiguous;
  }
  if (all_contiguous || !merge_dimensions(sizes, layout, operands, problem)) {
    for (Named& each : operands) {
      if (!each.operand->contiguous) replace(each, materialized(*each.tensor, input, layout));
      each.operand->contiguous = true;
      each.operand->strides[0] = 1;
    }
    problem.ndim = 1;
    problem.sizes[0] = problem.numel;
  }
  for (Named& each : operands) {
    if (!lies_across(problem, *each.operand, int64_t(each.tensor->element_size()))) continue;
    replace(each, materialized(*each.tensor, input, layout));
    each.operand->contiguous = true;
    int64_t stride = 1;
    for (int dim = problem.ndim - 1; dim >= 0; --dim) {
      each.operand->strides[dim] = stride;
      stride *= problem.sizes[dim];
    }
  }
  for (const Named& each : operands) each.operand->data = data_of(*each.tensor, each.name);

  if (!is_dense) bind_rows(arguments, bound);
  problem.options.ignore_value = as_stored(problem.options.ignore_value, problem.target.dtype);
  if (arguments.count) {
    const Tensor& count = *arguments.count;
    if (count.numel() != 1 || count.scalar_type() != ScalarType::Long) {
      fail("count must be one int64 element, got shape ", shape_of(count), " and dtype ", count.scalar_type());
    }
    check_same_device(count, "count", input);
    problem.count = static_cast<const int64_t*>(data_of(count, "count"));
  }
  return bound;
}

bool check_gradient(const Arguments& arguments, const Layout& layout, const Tensor* upstream, const Tensor& gradient) {
  const Tensor& input = arguments.input;
  if (!gradient.sizes().equals(input.sizes()) || !has_strides(input.sizes(), gradient.strides(), layout.strides)) {
    fail(
        "gradient must be of input's shape ", shape_of(input), " without gaps in memory, got shape ",
        shape_of(gradient), " and strides ", list_of(gradient.strides()));
  }
  if (gradient.scalar_type() != input.scalar_type()) {
    fail("gradient must have input's dtype ", input.scalar_type(), ", got ", gradient.scalar_type());
  }
  check_same_device(gradient, "gradient", input);
  const void* const data = data_of(gradient, "gradient");
  const bool is_in_place =
      data == input.const_data_ptr() && has_strides(input.sizes(), input.strides(), gradient.strides());
  bool is_apart = (is_in_place || !overlap(gradient, input)) && !overlap(gradient, arguments.target) &&
                  !(upstream && overlap(gradient, *upstream));
  for (const OptionalTensor* factor :
       {&arguments.weight, &arguments.pos_weight, &arguments.count, &arguments.mask, &arguments.label_alpha,
        &arguments.prior, &arguments.columns, &arguments.rows}) {
    is_apart = is_apart && !(*factor && overlap(gradient, **factor));
  }
  if (!is_apart) fail("gradient overlaps the memory of an argument and is not exactly that of input");
  return is_in_place;
}

void check_scale(const Tensor& self, const Tensor& factor) {
  if (!self.is_contiguous()) fail("self must be contiguous");
  if (factor.numel() != 1) fail("factor must have one element, got shape ", shape_of(factor));
  if (!is_floating(self.scalar_type()) || !is_floating(factor.scalar_type())) {
    fail(
        "self and factor must have dtype ", kFloatingTypes, ", got ", self.scalar_type(), " and ",
        factor.scalar_type());
  }
  check_same_device(factor, "factor", self);
  data_of(self, "self");
  data_of(factor, "factor");
  if (overlap(self, factor)) fail("factor lies in the memory of self");
}

Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, like.get_device_index(),
      &handle));
  return Tensor(handle);
}

Result result_of(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor, "result")}; }

}  // namespace fused_sce
