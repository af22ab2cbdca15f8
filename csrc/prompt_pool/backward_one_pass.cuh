// The backward in one pass: the blocks of an image form a cluster, as in the forward. Each keeps its 128 channels of
// all tokens and of grad_normed in shared memory. A warp has 16 of the tokens: it computes their part of y, passes the
// sums over its channels to the other blocks, and then computes b and the gradients of its tokens. A cluster loops over
// the images of a chunk, and a warp prefetches its tokens of the next image when it is done with those of the last.

#pragma once

#include "prompt_pool/backward_common.cuh"
#include "prompt_pool/backward_reduce.cuh"

namespace vapt_fast::prompt_pool {

// Shared memory of a block before the matrix and the tokens. There are 2 TILES tiles of 16 rows.
template <int TILES>
struct OnePassSmem {
  static constexpr int ROWS = 2 * TILES * kMmaM;
  static constexpr int K_STEPS = ROWS / kMmaK;
  static constexpr int WARPS = 16;              // at most: more would not have enough registers
  static constexpr int TOKENS = WARPS * kMmaM;  // at most
  static constexpr int STRIDE = kBlockC + 8;    // four rows in different banks

  std::uint32_t g[ROWS * STRIDE];  // tf32
  float g_weight[ROWS];            // sums of g * weight and g * bias over the block's channels
  float g_bias[ROWS];
  float matrix[ROWS];                 // sums over the patches
  float grad_weight[WARPS][kBlockC];  // sums over a warp's tokens and the chunk's images
  float grad_bias[kBlockC];           // sums over the chunk's images, in the order of g
  // Sums of a + b and of a * x_hat + s^2 b * x_hat over the block's channels, for even and for odd images.
  float sums[2][2][TOKENS];
};

// Whether there is room to keep grad_normed too. Otherwise it is read twice, and the second time hits L2.
template <typename Token, int TILES>
__host__ __device__ __forceinline__ constexpr bool keeps_grad_normed() {
  return sizeof(Token) < sizeof(float) || TILES == 1;
}

// A block of the kernel: where its part is, and the steps of its work.
template <typename Token, typename Element, int TILES>
struct OnePassBlock {
  using Smem = OnePassSmem<TILES>;

  const PromptPoolBackward& arguments;
  Smem& smem;
  int num_tokens, prefix, num_rows, channels;
  int blocks;       // of the cluster
  int k_steps;      // over the rows
  int num_threads;  // of the block
  int first_channel;
  int first_token;  // this lane's; it has the eighth after it too
  Bytes16* matrix;  // this lane's part of the left operands
  SmemTile<Token> total;
  SmemTile<Element> grad_normed;

  __device__ __forceinline__ OnePassBlock(const PromptPoolBackward& given, char* memory)
      : arguments(given),
        smem(*reinterpret_cast<Smem*>(memory)),
        num_tokens(static_cast<int>(given.sizes.prefix + given.sizes.patches)),
        prefix(static_cast<int>(given.sizes.prefix)),
        num_rows(static_cast<int>(given.sizes.rows)),
        channels(static_cast<int>(given.sizes.channels)),
        blocks(static_cast<int>(ceil_div(channels, kBlockC))),
        k_steps(static_cast<int>(ceil_div(num_rows, kMmaK))),
        num_threads(static_cast<int>(ceil_div(num_tokens, kMmaM) * kWarpSize)),
        first_channel(cluster_rank() * kBlockC),
        first_token(warp_id() * kMmaM + lane_id() / 4),
        matrix(reinterpret_cast<Bytes16*>(&smem + 1) + warp_id() * k_steps * kWarpSize + lane_id()),
        total(tokens()),
        grad_normed(tokens() + num_tokens * kBlockC) {}

  __device__ __forceinline__ Token* tokens() const {
    return reinterpret_cast<Token*>(reinterpret_cast<Bytes16*>(&smem + 1) + num_threads * k_steps);
  }

  // Begins to copy this warp's 16 tokens of a tensor.
  template <typename T>
  __device__ __forceinline__ void prefetch_tile(const SmemTile<T>& tile, const Tensor3& tensor,
                                                std::int64_t image) const {
    using Tile = SmemTile<T>;
#pragma unroll 1
    for (int i = opaque(lane_id()); i < kMmaM * Tile::CHUNKS; i += kWarpSize) {
      const int token = warp_id() * kMmaM + i / Tile::CHUNKS;
      const int channel = first_channel + i % Tile::CHUNKS * Tile::CHUNK;
      if (token < num_tokens && channel < channels) {
        cp_async(tile.chunk(token, i % Tile::CHUNKS), row_of<T>(tensor, image, token) + channel);
      }
    }
  }

