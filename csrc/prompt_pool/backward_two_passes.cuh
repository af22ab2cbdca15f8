// The backward in two passes: one kernel computes y and the means, for 64 tokens a block; another the gradients of x,
// branch, weight and bias, for 128 channels a block.

#pragma once

#include "prompt_pool/backward_common.cuh"

namespace vapt_fast::prompt_pool {

// ---- first pass

// Shared memory of the first kernel: as tf32, STEP channels of g and of weight * x_hat. A warp has TILES tiles of 16
// rows.
template <int TILES>
struct ProductsSmem {
  static constexpr int ROWS = 2 * TILES * kMmaM;
  static constexpr int ROWS_PER_THREAD = ROWS / (kThreads / 8);
  static constexpr int TOKENS = 64;
  static constexpr int STEP = 64;
  static constexpr int STRIDE = STEP + 4;  // eight rows in different banks

  std::uint32_t g[ROWS * STRIDE];
  std::uint32_t x_hat[TOKENS * STRIDE];
  float g_weight[ROWS];  // sums of g * weight and g * bias over the channels
  float g_bias[ROWS];
  float a[TOKENS];  // sums of a and a * x_hat over the channels
  float a_x_hat[TOKENS];
  float b[2][TOKENS];  // likewise of b / s, over each half of the tiles of rows
  float b_x_hat[2][TOKENS];
};

// The part of the work that a block of the first kernel does at a time: ROWS rows of 64 tokens of an image.
struct ProductsTile {
  std::int64_t image;
  int first_token;
  int first_row;
};

// Stores weight * x_hat from channel ``first``, and adds to the sums of a and a * x_hat. Four lanes take a token.
template <typename Token, typename Element, int TILES>
__device__ __forceinline__ void store_x_hat(const PromptPoolBackward& arguments, ProductsSmem<TILES>& smem,
                                            const ProductsTile& tile, int first, float& sum_a, float& sum_a_x_hat) {
  using Smem = ProductsSmem<TILES>;
  const auto num_tokens = static_cast<int>(arguments.sizes.prefix + arguments.sizes.patches);
  const auto channels = static_cast<int>(arguments.sizes.channels);
  const int token = tile.first_token + thread_id() / 4;
#pragma unroll
  for (int place = thread_id() % 4 * kVec; place < Smem::STEP; place += 4 * kVec) {
    const int channel = first + place;
    float values[kVec] = {};
    if (token < num_tokens && channel < channels) {
      load_as_float(row_of<Token>(arguments.total, tile.image, token) + channel, values);
      normalize(arguments.mean[tile.image * num_tokens + token], arguments.rstd[tile.image * num_tokens + token],
                values);
      if (tile.first_row == 0 && arguments.grad_normed.data) {
        float a[kVec];
        norm_affine_backward(arguments, channel,
                             load_vec8(row_of<Element>(arguments.grad_normed, tile.image, token) + channel), a);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          sum_a += a[i];
          sum_a_x_hat += a[i] * values[i];
        }
      }
      float weight[kVec];
      load_as_float(arguments.weight + channel, weight);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        values[i] *= weight[i];
      }
    }
    std::uint32_t* const to = smem.x_hat + thread_id() / 4 * Smem::STRIDE + place;
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      store16(to + i, {{to_tf32(values[i]), to_tf32(values[i + 1]), to_tf32(values[i + 2]), to_tf32(values[i + 3])}});
    }
  }
}

