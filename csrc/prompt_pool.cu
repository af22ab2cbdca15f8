// Two LayerNorms of the same tokens with one statistic, the second one pooled over the patches: see
// vapt_fast/prompt_pool.h for the formulas and the arguments.
//
// All products are 16 x 8 x 8 on the tensor cores, of tf32, summed in float32. A block of threads works on an image
// and a slab of 128 channels, or in ``products`` on an image and 64 tokens; what a product reads of shared memory
// is laid out so that no two lanes meet in a bank.
//
// Forward in one pass: the blocks of an image are a cluster. Each keeps its slab of all tokens in shared memory,
// the sums over a token's channels pass between the blocks, and pooling a slab needs nothing of the others.
// Forward in two passes: a warp normalises a token, then blocks read the tokens again and pool a slab.
//
// Backward, with g the gradient of pooled, a that of normed, and the gradient of normed from the prompts
// b[t, c] = s[t] * weight[c] * sum over r of M[r, n] g[r, c]: total gets
//
//     rstd * (a + b - mean(a + b) - normed * (mean(a * normed) + s^2 * mean(b * normed)))     means over channels
//
// ``products`` computes y[r, t] = sum over c of g[r, c] weight[c] normed[t, c]. It is the gradient of the matrix,
// and it gives the means without b: those of b * normed are s[t] * sum over r of M[r, n] y[r, t]. ``gradients``
// computes b, a slab at a time, and from it all the rest. Sums over images go through the workspace and are added
// in a fixed order.

#include "vapt_fast/prompt_pool.h"

#include <cmath>
#include <cstdio>

#include "vapt_fast/device.cuh"

namespace vapt_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTile = 16;   // rows of a product
constexpr int kDepth = 8;   // of a product, and its columns
constexpr int kEight = 8;   // channels that a thread takes at once
constexpr int kSlab = 128;  // channels of a block: 32 of each of four warps
constexpr int kGroup = 32;  // channels of a warp: eight of each four lanes
constexpr int kBlocksInCluster = 8;  // at most, on every device

__host__ __device__ __forceinline__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// ---- eight channels

template <typename Element>
struct Eight {
  Bytes16 bytes[sizeof(Element) / 2];
};

template <typename Element>
__device__ __forceinline__ Eight<Element> load_eight(const Element* from) {
  Eight<Element> eight;
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Element) / 2; ++i) {
    eight.bytes[i] = load16(from + i * 4);
  }
  return eight;
}

template <typename Element>
__device__ __forceinline__ void store_eight(Element* to, const Eight<Element>& eight) {
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Element) / 2; ++i) {
    store16(to + i * 4, eight.bytes[i]);
  }
}

template <typename Element>
__device__ __forceinline__ void widen(const Eight<Element>& eight, float (&to)[kEight]) {
  if constexpr (sizeof(Element) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      to[i] = float_of(eight.bytes[i / 4].words[i % 4]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      unpack<Element>(eight.bytes[0].words[i / 2], to[i], to[i + 1]);
    }
  }
}

template <typename Element>
__device__ __forceinline__ Eight<Element> narrow(const float (&from)[kEight]) {
  Eight<Element> eight;
  if constexpr (sizeof(Element) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      eight.bytes[i / 4].words[i % 4] = bits_of(from[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      eight.bytes[0].words[i / 2] = pack<Element>(from[i], from[i + 1]);
    }
  }
  return eight;
}

template <typename Element>
__device__ __forceinline__ void load_floats(const Element* from, float (&to)[kEight]) {
  widen(load_eight(from), to);
}

// ---- where things are

template <typename Element>
__device__ __forceinline__ const Element* row_of(const Tensor3& tensor, std::int64_t image, std::int64_t row) {
  return static_cast<const Element*>(tensor.data) + image * tensor.batch_stride + row * tensor.row_stride;
}

__device__ __forceinline__ const float* row_of(const PoolingMatrix& matrix, std::int64_t row) {
  return matrix.data + row * matrix.row_stride;
}

// Where a warp's 32 channels lie in shared memory, from the first one. Column j of product i is channel
// 8 (j / 2) + 2 i + j % 2, so that a lane's columns of the four products are eight channels in a row; in shared
// memory the columns of a product lie side by side. ``eight``: of which eight channels, 2 i is the first of two.
__device__ __forceinline__ int place_of(int eight, int i) { return i * kDepth + eight * 2; }

// The eight channels, of a lane's columns of the four products, in row lane / 4 or lane / 4 + 8.
__device__ __forceinline__ void columns_of(const float (&products)[4][4], int half, float (&to)[kEight]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = products[i][2 * half];
    to[2 * i + 1] = products[i][2 * half + 1];
  }
}

// Puts eight channels into a row of a slab in shared memory; ``eight`` counts from the slab's first.
__device__ __forceinline__ void put_in_slab(std::uint32_t* row, int eight, const float (&values)[kEight]) {
#pragma unroll
  for (int i = 0; i < kEight / 2; ++i) {
    std::uint32_t* const to = row + eight / 4 * kGroup + place_of(eight % 4, i);
    to[0] = to_tf32(values[2 * i]);
    to[1] = to_tf32(values[2 * i + 1]);
  }
}

// ---- sums

// Over lanes that differ in the bits of ``FIRST`` to LAST / 2, powers of 2.
template <int FIRST, int LAST>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int mask = FIRST; mask < LAST; mask *= 2) {
    x += shuffle_xor(x, mask);
  }
  return x;
}

__device__ __forceinline__ float sum_of(const float (&values)[kEight]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    sum += values[i];
  }
  return sum;
}

__device__ __forceinline__ float squares_of(const float (&values)[kEight], float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    sum += (values[i] - mean) * (values[i] - mean);
  }
  return sum;
}

__device__ __forceinline__ float rstd_of(float squares, std::int64_t channels, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(channels) + eps);
}

// s, from rstd itself: a small number where the variance is large, so nothing cancels.
__device__ __forceinline__ float prompt_factor(float rstd, float eps, float prompt_eps) {
  return 1.0f / sqrtf(1.0f + (prompt_eps - eps) * rstd * rstd);
}

// ---- forward

