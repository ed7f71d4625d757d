#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace tilewright {

// Of the current device; the driver is asked once.
inline cudaError_t multiprocessors(int& count) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device < kMaxDevices) count = known[device].load(std::memory_order_relaxed);
  if (count > 0) return cudaSuccess;
  status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess && device < kMaxDevices) known[device].store(count, std::memory_order_relaxed);
  return status;
}

// Lets the current device start a kernel with more shared memory than by default. `prepared` has a bit for each device
// that has been told: of one kernel, static.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, int bytes, std::atomic<uint64_t>& prepared) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (prepared.load(std::memory_order_relaxed) & bit)) return cudaSuccess;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

// Starts a kernel, and returns what became of that alone, not an error of others that nobody has fetched yet.
template <class Params>
cudaError_t start(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t stream, const Params& params,
                  cudaLaunchAttribute* attribute = nullptr) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// One that may be set up while the one before it in the stream still runs: it calls ptx::wait_for_prerequisite_grids
// before it touches what that one reads or writes.
template <class Params>
cudaError_t start_overlapping(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t stream,
                              const Params& params) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  return start(kernel, shape, stream, params, &overlap);
}

}  // namespace tilewright