// Stores g from channel ``first``, and adds to the sums of g * weight and g * bias. Eight lanes take a row.
template <int TILES>
__device__ __forceinline__ void store_g(const PromptPoolBackward& arguments, ProductsSmem<TILES>& smem,
                                        const ProductsTile& tile, int first,
                                        float (&g_weight)[ProductsSmem<TILES>::ROWS_PER_THREAD],
                                        float (&g_bias)[ProductsSmem<TILES>::ROWS_PER_THREAD]) {
  using Smem = ProductsSmem<TILES>;
  const auto num_rows = static_cast<int>(arguments.sizes.rows);
  const auto channels = static_cast<int>(arguments.sizes.channels);
#pragma unroll 1
  for (int place = thread_id() % 8 * 4; place < Smem::STEP; place += 32) {
    const int channel = first + place;
#pragma unroll
    for (int j = 0; j < Smem::ROWS_PER_THREAD; ++j) {
      const int row = thread_id() / 8 + j * (kThreads / 8);
      Bytes16 g{};
      if (tile.first_row + row < num_rows && channel < channels) {
        g = load16(row_of<float>(arguments.grad_pooled, tile.image, tile.first_row + row) + channel);
        const Bytes16 weight = load16(arguments.weight + channel);
        const Bytes16 bias = load16(arguments.bias + channel);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = float_of(g.words[i]);
          g_weight[j] += value * float_of(weight.words[i]);
          g_bias[j] += value * float_of(bias.words[i]);
          g.words[i] = to_tf32(value);
        }
      }
      store16(smem.g + row * Smem::STRIDE + place, g);
    }
  }
}

// Adds g @ (weight * x_hat)^T to ``y``.
template <int TILES>
__device__ __forceinline__ void multiply(const ProductsSmem<TILES>& smem, int first_row, int num_rows,
                                         float (&y)[TILES][2][4]) {
  using Smem = ProductsSmem<TILES>;
  const std::uint32_t* const right =
      smem.x_hat + (warp_id() % 4 * 16 + lane_id() % 8 + lane_id() / 16 * 8) * Smem::STRIDE + lane_id() / 8 % 2 * 4;
#pragma unroll
  for (int k = 0; k < Smem::STEP; k += kMmaK) {
    std::uint32_t b[4];
    ldmatrix_x4(b, right + k);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int row = (2 * tile + warp_id() / 4) * kMmaM;
      if (first_row + row < num_rows) {
        std::uint32_t a[4];
        ldmatrix_x4(a, smem.g + (row + lane_id() % 16) * Smem::STRIDE + k + lane_id() / 16 * 4);
        mma_tf32(y[tile][0], a, b[0], b[1]);
        mma_tf32(y[tile][1], a, b[2], b[3]);
      }
    }
  }
}

// Computes y over all channels, and the sums of g * weight and g * bias.
template <typename Token, typename Element, int TILES>
__device__ __forceinline__ void compute_y(const PromptPoolBackward& arguments, ProductsSmem<TILES>& smem,
                                          const ProductsTile& tile, float (&y)[TILES][2][4], float& sum_a,
                                          float& sum_a_x_hat) {
  using Smem = ProductsSmem<TILES>;
  float g_weight[Smem::ROWS_PER_THREAD] = {};
  float g_bias[Smem::ROWS_PER_THREAD] = {};
#pragma unroll 1
  for (int first = 0; first < static_cast<int>(arguments.sizes.channels); first += Smem::STEP) {
    store_x_hat<Token, Element>(arguments, smem, tile, first, sum_a, sum_a_x_hat);
    store_g(arguments, smem, tile, first, g_weight, g_bias);
    sync_threads();
    multiply(smem, tile.first_row, static_cast<int>(arguments.sizes.rows), y);
    sync_threads();
  }
#pragma unroll
  for (int j = 0; j < Smem::ROWS_PER_THREAD; ++j) {
    const float weighted = lane_sum<1, 8>(g_weight[j]);
    const float biased = lane_sum<1, 8>(g_bias[j]);
    if (lane_id() % 8 == 0) {
      smem.g_weight[thread_id() / 8 + j * (kThreads / 8)] = weighted;
      smem.g_bias[thread_id() / 8 + j * (kThreads / 8)] = biased;
    }
  }
  sync_threads();
}