// Eight channels of total, which they are written to if there is a delta.
template <typename Token, typename Element>
__device__ __forceinline__ Eight<Token> load_total(const PromptPoolForward& arguments, std::int64_t image,
                                                   std::int64_t token, std::int64_t channel) {
  const PromptPoolSizes& sizes = arguments.sizes;
  Eight<Token> eight = load_eight(row_of<Token>(arguments.x, image, token) + channel);
  if (arguments.delta.data) {
    float total[kEight];
    float branch[kEight];
    float gain[kEight] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    widen(eight, total);
    load_floats(row_of<Element>(arguments.delta, image, token) + channel, branch);
    if (arguments.gain) {
      load_floats(arguments.gain + channel, gain);
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      total[i] += gain[i] * branch[i];
    }
    eight = narrow<Token>(total);
    const std::int64_t row = image * (sizes.prefix + sizes.patches) + token;
    store_eight(static_cast<Token*>(arguments.total) + row * sizes.channels + channel, eight);
  }
  return eight;
}

template <typename Element>
__device__ __forceinline__ void store_normed(const PromptPoolForward& arguments, std::int64_t row,
                                             std::int64_t channel, float (&values)[kEight], float mean,
                                             float rstd) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    values[i] = (values[i] - mean) * rstd;
  }
  store_eight(static_cast<Element*>(arguments.normed) + row * arguments.sizes.channels + channel,
              narrow<Element>(values));
}

// total, normed, mean and rstd; a warp to a token. Its lanes read back only what they put into shared memory.
template <typename Token, typename Element>
__global__ void __launch_bounds__(kThreads) normalise(const PromptPoolForward arguments) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const auto channels = static_cast<int>(sizes.channels);
  const std::int64_t row = block() * kWarps + warp();
  if (row >= sizes.batch * tokens) {
    return;
  }
  Token* const kept = reinterpret_cast<Token*>(shared_memory()) + warp() * channels;
  float values[kEight];

  float sum = 0.0f;
  for (int channel = lane() * kEight; channel < channels; channel += kLanes * kEight) {
    const Eight<Token> eight = load_total<Token, Element>(arguments, row / tokens, row % tokens, channel);
    store_eight(kept + channel, eight);
    widen(eight, values);
    sum += sum_of(values);
  }
  const float mean = sum_of_lanes<1, kLanes>(sum) / static_cast<float>(channels);

  float squares = 0.0f;
  for (int channel = lane() * kEight; channel < channels; channel += kLanes * kEight) {
    load_floats(kept + channel, values);
    squares += squares_of(values, mean);
  }
  const float rstd = rstd_of(sum_of_lanes<1, kLanes>(squares), channels, arguments.eps);

  for (int channel = lane() * kEight; channel < channels; channel += kLanes * kEight) {
    load_floats(kept + channel, values);
    store_normed<Element>(arguments, row, channel, values, mean, rstd);
  }
  if (lane() == 0) {
    arguments.mean[row] = mean;
    arguments.rstd[row] = rstd;
  }
}

// What ``pool_slab`` has in shared memory, as tf32: a step's patches and the matrix's columns of them. TILES: how
// many tiles of 16 rows a warp has.
template <int TILES>
struct PoolStage {
  static constexpr int ROWS = 2 * TILES * kTile;
  static constexpr int STEP = 32;                    // patches
  static constexpr int STRIDE = kSlab + 8;           // four rows of a right factor in different banks
  static constexpr int MATRIX_STRIDE = STEP + 4;     // eight rows of a left factor in different banks

  std::uint32_t z[STEP * STRIDE];
  std::uint32_t matrix[ROWS * MATRIX_STRIDE];
  float row_sums[ROWS];
};

// ROWS rows and a slab of pooled, from ``first_row`` and ``first_channel``. ``patches`` are the slab's channels of
// the first patch, in memory or in shared memory, the next one ``stride`` elements further; mean and rstd its
// statistics.
template <typename Token, int TILES>
__device__ __forceinline__ void pool_slab(const PromptPoolForward& arguments, PoolStage<TILES>& stage,
                                          std::int64_t image, int first_row, int first_channel,
                                          const Token* patches, std::int64_t stride, const float* mean,
                                          const float* rstd) {
  using Stage = PoolStage<TILES>;
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_patches = static_cast<int>(sizes.patches);
  const auto num_rows = static_cast<int>(sizes.rows);
  const auto channels = static_cast<int>(sizes.channels);

  float products[TILES][4][4] = {};
  float row_sums[Stage::ROWS / (kThreads / 8)] = {};
  for (int first = 0; first < num_patches; first += Stage::STEP) {
    // Four lanes take the 32 channels of a warp, so that eight patches are written to different banks.
#pragma unroll
    for (int j = 0; j < Stage::STEP * kSlab / kEight; j += kThreads) {
      const int patch = (thread() + j) / 4 % Stage::STEP;
      const int eight = (thread() + j) / (4 * Stage::STEP) * 4 + thread() % 4;
      float z[kEight] = {};
      if (first + patch < num_patches && first_channel + eight * kEight < channels) {
        load_floats(patches + (first + patch) * stride + eight * kEight, z);
        const float r = rstd[first + patch];
        const float factor = r * prompt_factor(r, arguments.eps, arguments.prompt_eps);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          z[i] = (z[i] - mean[first + patch]) * factor;
        }
      }
      put_in_slab(stage.z + patch * Stage::STRIDE, eight, z);
    }
#pragma unroll
    for (int j = 0; j < Stage::ROWS / (kThreads / 8); ++j) {
      const int row = thread() / 8 + j * (kThreads / 8);
#pragma unroll
      for (int patch = thread() % 8; patch < Stage::STEP; patch += 8) {
        const bool inside = first_row + row < num_rows && first + patch < num_patches;
        const float value = inside ? row_of(arguments.matrix, first_row + row)[first + patch] : 0.0f;
        row_sums[j] += value;
        stage.matrix[row * Stage::MATRIX_STRIDE + patch] = to_tf32(value);
      }
    }
    sync_threads();

    const std::uint32_t* const right = stage.z + lane() % 4 * Stage::STRIDE + warp() % 4 * kGroup + lane() / 4;
#pragma unroll
    for (int k = 0; k < Stage::STEP; k += kDepth) {
      std::uint32_t b[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i][0] = right[k * Stage::STRIDE + i * kDepth];
        b[i][1] = right[(k + 4) * Stage::STRIDE + i * kDepth];
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const int row = (2 * tile + warp() / 4) * kTile;
        if (first_row + row < num_rows) {
          std::uint32_t a[4];
          load_matrices(a, stage.matrix + (row + lane() % 16) * Stage::MATRIX_STRIDE + k + lane() / 16 * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            mma_tf32(products[tile][i], a, b[i][0], b[i][1]);
          }
        }
      }
    }
    sync_threads();
  }

