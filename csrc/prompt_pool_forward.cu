// Two LayerNorms of the same tokens with one statistic, the second one pooled over the patches: see
// vapt_fast/prompt_pool.h for the formulas and the arguments.
//
// In one pass: the blocks of an image are a cluster. Each keeps its slab of 128 channels of all tokens in shared
// memory, the sums over a token's channels pass between the blocks, and pooling a slab needs nothing of the others.
// In two passes: a warp normalises a token, then blocks read the tokens again and pool a slab.

#include "prompt_pool.cuh"

namespace vapt_fast {
namespace {

// Eight channels of what total is the sum of.
template <typename Token, typename Element>
struct Summands {
  Eight<Token> x{};
  Eight<Element> branch{};

  __device__ __forceinline__ void load(const PromptPoolForward& arguments, std::int64_t image, std::int64_t token,
                                       std::int64_t channel) {
    x = load_eight(row_of<Token>(arguments.x, image, token) + channel);
    if (arguments.branch.data) {
      branch = load_eight(row_of<Element>(arguments.branch, image, token) + channel);
    }
  }

  // Writes the sum to total, if there is a branch.
  __device__ __forceinline__ Eight<Token> sum(const PromptPoolForward& arguments, std::int64_t image,
                                              std::int64_t token, std::int64_t channel) const {
    if (!arguments.branch.data) {
      return x;
    }
    const PromptPoolSizes& sizes = arguments.sizes;
    float total[kEight];
    float added[kEight];
    float layer_scale[kEight] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    widen(x, total);
    widen(branch, added);
    if (arguments.layer_scale) {
      load_floats(arguments.layer_scale + channel, layer_scale);
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      total[i] += layer_scale[i] * added[i];
    }
    const Eight<Token> eight = narrow<Token>(total);
    const std::int64_t row = image * (sizes.prefix + sizes.patches) + token;
    store_eight(static_cast<Token*>(arguments.total) + row * sizes.channels + channel, eight);
    return eight;
  }
};

// Eight channels of the affine that makes normed of x_hat.
struct NormAffine {
  float weight[kEight] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  float bias[kEight] = {};

  __device__ __forceinline__ NormAffine(const PromptPoolForward& arguments, std::int64_t channel) {
    if (arguments.norm_weight) {
      load_floats(arguments.norm_weight + channel, weight);
      load_floats(arguments.norm_bias + channel, bias);
    }
  }
};

template <typename Element>
__device__ __forceinline__ void store_normed(const PromptPoolForward& arguments, std::int64_t row, std::int64_t channel,
                                             float (&values)[kEight], float mean, float rstd,
                                             const NormAffine& affine) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    values[i] = (values[i] - mean) * rstd * affine.weight[i] + affine.bias[i];
  }
  store_eight(static_cast<Element*>(arguments.normed) + row * arguments.sizes.channels + channel,
              narrow<Element>(values));
}

// total, normed, mean and rstd; a warp of ``warps`` to a token. Its lanes read back only what they put into shared
// memory.
template <typename Token, typename Element>
__global__ void __launch_bounds__(kThreads) normalise(const PromptPoolForward arguments, int warps) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const auto channels = static_cast<int>(sizes.channels);
  const std::int64_t row = block() * warps + warp();
  if (row >= sizes.batch * tokens) {
    return;
  }
  Token* const kept = reinterpret_cast<Token*>(shared_memory()) + warp() * channels;
  float values[kEight];

  float sum = 0.0f;
  for (int channel = lane() * kEight; channel < channels; channel += kLanes * kEight) {
    Summands<Token, Element> summands;
    summands.load(arguments, row / tokens, row % tokens, channel);
    const Eight<Token> eight = summands.sum(arguments, row / tokens, row % tokens, channel);
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
    store_normed<Element>(arguments, row, channel, values, mean, rstd, NormAffine(arguments, channel));
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
  static constexpr int STEP = 32;                 // patches
  static constexpr int STRIDE = kSlab + 8;        // four rows of a right factor in different banks
  static constexpr int MATRIX_STRIDE = STEP + 4;  // eight rows of a left factor in different banks

  std::uint32_t z[STEP * STRIDE];
  std::uint32_t matrix[ROWS * MATRIX_STRIDE];
  float row_sums[ROWS];
};

// ROWS rows and a slab of pooled, from ``first_row`` and ``first_channel``. ``load`` gives eight channels of a patch,
// counted from the slab's first; mean and rstd are the patches' statistics.
template <int TILES, typename Load>
__device__ __forceinline__ void pool_slab(const PromptPoolForward& arguments, PoolStage<TILES>& stage,
                                          std::int64_t image, int first_row, int first_channel, Load load,
                                          const float* mean, const float* rstd) {
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
        widen(load(first + patch, eight), z);
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
  const Tensor3& tokens = arguments.branch.data ? total : arguments.x;
  const std::int64_t first_patch = image * (sizes.prefix + sizes.patches) + sizes.prefix;
  const Token* const patches = row_of<Token>(tokens, image, sizes.prefix) + first_channel;
  const auto load = [patches, stride = tokens.row_stride](int patch, int eight) {
    return load_eight(patches + patch * stride + eight * kEight);
  };
  pool_slab(arguments, stage, image, first_row, first_channel, load, arguments.mean + first_patch,
            arguments.rstd + first_patch);
}