// Adds y to the gradient of the matrix in the workspace, and to the sums of b and b * x_hat.
template <int TILES>
__device__ __forceinline__ void store_products(const PromptPoolBackward& arguments, ProductsSmem<TILES>& smem,
                                               const ProductsTile& tile, const float (&y)[TILES][2][4],
                                               float* grad_matrix, bool is_first_image) {
  const auto num_patches = static_cast<int>(arguments.sizes.patches);
  const auto prefix = static_cast<int>(arguments.sizes.prefix);
  const auto num_rows = static_cast<int>(arguments.sizes.rows);
  // A lane's columns are of four tokens.
  const int first_place = warp_id() % 4 * 16 + lane_id() % 4 * 2;
  const auto patch_of = [&](int column) {
    return tile.first_token - prefix + first_place + column / 2 * 8 + column % 2;
  };
  float s[4];
  float sum_b[4] = {};
  float sum_b_x_hat[4] = {};
#pragma unroll
  for (int column = 0; column < 4; ++column) {
    const int patch = patch_of(column);
    const bool is_patch = patch >= 0 && patch < num_patches;
    const float rstd = is_patch ? arguments.rstd[tile.image * (prefix + num_patches) + prefix + patch] : 0.0f;
    s[column] = prompt_factor(rstd, arguments.eps, arguments.prompt_eps);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (2 * i + warp_id() / 4) * kMmaM + half * 8 + lane_id() / 4;
      if (tile.first_row + row >= num_rows) {
        continue;
      }
      const float* const matrix = row_of(arguments.matrix, tile.first_row + row);
      float* const to = grad_matrix + std::int64_t{tile.first_row + row} * num_patches;
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const int patch = patch_of(column);
        if (patch >= 0 && patch < num_patches) {
          const float product = y[i][column / 2][2 * half + column % 2];
          sum_b[column] += matrix[patch] * smem.g_weight[row];
          sum_b_x_hat[column] += matrix[patch] * product;
          const float grad = s[column] * product + smem.g_bias[row];
          to[patch] = is_first_image ? grad : to[patch] + grad;
        }
      }
    }
  }
#pragma unroll
  for (int column = 0; column < 4; ++column) {
    const float b = lane_sum<4, kWarpSize>(sum_b[column]);
    const float b_x_hat = lane_sum<4, kWarpSize>(sum_b_x_hat[column]);
    if (lane_id() < 4) {
      const int place = first_place + column / 2 * 8 + column % 2;
      float& all_b = smem.b[warp_id() / 4][place];
      float& all_b_x_hat = smem.b_x_hat[warp_id() / 4][place];
      all_b = tile.first_row == 0 ? b : all_b + b;
      all_b_x_hat = tile.first_row == 0 ? b_x_hat : all_b_x_hat + b_x_hat;
    }
  }
}

// Stores the means of the tile's tokens in the workspace.
template <int TILES>
__device__ __forceinline__ void store_means(const PromptPoolBackward& arguments, ProductsSmem<TILES>& smem,
                                            const ProductsTile& tile, float sum_a, float sum_a_x_hat, float* means) {
  const auto num_tokens = static_cast<int>(arguments.sizes.prefix + arguments.sizes.patches);
  const auto channels = static_cast<float>(static_cast<int>(arguments.sizes.channels));
  sum_a = lane_sum<1, 4>(sum_a);
  sum_a_x_hat = lane_sum<1, 4>(sum_a_x_hat);
  if (lane_id() % 4 == 0) {
    smem.a[thread_id() / 4] = sum_a;
    smem.a_x_hat[thread_id() / 4] = sum_a_x_hat;
  }
  sync_threads();
  const int place = thread_id();
  if (place < ProductsSmem<TILES>::TOKENS && tile.first_token + place < num_tokens) {
    const std::int64_t row = tile.image * num_tokens + tile.first_token + place;
    const float s = prompt_factor(arguments.rstd[row], arguments.eps, arguments.prompt_eps);
    const float b = s * (smem.b[0][place] + smem.b[1][place]);
    const float b_x_hat = s * (smem.b_x_hat[0][place] + smem.b_x_hat[1][place]);
    means[2 * row] = (smem.a[place] + b) / channels;
    means[2 * row + 1] = (smem.a_x_hat[place] + s * s * b_x_hat) / channels;
  }
}

