// What the two ways of the backward share.
//
// With g the gradient of pooled, a[t, c] = norm_weight[c] * grad_normed[t, c] the gradient of x_hat through normed, and
// b[t, c] = s[t] * weight[c] * sum over r of M[r, n] g[r, c] that through the prompts, the gradient of total is
//
//     rstd * (a + b - mean(a + b) - x_hat * (mean(a * x_hat) + s^2 * mean(b * x_hat)))     means over channels
//
// y[r, t] = sum over c of g[r, c] weight[c] x_hat[t, c] gives the gradient of the matrix, and the means without b: the
// sum of b * x_hat over the channels is s[t] * sum over r of M[r, n] y[r, t].
//
// Sums over images go through the workspace and are added in a fixed order.

#pragma once

#include "prompt_pool/common.cuh"

namespace vapt_fast::prompt_pool {

// Partial results of the backward's kernels. A chunk is a range of images.
struct Workspace {
  std::int64_t images = 1;  // per chunk
  std::int64_t chunks = 0;
  float* means = nullptr;   // (B, T, 2), in two passes: mean(a + b) and mean(a * x_hat) + s^2 mean(b * x_hat)
  float* affine = nullptr;  // (B or chunks, 2, C): the gradients of weight and bias of an image or a chunk
  // The gradient of the matrix: (chunks, R, N), or (chunks, blocks, 16-token tiles, K steps, 32 lanes, 4).
  float* matrix = nullptr;
};

// Sums each of eight values over the lanes with the same lane % 4; returns the sum of values[lane / 4].
__device__ __forceinline__ float transposed_sum(float (&values)[kVec]) {
#pragma unroll
  for (int width = kVec / 2; width > 0; width /= 2) {
    const bool upper = lane_id() / 4 & width;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float other = shuffle_xor(upper ? values[i] : values[i + width], 4 * width);
      values[i] = (upper ? values[i + width] : values[i]) + other;
    }
  }
  return values[0];
}

// A vector of a. Without norm_weight it is multiplied by 1: a branch around the products takes more registers than some
// kernels have.
template <typename Element>
__device__ __forceinline__ void norm_affine_backward(const PromptPoolBackward& arguments, int channel,
                                                     const Vec8<Element>& grad_normed, float (&a)[kVec]) {
  widen(grad_normed, a);
#pragma unroll
  for (int i = 0; i < kVec; i += 4) {
    const std::uint32_t one = bits_of(1.0f);
    Bytes16 factors{{one, one, one, one}};
    if (arguments.norm_weight) {
      factors = load16(arguments.norm_weight + channel + i);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[i + j] *= float_of(factors.words[j]);
    }
  }
}

__device__ __forceinline__ void add(const float (&values)[kVec], float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    to[i] += values[i];
  }
}

__device__ __forceinline__ void normalize(float mean, float rstd, float (&values)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    values[i] = (values[i] - mean) * rstd;
  }
}

struct TokenStats {
  float mean;
  float rstd;
  float mean_grad;     // mean(a + b)
  float mean_product;  // mean(a * x_hat) + s^2 mean(b * x_hat)
};

// Stores a vector of the gradient of total, ``grad``, as those of x and branch.
template <typename Token, typename Element>
__device__ __forceinline__ void store_grads(const PromptPoolBackward& arguments, std::int64_t to, int channel,
                                            float (&grad)[kVec]) {
  if (arguments.grad_x) {
    store_vec8(static_cast<Token*>(arguments.grad_x) + to, narrow<Token>(grad));
  }
  if (arguments.grad_branch) {
    if (arguments.layer_scale) {
      float layer_scale[kVec];
      load_as_float(arguments.layer_scale + channel, layer_scale);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        grad[i] *= layer_scale[i];
      }
    }
    store_vec8(static_cast<Element*>(arguments.grad_branch) + to, narrow<Element>(grad));
  }
}

// Stores a vector of the gradients of x and branch for ``token``, which is ``row`` of the batch's, from ``product``:
// b / (s * weight). Adds to the gradient of weight. ``load_grad_normed`` returns the vector of grad_normed.
template <typename Token, typename Element, typename Load>
__device__ __forceinline__ void store_token_grads(const PromptPoolBackward& arguments, std::int64_t image, int token,
                                                  std::int64_t row, int channel, const TokenStats& stats,
                                                  const float (&product)[kVec], const Vec8<Token>& total,
                                                  Load load_grad_normed, float (&grad_weight)[kVec]) {
  const bool is_patch = token >= static_cast<int>(arguments.sizes.prefix);
  const float s = prompt_factor(stats.rstd, arguments.eps, arguments.prompt_eps);
  float x_hat[kVec];
  widen(total, x_hat);
  normalize(stats.mean, stats.rstd, x_hat);
  if (is_patch) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      grad_weight[i] += s * x_hat[i] * product[i];
    }
  }
  if (!arguments.grad_x && !arguments.grad_branch) {
    return;
  }

  float grad[kVec];
  float weight[kVec];
  load_as_float(arguments.weight + channel, weight);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    grad[i] = is_patch ? product[i] * s * weight[i] : 0.0f;
  }
  float incoming[kVec];
  if (arguments.grad_normed.data) {
    norm_affine_backward(arguments, channel, load_grad_normed(), incoming);
    add(incoming, grad);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    grad[i] = stats.rstd * (grad[i] - stats.mean_grad - x_hat[i] * stats.mean_product);
  }
  if (arguments.grad_total.data) {
    load_as_float(row_of<Token>(arguments.grad_total, image, token) + channel, incoming);
    add(incoming, grad);
  }
  store_grads<Token, Element>(arguments, row * static_cast<int>(arguments.sizes.channels) + channel, channel, grad);
}

}  // namespace vapt_fast::prompt_pool
