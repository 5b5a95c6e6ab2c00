// The ops on CUDA tensors: each launches on the current stream of the tensors' device and never waits.
//
// A library of its own, because a torch without CUDA lacks the functions it calls. The CUDA runtime is linked
// statically: so it does not matter which one torch brings, as long as the driver knows this one.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <utility>

#include "../ops/kernels.h"
#include "kernels.h"

namespace fused_sce {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgets the error, which the next launch would otherwise report again
  fail("CUDA error: ", cudaGetErrorString(status));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The counter and the partial sums of one kernel at a time. There is one workspace for each stream, whose kernels run
// one after the other; each leaves the counter at 0 for the next. Streams are told apart by their id: a handle may come
// back as that of a new stream while kernels of the destroyed one still run, and cudaStreamPerThread is another stream
// in each thread. A workspace is never freed, and not taken from torch's allocator: that may be serving a CUDA graph's
// private pool (torch.compile warms up in one), where a tensor that outlives the graph is an error. Null: there is no
// memory left, or there have been more streams than kMaxStreams.
constexpr size_t kMaxStreams = 1024;  // 32 MiB of workspaces, for programs that go on making streams

double* workspace_of(int32_t device, cudaStream_t stream) {
  static std::mutex mutex;
  static auto& workspaces = *new std::map<std::pair<int32_t, unsigned long long>, double*>();
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = workspaces.find({device, id});
  if (found != workspaces.end()) return found->second;
  if (workspaces.size() == kMaxStreams) return nullptr;
  // Another thread may be capturing a graph. In the default mode its capture would fail on this allocation.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  const size_t bytes = cuda::kMaxWorkspaceWords * sizeof(double);
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaSuccess) status = cudaMemsetAsync(memory, 0, bytes, stream);
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // forgets it
    return nullptr;
  }
  check(status);
  return workspaces[{device, id}] = static_cast<double*>(memory);
}

struct CudaBackend {
  static void prepare(const Tensor&) {}
  static void check_labels(const Problem&) {}  // the kernels do: a failed assertion ends the process's use of the GPU

  static void elements(const Problem& problem, const Tensor& result) {
    const DeviceGuard guard(result.get_device_index());
    check(cuda::elements(problem, current_stream(result)));
  }

  static void sum(const Problem& problem, const Tensor& total) {
    const DeviceGuard guard(total.get_device_index());
    const cudaStream_t stream = current_stream(total);
    const int64_t words = cuda::workspace_words(problem);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (words > 0) check(cudaStreamIsCapturing(stream, &capture));
    double* workspace = nullptr;
    OptionalTensor zeros;
    if (words > 0 && capture == cudaStreamCaptureStatusNone) {
      workspace = workspace_of(total.get_device_index(), stream);
    }
    if (words > 0 && !workspace) {
      // A CUDA graph may be replayed on any stream, beside kernels that use this stream's workspace, and two counts in
      // one counter would lose a block. So each captured sum has its own, zeroed by the graph. And where there is no
      // workspace, torch's allocator gives back what it keeps in reserve.
      const std::vector<int64_t> size = {words};
      zeros = new_tensor(total, size, std::vector<int64_t>{1}, ScalarType::Double);
      workspace = static_cast<double*>(zeros->mutable_data_ptr());
      check(cudaMemsetAsync(workspace, 0, size_t(words) * sizeof(double), stream));
    }
    check(cuda::sum(problem, result_of(total), workspace, stream));
  }

  static void rows(const Problem& problem, int64_t columns, const Tensor& loss) {
    const DeviceGuard guard(loss.get_device_index());
    check(cuda::rows(problem, columns, loss.numel(), current_stream(loss)));
  }
};

void scale(StableIValue* stack, uint64_t, uint64_t) {
  Values values{stack};
  const Tensor self = values.next<Tensor>();
  const Tensor factor = values.next<Tensor>();
  check_scale(self, factor);
  const DeviceGuard guard(self.get_device_index());
  Operand operand;
  operand.data = factor.const_data_ptr();
  operand.dtype = dtype_of(factor, "factor");
  check(cuda::scale(result_of(self), self.numel(), operand, current_stream(self)));
}

void build(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(std::string("nvcc " FUSED_SCE_NVCC_VERSION ", " FUSED_SCE_CUDA_ARCHS));
}

}  // namespace
}  // namespace fused_sce

STABLE_TORCH_LIBRARY_IMPL(fused_sce, CUDA, m) {
  fused_sce::OpKernels<fused_sce::CudaBackend>::register_all(m);
  m.impl("_scale_", &fused_sce::scale);
}
STABLE_TORCH_LIBRARY_IMPL(fused_sce, CompositeExplicitAutograd, m) { m.impl("_cuda_build", &fused_sce::build); }
