// The launchers of mlp, by CUTLASS: a product with GELU beside it, in one kernel. For rows m and hidden features d:
//
//     hidden[m, d]      = bias[d] + sum over c of x[m, c] * weight[d, c]
//     activated[m, d]   = gelu(hidden[m, d]) = hidden[m, d] * Phi(hidden[m, d])   of hidden before it is rounded
//     grad_hidden[m, d] = gelu'(hidden[m, d]) * sum over e of grad_y[m, e] * weight[e, d]
//
// Phi is the normal distribution's, by erf; gelu'(h) = Phi(h) + h * exp(-h^2 / 2) / sqrt(2 pi). Sums and GELU are
// float32, each sum in a fixed order.
//
// The launchers allocate nothing, do not synchronise, and can be captured in a CUDA graph. They run on the current
// device (sm_90), which must hold the tensors. Outputs must not overlap with anything.

#pragma once

#include "common/launch.h"

namespace vapt_fast {

struct MlpSizes {
  Dtype dtype = Dtype::bfloat16;  // of all tensors
  std::int64_t rows = 0;          // M; with 0 nothing is launched
  std::int64_t depth = 0;         // C, or E in the backward: what is summed over; a positive multiple of 8
  std::int64_t hidden = 0;        // D, a positive multiple of 8
};

struct MlpForward {
  MlpSizes sizes;
  Rows x;                      // (M, C)
  Rows weight;                 // (D, C)
  const void* bias = nullptr;  // (D,), at a multiple of 16 bytes; null for 0
  // Outputs, contiguous.
  void* activated = nullptr;  // (M, D)
  void* hidden = nullptr;     // (M, D); null if not wanted
};

struct MlpBackward {
  MlpSizes sizes;
  Rows grad_y;                   // (M, E)
  Rows weight;                   // (E, D)
  const void* hidden = nullptr;  // (M, D), contiguous, of the forward
  void* grad_hidden = nullptr;   // (M, D), contiguous
};

Status launch_mlp_forward(const MlpForward& arguments, Stream stream);
Status launch_mlp_backward(const MlpBackward& arguments, Stream stream);

}  // namespace vapt_fast