#pragma unroll
  for (int j = 0; j < Stage::ROWS / (kThreads / 8); ++j) {
    const float sum = sum_of_lanes<1, 8>(row_sums[j]);
    if (lane() % 8 == 0) {
      stage.row_sums[thread() / 8 + j * (kThreads / 8)] = sum;
    }
  }
  sync_threads();

  const int channel = first_channel + warp() % 4 * kGroup + lane() % 4 * kEight;
  if (channel >= channels) {
    return;
  }
  float weight[kEight];
  float bias[kEight];
  load_floats(arguments.weight + channel, weight);
  load_floats(arguments.bias + channel, bias);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (2 * tile + warp() / 4) * kTile + half * 8 + lane() / 4;
      if (first_row + row < num_rows) {
        float pooled[kEight];
        columns_of(products[tile], half, pooled);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          pooled[i] = weight[i] * pooled[i] + bias[i] * stage.row_sums[row];
        }
        const std::int64_t to = (image * num_rows + first_row + row) * channels + channel;
        store_eight(arguments.pooled + to, narrow<float>(pooled));
      }
    }
  }
}

// pooled, from the tokens in memory and their statistics.
template <typename Token, int TILES>
__global__ void __launch_bounds__(kThreads, 2) pool(const PromptPoolForward arguments) {
  auto& stage = *reinterpret_cast<PoolStage<TILES>*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t slabs = ceil_div(sizes.channels, kSlab);
  const std::int64_t row_blocks = ceil_div(sizes.rows, PoolStage<TILES>::ROWS);
  const std::int64_t image = block() / (slabs * row_blocks);
  const auto first_channel = static_cast<int>(block() % slabs * kSlab);
  const auto first_row = static_cast<int>(block() / slabs % row_blocks * PoolStage<TILES>::ROWS);

  const Tensor3 total{arguments.total, (sizes.prefix + sizes.patches) * sizes.channels, sizes.channels};
  const Tensor3& tokens = arguments.delta.data ? total : arguments.x;
  const std::int64_t first_patch = image * (sizes.prefix + sizes.patches) + sizes.prefix;
  pool_slab(arguments, stage, image, first_row, first_channel,
            row_of<Token>(tokens, image, sizes.prefix) + first_channel, tokens.row_stride,
            arguments.mean + first_patch, arguments.rstd + first_patch);
}

// What a block has in shared memory after its PoolStage: its slab of all tokens, and of each token the sums over
// the slab's channels and the statistics.
template <typename Token>
struct Kept {
  Token* tokens;  // (T, kSlab)
  float* sums;
  float* squares;
  float* mean;
  float* rstd;

  static std::int64_t size(std::int64_t tokens) {
    return tokens * (kSlab * static_cast<std::int64_t>(sizeof(Token)) + 4 * static_cast<std::int64_t>(sizeof(float)));
  }

  __device__ __forceinline__ Kept(void* memory, int num_tokens)
      : tokens(static_cast<Token*>(memory)),
        sums(reinterpret_cast<float*>(tokens + num_tokens * kSlab)),
        squares(sums + num_tokens),
        mean(squares + num_tokens),
        rstd(mean + num_tokens) {}
};

// Everything, by a cluster of blocks for each image.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(kThreads, 2) normalise_and_pool(const PromptPoolForward arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  auto& stage = *reinterpret_cast<PoolStage<TILES>*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const auto channels = static_cast<int>(sizes.channels);
  const Kept<Token> kept(&stage + 1, num_tokens);
  const auto blocks = static_cast<int>(ceil_div(channels, kSlab));
  const std::int64_t image = block() / blocks;
  const int first_channel = cluster_rank() * kSlab;

  // Sixteen lanes take a token's channels, always the same ones: they read back only what they keep.
  constexpr int LANES = kSlab / kEight;
  constexpr int STEP = kThreads / LANES;
  const int channel = thread() % LANES * kEight;
  const bool is_channel = first_channel + channel < channels;
  float values[kEight];

  // Over all channels of a token: always in the order of the blocks' ranks.
  const auto sum_of_cluster = [blocks](float* sums, int token) {
    float sum = 0.0f;
    for (int rank = 0; rank < blocks; ++rank) {
      sum += cluster_peer(sums, rank)[token];
    }
    return sum;
  };