// Computes the gradient of the matrix from a chunk of images, and the means, for 64 tokens of each.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_pool_bwd_products_kernel(const PromptPoolBackward arguments, const Workspace workspace) {
  using Smem = ProductsSmem<TILES>;
  auto& smem = *reinterpret_cast<Smem*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const std::int64_t token_blocks = ceil_div(num_tokens, Smem::TOKENS);
  const std::int64_t chunk = block_id() / token_blocks;
  const auto first_token = static_cast<int>(block_id() % token_blocks * Smem::TOKENS);
  const std::int64_t first_image = chunk * workspace.images;
  float* const grad_matrix = workspace.matrix + chunk * sizes.rows * sizes.patches;

  for (std::int64_t image = first_image; image < min(first_image + workspace.images, sizes.batch); ++image) {
    float sum_a = 0.0f;
    float sum_a_x_hat = 0.0f;
    ProductsTile tile{image, first_token, 0};
    do {  // once also without rows, for the sums of a
      float y[TILES][2][4] = {};
      compute_y<Token, Element>(arguments, smem, tile, y, sum_a, sum_a_x_hat);
      store_products(arguments, smem, tile, y, grad_matrix, image == first_image);
      tile.first_row += Smem::ROWS;
    } while (tile.first_row < static_cast<int>(sizes.rows));
    store_means(arguments, smem, tile, sum_a, sum_a_x_hat, workspace.means);
  }
}

// ---- second pass

// Shared memory of the second kernel: as tf32, ROWS rows of g and TOKENS columns of the matrix.
struct GradsSmem {
  static constexpr int ROWS = 64;
  static constexpr int TOKENS = 64;
  static constexpr int STRIDE = kBlockC + 8;        // four rows in different banks
  static constexpr int MATRIX_STRIDE = TOKENS + 8;  // likewise

  std::uint32_t g[ROWS * STRIDE];
  std::uint32_t matrix[ROWS * MATRIX_STRIDE];
  float affine[2][2][kBlockC];  // sums over the tokens of each half of the warps
};

// Stores ``count`` rows of g.
__device__ __forceinline__ void store_g(const PromptPoolBackward& arguments, GradsSmem& smem, std::int64_t image,
                                        int first_row, int count, int first_channel) {
  using Smem = GradsSmem;
  const auto channels = static_cast<int>(arguments.sizes.channels);
#pragma unroll
  for (int j = 0; j < Smem::ROWS * kBlockC / kVec; j += kThreads) {
    const int row = (thread_id() + j) / 4 % Smem::ROWS;
    const int vec = (thread_id() + j) / (4 * Smem::ROWS) * 4 + thread_id() % 4;
    float g[kVec] = {};
    if (row < count && first_channel + vec * kVec < channels) {
      const float* const from = row_of<float>(arguments.grad_pooled, image, first_row + row);
      load_as_float(from + first_channel + vec * kVec, g);
    }
    store_tile(smem.g + row * Smem::STRIDE, vec, g);
  }
}

// Stores ``count`` rows of the matrix.
__device__ __forceinline__ void store_matrix(const PromptPoolBackward& arguments, GradsSmem& smem, int first_row,
                                             int count, int first_token) {
  using Smem = GradsSmem;
  const auto prefix = static_cast<int>(arguments.sizes.prefix);
  const auto num_tokens = static_cast<int>(arguments.sizes.prefix + arguments.sizes.patches);
  for (int row = warp_id(); row < Smem::ROWS; row += kWarps) {
#pragma unroll
    for (int j = 0; j < Smem::TOKENS; j += kWarpSize) {
      const int token = first_token + j + lane_id();
      const bool inside = row < count && token >= prefix && token < num_tokens;
      const float value = inside ? row_of(arguments.matrix, first_row + row)[token - prefix] : 0.0f;
      smem.matrix[row * Smem::MATRIX_STRIDE + j + lane_id()] = to_tf32(value);
    }
  }
}

