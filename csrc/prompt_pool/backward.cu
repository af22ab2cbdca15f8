// The launches of prompt_pool's backward: see prompt_pool/api.h.

#include "prompt_pool/backward_one_pass.cuh"
#include "prompt_pool/backward_reduce.cuh"
#include "prompt_pool/backward_two_passes.cuh"

namespace vapt_fast {
namespace prompt_pool {
namespace {

// ---- two passes

// The images whose gradients of the matrix a block adds itself: few chunks remain, but blocks enough to fill any
// device.
std::int64_t images_in_chunk(const PromptPoolSizes& sizes) {
  constexpr std::int64_t kEnough = 512;
  const std::int64_t token_blocks = ceil_div(sizes.prefix + sizes.patches, ProductsSmem<1>::TOKENS);
  return max(ceil_div(sizes.batch * token_blocks, kEnough), std::int64_t{1});
}

Workspace workspace_of_two_passes(const PromptPoolSizes& sizes, float* memory) {
  Workspace workspace;
  workspace.images = images_in_chunk(sizes);
  workspace.chunks = ceil_div(sizes.batch, workspace.images);
  workspace.means = memory;
  workspace.affine = workspace.means + sizes.batch * (sizes.prefix + sizes.patches) * 2;
  workspace.matrix = workspace.affine + sizes.batch * sizes.channels * 2;
  return workspace;
}

template <typename Token, typename Element>
Status launch_two_passes(const PromptPoolBackward& arguments, const Workspace& workspace, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const Status status = dispatch_tiles(sizes.rows, [&](auto tiles) {
    constexpr int TILES = decltype(tiles)::value;
    using Smem = ProductsSmem<TILES>;
    const std::int64_t blocks = workspace.chunks * ceil_div(sizes.prefix + sizes.patches, Smem::TOKENS);
    const auto products = prompt_pool_bwd_products_kernel<Token, Element, TILES>;
    return launch(products, launch_shape(blocks, sizeof(Smem)), stream, arguments, workspace);
  });
  if (status.code != Code::ok) {
    return status;
  }
  const std::int64_t blocks = sizes.batch * ceil_div(sizes.channels, kBlockC);
  const auto grads = prompt_pool_bwd_grads_kernel<Token, Element>;
  return launch(grads, launch_shape(blocks, sizeof(GradsSmem)), stream, arguments, workspace);
}

// ---- one pass

// Enough clusters to fill any device at a ViT's sizes.
std::int64_t max_clusters(const PromptPoolSizes& sizes) {
  constexpr std::int64_t kEnough = 256;
  return min(sizes.batch, kEnough / ceil_div(sizes.channels, kBlockC));
}

bool fits_in_cluster(const PromptPoolSizes& sizes) {
  using Largest = OnePassSmem<2>;
  return sizes.prefix + sizes.patches <= Largest::TOKENS && ceil_div(sizes.channels, kBlockC) <= kMaxClusterSize &&
         sizes.rows <= Largest::ROWS;
}

// The elements of the gradient of the matrix in the order of accumulators.
std::int64_t padded_matrix(const PromptPoolSizes& sizes) {
  return ceil_div(sizes.prefix + sizes.patches, kMmaM) * kMmaM * ceil_div(sizes.rows, kMmaK) * kMmaK;
}

// As many images in a chunk as let all clusters run at once.
Workspace workspace_of_one_pass(const PromptPoolSizes& sizes, float* memory, std::int64_t clusters) {
  Workspace workspace;
  workspace.images = ceil_div(sizes.batch, clusters);
  workspace.chunks = ceil_div(sizes.batch, workspace.images);
  workspace.affine = memory;
  workspace.matrix = workspace.affine + workspace.chunks * sizes.channels * 2;
  return workspace;
}

// The kernel for some sizes, and the launch of one cluster.
struct OnePass {
  void (*kernel)(PromptPoolBackward, Workspace);
  LaunchShape shape;
};

template <typename Token, typename Element>
OnePass one_pass_for(const PromptPoolSizes& sizes) {
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t blocks = ceil_div(sizes.channels, kBlockC);
  const auto with = [&](auto tiles) {
    constexpr int TILES = decltype(tiles)::value;
    constexpr std::size_t kept = sizeof(Token) + (keeps_grad_normed<Token, TILES>() ? sizeof(Element) : 0);
    const std::int64_t memory = static_cast<std::int64_t>(sizeof(OnePassSmem<TILES>)) +
                                padded_matrix(sizes) * static_cast<std::int64_t>(sizeof(float)) +
                                tokens * kBlockC * static_cast<std::int64_t>(kept);
    OnePass one_pass{prompt_pool_bwd_one_pass_kernel<Token, Element, TILES>, launch_shape(blocks, memory, blocks)};
    one_pass.shape.threads = static_cast<int>(ceil_div(tokens, kMmaM) * kWarpSize);
    return one_pass;
  };
  return sizes.rows <= OnePassSmem<1>::ROWS ? with(Tiles<1>{}) : with(Tiles<2>{});
}

// ---- all

template <typename Order>
Status reduce(const float* partial, std::int64_t stride, std::int64_t chunks, std::int64_t size, float* out,
              Order order, Stream stream) {
  if (size == 0) {
    return {};
  }
  const LaunchShape shape = launch_shape(ceil_div(size, kWarpSize), kThreads * sizeof(float));
  return launch(prompt_pool_bwd_reduce_kernel<Order>, shape, stream, partial, stride, chunks, size, out, order);
}

// Reduces the gradients of weight and bias: ``chunks`` of (2, C).
Status reduce_affine(const PromptPoolBackward& arguments, const Workspace& workspace, std::int64_t chunks,
                     Stream stream) {
  const std::int64_t channels = arguments.sizes.channels;
  const Status status =
      reduce(workspace.affine, 2 * channels, chunks, channels, arguments.grad_weight, SameOrder{}, stream);
  if (status.code != Code::ok) {
    return status;
  }
  return reduce(workspace.affine + channels, 2 * channels, chunks, channels, arguments.grad_bias, SameOrder{}, stream);
}

template <typename Token, typename Element>
Status backward_in_two_passes(const PromptPoolBackward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const Workspace workspace = workspace_of_two_passes(sizes, arguments.workspace);
  Status status;
  if (sizes.batch > 0) {
    status = launch_two_passes<Token, Element>(arguments, workspace, stream);
  }
  if (status.code == Code::ok) {
    const std::int64_t size = sizes.rows * sizes.patches;
    status = reduce(workspace.matrix, size, workspace.chunks, size, arguments.grad_matrix, SameOrder{}, stream);
  }
  return status.code == Code::ok ? reduce_affine(arguments, workspace, sizes.batch, stream) : status;
}

Status backward_in_one_pass(const PromptPoolBackward& arguments, OnePass one_pass, std::int64_t clusters,
                            Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const Workspace workspace = workspace_of_one_pass(sizes, arguments.workspace, clusters);
  one_pass.shape.blocks = workspace.chunks * one_pass.shape.cluster;
  Status status = launch(one_pass.kernel, one_pass.shape, stream, arguments, workspace);
  if (status.code == Code::ok) {
    const AccumulatorOrder order{static_cast<int>(sizes.prefix), static_cast<int>(sizes.patches),
                                 static_cast<int>(sizes.rows)};
    const std::int64_t size = padded_matrix(sizes);
    status = reduce(workspace.matrix, size, one_pass.shape.blocks, size, arguments.grad_matrix, order, stream);
  }
  return status.code == Code::ok ? reduce_affine(arguments, workspace, workspace.chunks, stream) : status;
}

template <typename Token, typename Element>
Status backward(const PromptPoolBackward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  if (arguments.one_pass && sizes.batch > 0) {
    const Device device = current_device();
    if (device.status.code != Code::ok) {
      return device.status;
    }
    if (fits_in_cluster(sizes)) {
      const OnePass one_pass = one_pass_for<Token, Element>(sizes);
      const std::int64_t clusters =
          min(max_active_clusters(one_pass.kernel, one_pass.shape, device), max_clusters(sizes));
      if (clusters > 0) {
        return backward_in_one_pass(arguments, one_pass, clusters, stream);
      }
    }
  }
  return backward_in_two_passes<Token, Element>(arguments, stream);
}

Check checked(const PromptPoolBackward& arguments) {
  const PromptPoolSizes& sizes = arguments.sizes;
  Check check = checked_sizes(sizes);
  if (!check.ok()) {
    return check;
  }
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t bytes = sizes.float32_tokens ? 4 : 2;
  check.tensor("total", arguments.total, sizes.batch, tokens, bytes);
  check.tensor("grad_total", arguments.grad_total, sizes.batch, arguments.grad_total.data ? tokens : 0, bytes);
  check.tensor("grad_normed", arguments.grad_normed, sizes.batch, arguments.grad_normed.data ? tokens : 0, 2);
  check.tensor("grad_pooled", arguments.grad_pooled, sizes.batch, sizes.rows, sizeof(float));
  check.optional("layer_scale", arguments.layer_scale);
  check.pointer("matrix", arguments.matrix.data, sizes.rows, sizeof(float));
  check.pointer("weight", arguments.weight);
  check.pointer("bias", arguments.bias);
  check.optional("norm_weight", arguments.norm_weight);
  check.pointer("mean", arguments.mean, sizes.batch, sizeof(float));
  check.pointer("rstd", arguments.rstd, sizes.batch, sizeof(float));
  check.pointer("workspace", arguments.workspace, sizes.batch);
  check.optional("grad_x", arguments.grad_x);
  check.optional("grad_branch", arguments.grad_branch);
  check.pointer("grad_matrix", arguments.grad_matrix, sizes.rows, sizeof(float));
  check.pointer("grad_weight", arguments.grad_weight, 1, sizeof(float));
  check.pointer("grad_bias", arguments.grad_bias, 1, sizeof(float));
  return check;
}

}  // namespace
}  // namespace prompt_pool

Status launch_prompt_pool_backward(const PromptPoolBackward& arguments, Stream stream) {
  const Check check = prompt_pool::checked(arguments);
  if (!check.ok()) {
    return check.status();
  }
  return prompt_pool::dispatch_types(arguments.sizes, [&](auto token, auto element) {
    return prompt_pool::backward<decltype(token), decltype(element)>(arguments, stream);
  });
}

std::int64_t prompt_pool_backward_workspace(const PromptPoolSizes& sizes) {
  using namespace prompt_pool;
  const std::int64_t affine = 2 * sizes.channels;
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t chunks = ceil_div(sizes.batch, images_in_chunk(sizes));
  const std::int64_t two_passes = sizes.batch * (2 * tokens + affine) + chunks * sizes.rows * sizes.patches;
  if (!fits_in_cluster(sizes)) {
    return two_passes;
  }
  const std::int64_t chunk = affine + ceil_div(sizes.channels, kBlockC) * padded_matrix(sizes);
  return max(two_passes, max_clusters(sizes) * chunk);
}

}  // namespace vapt_fast
