// The op layer: schemas, checks, and the tensors around each kernel call. Autograd is in autograd.cpp.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <utility>

#include "cpu/kernels.h"
#include "cpu/pages.h"
#ifdef FUSED_SCE_WITH_CUDA
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>
#include <unordered_map>

#include "cuda/kernels.h"
#endif
#include "ops.h"

namespace fused_sce {

using at::Tensor;
using c10::ScalarType;
using std::optional;

// Public ops first. `divisor` is what the sum is divided by: an integer made of sizes, so that it stays symbolic under
// torch.compile, where a float scale would be a new graph for each batch size. `dtype` is that of the result; default:
// the target's if it is floating point (as torch), else the input's.
TORCH_LIBRARY(fused_sce, m) {
  m.def(
      "sigmoid_cross_entropy(Tensor input, Tensor target, Tensor? weight=None, Tensor? pos_weight=None, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "sigmoid_cross_entropy_rows(Tensor input, Tensor target, Tensor? weight=None, Tensor? pos_weight=None, "
      "SymInt divisor=1, ScalarType? dtype=None) -> Tensor");
  m.def(
      "sigmoid_cross_entropy_sum(Tensor input, Tensor target, Tensor? weight=None, Tensor? pos_weight=None, "
      "SymInt divisor=1, ScalarType? dtype=None) -> Tensor");

  // The sum and its gradient by the input, both divided by `divisor`, from one pass over the inputs.
  m.def(
      "_sigmoid_cross_entropy_sum_with_gradient(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "SymInt divisor, ScalarType? dtype) -> (Tensor, Tensor)");
  // The same into memory that the caller has: nothing is allocated.
  m.def(
      "_sigmoid_cross_entropy_sum_with_gradient_out(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "SymInt divisor, *, Tensor(a!) loss, Tensor(b!) gradient) -> ()");
  // The gradient by the input for a gradient of the result that broadcasts to the input's shape.
  m.def(
      "_sigmoid_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, SymInt divisor) -> Tensor");
  // Multiplies `self` by a one-element tensor, without reading that on the host.
  m.def("_scale_(Tensor(a!) self, Tensor factor) -> ()");
}

namespace {

DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
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
    default: TORCH_CHECK_TYPE(false, name, " has dtype ", type, ", which sigmoid cross-entropy does not take");
  }
}

// A problem and the tensors whose memory it points at.
struct BoundProblem {
  Problem problem;
  c10::SmallVector<Tensor, 5> owners;
};

struct NamedTensor {
  const char* name;
  Tensor tensor;
  Operand* operand;
};

// The stride of `tensor`, broadcast to `sizes`, along dimension `dim` of these.
int64_t broadcast_stride(const Tensor& tensor, int64_t dims, int64_t dim) {
  const int64_t own = dim - (dims - tensor.dim());
  return own < 0 || tensor.size(own) == 1 ? 0 : tensor.stride(own);
}

bool broadcasts_to(const Tensor& tensor, at::IntArrayRef sizes) {
  const int64_t missing = int64_t(sizes.size()) - tensor.dim();
  if (missing < 0) return false;
  for (int64_t own = 0; own < tensor.dim(); ++own) {
    if (tensor.size(own) != 1 && tensor.size(own) != sizes[own + missing]) return false;
  }
  return true;
}

// Dimensions of size 1 dropped, neighbours merged wherever every strided operand allows it. False: more than kMaxDims
// left.
bool merge_dimensions(at::IntArrayRef sizes, c10::ArrayRef<NamedTensor> strided, Problem& problem) {
  problem.ndim = 0;
  for (int64_t dim = 0; dim < int64_t(sizes.size()); ++dim) {
    if (sizes[dim] == 1) continue;
    bool joins = problem.ndim > 0;
    for (const NamedTensor& operand : strided) {
      joins = joins && operand.operand->strides[problem.ndim - 1] ==
                           broadcast_stride(operand.tensor, sizes.size(), dim) * sizes[dim];
    }
    if (joins) {
      problem.sizes[problem.ndim - 1] *= sizes[dim];
    } else if (problem.ndim == kMaxDims) {
      return false;
    } else {
      problem.sizes[problem.ndim++] = sizes[dim];
    }
    for (const NamedTensor& operand : strided) {
      operand.operand->strides[problem.ndim - 1] = broadcast_stride(operand.tensor, sizes.size(), dim);
    }
  }
  if (problem.ndim == 0) {
    problem.ndim = 1;
    problem.sizes[0] = 1;
  }
  return true;
}

// Checks what would read out of bounds or in the wrong type; messages for people are fused_sce/_checks.py's business.
BoundProblem bind_problem(
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    const optional<Tensor>& upstream,
    double divisor) {
  TORCH_CHECK_TYPE(input.is_floating_point(), "input must be floating point, got ", input.scalar_type());
  TORCH_CHECK_VALUE(
      input.sizes() == target.sizes(), "Target size (", target.sizes(), ") must be the same as input size (",
      input.sizes(), ")");

  BoundProblem bound;
  Problem& problem = bound.problem;
  problem.numel = input.numel();
  problem.divisor = divisor;
  problem.in_double = input.scalar_type() == ScalarType::Double || target.scalar_type() == ScalarType::Double;

  c10::SmallVector<NamedTensor, 5> operands = {{"input", input, &problem.logits}, {"target", target, &problem.target}};
  if (weight && weight->defined()) operands.push_back({"weight", *weight, &problem.weight});
  if (pos_weight && pos_weight->defined()) operands.push_back({"pos_weight", *pos_weight, &problem.pos_weight});
  if (upstream) operands.push_back({"grad_output", *upstream, &problem.upstream});

  c10::SmallVector<NamedTensor, 5> strided;
  for (NamedTensor& each : operands) {
    if (each.tensor.device() != input.device()) {
      // As elsewhere in torch a scalar tensor may stay on the CPU.
      TORCH_CHECK(
          each.tensor.dim() == 0 && each.tensor.is_cpu(),
          "Expected all tensors to be on the same device, but input is on ", input.device(), " and ", each.name,
          " is on ", each.tensor.device());
      each.tensor = each.tensor.to(input.device());
    }
    TORCH_CHECK(
        broadcasts_to(each.tensor, input.sizes()), each.name, " of shape ", each.tensor.sizes(),
        " does not broadcast to the input's shape ", input.sizes());
    each.operand->dtype = dtype_of(each.tensor.scalar_type(), each.name);
    if (each.operand == &problem.weight || each.operand == &problem.pos_weight) {
      each.tensor = each.tensor.to(problem.in_double ? ScalarType::Double : ScalarType::Float);
      each.operand->dtype = dtype_of(each.tensor.scalar_type(), each.name);
    }
    each.operand->contiguous = each.tensor.is_contiguous() && each.tensor.sizes() == input.sizes();
    if (!each.operand->contiguous) strided.push_back(each);
  }

  if (strided.empty()) {
    problem.sizes[0] = problem.numel;
  } else if (!merge_dimensions(input.sizes(), strided, problem)) {
    for (NamedTensor& each : operands) {
      each.tensor = each.tensor.expand(input.sizes()).contiguous();
      each.operand->contiguous = true;
    }
    problem.ndim = 1;
    problem.sizes[0] = problem.numel;
  }
  static const char kEmpty = 0;  // null would mean an absent operand
  for (NamedTensor& each : operands) {
    each.operand->data = problem.numel ? each.tensor.const_data_ptr() : &kEmpty;
    bound.owners.push_back(std::move(each.tensor));
  }
  return bound;
}

Result result_of(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dtype_of(tensor.scalar_type(), "result")}; }