// Adds matrix^T @ g, over ``count`` rows, to ``products``.
__device__ __forceinline__ void multiply(const GradsSmem& smem, int count, float (&products)[2][4][4]) {
  using Smem = GradsSmem;
  const std::uint32_t* const left =
      smem.matrix + lane_id() % 4 * Smem::MATRIX_STRIDE + warp_id() / 4 * 2 * kMmaM + lane_id() / 4;
  const std::uint32_t* const right = smem.g + lane_id() % 4 * Smem::STRIDE + warp_id() % 4 * kWarpC + lane_id() / 4;
  for (int k = 0; k < count; k += kMmaK) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[tile][i] = left[(k + i / 2 * 4) * Smem::MATRIX_STRIDE + tile * kMmaM + i % 2 * 8];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t b0 = right[k * Smem::STRIDE + i * kMmaK];
      const std::uint32_t b1 = right[(k + 4) * Smem::STRIDE + i * kMmaK];
      mma_tf32(products[0][i], a[0], b0, b1);
      mma_tf32(products[1][i], a[1], b0, b1);
    }
  }
}

// Computes the gradients of x and branch, and those of weight and bias from an image, for some of its channels.
template <typename Token, typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_pool_bwd_grads_kernel(const PromptPoolBackward arguments, const Workspace workspace) {
  using Smem = GradsSmem;
  auto& smem = *reinterpret_cast<Smem*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const auto num_rows = static_cast<int>(sizes.rows);
  const auto channels = static_cast<int>(sizes.channels);
  const std::int64_t channel_blocks = ceil_div(channels, kBlockC);
  const std::int64_t image = block_id() / channel_blocks;
  const auto first_channel = static_cast<int>(block_id() % channel_blocks * kBlockC);
  const int place = warp_id() % 4 * kWarpC + lane_id() % 4 * kVec;
  const int channel = first_channel + place;

  float grad_weight[kVec] = {};
  float grad_bias[kVec] = {};
#pragma unroll 1
  for (int first_token = 0; first_token < num_tokens; first_token += Smem::TOKENS) {
    float products[2][4][4] = {};  // b / (s * weight), of two tiles of 16 tokens
#pragma unroll 1
    for (int first_row = 0; first_row < num_rows; first_row += Smem::ROWS) {
      const int count = min(Smem::ROWS, num_rows - first_row);
      if (first_token == 0 || num_rows > Smem::ROWS) {  // else it is there
        store_g(arguments, smem, image, first_row, count, first_channel);
      }
      store_matrix(arguments, smem, first_row, count, first_token);
      sync_threads();
      multiply(smem, count, products);
      sync_threads();
    }

#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + (warp_id() / 4 * 2 + tile) * kMmaM + half * 8 + lane_id() / 4;
        if (token >= num_tokens || channel >= channels) {
          continue;
        }
        const std::int64_t row = image * num_tokens + token;
        const TokenStats stats{arguments.mean[row], arguments.rstd[row], workspace.means[2 * row],
                               workspace.means[2 * row + 1]};
        float product[kVec];
        accumulator_row(products[tile], half, product);
        if (token >= static_cast<int>(sizes.prefix)) {
          add(product, grad_bias);
        }
        const auto load_grad_normed = [&] {
          return load_vec8(row_of<Element>(arguments.grad_normed, image, token) + channel);
        };
        store_token_grads<Token, Element>(arguments, image, token, row, channel, stats, product,
                                          load_vec8(row_of<Token>(arguments.total, image, token) + channel),
                                          load_grad_normed, grad_weight);
      }
    }
  }

  smem.affine[warp_id() / 4][0][place + lane_id() / 4] = transposed_sum(grad_weight);
  smem.affine[warp_id() / 4][1][place + lane_id() / 4] = transposed_sum(grad_bias);
  sync_threads();
  const int which = thread_id() / kBlockC;
  const int column = thread_id() % kBlockC;
  if (first_channel + column < channels) {
    workspace.affine[(image * 2 + which) * channels + first_channel + column] =
        smem.affine[0][which][column] + smem.affine[1][which][column];
  }
}

}  // namespace vapt_fast::prompt_pool
