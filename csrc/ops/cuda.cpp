#include "ops/cuda.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels/backward/launch.h"
#include "kernels/forward/launch.h"

namespace tilewright::ops {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("tilewright: ") + what + ": " + cudaGetErrorString(status));
  }
}

// The device of the tensors is the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != device;
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Ten times the major compute capability, plus the minor.
int compute_capability(int device) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet
  if (device < kMaxDevices) {
    if (const int capability = known[device].load(std::memory_order_relaxed)) return capability;
  }
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  const int capability = 10 * major + minor;
  if (device < kMaxDevices) known[device].store(capability, std::memory_order_relaxed);
  return capability;
}

// The binary also loads into a torch without CUDA, which lacks this symbol: it is looked up in the library that a torch
// with CUDA has loaded. (A weak symbol would stay null there, for nothing links to that library.)
cudaStream_t current_stream(int device) {
  using GetStream = AOTITorchError (*)(int32_t device, void** stream);
  static const GetStream get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (!get_stream) throw std::runtime_error("tilewright: this torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// TMA wants the base address and every stride at multiples of 16 bytes, and no stride of 0 in a dimension that has
// extent; and the rows of a packed tensor, whose coordinates wrap around (tile/row_coordinates.h), less than 2^34 bytes
// apart.
bool tma_can_address(const Argument& argument) {
  constexpr int64_t kElementsPer16Bytes = 8;  // of bfloat16 or float16
  constexpr int64_t kPackedRowLimit = int64_t{1} << 33;
  if (argument.rank == 3 && argument.sizes[0] > 1 && argument.strides[0] >= kPackedRowLimit) return false;
  if (reinterpret_cast<uintptr_t>(argument.data()) % 16 != 0) return false;
  for (int64_t dim = 0; dim + 1 < argument.rank; ++dim) {
    if (argument.sizes[dim] <= 1) continue;
    if (argument.strides[dim] == 0 || argument.strides[dim] % kElementsPer16Bytes != 0) return false;
  }
  return true;
}

void make_addressable(Argument& argument) {
  if (!tma_can_address(argument)) argument = contiguous_copy(argument);
}

}  // namespace

void prepare_inputs_cuda(ForwardCall& call, Problem& problem) {
  const int capability = compute_capability(call.q.device_index);
  if (capability != 90) {
    throw std::invalid_argument("q must be on a GPU of compute capability 9.0 (Hopper), got " +
                                std::to_string(capability / 10) + "." + std::to_string(capability % 10) + " on " +
                                device_name(call.q));
  }
  if (problem.scale < 0) {
    call.q = negated_copy(call.q);
    problem.scale = -problem.scale;
  }
  for (Argument* argument : {&call.q, &call.k, &call.v}) make_addressable(*argument);
}

void prepare_backward_cuda(BackwardCall& call, Problem& problem) {
  prepare_inputs_cuda(call.forward, problem);
  // out is read without TMA, but 16 bytes at a time as well.
  for (Argument* argument : {&call.dout, &call.out}) make_addressable(*argument);
}

size_t workspace_bytes_cuda(const ForwardParams& params, const Argument& q) {
  const DeviceGuard guard(q.device_index);
  return forward_workspace_bytes(params);
}

void launch_cuda(const ForwardParams& params, void* workspace, const Argument& q) {
  const DeviceGuard guard(q.device_index);
  check_cuda(forward_sm90(params, workspace, current_stream(q.device_index)), "attention's launch failed");
}

void launch_backward_cuda(const BackwardParams& params, const Argument& q) {
  const DeviceGuard guard(q.device_index);
  const size_t bytes = backward_workspace_bytes(params);
  // Freed when this returns, and used again only by what comes later on the same stream.
  const Tensor workspace = new_tensor(q, {static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8());
  void* const memory = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  check_cuda(backward_sm90(params, memory, current_stream(q.device_index)),
             "the launch of attention's backward failed");
}

}  // namespace tilewright::ops
