// The launchers of prompt_pool. For image b, token t, patch n = t - prefix, channel c and row r of the matrix:
//
//     total[b, t, c]  = x[b, t, c] + layer_scale[c] * branch[b, t, c]   rounded before it is used
//     x_hat[b, t, c]  = (total[b, t, c] - mean[b, t]) * rstd[b, t]      rstd of the variance + eps
//     normed[b, t, c] = norm_weight[c] * x_hat[b, t, c] + norm_bias[c]  rounded once, to 16 bits
//     z[b, n, c]      = weight[c] * s[b, t] * x_hat[b, t, c] + bias[c]  s = rstd(variance + prompt_eps) / rstd
//     pooled[b, r, c] = sum over n of matrix[r, n] * z[b, n, c]
//
// layer_scale, norm_weight and norm_bias are frozen and get no gradient. norm_weight may be 0.
//
// The launchers allocate nothing, do not synchronise, and can be captured in a CUDA graph. They run on the current
// device (sm_80 or later), which must hold the tensors. Results are deterministic, and those of an image do not depend
// on the rest of the batch.
//
// Statistics and sums are float32. The operands of the products with the matrix are rounded to tf32, whose 10 bits of
// mantissa are those of float16; x_hat is never rounded to 16 bits.
//
// Every row of a Tensor3 must begin at a multiple of 16 bytes, and so must every (C,); the stride of an axis of length
// 1 does not matter, and a stride may be 0. Bare pointers are contiguous. Outputs must not overlap with anything.

#pragma once

#include "common/launch.h"

namespace vapt_fast {

struct PromptPoolSizes {
  Dtype dtype = Dtype::bfloat16;  // of branch, normed and their gradients
  bool float32_tokens = false;    // whether x, total and their gradients are float32 instead
  std::int64_t batch = 0;         // B; with 0 the gradients of matrix, weight and bias are 0
  std::int64_t prefix = 0;        // S, the first tokens of an image, normalised but not pooled
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
  Matrix matrix;                       // (R, N)
  const float* weight = nullptr;       // (C,)
  const float* bias = nullptr;         // (C,)
  const float* norm_weight = nullptr;  // (C,); null for 1
  const float* norm_bias = nullptr;    // (C,); null if and only if norm_weight is
  // Outputs.
  void* total = nullptr;    // (B, T, C), as x; null if and only if branch is
  void* normed = nullptr;   // (B, T, C)
  float* pooled = nullptr;  // (B, R, C)
  float* mean = nullptr;    // (B, T), for the backward
  float* rstd = nullptr;    // (B, T), likewise
  // Whether to read the tokens once, with thread block clusters, if the device (sm_90 or later) and the sizes allow
  // it. Otherwise one kernel normalises them and another reads them again to pool them.
  bool one_pass = true;
};

struct PromptPoolBackward {
  PromptPoolSizes sizes;
  float eps = 1e-6f;
  float prompt_eps = 1e-5f;
  // Inputs: the normalised tokens, their statistics, and the incoming gradients.
  Tensor3 total;                       // (B, T, C): the forward's total, or x if it had no branch
  Tensor3 grad_total;                  // (B, T, C), as total; null for 0
  Tensor3 grad_normed;                 // (B, T, C); null for 0
  Tensor3 grad_pooled;                 // (B, R, C), float32
  const float* layer_scale = nullptr;  // (C,); null for 1
  Matrix matrix;                       // (R, N)
  const float* weight = nullptr;       // (C,)
  const float* bias = nullptr;         // (C,)
  const float* norm_weight = nullptr;  // (C,); null for 1
  const float* mean = nullptr;         // (B, T)
  const float* rstd = nullptr;         // (B, T)
  float* workspace = nullptr;          // prompt_pool_backward_workspace() elements, at a multiple of 16 bytes
  // Outputs.
  void* grad_x = nullptr;        // (B, T, C), as total; null if not wanted
  void* grad_branch = nullptr;   // (B, T, C); null if not wanted; equals grad_x without layer_scale and float32_tokens
  float* grad_matrix = nullptr;  // (R, N)
  float* grad_weight = nullptr;  // (C,)
  float* grad_bias = nullptr;    // (C,)
  // Whether to read total and grad_normed once, as in the forward, if the device and the sizes allow it: at most 256
  // tokens, 1024 channels and 64 rows (with float32 tokens and more than 32 rows grad_normed is read twice). The
  // images are then cut into as many chunks as the device has room for clusters, so the gradients of matrix, weight
  // and bias are deterministic on one kind of device.
  bool one_pass = true;
};

// ok if the kernels have code for ``device``, which becomes current, that the driver accepts.
Status prompt_pool_supported(int device);

Status launch_prompt_pool_forward(const PromptPoolForward& arguments, Stream stream);
Status launch_prompt_pool_backward(const PromptPoolBackward& arguments, Stream stream);

// The float32 elements of PromptPoolBackward::workspace, which need not be initialised.
std::int64_t prompt_pool_backward_workspace(const PromptPoolSizes& sizes);

}  // namespace vapt_fast