#pragma unroll 4
  for (int first = 0; first < num_tokens; first += STEP) {
    const int token = first + thread() / LANES;
    float sum = 0.0f;
    if (token < num_tokens && is_channel) {
      const Eight<Token> eight = load_total<Token, Element>(arguments, image, token, first_channel + channel);
      store_eight(kept.tokens + token * kSlab + channel, eight);
      widen(eight, values);
      sum = sum_of(values);
    }
    sum = sum_of_lanes<1, LANES>(sum);
    if (token < num_tokens && channel == 0) {
      kept.sums[token] = sum;
    }
  }
  sync_cluster();
  for (int token = thread(); token < num_tokens; token += kThreads) {
    kept.mean[token] = sum_of_cluster(kept.sums, token) / static_cast<float>(channels);
  }
  sync_threads();

  for (int first = 0; first < num_tokens; first += STEP) {
    const int token = first + thread() / LANES;
    float squares = 0.0f;
    if (token < num_tokens && is_channel) {
      load_floats(kept.tokens + token * kSlab + channel, values);
      squares = squares_of(values, kept.mean[token]);
    }
    squares = sum_of_lanes<1, LANES>(squares);
    if (token < num_tokens && channel == 0) {
      kept.squares[token] = squares;
    }
  }
  sync_cluster();
  for (int token = thread(); token < num_tokens; token += kThreads) {
    kept.rstd[token] = rstd_of(sum_of_cluster(kept.squares, token), channels, arguments.eps);
    if (cluster_rank() == 0) {
      arguments.mean[image * num_tokens + token] = kept.mean[token];
      arguments.rstd[image * num_tokens + token] = kept.rstd[token];
    }
  }
  sync_cluster();  // also before a block ends: until here others read its sums

  for (int token = thread() / LANES; token < num_tokens; token += STEP) {
    if (is_channel) {
      load_floats(kept.tokens + token * kSlab + channel, values);
      store_normed<Element>(arguments, image * num_tokens + token, first_channel + channel, values,
                            kept.mean[token], kept.rstd[token]);
    }
  }
  for (int first_row = 0; first_row < sizes.rows; first_row += PoolStage<TILES>::ROWS) {
    pool_slab(arguments, stage, image, first_row, first_channel, kept.tokens + sizes.prefix * kSlab, kSlab,
              kept.mean + sizes.prefix, kept.rstd + sizes.prefix);
  }
#endif
}

// ---- backward

// Where the kernels of the backward leave what others of them read.
struct Workspace {
  float* means;   // (B, T, 2): mean(a + b) and mean(a * normed) + s^2 mean(b * normed)
  float* affine;  // (B, 2, C): the gradients of weight and bias from each image
  float* matrix;  // (chunks, R, N): the gradient of the matrix from each chunk of images
  std::int64_t images;  // in a chunk
  std::int64_t chunks;
};

// What ``products`` has in shared memory, as tf32 a step's channels of g and of weight * normed. TILES: how many
// tiles of 16 rows a warp has.
template <int TILES>
struct ProductStage {
  static constexpr int ROWS = 2 * TILES * kTile;
  static constexpr int TOKENS = 64;
  static constexpr int STEP = 64;          // channels
  static constexpr int STRIDE = STEP + 4;  // eight rows in different banks

  std::uint32_t g[ROWS * STRIDE];
  std::uint32_t normed[TOKENS * STRIDE];
  float of_weight[ROWS];  // sums of g * weight and g * bias over the channels
  float of_bias[ROWS];
  float of_a[TOKENS];  // sums of a and a * normed over the channels
  float of_a_normed[TOKENS];
  float of_b[2][TOKENS];  // likewise of b / s, of each half of the tiles of rows
  float of_b_normed[2][TOKENS];
};

// The gradient of the matrix from a chunk of images, and the means: for 64 tokens of the chunk's images.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(kThreads, 2) products(const PromptPoolBackward arguments,
                                                        const Workspace workspace) {
  using Stage = ProductStage<TILES>;
  auto& stage = *reinterpret_cast<Stage*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const auto num_patches = static_cast<int>(sizes.patches);
  const auto prefix = static_cast<int>(sizes.prefix);
  const auto num_rows = static_cast<int>(sizes.rows);
  const auto channels = static_cast<int>(sizes.channels);
  const std::int64_t token_blocks = ceil_div(num_tokens, Stage::TOKENS);
  const std::int64_t chunk = block() / token_blocks;
  const auto first_token = static_cast<int>(block() % token_blocks * Stage::TOKENS);
  const std::int64_t first_image = chunk * workspace.images;

  for (std::int64_t image = first_image; image < min(first_image + workspace.images, sizes.batch); ++image) {
    // Four lanes take a token.
    const int token = first_token + thread() / 4;
    float sum_a = 0.0f;
    float sum_a_normed = 0.0f;

    int first_row = 0;
    do {  // once also without rows, for the sums of a
      float y[TILES][2][4] = {};
      float of_weight[Stage::ROWS / (kThreads / 8)] = {};
      float of_bias[Stage::ROWS / (kThreads / 8)] = {};
#pragma unroll 1
      for (int first = 0; first < channels; first += Stage::STEP) {
#pragma unroll
        for (int place = thread() % 4 * kEight; place < Stage::STEP; place += 4 * kEight) {
          const int channel = first + place;
          float values[kEight] = {};
          if (token < num_tokens && channel < channels) {
            load_floats(row_of<Token>(arguments.total, image, token) + channel, values);
            const float mean = arguments.mean[image * num_tokens + token];
            const float rstd = arguments.rstd[image * num_tokens + token];
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
              values[i] = (values[i] - mean) * rstd;
            }
            if (first_row == 0 && arguments.grad_normed.data) {
              float a[kEight];
              load_floats(row_of<Element>(arguments.grad_normed, image, token) + channel, a);
#pragma unroll
              for (int i = 0; i < kEight; ++i) {
                sum_a += a[i];
                sum_a_normed += a[i] * values[i];
              }
            }
            float weight[kEight];
            load_floats(arguments.weight + channel, weight);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
              values[i] *= weight[i];
            }
          }
          std::uint32_t* const to = stage.normed + thread() / 4 * Stage::STRIDE + place;
#pragma unroll
          for (int i = 0; i < kEight; i += 4) {
            store16(to + i, {{to_tf32(values[i]), to_tf32(values[i + 1]), to_tf32(values[i + 2]),
                              to_tf32(values[i + 3])}});
          }
        }
#pragma unroll 1
        for (int place = thread() % 8 * 4; place < Stage::STEP; place += 32) {
          const int channel = first + place;
#pragma unroll
          for (int j = 0; j < Stage::ROWS / (kThreads / 8); ++j) {
            const int row = thread() / 8 + j * (kThreads / 8);
            Bytes16 g{};
            if (first_row + row < num_rows && channel < channels) {
              g = load16(row_of<float>(arguments.grad_pooled, image, first_row + row) + channel);
              const Bytes16 weight = load16(arguments.weight + channel);
              const Bytes16 bias = load16(arguments.bias + channel);
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float value = float_of(g.words[i]);
                of_weight[j] += value * float_of(weight.words[i]);
                of_bias[j] += value * float_of(bias.words[i]);
                g.words[i] = to_tf32(value);
              }
            }
            store16(stage.g + row * Stage::STRIDE + place, g);
          }
        }
        sync_threads();

        const std::uint32_t* const right = stage.normed +
                                           (warp() % 4 * 16 + lane() % 8 + lane() / 16 * 8) * Stage::STRIDE +
                                           lane() / 8 % 2 * 4;
#pragma unroll
        for (int k = 0; k < Stage::STEP; k += kDepth) {
          std::uint32_t b[4];
          load_matrices(b, right + k);
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            const int row = (2 * tile + warp() / 4) * kTile;
            if (first_row + row < num_rows) {
              std::uint32_t a[4];
              load_matrices(a, stage.g + (row + lane() % 16) * Stage::STRIDE + k + lane() / 16 * 4);
              mma_tf32(y[tile][0], a, b[0], b[1]);
              mma_tf32(y[tile][1], a, b[2], b[3]);
            }
          }
        }
        sync_threads();
      }

