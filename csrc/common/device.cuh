// The device primitives that the kernels use.
//
// nvcc compiles them for sm_90a. Any other compiler takes csrc/emulation, which runs the same kernels on a CPU and finds
// missing barriers, missing waits and stray addresses.
//
// "Warp-wide": all 32 lanes of a warp call the function together.

#pragma once

#include <cstdint>

#include "common/launch.h"

namespace vapt_fast {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

struct alignas(8) Bytes8 {
  std::uint32_t words[2];
};

constexpr int kWarpSize = 32;

struct LaunchShape {
  std::int64_t blocks = 0;  // gridDim.x: the other two dimensions end at 65,535
  int threads = 0;          // per block
  std::int64_t shared_memory = 0;
  int cluster = 1;   // blocks per cluster, of those along x
  int blocks_y = 1;  // gridDim.y
  int cluster_y = 1;
};

}  // namespace vapt_fast

#ifndef __CUDACC__
#include "emulation/emulation.h"
#else

#include <cuda_runtime.h>

#include <cstdio>

namespace vapt_fast {

// ---- indices

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_id() { return thread_id() % kWarpSize; }
__device__ __forceinline__ int warp_id() { return thread_id() / kWarpSize; }
__device__ __forceinline__ std::int64_t block_id() { return blockIdx.x; }

// The block's dynamic shared memory, aligned to 1,024 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// The value, opaque to the compiler: what depends on it can't be hoisted above this line and held in registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Ends the kernel with an error.
__device__ __forceinline__ void trap() { __trap(); }

// ---- barriers, which also order memory

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// ---- shuffles: warp-wide, and they order no memory

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <typename T>
__device__ __forceinline__ T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// ---- memory

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ Bytes16 load16(const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
}

__device__ __forceinline__ void store16(void* to, Bytes16 bytes) {
  *static_cast<uint4*>(to) = make_uint4(bytes.words[0], bytes.words[1], bytes.words[2], bytes.words[3]);
}

__device__ __forceinline__ void store4(void* to, std::uint32_t word) { *static_cast<std::uint32_t*>(to) = word; }

__device__ __forceinline__ Bytes8 load8(const void* from) {
  const uint2 words = *static_cast<const uint2*>(from);
  return {{words.x, words.y}};
}

// Copies 16 bytes asynchronously; ``shared`` is undefined until the wait for their group.
__device__ __forceinline__ void cp_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Commits this thread's copies since the last group as a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the last PENDING. Other threads see the copies after a barrier.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, warp-wide. Lanes 8 m to 8 m + 7 give the rows of matrix m, 16 bytes each in
// shared memory. Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m in r[m].
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- arithmetic

// To 2^-22 relative (exp2) or absolute (log2).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ std::uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

// Two elements in a word, the first in the low half, rounded to nearest even.
template <typename Element>
__device__ __forceinline__ std::uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ std::uint32_t pack<Float16>(float first, float second) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <>
__device__ __forceinline__ std::uint32_t pack<BFloat16>(float first, float second) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// The inverse of ``pack``.
template <typename Element>
__device__ __forceinline__ void unpack(std::uint32_t word, float& first, float& second);

template <>
__device__ __forceinline__ void unpack<Float16>(std::uint32_t word, float& first, float& second) {
  asm("{.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;}"
      : "=f"(first), "=f"(second)
      : "r"(word));
}

template <>
__device__ __forceinline__ void unpack<BFloat16>(std::uint32_t word, float& first, float& second) {
  first = float_of(word << 16);
  second = float_of(word & 0xffff0000u);
}

// ---- launches

inline Status cuda_status(cudaError_t error) {
  Status status;
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next launch, anyone's, reports it
    status.code = Code::cuda_error;
    std::snprintf(status.message, sizeof status.message, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  }
  return status;
}

// ok if ``kernel`` has code for ``device``, which becomes current. Loads it.
template <typename... Parameters>
Status supported(void (*kernel)(Parameters...), int device) {
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, kernel);
  }
  return cuda_status(error);
}

// What a launch has to know of a device.
struct Device {
  Status status;
  std::int64_t shared_memory = 0;  // bytes per block, at most
};

inline Device current_device() {
  int number = 0;
  int bytes = 0;
  cudaError_t error = cudaGetDevice(&number);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  }
  return {cuda_status(error), bytes};
}

// A launch configuration of the runtime.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, Stream stream, bool sets_cluster) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(shape.cluster), static_cast<unsigned>(shape.cluster_y), 1};
    config_.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y));
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_memory);
    config_.stream = stream;
    config_.attrs = &cluster_;
    config_.numAttrs = sets_cluster ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // it holds its own address

  const cudaLaunchConfig_t* get() const { return &config_; }

  // Raises the kernel's limit of dynamic shared memory. Only if it is too low, since that can wait for copies in
  // flight; and to ``most``, since a launch by another thread may need more than this one.
  template <typename... Parameters>
  cudaError_t raise_limit(void (*kernel)(Parameters...), int most) const {
    cudaFuncAttributes now{};
    const cudaError_t error = cudaFuncGetAttributes(&now, kernel);
    if (error != cudaSuccess || static_cast<std::size_t>(now.maxDynamicSharedSizeBytes) >= config_.dynamicSmemBytes) {
      return error;
    }
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }

 private:
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

// How many clusters of ``kernel`` fit on the current device, ``device``, at once; 0 if none do.
template <typename... Parameters>
std::int64_t max_active_clusters(void (*kernel)(Parameters...), const LaunchShape& shape, const Device& device) {
  if (shape.shared_memory > device.shared_memory) {
    return 0;
  }
  const LaunchConfig config(shape, nullptr, true);
  int count = 0;
  cudaError_t error = config.raise_limit(kernel, static_cast<int>(device.shared_memory));
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveClusters(&count, kernel, config.get());
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// Launches ``kernel`` on the current device; can be captured in a CUDA graph.
template <typename... Parameters>
Status launch(void (*kernel)(Parameters...), LaunchShape shape, Stream stream, Parameters... arguments) {
  const Device device = current_device();
  if (device.status.code != Code::ok) {
    return device.status;
  }
  if (shape.shared_memory > device.shared_memory) {
    Status status{Code::unsupported};
    std::snprintf(status.message, sizeof status.message,
                  "the kernel needs %lld bytes of shared memory, the device has %lld",
                  static_cast<long long>(shape.shared_memory), static_cast<long long>(device.shared_memory));
    return status;
  }
  const LaunchConfig config(shape, stream, shape.cluster * shape.cluster_y > 1);
  cudaError_t error = config.raise_limit(kernel, static_cast<int>(device.shared_memory));
  if (error == cudaSuccess) {
    error = cudaLaunchKernelEx(config.get(), kernel, arguments...);
  }
  return cuda_status(error);
}

}  // namespace vapt_fast

#endif
