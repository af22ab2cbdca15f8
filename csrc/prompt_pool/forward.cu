// The launches of prompt_pool's forward: see prompt_pool/api.h.

#include "prompt_pool/forward_one_pass.cuh"
#include "prompt_pool/forward_two_passes.cuh"

namespace vapt_fast {
namespace prompt_pool {
namespace {

template <typename Token, typename Element, int TILES>
Status forward_in_two_passes(const PromptPoolForward& arguments, Stream stream, const Device& device) {
  const PromptPoolSizes& sizes = arguments.sizes;
  // Fewer warps per block where shared memory has no room for eight tokens.
  const std::int64_t row = sizes.channels * static_cast<std::int64_t>(sizeof(Token));
  const std::int64_t warps = max(min(device.shared_memory / row, std::int64_t{kWarps}), std::int64_t{1});
  LaunchShape shape = launch_shape(ceil_div(sizes.batch * (sizes.prefix + sizes.patches), warps), warps * row);
  shape.threads = static_cast<int>(warps) * kWarpSize;
  const auto norm = prompt_pool_fwd_norm_kernel<Token, Element>;
  const Status status = launch(norm, shape, stream, arguments, static_cast<int>(warps));
  if (status.code != Code::ok || sizes.rows == 0) {
    return status;
  }
  using Smem = PoolSmem<TILES>;
  const std::int64_t blocks = sizes.batch * ceil_div(sizes.channels, kBlockC) * ceil_div(sizes.rows, Smem::ROWS);
  return launch(prompt_pool_fwd_pool_kernel<Token, TILES>, launch_shape(blocks, sizeof(Smem)), stream, arguments);
}

template <typename Token, typename Element>
Status forward(const PromptPoolForward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t cluster = ceil_div(sizes.channels, kBlockC);
  const Device device = current_device();
  if (device.status.code != Code::ok) {
    return device.status;
  }
  return dispatch_tiles(sizes.rows, [&](auto tiles) {
    constexpr int TILES = decltype(tiles)::value;
    const std::int64_t memory = sizeof(PoolSmem<TILES>) + TokensSmem<Token>::size(sizes.prefix + sizes.patches);
    const LaunchShape shape = launch_shape(sizes.batch * cluster, memory, cluster);
    const auto one_pass = prompt_pool_fwd_one_pass_kernel<Token, Element, TILES>;
    if (arguments.one_pass && cluster <= kMaxClusterSize && max_active_clusters(one_pass, shape, device) > 0) {
      return launch(one_pass, shape, stream, arguments);
    }
    return forward_in_two_passes<Token, Element, TILES>(arguments, stream, device);
  });
}

Check checked(const PromptPoolForward& arguments) {
  const PromptPoolSizes& sizes = arguments.sizes;
  Check check = checked_sizes(sizes);
  if (!check.ok() || sizes.batch == 0) {
    return check;
  }
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const bool has_branch = arguments.branch.data != nullptr;
  check.tensor("x", arguments.x, sizes.batch, tokens, sizes.float32_tokens ? 4 : 2);
  check.tensor("branch", arguments.branch, sizes.batch, has_branch ? tokens : 0, 2);
  check.pointer("total", arguments.total, has_branch);
  if (!has_branch && arguments.total) {
    check.fail(Code::invalid, "total must be null where branch is");
  }
  check.optional("layer_scale", arguments.layer_scale);
  check.pointer("matrix", arguments.matrix.data, sizes.rows, sizeof(float));
  check.pointer("weight", arguments.weight);
  check.pointer("bias", arguments.bias);
  check.optional("norm_weight", arguments.norm_weight);
  check.pointer("norm_bias", arguments.norm_bias, arguments.norm_weight != nullptr);
  if (!arguments.norm_weight && arguments.norm_bias) {
    check.fail(Code::invalid, "norm_bias must be null where norm_weight is");
  }
  check.pointer("normed", arguments.normed);
  check.pointer("pooled", arguments.pooled, sizes.rows);
  check.pointer("mean", arguments.mean, 1, sizeof(float));
  check.pointer("rstd", arguments.rstd, 1, sizeof(float));
  return check;
}

}  // namespace
}  // namespace prompt_pool

Status prompt_pool_supported(int device) {
  return supported(prompt_pool::prompt_pool_fwd_norm_kernel<float, BFloat16>, device);
}

Status launch_prompt_pool_forward(const PromptPoolForward& arguments, Stream stream) {
  const Check check = prompt_pool::checked(arguments);
  if (!check.ok() || arguments.sizes.batch == 0) {
    return check.status();
  }
  return prompt_pool::dispatch_types(arguments.sizes, [&](auto token, auto element) {
    return prompt_pool::forward<decltype(token), decltype(element)>(arguments, stream);
  });
}

}  // namespace vapt_fast