#pragma unroll
      for (int j = 0; j < Stage::ROWS / (kThreads / 8); ++j) {
        const float weighted = sum_of_lanes<1, 8>(of_weight[j]);
        const float biased = sum_of_lanes<1, 8>(of_bias[j]);
        if (lane() % 8 == 0) {
          stage.of_weight[thread() / 8 + j * (kThreads / 8)] = weighted;
          stage.of_bias[thread() / 8 + j * (kThreads / 8)] = biased;
        }
      }
      sync_threads();

      // Of the four tokens in this lane's columns.
      const int first_place = warp() % 4 * 16 + lane() % 4 * 2;
      const auto patch_of = [&](int column) {
        return first_token - prefix + first_place + column / 2 * 8 + column % 2;
      };
      float s[4];
      float sum_b[4] = {};
      float sum_b_normed[4] = {};
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const int patch = patch_of(column);
        const bool is_patch = patch >= 0 && patch < num_patches;
        const float rstd = is_patch ? arguments.rstd[image * num_tokens + prefix + patch] : 0.0f;
        s[column] = prompt_factor(rstd, arguments.eps, arguments.prompt_eps);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = (2 * tile + warp() / 4) * kTile + half * 8 + lane() / 4;
          if (first_row + row >= num_rows) {
            continue;
          }
          const float* const matrix = row_of(arguments.matrix, first_row + row);
          float* const grad_matrix = workspace.matrix + (chunk * num_rows + first_row + row) * num_patches;
#pragma unroll
          for (int column = 0; column < 4; ++column) {
            const int patch = patch_of(column);
            if (patch >= 0 && patch < num_patches) {
              const float product = y[tile][column / 2][2 * half + column % 2];
              sum_b[column] += matrix[patch] * stage.of_weight[row];
              sum_b_normed[column] += matrix[patch] * product;
              const float of_image = s[column] * product + stage.of_bias[row];
              grad_matrix[patch] = image == first_image ? of_image : grad_matrix[patch] + of_image;
            }
          }
        }
      }
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const float b = sum_of_lanes<4, kLanes>(sum_b[column]);
        const float b_normed = sum_of_lanes<4, kLanes>(sum_b_normed[column]);
        if (lane() < 4) {
          const int place = first_place + column / 2 * 8 + column % 2;
          float& all_b = stage.of_b[warp() / 4][place];
          float& all_b_normed = stage.of_b_normed[warp() / 4][place];
          all_b = first_row == 0 ? b : all_b + b;
          all_b_normed = first_row == 0 ? b_normed : all_b_normed + b_normed;
        }
      }
      first_row += Stage::ROWS;
    } while (first_row < num_rows);

    sum_a = sum_of_lanes<1, 4>(sum_a);
    sum_a_normed = sum_of_lanes<1, 4>(sum_a_normed);
    if (lane() % 4 == 0) {
      stage.of_a[thread() / 4] = sum_a;
      stage.of_a_normed[thread() / 4] = sum_a_normed;
    }
    sync_threads();
    if (thread() < Stage::TOKENS && first_token + thread() < num_tokens) {
      const int place = thread();
      const std::int64_t at = image * num_tokens + first_token + place;
      const float s = prompt_factor(arguments.rstd[at], arguments.eps, arguments.prompt_eps);
      const float b = s * (stage.of_b[0][place] + stage.of_b[1][place]);
      const float b_normed = s * (stage.of_b_normed[0][place] + stage.of_b_normed[1][place]);
      workspace.means[2 * at] = (stage.of_a[place] + b) / static_cast<float>(channels);
      workspace.means[2 * at + 1] = (stage.of_a_normed[place] + s * s * b_normed) / static_cast<float>(channels);
    }
  }
}

// What ``gradients`` has in shared memory, as tf32 a slab of some rows of g, and the matrix's columns of a step's
// tokens.
struct GradientStage {
  static constexpr int ROWS = 64;
  static constexpr int TOKENS = 64;
  static constexpr int STRIDE = kSlab + 8;          // four rows in different banks
  static constexpr int MATRIX_STRIDE = TOKENS + 8;  // likewise

  std::uint32_t g[ROWS * STRIDE];
  std::uint32_t matrix[ROWS * MATRIX_STRIDE];
  float affine[2][2][kSlab];  // sums over the tokens of each half of the warps
};

