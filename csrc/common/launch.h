// The types of every launcher's interface. Free of CUDA and of PyTorch: the bindings and the tests include this.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace vapt_fast {

// cudaStream_t, by its definition; null is the default stream.
using Stream = CUstream_st*;

enum class Dtype : std::int32_t { float16 = 0, bfloat16 = 1 };

enum class Code : std::int32_t {
  ok = 0,
  invalid = 1,      // an argument contradicts the op's api.h: a bug of the caller
  unsupported = 2,  // no kernel takes these sizes, or the device lacks the shared memory
  cuda_error = 3,   // the CUDA runtime failed; the message is its own
};

// The outcome of a launch. Nothing was launched unless code is ok; the message is empty if it is.
struct Status {
  Code code = Code::ok;
  char message[240] = "";
};

// A tensor (B, T, H, D) on the device; its channels, the last axis, are contiguous.
struct Tensor4 {
  void* data = nullptr;
  std::int64_t batch_stride = 0;  // in elements, as all strides; 0 repeats one image
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

// A matrix (M, N) of 16-bit elements on the device; its columns are contiguous.
struct Rows {
  const void* data = nullptr;
  std::int64_t row_stride = 0;
};

}  // namespace vapt_fast
