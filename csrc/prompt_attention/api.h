// The launchers of prompt_attention. For image b, query i, head h, and the keys and values n of that head, which are
// those of the prompts and then those of the tokens:
//
//     s[i, n]   = scale * q[b, i, h] . k[b, n, h]
//     out[i]    = sum over n of softmax(s[i])[n] * v[b, n, h]
//     lse[i]    = log2(sum over n of exp(s[i, n]))
//
// The launchers allocate nothing, do not synchronise, and can be captured in a CUDA graph. They run on the current
// device, of compute capability 9.0, which must hold the tensors. Results are deterministic, and those of an image do not
// depend on the rest of the batch.
//
// Scores, their softmax and all sums are float32. The operands of the products with them, which are the softmax and the
// gradient of s, are rounded to the tensors' dtype.
//
// Every row of a Tensor4, a head of a token, must begin at a multiple of 16 bytes; the stride of an axis of length 1 does
// not matter, and a stride may be 0. Bare pointers are contiguous. Outputs must not overlap with anything.
//
// A block has all queries and keys of an image and head in shared memory: Q and P + T, each rounded up to a multiple of
// 64, are at most 832 together. With heads of more than 64 channels the backward has one side as a whole at a time, and
// each is at most 320.

#pragma once

#include "common/launch.h"

namespace vapt_fast {

struct PromptAttentionSizes {
  Dtype dtype = Dtype::bfloat16;  // of all tensors but lse
  std::int64_t batch = 0;         // B
  std::int64_t queries = 0;       // of an image, Q
  std::int64_t tokens = 0;        // T; P + T is at least 1
  std::int64_t prompts = 0;       // P
  std::int64_t heads = 0;         // H
  std::int64_t channels = 0;      // of a head, D: a multiple of 8, at most 128
};

struct PromptAttentionInputs {
  Tensor4 q;         // (B, Q, H, D)
  Tensor4 k;         // (B, T, H, D)
  Tensor4 v;         // (B, T, H, D)
  Tensor4 prompt_k;  // (B, P, H, D)
  Tensor4 prompt_v;  // (B, P, H, D)
};

struct PromptAttentionForward {
  PromptAttentionSizes sizes;
  float scale = 1.0f;
  PromptAttentionInputs in;
  // Outputs.
  Tensor4 out;           // (B, Q, H, D)
  float* lse = nullptr;  // (B, H, Q)
};

struct PromptAttentionBackward {
  PromptAttentionSizes sizes;
  float scale = 1.0f;
  PromptAttentionInputs in;
  Tensor4 out;                 // the forward's
  const float* lse = nullptr;  // the forward's
  Tensor4 grad_out;            // (B, Q, H, D)
  // Outputs, as the inputs; null for those that are not wanted. Those of k and v are wanted both or not at all, and so
  // are those of prompt_k and prompt_v.
  PromptAttentionInputs grads;
};

// ok if ``device``, which becomes current, can run the kernels.
Status prompt_attention_supported(int device);

Status launch_prompt_attention_forward(const PromptAttentionForward& arguments, Stream stream);
Status launch_prompt_attention_backward(const PromptAttentionBackward& arguments, Stream stream);

}  // namespace vapt_fast