// The gradients of x and delta, and those of weight and bias from an image: for a slab of its channels.
template <typename Token, typename Element>
__global__ void __launch_bounds__(kThreads, 2) gradients(const PromptPoolBackward arguments,
                                                         const Workspace workspace) {
  using Stage = GradientStage;
  auto& stage = *reinterpret_cast<Stage*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const auto prefix = static_cast<int>(sizes.prefix);
  const auto num_rows = static_cast<int>(sizes.rows);
  const auto channels = static_cast<int>(sizes.channels);
  const std::int64_t slabs = ceil_div(channels, kSlab);
  const std::int64_t image = block() / slabs;
  const auto first_channel = static_cast<int>(block() % slabs * kSlab);
  // This lane's eight, in the slab and of all.
  const int place = warp() % 4 * kGroup + lane() % 4 * kEight;
  const int channel = first_channel + place;

  float of_weight[kEight] = {};
  float of_bias[kEight] = {};
#pragma unroll 1
  for (int first_token = 0; first_token < num_tokens; first_token += Stage::TOKENS) {
    float products[2][4][4] = {};  // b / (s * weight), of two tiles of 16 tokens
#pragma unroll 1
    for (int first_row = 0; first_row < num_rows; first_row += Stage::ROWS) {
      const int count = min(Stage::ROWS, num_rows - first_row);
      if (first_token == 0 || num_rows > Stage::ROWS) {  // else it is there
#pragma unroll
        for (int j = 0; j < Stage::ROWS * kSlab / kEight; j += kThreads) {
          const int row = (thread() + j) / 4 % Stage::ROWS;
          const int eight = (thread() + j) / (4 * Stage::ROWS) * 4 + thread() % 4;
          float g[kEight] = {};
          if (row < count && first_channel + eight * kEight < channels) {
            const float* const from = row_of<float>(arguments.grad_pooled, image, first_row + row);
            load_floats(from + first_channel + eight * kEight, g);
          }
          put_in_slab(stage.g + row * Stage::STRIDE, eight, g);
        }
      }
      for (int row = warp(); row < Stage::ROWS; row += kWarps) {
#pragma unroll
        for (int j = 0; j < Stage::TOKENS; j += kLanes) {
          const int token = first_token + j + lane();
          const bool inside = row < count && token >= prefix && token < num_tokens;
          const float value = inside ? row_of(arguments.matrix, first_row + row)[token - prefix] : 0.0f;
          stage.matrix[row * Stage::MATRIX_STRIDE + j + lane()] = to_tf32(value);
        }
      }
      sync_threads();

      const std::uint32_t* const left =
          stage.matrix + lane() % 4 * Stage::MATRIX_STRIDE + warp() / 4 * 2 * kTile + lane() / 4;
      const std::uint32_t* const right = stage.g + lane() % 4 * Stage::STRIDE + warp() % 4 * kGroup + lane() / 4;
      for (int k = 0; k < count; k += kDepth) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[tile][i] = left[(k + i / 2 * 4) * Stage::MATRIX_STRIDE + tile * kTile + i % 2 * 8];
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::uint32_t b0 = right[k * Stage::STRIDE + i * kDepth];
          const std::uint32_t b1 = right[(k + 4) * Stage::STRIDE + i * kDepth];
          mma_tf32(products[0][i], a[0], b0, b1);
          mma_tf32(products[1][i], a[1], b0, b1);
        }
      }
      sync_threads();
    }

#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + (warp() / 4 * 2 + tile) * kTile + half * 8 + lane() / 4;
        if (token >= num_tokens || channel >= channels) {
          continue;
        }
        const std::int64_t at = image * num_tokens + token;
        const float mean = arguments.mean[at];
        const float rstd = arguments.rstd[at];
        const float s = prompt_factor(rstd, arguments.eps, arguments.prompt_eps);
        float normed[kEight];
        float grad[kEight];
        load_floats(row_of<Token>(arguments.total, image, token) + channel, normed);
        columns_of(products[tile], half, grad);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          normed[i] = (normed[i] - mean) * rstd;
        }
        if (token >= prefix) {
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            of_weight[i] += s * normed[i] * grad[i];
            of_bias[i] += grad[i];
          }
        }
        if (!arguments.grad_x && !arguments.grad_delta) {
          continue;
        }

        float factors[kEight];
        load_floats(arguments.weight + channel, factors);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          grad[i] = token >= prefix ? grad[i] * s * factors[i] : 0.0f;
        }
        float incoming[kEight];
        if (arguments.grad_normed.data) {
          load_floats(row_of<Element>(arguments.grad_normed, image, token) + channel, incoming);
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            grad[i] += incoming[i];
          }
        }
        const float mean_grad = workspace.means[2 * at];
        const float mean_product = workspace.means[2 * at + 1];
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          grad[i] = rstd * (grad[i] - mean_grad - normed[i] * mean_product);
        }
        if (arguments.grad_total.data) {
          load_floats(row_of<Token>(arguments.grad_total, image, token) + channel, incoming);
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            grad[i] += incoming[i];
          }
        }
        if (arguments.grad_x) {
          store_eight(static_cast<Token*>(arguments.grad_x) + at * channels + channel, narrow<Token>(grad));
        }
        if (arguments.grad_delta) {
          if (arguments.gain) {
            load_floats(arguments.gain + channel, factors);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
              grad[i] *= factors[i];
            }
          }
          store_eight(static_cast<Element*>(arguments.grad_delta) + at * channels + channel, narrow<Element>(grad));
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const float weighted = sum_of_lanes<4, kLanes>(of_weight[i]);
    const float biased = sum_of_lanes<4, kLanes>(of_bias[i]);
    if (lane() < 4) {
      stage.affine[warp() / 4][0][place + i] = weighted;
      stage.affine[warp() / 4][1][place + i] = biased;
    }
  }
  sync_threads();
  const int which = thread() / kSlab;
  const int column = thread() % kSlab;
  if (first_channel + column < channels) {
    workspace.affine[(image * 2 + which) * channels + first_channel + column] =
        stage.affine[0][which][column] + stage.affine[1][which][column];
  }
}

// out (size,): the sum of partial (chunks, stride) over the chunks. Each warp adds every eighth of them.
__global__ void __launch_bounds__(kThreads)
    add_chunks(const float* partial, std::int64_t stride, std::int64_t chunks, std::int64_t size, float* out) {
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  const std::int64_t column = block() * kLanes + lane();
  float sum = 0.0f;
  if (column < size) {
#pragma unroll 4
    for (std::int64_t chunk = warp(); chunk < chunks; chunk += kWarps) {
      sum += partial[chunk * stride + column];
    }
  }
  sums[thread()] = sum;
  sync_threads();
  if (warp() == 0 && column < size) {
    for (int other = 1; other < kWarps; ++other) {
      sum += sums[other * kLanes + lane()];
    }
    out[column] = sum;
  }
}

// ---- launches

template <typename... Arguments>
Status refuse(Code code, const char* format, Arguments... arguments) {
  Status status;
  status.code = code;
  std::snprintf(status.message, sizeof status.message, format, arguments...);
  return status;
}

