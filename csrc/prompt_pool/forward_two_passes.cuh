// The forward in two passes: a warp normalises a token; then a block reads the tokens again and pools some channels.

#pragma once

#include "prompt_pool/forward_common.cuh"

namespace vapt_fast::prompt_pool {

// Computes total, normed, mean and rstd, a token by each of a block's ``warps``. A lane reads back from shared memory
// only what it has stored.
template <typename Token, typename Element>
__global__ void __launch_bounds__(kThreads) prompt_pool_fwd_norm_kernel(const PromptPoolForward arguments, int warps) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const auto channels = static_cast<int>(sizes.channels);
  const std::int64_t row = block_id() * warps + warp_id();
  if (row >= sizes.batch * tokens) {
    return;
  }
  Token* const kept = reinterpret_cast<Token*>(shared_memory()) + warp_id() * channels;
  float values[kVec];

  float sum = 0.0f;
  for (int channel = lane_id() * kVec; channel < channels; channel += kWarpSize * kVec) {
    Residual<Token, Element> residual;
    residual.load(arguments, row / tokens, row % tokens, channel);
    const Vec8<Token> vec = residual.store_total(arguments, row / tokens, row % tokens, channel);
    store_vec8(kept + channel, vec);
    widen(vec, values);
    sum += sum_of(values);
  }
  const float mean = lane_sum<1, kWarpSize>(sum) / static_cast<float>(channels);

  float squares = 0.0f;
  for (int channel = lane_id() * kVec; channel < channels; channel += kWarpSize * kVec) {
    load_as_float(kept + channel, values);
    squares += sum_of_squares(values, mean);
  }
  const float rstd = rstd_of(lane_sum<1, kWarpSize>(squares), channels, arguments.eps);

  for (int channel = lane_id() * kVec; channel < channels; channel += kWarpSize * kVec) {
    load_as_float(kept + channel, values);
    store_normed<Element>(arguments, row, channel, values, mean, rstd, NormAffine(arguments, channel));
  }
  if (lane_id() == 0) {
    arguments.mean[row] = mean;
    arguments.rstd[row] = rstd;
  }
}

// Computes pooled from the tokens and their statistics in memory.
template <typename Token, int TILES>
__global__ void __launch_bounds__(kThreads, 2) prompt_pool_fwd_pool_kernel(const PromptPoolForward arguments) {
  auto& smem = *reinterpret_cast<PoolSmem<TILES>*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t channel_blocks = ceil_div(sizes.channels, kBlockC);
  const std::int64_t row_blocks = ceil_div(sizes.rows, PoolSmem<TILES>::ROWS);
  const std::int64_t image = block_id() / (channel_blocks * row_blocks);
  const auto first_channel = static_cast<int>(block_id() % channel_blocks * kBlockC);
  const auto first_row = static_cast<int>(block_id() / channel_blocks % row_blocks * PoolSmem<TILES>::ROWS);

  const Tensor3 total{arguments.total, (sizes.prefix + sizes.patches) * sizes.channels, sizes.channels};
  const Tensor3& tokens = arguments.branch.data ? total : arguments.x;
  const std::int64_t first_patch = image * (sizes.prefix + sizes.patches) + sizes.prefix;
  const Token* const patches = row_of<Token>(tokens, image, sizes.prefix) + first_channel;
  const auto load = [patches, stride = tokens.row_stride](int patch, int vec) {
    return load_vec8(patches + patch * stride + vec * kVec);
  };
  pool_tile(arguments, smem, image, first_row, first_channel, load, arguments.mean + first_patch,
            arguments.rstd + first_patch);
}

}  // namespace vapt_fast::prompt_pool