ScalarType result_type(const Tensor& input, const Tensor& target, optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(target.is_floating_point() ? target.scalar_type() : input.scalar_type());
  TORCH_CHECK_TYPE(at::isFloatingType(type), "dtype must be floating point, got ", type);
  return type;
}

// What differs between CPU and CUDA: who makes room for a result, and who runs a problem.
struct CpuBackend {
  static Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Tensor fresh = at::empty(sizes, options);
    cpu::prefer_large_pages(fresh.mutable_data_ptr(), fresh.nbytes());
    return fresh;
  }

  // At most this many elements (about 40 us of work with AVX2) are not worth waking a second thread.
  static constexpr int64_t kElementsPerThread = 32768;
  static constexpr int64_t kChunksPerThread = kElementsPerThread / cpu::kChunk;

  static void elements(const BoundProblem& bound, const Tensor&) {
    const cpu::Kernels& kernels = cpu::kernels();
    at::parallel_for(0, cpu::num_chunks(bound.problem.numel), kChunksPerThread, [&](int64_t begin, int64_t end) {
      kernels.chunks(bound.problem, begin, end, nullptr);
    });
  }

  // The sum of all losses over the divisor, into the one element of `total`.
  static void sum(const BoundProblem& bound, const Tensor& total) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t chunks = cpu::num_chunks(bound.problem.numel);
    c10::SmallVector<double, 64> partial_sums(chunks);
    at::parallel_for(0, chunks, kChunksPerThread, [&](int64_t begin, int64_t end) {
      kernels.chunks(bound.problem, begin, end, partial_sums.data());
    });
    const double sum = cpu::add_pairwise(partial_sums.data(), chunks) / bound.problem.divisor;
    visit_floating(dtype_of(total.scalar_type(), "result"), [&](auto tag) {
      using To = decltype(tag);
      *static_cast<To*>(total.mutable_data_ptr()) = StoreAs<To>::from(sum);
    });
  }

  static void rows(const BoundProblem& bound, int64_t columns, int64_t count) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns));
    at::parallel_for(
        0, count, grain, [&](int64_t begin, int64_t end) { kernels.rows(bound.problem, columns, begin, end); });
  }

  static void scale(const Tensor& self, const Tensor& factor) {
    bool is_one = false;
    visit_floating(dtype_of(factor.scalar_type(), "factor"), [&](auto tag) {
      using From = decltype(tag);
      is_one = load_as<double>(*static_cast<const From*>(factor.const_data_ptr())) == 1.0;
    });
    if (!is_one) self.mul_(factor);
  }
};

