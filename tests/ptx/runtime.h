// What stands in for the CUDA runtime: nvcc's own code for the host - launches, stubs, parameters - runs unchanged and
// ends here. To be included once, because the functions that this code calls are below.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptx {

struct Runtime {
  struct Configuration {
    dim3 grid;
    dim3 block;
    size_t shared;
    cudaStream_t stream;
  };

  std::unique_ptr<Program> program;
  Machine machine;
  std::unordered_map<const void*, std::string> names;  // of kernels, by the host's functions
  std::vector<Configuration> configurations;
  std::map<std::string, uint64_t> launches;  // by name
  cudaError_t status = cudaSuccess;          // of the last launch
  std::string error;                         // of the last launch

  static Runtime& get() {
    static Runtime runtime;
    return runtime;
  }

  // An exception must not cross nvcc's code, so an error is kept.
  cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments) {
    try {
      const auto found = names.find(kernel);
      if (found == names.end()) fail("launch of a kernel that was never registered");
      if (!grid.x || !block.x || grid.x > 0x7fffffffu || block.x > 1024 || grid.y * grid.z * block.y * block.z != 1) {
        fail("invalid grid: %u %u %u blocks, %u %u %u threads", grid.x, grid.y, grid.z, block.x, block.y, block.z);
      }
      Function& function = program->function(found->second);
      ++launches[found->second];
      if (function.param_bytes > 4096) fail("%d bytes of parameters", function.param_bytes);
      std::vector<uint8_t> params(size_t(function.param_bytes));
      for (size_t n = 0; n < function.params.size(); ++n) {
        std::memcpy(params.data() + function.params[n].first, arguments[n], size_t(function.params[n].second));
      }
      machine.launch(function, grid.x, block.x, params);
      status = cudaSuccess;
    } catch (const Error& caught) {
      error = caught.what();
      status = cudaErrorLaunchFailure;
    }
    return status;
  }
};

}  // namespace ptx

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**,
    const char* host,
    char*,
    const char* device,
    int,
    uint3*,
    uint3*,
    dim3*,
    dim3*,
    int*) {
  ptx::Runtime::get().names[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  ptx::Runtime::get().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  std::vector<ptx::Runtime::Configuration>& all = ptx::Runtime::get().configurations;
  *grid = all.back().grid;
  *block = all.back().block;
  *shared = all.back().shared;
  *static_cast<cudaStream_t*>(stream) = all.back().stream;
  all.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  return ptx::Runtime::get().launch(kernel, grid, block, arguments);
}
cudaError_t cudaGetLastError() { return std::exchange(ptx::Runtime::get().status, cudaSuccess); }

}  // extern "C"
