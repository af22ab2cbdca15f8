// What every launcher takes and returns. Free of CUDA and of PyTorch: the binding and the tests include this.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace vapt_fast {

// cudaStream_t, by its definition; null is the default stream.
using Stream = CUstream_st*;

enum class Dtype : std::int32_t { float16 = 0, bfloat16 = 1 };

enum class Code : std::int32_t {
  ok = 0,
  invalid = 1,      // an argument contradicts what the header says: a bug of the caller
  unsupported = 2,  // the kernels have no part for these sizes, or the device lacks the shared memory
  cuda_error = 3,   // the CUDA runtime refused; the message is its own
};

// What became of a launch. Nothing was launched unless code is ok; the message is empty if it is.
struct Status {
  Code code = Code::ok;
  char message[240] = "";
};

}  // namespace vapt_fast