  __device__ __forceinline__ void prefetch(std::int64_t image) const {
    prefetch_tile(total, arguments.total, image);
    if (keeps_grad_normed<Token, TILES>() && arguments.grad_normed.data) {
      prefetch_tile(grad_normed, arguments.grad_normed, image);
    }
    cp_async_commit();
  }

  __device__ __forceinline__ Vec8<Element> load_grad_normed(std::int64_t image, int token, int vec) const {
    if constexpr (keeps_grad_normed<Token, TILES>()) {
      return grad_normed.load(token, vec);
    } else {
      return load_vec8(row_of<Element>(arguments.grad_normed, image, token) + first_channel + vec * kVec);
    }
  }

  // The row of the matrix that a lane holds in word i of a left operand, and in column i / 2 of an accumulator of y.
  __device__ __forceinline__ static int row_of_word(int step, int i) {
    return step * kMmaK + permuted_row(lane_id() % 4 + i / 2 * 4);
  }

  // Stores the matrix's columns of this warp's tokens as left operands, and the sums of its rows. A lane reads back
  // only the words that it has stored.
  __device__ __forceinline__ void store_matrix() const {
    for (int j = 0; j < k_steps; ++j) {
      Bytes16 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_of_word(j, i);
        const int token = first_token + i % 2 * 8;
        const bool inside = row < num_rows && token >= prefix && token < num_tokens;
        words.words[i] = to_tf32(inside ? row_of(arguments.matrix, row)[token - prefix] : 0.0f);
      }
      store16(matrix + j * kWarpSize, words);
    }
    for (int row = warp_id(); row < num_rows; row += num_threads / kWarpSize) {
      float sum = 0.0f;
      for (int patch = lane_id(); patch < static_cast<int>(arguments.sizes.patches); patch += kWarpSize) {
        sum += row_of(arguments.matrix, row)[patch];
      }
      sum = lane_sum<1, kWarpSize>(sum);
      if (lane_id() == 0) {
        smem.matrix[row] = sum;
      }
    }
  }