#ifdef FUSED_SCE_WITH_CUDA
// Every launch goes to the current stream of the tensors' device, and nothing waits for it.
struct CudaBackend {
  static Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

  static void elements(const BoundProblem& bound, const Tensor& result) {
    const c10::cuda::CUDAGuard guard(result.device());
    C10_CUDA_CHECK(cuda::elements(bound.problem, c10::cuda::getCurrentCUDAStream()));
  }

  static void sum(const BoundProblem& bound, const Tensor& total) {
    const c10::cuda::CUDAGuard guard(total.device());
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const int64_t words = cuda::workspace_words(bound.problem);
    Tensor fresh;
    double* workspace = nullptr;
    if (words > 0 && c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
      // A CUDA graph may be replayed on any stream, beside kernels that use this stream's workspace, and two counts in
      // one counter would lose a block. So each captured sum has its own, zeroed by the graph.
      fresh = at::zeros({words}, total.options().dtype(at::kDouble));
      workspace = fresh.mutable_data_ptr<double>();
    } else if (words > 0) {
      workspace = workspace_of(stream);
    }
    C10_CUDA_CHECK(cuda::sum(bound.problem, result_of(total), workspace, stream));
  }

  static void rows(const BoundProblem& bound, int64_t columns, int64_t count) {
    const c10::cuda::CUDAGuard guard(bound.owners[0].device());
    C10_CUDA_CHECK(cuda::rows(bound.problem, columns, count, c10::cuda::getCurrentCUDAStream()));
  }

  static void scale(const Tensor& self, const Tensor& factor) {
    TORCH_CHECK(
        factor.device() == self.device(), "Expected factor to be on ", self.device(), " like self, but it is on ",
        factor.device());
    const c10::cuda::CUDAGuard guard(self.device());
    Operand operand;
    operand.data = factor.const_data_ptr();
    operand.dtype = dtype_of(factor.scalar_type(), "factor");
    C10_CUDA_CHECK(cuda::scale(result_of(self), self.numel(), operand, c10::cuda::getCurrentCUDAStream()));
  }

