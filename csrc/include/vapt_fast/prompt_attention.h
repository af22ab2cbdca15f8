// Launchers of prompt_attention: o = softmax(scale * q [prompt_k, k]^T) [prompt_v, v], head by head.
//
// The launchers allocate nothing, synchronise nothing and can be captured in a CUDA graph. They run on the
// current device, which must be the one that holds the tensors, and on sm_80 or later. Results are the same
// bits in every run and do not depend on the other images of a batch.
//
// Tensor4 arguments are of the sizes' dtype, except where said. Every row of an input, d channels of one
// token and head, must begin at a multiple of 16 bytes: data at 16 bytes, strides at multiples of 8 elements
// (the stride of an axis of length 1 does not matter). Rows of an output must begin at multiples of 4 bytes.
// Inputs may repeat (a stride of 0); outputs must not overlap with anything.

#pragma once

#include "vapt_fast/launch.h"

namespace vapt_fast {

struct PromptAttentionSizes {
  Dtype dtype = Dtype::bfloat16;
  std::int64_t batch = 0;     // B; with 0 nothing is launched
  std::int64_t queries = 0;   // Tq; with 0 the gradients of the keys and values are 0
  std::int64_t tokens = 0;    // T, with a key and a value each; may be 0
  std::int64_t prompts = 0;   // P, likewise; may be 0. Without any key the output and lse are 0
  std::int64_t heads = 0;     // h, of the queries
  std::int64_t groups = 0;    // g, heads of the keys and values: divides h, each serves h / g heads in a row
  std::int64_t head_dim = 0;  // d: a multiple of 8, 8 to 128
};

struct PromptAttentionForward {
  PromptAttentionSizes sizes;
  float scale = 1.0f;  // of the scores
  // Inputs.
  Tensor4 q;         // (B, Tq, h, d)
  Tensor4 k;         // (B, T, g, d); data may be null if T is 0
  Tensor4 v;         // as k
  Tensor4 prompt_k;  // (B, P, g, d), with a batch_stride of 0 where all images share them; null if P is 0
  Tensor4 prompt_v;  // as prompt_k
  // Outputs.
  Tensor4 out;  // (B, Tq, h, d)
  float* lse =
      nullptr;  // (B, h, Tq), contiguous: log2 of the sum of exp2(log2(e) * scores), for the backward
};

struct PromptAttentionBackward {
  PromptAttentionSizes sizes;
  float scale = 1.0f;
  // Inputs: those of the forward, its outputs, and the incoming gradient.
  Tensor4 q, k, v, prompt_k, prompt_v;
  Tensor4 out;                 // (B, Tq, h, d)
  const float* lse = nullptr;  // (B, h, Tq), contiguous
  Tensor4 grad_out;            // (B, Tq, h, d)
  // Outputs. Those of the tokens are wanted together or not at all (all three null), as in a block before
  // which nothing learns: then only the prompts' are computed, which is cheaper.
  Tensor4 grad_q;  // (B, Tq, h, d)
  Tensor4 grad_k;  // (B, T, g, d); null as well if T is 0
  Tensor4 grad_v;  // as grad_k
  Tensor4 grad_prompt_k;  // (B, P, g, d), one for each image also where the prompts are shared; null if P is 0
  Tensor4 grad_prompt_v;  // as grad_prompt_k
  // Whether the prompts' gradients are float32 instead of sizes.dtype: for shared prompts, whose gradients
  // the caller then sums over the images.
  bool float32_prompt_grads = false;
  // Bytes of shared memory that a block may have (cudaDevAttrMaxSharedMemoryPerBlockOptin): with fewer the keys
  // take more passes, which changes no bit. In between, dq is in the workspace, null where none is needed.
  std::int64_t shared_memory = 0;
  float* workspace = nullptr;  // prompt_attention_backward_workspace() elements
};

Status launch_prompt_attention_forward(const PromptAttentionForward& arguments, Stream stream);
Status launch_prompt_attention_backward(const PromptAttentionBackward& arguments, Stream stream);

// Bytes of shared memory that a launch needs of the device (cudaDevAttrMaxSharedMemoryPerBlockOptin) at the least, to
// choose another implementation beforehand. ``prompts_only``: without the tokens' gradients.
std::int64_t prompt_attention_forward_shared_memory(const PromptAttentionSizes& sizes);
std::int64_t prompt_attention_backward_shared_memory(const PromptAttentionSizes& sizes, bool prompts_only);

// float32 elements of PromptAttentionBackward::workspace, which need not be initialised, for the same
// ``shared_memory``; 0 if all keys take one pass.
std::int64_t prompt_attention_backward_workspace(const PromptAttentionSizes& sizes, bool prompts_only,
                                                 std::int64_t shared_memory);

}  // namespace vapt_fast
