// The forward in one pass: the blocks of an image form a cluster. Each keeps its 128 channels of all tokens in shared
// memory; only the sums over a token's channels pass between the blocks.

#pragma once

#include "prompt_pool/forward_common.cuh"

namespace vapt_fast::prompt_pool {

// Shared memory of a block behind its PoolSmem: its channels of all tokens, the sums over them, and the statistics.
template <typename Token>
struct TokensSmem {
  SmemTile<Token> tile;
  float* sums;
  float* squares;
  float* mean;
  float* rstd;

  static std::int64_t size(std::int64_t tokens) {
    return tokens * (kBlockC * static_cast<std::int64_t>(sizeof(Token)) + 4 * static_cast<std::int64_t>(sizeof(float)));
  }

  __device__ __forceinline__ TokensSmem(void* memory, int num_tokens)
      : tile(memory),
        sums(reinterpret_cast<float*>(static_cast<Token*>(memory) + num_tokens * kBlockC)),
        squares(sums + num_tokens),
        mean(squares + num_tokens),
        rstd(mean + num_tokens) {}
};

// The sum of a token over the blocks of the cluster, in the order of their ranks.
__device__ __forceinline__ float cluster_sum(float* sums, int token, int blocks) {
  float sum = 0.0f;
  for (int rank = 0; rank < blocks; ++rank) {
    sum += cluster_peer(sums, rank)[token];
  }
  return sum;
}

// Sixteen lanes take a block's channels of a token; a lane reads back only what it has stored.
constexpr int kLanesPerToken = kBlockC / kVec;
constexpr int kTokenStep = kThreads / kLanesPerToken;

// Loads the tokens, keeps total, and sums it over the block's channels.
template <typename Token, typename Element>
__device__ __forceinline__ void store_tokens(const PromptPoolForward& arguments, const TokensSmem<Token>& smem,
                                             std::int64_t image, int first_channel) {
  constexpr int AHEAD = 4;  // tokens in flight per lane
  const auto num_tokens = static_cast<int>(arguments.sizes.prefix + arguments.sizes.patches);
  const int vec = thread_id() % kLanesPerToken;
  const int channel = vec * kVec;
  const bool inside = first_channel + channel < static_cast<int>(arguments.sizes.channels);
  const int first_token = thread_id() / kLanesPerToken;
#pragma unroll 1
  for (int first = first_token; first < num_tokens + first_token; first += AHEAD * kTokenStep) {
    Residual<Token, Element> residuals[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int token = first + i * kTokenStep;
      if (token < num_tokens && inside) {
        residuals[i].load(arguments, image, token, first_channel + channel);
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int token = first + i * kTokenStep;
      float sum = 0.0f;
      if (token < num_tokens && inside) {
        const Vec8<Token> total = residuals[i].store_total(arguments, image, token, first_channel + channel);
        smem.tile.store(token, vec, total);
        float values[kVec];
        widen(total, values);
        sum = sum_of(values);
      }
      sum = lane_sum<1, kLanesPerToken>(sum);
      if (token < num_tokens && channel == 0) {
        smem.sums[token] = sum;
      }
    }
  }
}

// Sums (total - mean)^2 over the block's channels.
template <typename Token>
__device__ __forceinline__ void store_squares(const TokensSmem<Token>& smem, int num_tokens, int first_channel,
                                              int channels) {
  const int vec = thread_id() % kLanesPerToken;
  for (int first = 0; first < num_tokens; first += kTokenStep) {
    const int token = first + thread_id() / kLanesPerToken;
    float squares = 0.0f;
    if (token < num_tokens && first_channel + vec * kVec < channels) {
      float values[kVec];
      widen(smem.tile.load(token, vec), values);
      squares = sum_of_squares(values, smem.mean[token]);
    }
    squares = lane_sum<1, kLanesPerToken>(squares);
    if (token < num_tokens && vec == 0) {
      smem.squares[token] = squares;
    }
  }
}

// Computes all outputs, by a cluster for each image.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(kThreads, 2) prompt_pool_fwd_one_pass_kernel(const PromptPoolForward arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  auto& pool_smem = *reinterpret_cast<PoolSmem<TILES>*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const auto channels = static_cast<int>(sizes.channels);
  const TokensSmem<Token> smem(&pool_smem + 1, num_tokens);
  const auto blocks = static_cast<int>(ceil_div(channels, kBlockC));
  const std::int64_t image = block_id() / blocks;
  const int first_channel = cluster_rank() * kBlockC;

  store_tokens<Token, Element>(arguments, smem, image, first_channel);
  sync_cluster();
  for (int token = thread_id(); token < num_tokens; token += kThreads) {
    smem.mean[token] = cluster_sum(smem.sums, token, blocks) / static_cast<float>(channels);
  }
  sync_threads();

  store_squares(smem, num_tokens, first_channel, channels);
  sync_cluster();
  for (int token = thread_id(); token < num_tokens; token += kThreads) {
    smem.rstd[token] = rstd_of(cluster_sum(smem.squares, token, blocks), channels, arguments.eps);
    if (cluster_rank() == 0) {
      arguments.mean[image * num_tokens + token] = smem.mean[token];
      arguments.rstd[image * num_tokens + token] = smem.rstd[token];
    }
  }
  sync_cluster();  // also before a block ends: until here others read its sums

  const int vec = thread_id() % kLanesPerToken;
  const int channel = first_channel + vec * kVec;
  if (channel < channels) {
    const NormAffine affine(arguments, channel);
    for (int token = thread_id() / kLanesPerToken; token < num_tokens; token += kTokenStep) {
      float values[kVec];
      widen(smem.tile.load(token, vec), values);
      store_normed<Element>(arguments, image * num_tokens + token, channel, values, smem.mean[token], smem.rstd[token],
                            affine);
    }
  }
  const auto load = [tile = smem.tile, prefix = static_cast<int>(sizes.prefix)](int patch, int number) {
    return tile.load(prefix + patch, number);
  };
  for (int first_row = 0; first_row < sizes.rows; first_row += PoolSmem<TILES>::ROWS) {
    pool_tile(arguments, pool_smem, image, first_row, first_channel, load, smem.mean + sizes.prefix,
              smem.rstd + sizes.prefix);
  }
#endif
}

}  // namespace vapt_fast::prompt_pool