 private:
  // One workspace for each stream, whose kernels run one after the other; each leaves the counter at 0 for the next. It
  // is kept for good (32 KiB) and not taken from torch's allocator: that may be serving a CUDA graph's private pool
  // (torch.compile warms up in one), where a tensor that outlives the graph is an error.
  static double* workspace_of(const c10::cuda::CUDAStream& stream) {
    static std::mutex mutex;
    static auto& workspaces = *new std::unordered_map<c10::cuda::CUDAStream, double*>();
    const std::lock_guard<std::mutex> lock(mutex);
    double*& workspace = workspaces[stream];
    if (!workspace) {
      // Another thread may be capturing a graph; in the default mode its capture would fail on this allocation.
      const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
      const size_t bytes = cuda::kMaxWorkspaceWords * sizeof(double);
      void* memory = nullptr;
      C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
      C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
      workspace = static_cast<double*>(memory);
    }
    return workspace;
  }
};
#endif

template <class Backend>
Tensor elementwise(
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    optional<ScalarType> dtype) {
  BoundProblem bound = bind_problem(input, target, weight, pos_weight, std::nullopt, 1.0);
  Tensor loss = Backend::empty(input.sizes(), input.options().dtype(result_type(input, target, dtype)));
  if (bound.problem.numel == 0) return loss;
  bound.problem.loss = result_of(loss);
  Backend::elements(bound, loss);
  return loss;
}

template <class Backend>
Tensor rows(
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    int64_t divisor,
    optional<ScalarType> dtype) {
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have at least one dimension to sum over");
  BoundProblem bound = bind_problem(input, target, weight, pos_weight, std::nullopt, double(divisor));
  const int64_t columns = input.size(-1);
  Tensor loss =
      at::empty(input.sizes().slice(0, input.dim() - 1), input.options().dtype(result_type(input, target, dtype)));
  if (loss.numel() == 0) return loss;
  bound.problem.loss = result_of(loss);
  Backend::rows(bound, columns, loss.numel());
  return loss;
}

template <class Backend>
Tensor sum(
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    int64_t divisor,
    optional<ScalarType> dtype) {
  BoundProblem bound = bind_problem(input, target, weight, pos_weight, std::nullopt, double(divisor));
  Tensor total = at::empty({}, input.options().dtype(result_type(input, target, dtype)));
  Backend::sum(bound, total);
  return total;
}

template <class Backend>
std::tuple<Tensor, Tensor> sum_with_gradient(
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    int64_t divisor,
    optional<ScalarType> dtype) {
  BoundProblem bound = bind_problem(input, target, weight, pos_weight, std::nullopt, double(divisor));
  Tensor total = at::empty({}, input.options().dtype(result_type(input, target, dtype)));
  Tensor gradient = Backend::empty(input.sizes(), input.options());
  bound.problem.gradient = result_of(gradient);
  Backend::sum(bound, total);
  return {total, gradient};
}

template <class Backend>
void sum_with_gradient_out(
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    int64_t divisor,
    const Tensor& loss,
    const Tensor& gradient) {
  TORCH_CHECK_VALUE(loss.numel() == 1, "loss must have one element, got shape ", loss.sizes());
  TORCH_CHECK_TYPE(loss.is_floating_point(), "loss must be floating point, got ", loss.scalar_type());
  TORCH_CHECK_VALUE(
      gradient.sizes() == input.sizes() && gradient.is_contiguous(),
      "gradient must be contiguous and of input's shape ", input.sizes(), ", got shape ", gradient.sizes(),
      " and strides ", gradient.strides());
  TORCH_CHECK_TYPE(
      gradient.scalar_type() == input.scalar_type(), "gradient must have input's dtype ", input.scalar_type(), ", got ",
      gradient.scalar_type());
  for (const auto& [name, result] : {std::pair{"loss", loss}, std::pair{"gradient", gradient}}) {
    TORCH_CHECK(
        result.device() == input.device(), "Expected all tensors to be on the same device, but input is on ",
        input.device(), " and ", name, " is on ", result.device());
  }

  BoundProblem bound = bind_problem(input, target, weight, pos_weight, std::nullopt, double(divisor));
  at::assert_no_overlap(loss, gradient);
  for (const Tensor& each : bound.owners) {
    at::assert_no_overlap(loss, each);
    at::assert_no_overlap(gradient, each);
  }
  bound.problem.gradient = result_of(gradient);
  Backend::sum(bound, loss);
}

