// What the two ways of the forward share: the sum of x and branch, normed, and pooling.

#pragma once

#include "prompt_pool/common.cuh"

namespace vapt_fast::prompt_pool {

// A vector of x and one of branch.
template <typename Token, typename Element>
struct Residual {
  Vec8<Token> x{};
  Vec8<Element> branch{};

  __device__ __forceinline__ void load(const PromptPoolForward& arguments, std::int64_t image, std::int64_t token,
                                       std::int64_t channel) {
    x = load_vec8(row_of<Token>(arguments.x, image, token) + channel);
    if (arguments.branch.data) {
      branch = load_vec8(row_of<Element>(arguments.branch, image, token) + channel);
    }
  }

  // The sum, which goes to total too if there is a branch.
  __device__ __forceinline__ Vec8<Token> store_total(const PromptPoolForward& arguments, std::int64_t image,
                                                     std::int64_t token, std::int64_t channel) const {
    if (!arguments.branch.data) {
      return x;
    }
    const PromptPoolSizes& sizes = arguments.sizes;
    float total[kVec];
    float added[kVec];
    float layer_scale[kVec] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    widen(x, total);
    widen(branch, added);
    if (arguments.layer_scale) {
      load_as_float(arguments.layer_scale + channel, layer_scale);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      total[i] += layer_scale[i] * added[i];
    }
    const Vec8<Token> vec = narrow<Token>(total);
    const std::int64_t row = image * (sizes.prefix + sizes.patches) + token;
    store_vec8(static_cast<Token*>(arguments.total) + row * sizes.channels + channel, vec);
    return vec;
  }
};

// A vector of norm_weight and one of norm_bias.
struct NormAffine {
  float weight[kVec] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  float bias[kVec] = {};

  __device__ __forceinline__ NormAffine(const PromptPoolForward& arguments, std::int64_t channel) {
    if (arguments.norm_weight) {
      load_as_float(arguments.norm_weight + channel, weight);
      load_as_float(arguments.norm_bias + channel, bias);
    }
  }
};

template <typename Element>
__device__ __forceinline__ void store_normed(const PromptPoolForward& arguments, std::int64_t row, std::int64_t channel,
                                             float (&values)[kVec], float mean, float rstd, const NormAffine& affine) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    values[i] = (values[i] - mean) * rstd * affine.weight[i] + affine.bias[i];
  }
  store_vec8(static_cast<Element*>(arguments.normed) + row * arguments.sizes.channels + channel,
             narrow<Element>(values));
}

// ---- pooling: ROWS rows and kBlockC channels of pooled, STEP patches at a time

// Shared memory of ``pool_tile``; the operands are tf32. A warp has TILES tiles of 16 rows.
template <int TILES>
struct PoolSmem {
  static constexpr int ROWS = 2 * TILES * kMmaM;
  static constexpr int ROWS_PER_THREAD = ROWS / (kThreads / 8);
  static constexpr int STEP = 32;
  static constexpr int STRIDE = kBlockC + 8;      // four rows in different banks
  static constexpr int MATRIX_STRIDE = STEP + 4;  // eight rows in different banks

  std::uint32_t z[STEP * STRIDE];
  std::uint32_t matrix[ROWS * MATRIX_STRIDE];
  float row_sums[ROWS];
};

// Stores z / weight without bias, from patch ``first``.
template <int TILES, typename Load>
__device__ __forceinline__ void store_patches(const PromptPoolForward& arguments, PoolSmem<TILES>& smem, int first,
                                              int first_channel, Load load, const float* mean, const float* rstd) {
  using Smem = PoolSmem<TILES>;
  const auto num_patches = static_cast<int>(arguments.sizes.patches);
  const auto channels = static_cast<int>(arguments.sizes.channels);
  // Four lanes take a warp's 32 channels of a patch, so that the stores of eight patches are to different banks.
#pragma unroll
  for (int j = 0; j < Smem::STEP * kBlockC / kVec; j += kThreads) {
    const int patch = (thread_id() + j) / 4 % Smem::STEP;
    const int vec = (thread_id() + j) / (4 * Smem::STEP) * 4 + thread_id() % 4;
    float z[kVec] = {};
    if (first + patch < num_patches && first_channel + vec * kVec < channels) {
      widen(load(first + patch, vec), z);
      const float r = rstd[first + patch];
      const float factor = r * prompt_factor(r, arguments.eps, arguments.prompt_eps);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        z[i] = (z[i] - mean[first + patch]) * factor;
      }
    }
    store_tile(smem.z + patch * Smem::STRIDE, vec, z);
  }
}