using Size = long long;  // as snprintf takes it

// Checks arguments one by one, and keeps the first thing that is wrong.
class Check {
 public:
  explicit Check(const PromptPoolSizes& sizes) : sizes_(sizes) {
    if (sizes.dtype != Dtype::float16 && sizes.dtype != Dtype::bfloat16) {
      fail(refuse(Code::invalid, "dtype must be float16 or bfloat16, got number %d", static_cast<int>(sizes.dtype)));
    } else if (sizes.batch < 0 || sizes.prefix < 0 || sizes.rows < 0) {
      fail(refuse(Code::invalid, "sizes must not be negative, got %lld images, %lld prefix tokens, %lld rows",
                  Size(sizes.batch), Size(sizes.prefix), Size(sizes.rows)));
    } else if (sizes.patches < 1) {
      fail(refuse(Code::invalid, "there must be a patch, got %lld", Size(sizes.patches)));
    } else if (sizes.channels < kEight || sizes.channels % kEight) {
      fail(refuse(Code::unsupported, "tokens must have 8, 16, 24, ... channels, got %lld", Size(sizes.channels)));
    } else if (too_large()) {
      fail(refuse(Code::unsupported, "too large: %lld images, %lld + %lld tokens, %lld channels, %lld rows",
                  Size(sizes.batch), Size(sizes.prefix), Size(sizes.patches), Size(sizes.channels),
                  Size(sizes.rows)));
    }
  }

  // A tensor (B, rows, C) whose elements have ``bytes`` bytes.
  void tensor(const char* name, const Tensor3& tensor, std::int64_t rows, std::int64_t bytes) {
    if (sizes_.batch == 0 || rows == 0) {
      return;
    }
    pointer(name, tensor.data);
    const bool images = sizes_.batch == 1 || tensor.batch_stride * bytes % 16 == 0;
    if (!images || (rows > 1 && tensor.row_stride * bytes % 16 != 0)) {
      fail(refuse(Code::invalid, "every row of %s must begin at a multiple of 16 bytes", name));
    }
  }

  // A tensor of ``count`` elements, contiguous, that begins at a multiple of ``bytes``.
  void pointer(const char* name, const void* data, std::int64_t count = 1, std::uintptr_t bytes = 16) {
    if (count == 0) {
      return;
    }
    if (data == nullptr) {
      fail(refuse(Code::invalid, "%s must not be null", name));
    } else if (reinterpret_cast<std::uintptr_t>(data) % bytes) {
      fail(refuse(Code::invalid, "%s must begin at a multiple of %d bytes", name, static_cast<int>(bytes)));
    }
  }

  void fail(const Status& status) {
    if (status_.code == Code::ok) {
      status_ = status;
    }
  }

  const Status& status() const { return status_; }

 private:
  // A grid has 2^31 - 1 blocks, and what belongs to one image is counted in 32 bits.
  bool too_large() const {
    constexpr std::int64_t kMost = 1 << 28;
    if (max(max(sizes_.prefix, sizes_.patches), max(sizes_.channels, sizes_.rows)) > kMost) {
      return true;
    }
    const std::int64_t slabs = ceil_div(sizes_.channels, kSlab) * max(sizes_.rows, std::int64_t{1});
    return sizes_.batch > kMost / max(slabs, sizes_.prefix + sizes_.patches) || sizes_.rows > kMost / sizes_.patches;
  }

  const PromptPoolSizes& sizes_;
  Status status_;
};

// Calls ``function`` with a value of the tokens' type and one of the type of what is normed.
template <typename Function>
auto with_types(const PromptPoolSizes& sizes, Function function) {
  if (sizes.dtype == Dtype::float16) {
    return sizes.float32_tokens ? function(float{}, Float16{}) : function(Float16{}, Float16{});
  }
  return sizes.float32_tokens ? function(float{}, BFloat16{}) : function(BFloat16{}, BFloat16{});
}

template <int TILES>
struct Tiles {
  static constexpr int value = TILES;
};

// Calls ``function`` with the number of tiles, as a type, that a warp needs for the rows, or with the most.
template <typename Function>
auto with_tiles(std::int64_t rows, Function function) {
  if (rows <= 2 * kTile) {
    return function(Tiles<1>{});
  }
  if (rows <= 4 * kTile) {
    return function(Tiles<2>{});
  }
  return function(Tiles<4>{});
}

LaunchShape shape_of(std::int64_t blocks, std::int64_t shared_memory, std::int64_t cluster = 1) {
  LaunchShape shape;
  shape.blocks = blocks;
  shape.threads = kThreads;
  shape.shared_memory = shared_memory;
  shape.cluster = static_cast<int>(cluster);
  return shape;
}

// Images whose gradients of the matrix ``products`` adds itself: few chunks are left, but blocks enough to fill any
// device.
std::int64_t images_in_chunk(const PromptPoolSizes& sizes) {
  constexpr std::int64_t kEnough = 512;
  const std::int64_t token_blocks = ceil_div(sizes.prefix + sizes.patches, ProductStage<1>::TOKENS);
  return max(ceil_div(sizes.batch * token_blocks, kEnough), std::int64_t{1});
}

Workspace workspace_of(const PromptPoolSizes& sizes, float* memory) {
  Workspace workspace;
  workspace.means = memory;
  workspace.affine = workspace.means + sizes.batch * (sizes.prefix + sizes.patches) * 2;
  workspace.matrix = workspace.affine + sizes.batch * sizes.channels * 2;
  workspace.images = images_in_chunk(sizes);
  workspace.chunks = ceil_div(sizes.batch, workspace.images);
  return workspace;
}

