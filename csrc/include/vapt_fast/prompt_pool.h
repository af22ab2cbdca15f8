// Launchers of prompt_pool, for image b, token t, patch n = t - prefix, channel c and row r of the matrix:
//
//     total[b, t, c]  = x[b, t, c] + layer_scale[c] * branch[b, t, c]           rounded before anything is computed from it
//     x_hat[b, t, c]  = (total[b, t, c] - mean[b, t]) * rstd[b, t]      rstd of the variance + eps
//     normed[b, t, c] = norm_weight[c] * x_hat[b, t, c] + norm_bias[c]  rounded once, in 16 bits
//     z[b, n, c]      = weight[c] * s[b, t] * x_hat[b, t, c] + bias[c]  s = rstd(variance + prompt_eps) / rstd
//     pooled[b, r, c] = sum over n of matrix[r, n] * z[b, n, c]
//
// There is no gradient of layer_scale, norm_weight and norm_bias: they are frozen. norm_weight may be 0.
//
// The launchers allocate nothing, synchronise nothing and can be captured in a CUDA graph. They run on the current
// device, which must be the one that holds the tensors, and on sm_80 or later. Results are the same bits in every
// run, and those of an image do not depend on the other images of a batch.
//
// Statistics and sums are float32. The factors of the products with the matrix are rounded to tf32, whose 10 bits
// of mantissa are those of float16, on their way to the tensor cores; x_hat is never rounded to 16 bits.
//
// Tensor3 arguments are inputs: each row of channels must begin at a multiple of 16 bytes, and so must all of (C,)
// (the stride of an axis of length 1 does not matter). They may repeat (a stride of 0). What is
// given as a bare pointer is contiguous; outputs must not overlap with anything.

#pragma once

#include "vapt_fast/launch.h"

namespace vapt_fast {

// A tensor (B, T, C) or (B, R, C) on the device; its channels are contiguous.
struct Tensor3 {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;  // in elements, as all strides; 0 repeats one image
  std::int64_t row_stride = 0;
};

// The pooling matrix (R, N), float32; its columns are contiguous.
struct PoolingMatrix {
  const float* data = nullptr;  // may be null if R is 0
  std::int64_t row_stride = 0;
};

struct PromptPoolSizes {
  Dtype dtype = Dtype::bfloat16;  // of branch and normed, and of their gradients
  bool float32_tokens = false;    // whether x and total, and their gradients, are float32 instead
  std::int64_t batch = 0;         // B; with 0 the gradients of matrix, weight and bias are 0
  std::int64_t prefix = 0;        // S, the first tokens of each image, which are normalised but not pooled
  std::int64_t patches = 0;       // N, at least 1; T = S + N
  std::int64_t channels = 0;      // C, a multiple of 8
  std::int64_t rows = 0;          // R; may be 0
};

struct PromptPoolForward {
  PromptPoolSizes sizes;
  float eps = 1e-6f;
  float prompt_eps = 1e-5f;
  // Inputs.
  Tensor3 x;                           // (B, T, C)
  Tensor3 branch;                      // (B, T, C); null for none, and then total is x
  const float* layer_scale = nullptr;  // (C,); null for 1
  PoolingMatrix matrix;                // (R, N)
  const float* weight = nullptr;       // (C,)
  const float* bias = nullptr;         // (C,)
  const float* norm_weight = nullptr;  // (C,); null for 1
  const float* norm_bias = nullptr;    // (C,); null for 0, exactly where norm_weight is null
  // Outputs.
  void* total = nullptr;    // (B, T, C), as x; null exactly where branch is
  void* normed = nullptr;   // (B, T, C)
  float* pooled = nullptr;  // (B, R, C)
  float* mean = nullptr;    // (B, T), for the backward
  float* rstd = nullptr;    // (B, T), likewise
  // Whether to read the tokens only once, by clusters of thread blocks, if the device (sm_90 or later) and the
  // sizes allow it; else they are normalised and then read again to be pooled.
  bool one_pass = true;
};

struct PromptPoolBackward {
  PromptPoolSizes sizes;
  float eps = 1e-6f;
  float prompt_eps = 1e-5f;
  // Inputs: what the forward normalised and its statistics, and the incoming gradients.
  Tensor3 total;                       // (B, T, C): the forward's total, or x if it had no branch
  Tensor3 grad_total;                  // (B, T, C), as total; null for 0
  Tensor3 grad_normed;                 // (B, T, C); null for 0
  Tensor3 grad_pooled;                 // (B, R, C), float32
  const float* layer_scale = nullptr;  // (C,); null for 1
  PoolingMatrix matrix;                // (R, N)
  const float* weight = nullptr;       // (C,)
  const float* bias = nullptr;         // (C,)
  const float* norm_weight = nullptr;  // (C,); null for 1
  const float* mean = nullptr;         // (B, T)
  const float* rstd = nullptr;         // (B, T)
  float* workspace = nullptr;          // prompt_pool_backward_workspace() elements, at a multiple of 16 bytes
  // Outputs.
  void* grad_x = nullptr;        // (B, T, C), as total; null if not wanted
  void* grad_branch = nullptr;   // (B, T, C); null if not wanted. Without layer_scale and float32_tokens it is grad_x
  float* grad_matrix = nullptr;  // (R, N)
  float* grad_weight = nullptr;  // (C,)
  float* grad_bias = nullptr;    // (C,)
  // Whether to read total and grad_normed only once, as in the forward, if the device and the sizes allow it: at most
  // 256 tokens, 1024 channels and 64 rows (with float32 tokens and more than 32 rows grad_normed is read twice). The
  // images are then cut into chunks by what the device runs at once, so that the gradients of matrix, weight and bias
  // are the same bits in every run on the same kind of device.
  bool one_pass = true;
};

// ok if ``device``, which becomes current, runs these kernels: if there is code for it that the driver takes.
Status prompt_pool_supported(int device);

Status launch_prompt_pool_forward(const PromptPoolForward& arguments, Stream stream);
Status launch_prompt_pool_backward(const PromptPoolBackward& arguments, Stream stream);

// float32 elements of PromptPoolBackward::workspace, in one pass or two, which need not be initialised.
std::int64_t prompt_pool_backward_workspace(const PromptPoolSizes& sizes);

}  // namespace vapt_fast