// Stores the matrix's columns from ``first`` and adds them to ``row_sums``. Eight lanes take a row.
template <int TILES>
__device__ __forceinline__ void store_matrix(const PromptPoolForward& arguments, PoolSmem<TILES>& smem, int first,
                                             int first_row, float (&row_sums)[PoolSmem<TILES>::ROWS_PER_THREAD]) {
  using Smem = PoolSmem<TILES>;
  const auto num_patches = static_cast<int>(arguments.sizes.patches);
  const auto num_rows = static_cast<int>(arguments.sizes.rows);
#pragma unroll
  for (int j = 0; j < Smem::ROWS_PER_THREAD; ++j) {
    const int row = thread_id() / 8 + j * (kThreads / 8);
#pragma unroll
    for (int patch = thread_id() % 8; patch < Smem::STEP; patch += 8) {
      const bool inside = first_row + row < num_rows && first + patch < num_patches;
      const float value = inside ? row_of(arguments.matrix, first_row + row)[first + patch] : 0.0f;
      row_sums[j] += value;
      smem.matrix[row * Smem::MATRIX_STRIDE + patch] = to_tf32(value);
    }
  }
}

// Adds matrix @ z to ``products``.
template <int TILES>
__device__ __forceinline__ void multiply(const PoolSmem<TILES>& smem, int first_row, int num_rows,
                                         float (&products)[TILES][4][4]) {
  using Smem = PoolSmem<TILES>;
  const std::uint32_t* const right = smem.z + lane_id() % 4 * Smem::STRIDE + warp_id() % 4 * kWarpC + lane_id() / 4;
#pragma unroll
  for (int k = 0; k < Smem::STEP; k += kMmaK) {
    std::uint32_t b[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i][0] = right[k * Smem::STRIDE + i * kMmaK];
      b[i][1] = right[(k + 4) * Smem::STRIDE + i * kMmaK];
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int row = (2 * tile + warp_id() / 4) * kMmaM;
      if (first_row + row < num_rows) {
        std::uint32_t a[4];
        ldmatrix_x4(a, smem.matrix + (row + lane_id() % 16) * Smem::MATRIX_STRIDE + k + lane_id() / 16 * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mma_tf32(products[tile][i], a, b[i][0], b[i][1]);
        }
      }
    }
  }
}

// Stores pooled = weight * products + bias * row sums.
template <int TILES>
__device__ __forceinline__ void store_pooled(const PromptPoolForward& arguments, const PoolSmem<TILES>& smem,
                                             std::int64_t image, int first_row, int first_channel,
                                             const float (&products)[TILES][4][4]) {
  const auto num_rows = static_cast<int>(arguments.sizes.rows);
  const auto channels = static_cast<int>(arguments.sizes.channels);
  const int channel = first_channel + warp_id() % 4 * kWarpC + lane_id() % 4 * kVec;
  if (channel >= channels) {
    return;
  }
  float weight[kVec];
  float bias[kVec];
  load_as_float(arguments.weight + channel, weight);
  load_as_float(arguments.bias + channel, bias);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (2 * tile + warp_id() / 4) * kMmaM + half * 8 + lane_id() / 4;
      if (first_row + row < num_rows) {
        float pooled[kVec];
        accumulator_row(products[tile], half, pooled);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          pooled[i] = weight[i] * pooled[i] + bias[i] * smem.row_sums[row];
        }
        const std::int64_t to = (image * num_rows + first_row + row) * channels + channel;
        store_vec8(arguments.pooled + to, narrow<float>(pooled));
      }
    }
  }
}

// Computes pooled from ``first_row`` and ``first_channel``. ``load`` returns a vector of a patch, counted from the
// block's first channel; mean and rstd are the patches' statistics.
template <int TILES, typename Load>
__device__ __forceinline__ void pool_tile(const PromptPoolForward& arguments, PoolSmem<TILES>& smem, std::int64_t image,
                                          int first_row, int first_channel, Load load, const float* mean,
                                          const float* rstd) {
  using Smem = PoolSmem<TILES>;
  float products[TILES][4][4] = {};
  float row_sums[Smem::ROWS_PER_THREAD] = {};
  for (int first = 0; first < static_cast<int>(arguments.sizes.patches); first += Smem::STEP) {
    store_patches(arguments, smem, first, first_channel, load, mean, rstd);
    store_matrix(arguments, smem, first, first_row, row_sums);
    sync_threads();
    multiply(smem, first_row, static_cast<int>(arguments.sizes.rows), products);
    sync_threads();
  }
#pragma unroll
  for (int j = 0; j < Smem::ROWS_PER_THREAD; ++j) {
    const float sum = lane_sum<1, 8>(row_sums[j]);
    if (lane_id() % 8 == 0) {
      smem.row_sums[thread_id() / 8 + j * (kThreads / 8)] = sum;
    }
  }
  sync_threads();
  store_pooled(arguments, smem, image, first_row, first_channel, products);
}

}  // namespace vapt_fast::prompt_pool