  // Stores g, and its sums with weight and bias. Four lanes take a row.
  __device__ __forceinline__ void store_g(std::int64_t image) const {
    for (int row = thread_id() / 4; row < Smem::ROWS; row += num_threads / 4) {
      float weighted = 0.0f;
      float biased = 0.0f;
#pragma unroll 2
      for (int group = 0; group < kBlockC / kWarpC; ++group) {
        const int vec = group * 4 + lane_id() % 4;
        const int channel = first_channel + vec * kVec;
        float g[kVec] = {};
        if (row < num_rows && channel < channels) {
          float factors[kVec];
          load_as_float(row_of<float>(arguments.grad_pooled, image, row) + channel, g);
          load_as_float(arguments.weight + channel, factors);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            weighted += g[i] * factors[i];
          }
          load_as_float(arguments.bias + channel, factors);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            biased += g[i] * factors[i];
          }
        }
        store_tile(smem.g + row * Smem::STRIDE, vec, g);
      }
      weighted = lane_sum<1, 4>(weighted);
      biased = lane_sum<1, 4>(biased);
      if (lane_id() % 4 == 0) {
        smem.g_weight[row] = weighted;
        smem.g_bias[row] = biased;
      }
    }
  }

  // Adds to the gradient of bias: the sum of b / (s * weight) over the patches, for all of which g is the same.
  __device__ __forceinline__ void add_grad_bias(bool is_first_image) const {
    for (int place = thread_id(); place < kBlockC; place += num_threads) {
      float sum = is_first_image ? 0.0f : smem.grad_bias[place];
      for (int row = 0; row < num_rows; ++row) {
        sum += smem.matrix[row] * float_of(smem.g[row * Smem::STRIDE + place]);
      }
      smem.grad_bias[place] = sum;
    }
  }

  // Computes the transpose of y for this warp's tokens, and the sums of a and a * x_hat over a lane's channels.
  __device__ __forceinline__ void compute_y(std::int64_t image, const TokenStats (&stats)[2],
                                            float (&y)[Smem::K_STEPS][4], float (&sum_a)[2],
                                            float (&sum_a_x_hat)[2]) const {
#pragma unroll 1
    for (int group = 0; group < kBlockC / kWarpC; ++group) {
      const int vec = group * 4 + lane_id() % 4;
      const int channel = first_channel + vec * kVec;
      std::uint32_t left[2][kVec] = {};  // weight * x_hat
      if (channel < channels) {
        float x_hat[2][kVec] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = first_token + half * 8;
          if (token < num_tokens) {
            widen(total.load(token, vec), x_hat[half]);
            normalize(stats[half].mean, stats[half].rstd, x_hat[half]);
            if (arguments.grad_normed.data) {
              float a[kVec];
              norm_affine_backward(arguments, channel, load_grad_normed(image, token, vec), a);
#pragma unroll
              for (int i = 0; i < kVec; ++i) {
                sum_a[half] += a[i];
                sum_a_x_hat[half] += a[i] * x_hat[half][i];
              }
            }
          }
        }
        float weight[kVec];  // only now: there are no registers for it and norm_weight at once
        load_as_float(arguments.weight + channel, weight);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          left[0][i] = to_tf32(weight[i] * x_hat[0][i]);
          left[1][i] = to_tf32(weight[i] * x_hat[1][i]);
        }
      }
      const std::uint32_t* const right = smem.g + permuted_row(lane_id() / 8 + lane_id() / 4 % 2 * 4) * Smem::STRIDE +
                                         group * kWarpC + smem_column(lane_id() % 4, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t a[4] = {left[0][2 * i], left[1][2 * i], left[0][2 * i + 1], left[1][2 * i + 1]};
#pragma unroll
        for (int j = 0; j < Smem::K_STEPS; ++j) {
          if (j < k_steps) {
            const Bytes8 b = load8(right + j * kMmaK * Smem::STRIDE + smem_column(0, i));
            mma_tf32(y[j], a, b.words[0], b.words[1]);
          }
        }
      }
    }
  }

  // Adds y to the gradient of the matrix, and stores the tokens' sums over the block's channels.
  __device__ __forceinline__ void store_sums(const float (&s)[2], const float (&y)[Smem::K_STEPS][4],
                                             const float (&sum_a)[2], const float (&sum_a_x_hat)[2],
                                             float (&grad_matrix)[Smem::K_STEPS][4],
                                             float (&sums)[2][Smem::TOKENS]) const {
    float sum_b[2] = {};
    float sum_b_x_hat[2] = {};
#pragma unroll
    for (int j = 0; j < Smem::K_STEPS; ++j) {
      if (j < k_steps) {
        const Bytes16 factors = load16(matrix + j * kWarpSize);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = row_of_word(j, i);
          const int half = i % 2;
          const float product = y[j][2 * half + i / 2];
          sum_b[half] += float_of(factors.words[i]) * smem.g_weight[row];
          sum_b_x_hat[half] += float_of(factors.words[i]) * product;
          grad_matrix[j][2 * half + i / 2] += s[half] * product + smem.g_bias[row];
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token + half * 8;
      // A prefix token has no b: 0 * g would be NaN where g is not finite.
      const float b = token >= prefix ? s[half] * sum_b[half] : 0.0f;
      const float b_x_hat = token >= prefix ? s[half] * sum_b_x_hat[half] : 0.0f;
      const float sum = lane_sum<1, 4>(sum_a[half] + b);
      const float sum_product = lane_sum<1, 4>(sum_a_x_hat[half] + s[half] * s[half] * b_x_hat);
      if (lane_id() % 4 == 0) {
        sums[0][token] = sum;
        sums[1][token] = sum_product;
      }
    }
  }

  // Loads the means over all channels. A lane adds one sum of one token, in the order of the blocks' ranks.
  __device__ __forceinline__ void load_means(float (&sums)[2][Smem::TOKENS], TokenStats (&stats)[2]) const {
    float sum = 0.0f;
    for (int rank = 0; rank < blocks; ++rank) {
      sum += cluster_peer(&sums[0][0], rank)[lane_id() / kMmaM * Smem::TOKENS + warp_id() * kMmaM + lane_id() % kMmaM];
    }
    sum /= static_cast<float>(channels);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      stats[half].mean_grad = shuffle(sum, lane_id() / 4 + half * 8);
      stats[half].mean_product = shuffle(sum, kMmaM + lane_id() / 4 + half * 8);
    }
  }

  // Computes b, stores the gradients of x and branch, and adds to that of weight.
  __device__ __forceinline__ void store_image_grads(std::int64_t image, const TokenStats (&stats)[2],
                                                    bool is_first_image) const {
#pragma unroll 1
    for (int group = 0; group < kBlockC / kWarpC; ++group) {
      const int vec = group * 4 + lane_id() % 4;
      const int channel = first_channel + vec * kVec;
      float products[4][4] = {};  // b / (s * weight)
      const std::uint32_t* const right = smem.g + group * kWarpC + lane_id() / 4;
#pragma unroll 2
      for (int j = 0; j < k_steps; ++j) {
        const Bytes16 left = load16(matrix + j * kWarpSize);
        const std::uint32_t* const first = right + (j * kMmaK + lane_id() % 4) * Smem::STRIDE;
        const std::uint32_t* const second = right + (j * kMmaK + permuted_row(lane_id() % 4 + 4)) * Smem::STRIDE;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mma_tf32(products[i], left.words, first[i * kMmaK], second[i * kMmaK]);
        }
      }

      float grad_weight[kVec] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + half * 8;
        if (token < num_tokens && channel < channels) {
          float product[kVec];
          accumulator_row(products, half, product);
          store_token_grads<Token, Element>(
              arguments, image, token, image * num_tokens + token, channel, stats[half], product,
              total.load(token, vec), [&] { return load_grad_normed(image, token, vec); }, grad_weight);
        }
      }
      const float sum = transposed_sum(grad_weight);
      float& all = smem.grad_weight[warp_id()][vec * kVec + lane_id() / 4];
      all = is_first_image ? sum : all + sum;
    }
  }

  // Stores the chunk's gradients of matrix, weight and bias in the workspace.
  __device__ __forceinline__ void store_partials(const Workspace& workspace, std::int64_t chunk,
                                                 const float (&grad_matrix)[Smem::K_STEPS][4]) const {
    const std::int64_t first_step =
        ((chunk * blocks + cluster_rank()) * (num_threads / kWarpSize) + warp_id()) * k_steps;
#pragma unroll
    for (int j = 0; j < Smem::K_STEPS; ++j) {
      if (j < k_steps) {
        const float (&sums)[4] = grad_matrix[j];
        store16(workspace.matrix + (first_step + j) * kWarpSize * 4 + lane_id() * 4,
                {{bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])}});
      }
    }
    for (int column = thread_id(); column < kBlockC; column += num_threads) {
      if (first_channel + column < channels) {
        float sum = 0.0f;
        for (int warp = 0; warp < num_threads / kWarpSize; ++warp) {
          sum += smem.grad_weight[warp][column];
        }
        float* const affine = workspace.affine + chunk * 2 * channels + first_channel + column;
        affine[0] = sum;
        affine[channels] =
            smem.grad_bias[column / kWarpC * kWarpC + smem_column(column / kVec % 4, column % kVec / 2) + column % 2];
      }
    }
  }
};