template <typename Token, typename Element>
Status forward(const PromptPoolForward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t slabs = ceil_div(sizes.channels, kSlab);
  const Device device = current_device();
  if (device.status.code != Code::ok) {
    return device.status;
  }
  return with_tiles(sizes.rows, [&](auto tiles) {
    constexpr int TILES = decltype(tiles)::value;
    using Stage = PoolStage<TILES>;
    const auto staged = static_cast<std::int64_t>(sizeof(Stage));
    const std::int64_t kept = staged + Kept<Token>::size(tokens);
    if (arguments.one_pass && device.has_clusters && slabs <= kBlocksInCluster && kept <= device.shared_memory) {
      return launch(normalise_and_pool<Token, Element, TILES>, shape_of(sizes.batch * slabs, kept, slabs), stream,
                    arguments);
    }
    const std::int64_t rows_of_tokens = kWarps * sizes.channels * static_cast<std::int64_t>(sizeof(Token));
    const LaunchShape shape = shape_of(ceil_div(sizes.batch * tokens, kWarps), rows_of_tokens);
    const Status status = launch(normalise<Token, Element>, shape, stream, arguments);
    if (status.code != Code::ok || sizes.rows == 0) {
      return status;
    }
    const std::int64_t blocks = sizes.batch * slabs * ceil_div(sizes.rows, Stage::ROWS);
    return launch(pool<Token, TILES>, shape_of(blocks, staged), stream, arguments);
  });
}

template <typename Token, typename Element>
Status backward(const PromptPoolBackward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const Workspace workspace = workspace_of(sizes, arguments.workspace);
  Status status;
  if (sizes.batch > 0) {
    status = with_tiles(sizes.rows, [&](auto tiles) {
      using Stage = ProductStage<decltype(tiles)::value>;
      const std::int64_t blocks = workspace.chunks * ceil_div(sizes.prefix + sizes.patches, Stage::TOKENS);
      return launch(products<Token, Element, decltype(tiles)::value>, shape_of(blocks, sizeof(Stage)), stream,
                    arguments, workspace);
    });
    if (status.code == Code::ok) {
      const std::int64_t blocks = sizes.batch * ceil_div(sizes.channels, kSlab);
      status = launch(gradients<Token, Element>, shape_of(blocks, sizeof(GradientStage)), stream, arguments, workspace);
    }
  }
  const auto add = [&](const float* partial, std::int64_t stride, std::int64_t chunks, std::int64_t size, float* out) {
    if (status.code == Code::ok && size > 0) {
      const LaunchShape shape = shape_of(ceil_div(size, kLanes), kThreads * sizeof(float));
      status = launch(add_chunks, shape, stream, partial, stride, chunks, size, out);
    }
  };
  const std::int64_t of_matrix = sizes.rows * sizes.patches;
  add(workspace.matrix, of_matrix, workspace.chunks, of_matrix, arguments.grad_matrix);
  add(workspace.affine, 2 * sizes.channels, sizes.batch, sizes.channels, arguments.grad_weight);
  add(workspace.affine + sizes.channels, 2 * sizes.channels, sizes.batch, sizes.channels, arguments.grad_bias);
  return status;
}

}  // namespace

Status launch_prompt_pool_forward(const PromptPoolForward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  Check check(sizes);
  if (check.status().code != Code::ok || sizes.batch == 0) {
    return check.status();
  }
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const bool is_sum = arguments.delta.data != nullptr;
  check.tensor("x", arguments.x, tokens, sizes.float32_tokens ? 4 : 2);
  check.tensor("delta", arguments.delta, is_sum ? tokens : 0, 2);
  check.pointer("total", arguments.total, is_sum);
  if (!is_sum && arguments.total) {
    check.fail(refuse(Code::invalid, "total must be null where delta is"));
  }
  check.pointer("gain", arguments.gain, arguments.gain != nullptr);
  check.pointer("matrix", arguments.matrix.data, sizes.rows, sizeof(float));
  check.pointer("weight", arguments.weight);
  check.pointer("bias", arguments.bias);
  check.pointer("normed", arguments.normed);
  check.pointer("pooled", arguments.pooled, sizes.rows);
  check.pointer("mean", arguments.mean, 1, sizeof(float));
  check.pointer("rstd", arguments.rstd, 1, sizeof(float));
  if (check.status().code != Code::ok) {
    return check.status();
  }
  return with_types(sizes, [&](auto token, auto element) {
    return forward<decltype(token), decltype(element)>(arguments, stream);
  });
}

Status launch_prompt_pool_backward(const PromptPoolBackward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  Check check(sizes);
  if (check.status().code != Code::ok) {
    return check.status();
  }
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t bytes = sizes.float32_tokens ? 4 : 2;
  check.tensor("total", arguments.total, tokens, bytes);
  check.tensor("grad_total", arguments.grad_total, arguments.grad_total.data ? tokens : 0, bytes);
  check.tensor("grad_normed", arguments.grad_normed, arguments.grad_normed.data ? tokens : 0, 2);
  check.tensor("grad_pooled", arguments.grad_pooled, sizes.rows, sizeof(float));
  check.pointer("gain", arguments.gain, arguments.gain != nullptr);
  check.pointer("matrix", arguments.matrix.data, sizes.rows, sizeof(float));
  check.pointer("weight", arguments.weight);
  check.pointer("bias", arguments.bias);
  check.pointer("mean", arguments.mean, sizes.batch, sizeof(float));
  check.pointer("rstd", arguments.rstd, sizes.batch, sizeof(float));
  check.pointer("workspace", arguments.workspace, sizes.batch);
  check.pointer("grad_x", arguments.grad_x, arguments.grad_x != nullptr);
  check.pointer("grad_delta", arguments.grad_delta, arguments.grad_delta != nullptr);
  check.pointer("grad_matrix", arguments.grad_matrix, sizes.rows, sizeof(float));
  check.pointer("grad_weight", arguments.grad_weight, 1, sizeof(float));
  check.pointer("grad_bias", arguments.grad_bias, 1, sizeof(float));
  if (check.status().code != Code::ok) {
    return check.status();
  }
  return with_types(sizes, [&](auto token, auto element) {
    return backward<decltype(token), decltype(element)>(arguments, stream);
  });
}

std::int64_t prompt_pool_backward_workspace(const PromptPoolSizes& sizes) {
  const std::int64_t chunks = ceil_div(sizes.batch, images_in_chunk(sizes));
  return sizes.batch * (sizes.prefix + sizes.patches + sizes.channels) * 2 + chunks * sizes.rows * sizes.patches;
}

}  // namespace vapt_fast