template <class Backend>
Tensor backward(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& target,
    const optional<Tensor>& weight,
    const optional<Tensor>& pos_weight,
    int64_t divisor) {
  BoundProblem bound = bind_problem(input, target, weight, pos_weight, grad_output, double(divisor));
  Tensor gradient = Backend::empty(input.sizes(), input.options());
  if (bound.problem.numel == 0) return gradient;
  bound.problem.gradient = result_of(gradient);
  Backend::elements(bound, gradient);
  return gradient;
}

template <class Backend>
void scale_(const Tensor& self, const Tensor& factor) {
  TORCH_CHECK(self.is_contiguous(), "self must be contiguous");
  TORCH_CHECK(factor.numel() == 1, "factor must have one element, got ", factor.numel());
  if (self.numel() > 0) Backend::scale(self, factor);
}

template <class Backend>
void register_kernels(torch::Library& m) {
  m.impl("sigmoid_cross_entropy", &elementwise<Backend>);
  m.impl("sigmoid_cross_entropy_rows", &rows<Backend>);
  m.impl("sigmoid_cross_entropy_sum", &sum<Backend>);
  m.impl("_sigmoid_cross_entropy_sum_with_gradient", &sum_with_gradient<Backend>);
  m.impl("_sigmoid_cross_entropy_sum_with_gradient_out", &sum_with_gradient_out<Backend>);
  m.impl("_sigmoid_cross_entropy_backward", &backward<Backend>);
  m.impl("_scale_", &scale_<Backend>);
}

// Autocast reads the logits in their own type, where torch first copies them to float32, and gives a float32 loss
// (float64 for a float64 target, as torch).
optional<ScalarType> autocast_type(const Tensor& target, optional<ScalarType> dtype) {
  if (dtype) return dtype;
  return target.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <c10::DispatchKey key>
struct Autocast {
  static Tensor elementwise(
      const Tensor& input,
      const Tensor& target,
      const optional<Tensor>& weight,
      const optional<Tensor>& pos_weight,
      optional<ScalarType> dtype) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return call_elementwise(input, target, weight, pos_weight, autocast_type(target, dtype));
  }

  static Tensor rows(
      const Tensor& input,
      const Tensor& target,
      const optional<Tensor>& weight,
      const optional<Tensor>& pos_weight,
      c10::SymInt divisor,
      optional<ScalarType> dtype) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return call_rows(input, target, weight, pos_weight, std::move(divisor), autocast_type(target, dtype));
  }

  static Tensor sum(
      const Tensor& input,
      const Tensor& target,
      const optional<Tensor>& weight,
      const optional<Tensor>& pos_weight,
      c10::SymInt divisor,
      optional<ScalarType> dtype) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return call_sum(input, target, weight, pos_weight, std::move(divisor), autocast_type(target, dtype));
  }

  static void register_wrappers(torch::Library& m) {
    m.impl("sigmoid_cross_entropy", &elementwise);
    m.impl("sigmoid_cross_entropy_rows", &rows);
    m.impl("sigmoid_cross_entropy_sum", &sum);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_sce, CPU, m) { register_kernels<CpuBackend>(m); }
#ifdef FUSED_SCE_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_sce, CUDA, m) { register_kernels<CudaBackend>(m); }
#endif
TORCH_LIBRARY_IMPL(fused_sce, AutocastCPU, m) { Autocast<c10::DispatchKey::AutocastCPU>::register_wrappers(m); }
TORCH_LIBRARY_IMPL(fused_sce, AutocastCUDA, m) { Autocast<c10::DispatchKey::AutocastCUDA>::register_wrappers(m); }

}  // namespace fused_sce