// What a block has in shared memory after its PoolStage: its slab of all tokens, and of each token the sums over
// the slab's channels and the statistics.
template <typename Token>
struct Kept {
  KeptSlab<Token> tokens;
  float* sums;
  float* squares;
  float* mean;
  float* rstd;

  static std::int64_t size(std::int64_t tokens) {
    return tokens * (kSlab * static_cast<std::int64_t>(sizeof(Token)) + 4 * static_cast<std::int64_t>(sizeof(float)));
  }

  __device__ __forceinline__ Kept(void* memory, int num_tokens)
      : tokens(memory),
        sums(reinterpret_cast<float*>(static_cast<Token*>(memory) + num_tokens * kSlab)),
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
  constexpr int AHEAD = 4;  // tokens that a lane loads at once: memory is far
  const int eight = thread() % LANES;
  const int channel = eight * kEight;
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

#pragma unroll 1
  for (int first = thread() / LANES; first < num_tokens + thread() / LANES; first += AHEAD * STEP) {
    Summands<Token, Element> summands[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int token = first + i * STEP;
      if (token < num_tokens && is_channel) {
        summands[i].load(arguments, image, token, first_channel + channel);
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int token = first + i * STEP;
      float sum = 0.0f;
      if (token < num_tokens && is_channel) {
        const Eight<Token> total = summands[i].sum(arguments, image, token, first_channel + channel);
        kept.tokens.store(token, eight, total);
        widen(total, values);
        sum = sum_of(values);
      }
      sum = sum_of_lanes<1, LANES>(sum);
      if (token < num_tokens && channel == 0) {
        kept.sums[token] = sum;
      }
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
      widen(kept.tokens.load(token, eight), values);
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

  if (is_channel) {
    const NormAffine affine(arguments, first_channel + channel);
    for (int token = thread() / LANES; token < num_tokens; token += STEP) {
      widen(kept.tokens.load(token, eight), values);
      store_normed<Element>(arguments, image * num_tokens + token, first_channel + channel, values, kept.mean[token],
                            kept.rstd[token], affine);
    }
  }
  for (int first_row = 0; first_row < sizes.rows; first_row += PoolStage<TILES>::ROWS) {
    const auto load = [&](int patch, int number) {
      return kept.tokens.load(static_cast<int>(sizes.prefix) + patch, number);
    };
    pool_slab(arguments, stage, image, first_row, first_channel, load, kept.mean + sizes.prefix,
              kept.rstd + sizes.prefix);
  }
#endif
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
    const LaunchShape cluster = shape_of(sizes.batch * slabs, staged + Kept<Token>::size(tokens), slabs);
    const auto one_pass = normalise_and_pool<Token, Element, TILES>;
    if (arguments.one_pass && slabs <= kBlocksInCluster && clusters_at_once(one_pass, cluster, device) > 0) {
      return launch(one_pass, cluster, stream, arguments);
    }
    // Fewer warps where a token is so long that shared memory would not do for all.
    const std::int64_t row = sizes.channels * static_cast<std::int64_t>(sizeof(Token));
    const std::int64_t warps = max(min(device.shared_memory / row, std::int64_t{kWarps}), std::int64_t{1});
    LaunchShape shape = shape_of(ceil_div(sizes.batch * tokens, warps), warps * row);
    shape.threads = static_cast<int>(warps) * kLanes;
    const Status status = launch(normalise<Token, Element>, shape, stream, arguments, static_cast<int>(warps));
    if (status.code != Code::ok || sizes.rows == 0) {
      return status;
    }
    const std::int64_t blocks = sizes.batch * slabs * ceil_div(sizes.rows, Stage::ROWS);
    return launch(pool<Token, TILES>, shape_of(blocks, staged), stream, arguments);
  });
}

}  // namespace

Status prompt_pool_supported(int device) { return supported(normalise<float, BFloat16>, device); }

Status launch_prompt_pool_forward(const PromptPoolForward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  Check check(sizes);
  if (check.status().code != Code::ok || sizes.batch == 0) {
    return check.status();
  }
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const bool is_sum = arguments.branch.data != nullptr;
  check.tensor("x", arguments.x, tokens, sizes.float32_tokens ? 4 : 2);
  check.tensor("branch", arguments.branch, is_sum ? tokens : 0, 2);
  check.pointer("total", arguments.total, is_sum);
  if (!is_sum && arguments.total) {
    check.fail(refuse(Code::invalid, "total must be null where branch is"));
  }
  check.pointer("layer_scale", arguments.layer_scale, arguments.layer_scale != nullptr);
  check.pointer("matrix", arguments.matrix.data, sizes.rows, sizeof(float));
  check.pointer("weight", arguments.weight);
  check.pointer("bias", arguments.bias);
  const bool is_affine = arguments.norm_weight != nullptr;
  check.pointer("norm_weight", arguments.norm_weight, is_affine);
  check.pointer("norm_bias", arguments.norm_bias, is_affine);
  if (!is_affine && arguments.norm_bias) {
    check.fail(refuse(Code::invalid, "norm_bias must be null where norm_weight is"));
  }
  check.pointer("normed", arguments.normed);
  check.pointer("pooled", arguments.pooled, sizes.rows);
  check.pointer("mean", arguments.mean, 1, sizeof(float));
  check.pointer("rstd", arguments.rstd, 1, sizeof(float));
  if (check.status().code != Code::ok) {
    return check.status();
  }
  return with_types(
      sizes, [&](auto token, auto element) { return forward<decltype(token), decltype(element)>(arguments, stream); });
}

}  // namespace vapt_fast