// Computes the whole backward but the sums over chunks, by a cluster for each chunk of images.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(OnePassSmem<TILES>::WARPS* kWarpSize, 1)
    prompt_pool_bwd_one_pass_kernel(const PromptPoolBackward arguments, const Workspace workspace) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Smem = OnePassSmem<TILES>;
  const OnePassBlock<Token, Element, TILES> block(arguments, shared_memory());
  const std::int64_t chunk = block_id() / block.blocks;
  const std::int64_t first_image = chunk * workspace.images;
  const std::int64_t end = min(first_image + workspace.images, arguments.sizes.batch);
  block.prefetch(first_image);
  block.store_matrix();

  float grad_matrix[Smem::K_STEPS][4] = {};  // of the chunk, in the order of y's accumulators
  for (std::int64_t image = first_image; image < end; ++image) {
    TokenStats stats[2] = {};
    float s[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = block.first_token + half * 8;
      if (token < block.num_tokens) {
        stats[half].mean = arguments.mean[image * block.num_tokens + token];
        stats[half].rstd = arguments.rstd[image * block.num_tokens + token];
      }
      s[half] = prompt_factor(stats[half].rstd, arguments.eps, arguments.prompt_eps);
    }
    sync_threads();  // the last image's g has been read
    block.store_g(image);
    cp_async_wait<0>();
    sync_threads();
    block.add_grad_bias(image == first_image);

    float y[Smem::K_STEPS][4] = {};
    float sum_a[2] = {};
    float sum_a_x_hat[2] = {};
    block.compute_y(image, stats, y, sum_a, sum_a_x_hat);
    float (&sums)[2][Smem::TOKENS] = block.smem.sums[(image - first_image) % 2];
    block.store_sums(s, y, sum_a, sum_a_x_hat, grad_matrix, sums);
    // Other blocks read these sums until they arrive at the next image's barrier; only the image after it overwrites
    // them.
    sync_cluster();
    block.load_means(sums, stats);
    block.store_image_grads(image, stats, image == first_image);
    sync_warp();  // all its lanes have read what the next copies overwrite
    if (image + 1 < end) {
      block.prefetch(image + 1);
    }
  }
  sync_cluster();  // before a block ends: until here others read its sums
  block.store_partials(workspace, chunk, grad_matrix);
#endif
}

}  // namespace vapt_fast::prompt_pool
