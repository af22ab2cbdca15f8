// The gradients of prompt_pool: see vapt_fast/prompt_pool.h for the formulas and the arguments.
//
// With g the gradient of pooled, and those of x_hat from the block, a = norm_weight[c] * grad_normed[t, c], and from
// the prompts, b[t, c] = s[t] * weight[c] * sum over r of M[r, n] g[r, c], total gets
//
//     rstd * (a + b - mean(a + b) - x_hat * (mean(a * x_hat) + s^2 * mean(b * x_hat)))     means over channels
//
// What the matrix gets, y[r, t] = sum over c of g[r, c] weight[c] x_hat[t, c], gives the means without b: those of
// b * x_hat are s[t] * sum over r of M[r, n] y[r, t].
//
// In one pass, ``products_and_gradients``: the blocks of an image are a cluster, as in the forward, each with a slab of
// 128 channels of all tokens and of grad_normed in shared memory. A warp has 16 of the tokens: it computes their part
// of y, passes its sums over the slab to the other blocks, and then computes b and the gradients of its tokens. The
// cluster goes over the images of a chunk, and a warp fetches its tokens of the next image as soon as it is done with
// those of the last one.
// In two passes: ``products`` computes y and the means, for 64 tokens, ``gradients`` b and the rest, for a slab.
//
// Sums over images go through the workspace and are added in a fixed order.

#include "prompt_pool.cuh"

namespace vapt_fast {
namespace {

// Where the kernels of the backward leave what others of them read.
struct Workspace {
  std::int64_t images = 1;  // in a chunk
  std::int64_t chunks = 0;
  float* means = nullptr;   // (B, T, 2), in two passes: mean(a + b) and mean(a * x_hat) + s^2 mean(b * x_hat)
  float* affine = nullptr;  // (B or chunks, 2, C): the gradients of weight and bias from an image or a chunk
  // The gradient of the matrix: (chunks, R, N), or (chunks, slabs, tiles of 16 tokens, eights of rows, 32 lanes, 4).
  float* matrix = nullptr;
};

// ---- what one pass and two have in common

// The sums over the lanes that differ in lane / 4, of eight values: that of values[lane / 4].
__device__ __forceinline__ float sum_of_rows(float (&values)[kEight]) {
#pragma unroll
  for (int width = kEight / 2; width > 0; width /= 2) {
    const bool upper = lane() / 4 & width;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float other = shuffle_xor(upper ? values[i] : values[i + width], 4 * width);
      values[i] = (upper ? values[i + width] : values[i]) + other;
    }
  }
  return values[0];
}

// Eight channels of a, from those of grad_normed. Without norm_weight they are multiplied by 1: a branch around the
// products takes more registers than some kernels have.
template <typename Element>
__device__ __forceinline__ void through_affine(const PromptPoolBackward& arguments, int channel,
                                               const Eight<Element>& grad_normed, float (&a)[kEight]) {
  widen(grad_normed, a);
#pragma unroll
  for (int i = 0; i < kEight; i += 4) {
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

// Of a token: the statistics, mean(a + b) and mean(a * x_hat) + s^2 mean(b * x_hat).
struct TokenNumbers {
  float mean;
  float rstd;
  float mean_grad;
  float mean_product;
};

// Eight channels of a token, number ``at`` of all images' tokens, from ``product``, their b / (s * weight): the
// gradients of x and branch, and what is added to that of weight. ``load_grad_normed`` gives those of grad_normed.
template <typename Token, typename Element, typename Load>
__device__ __forceinline__ void finish_eight(const PromptPoolBackward& arguments, std::int64_t image, int token,
                                             std::int64_t at, int channel, const TokenNumbers& numbers,
                                             const float (&product)[kEight], const Eight<Token>& total,
                                             Load load_grad_normed, float (&of_weight)[kEight]) {
  const bool is_patch = token >= static_cast<int>(arguments.sizes.prefix);
  const float s = prompt_factor(numbers.rstd, arguments.eps, arguments.prompt_eps);
  float x_hat[kEight];
  widen(total, x_hat);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    x_hat[i] = (x_hat[i] - numbers.mean) * numbers.rstd;
  }
  if (is_patch) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      of_weight[i] += s * x_hat[i] * product[i];
    }
  }
  if (!arguments.grad_x && !arguments.grad_branch) {
    return;
  }

  float grad[kEight];
  float factors[kEight];
  load_floats(arguments.weight + channel, factors);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    grad[i] = is_patch ? product[i] * s * factors[i] : 0.0f;
  }
  float incoming[kEight];
  if (arguments.grad_normed.data) {
    through_affine(arguments, channel, load_grad_normed(), incoming);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      grad[i] += incoming[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    grad[i] = numbers.rstd * (grad[i] - numbers.mean_grad - x_hat[i] * numbers.mean_product);
  }
  if (arguments.grad_total.data) {
    load_floats(row_of<Token>(arguments.grad_total, image, token) + channel, incoming);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      grad[i] += incoming[i];
    }
  }
  const std::int64_t to = at * static_cast<int>(arguments.sizes.channels) + channel;
  if (arguments.grad_x) {
    store_eight(static_cast<Token*>(arguments.grad_x) + to, narrow<Token>(grad));
  }
  if (arguments.grad_branch) {
    if (arguments.layer_scale) {
      load_floats(arguments.layer_scale + channel, factors);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        grad[i] *= factors[i];
      }
    }
    store_eight(static_cast<Element*>(arguments.grad_branch) + to, narrow<Element>(grad));
  }
}

// ---- two passes

// What ``products`` has in shared memory, as tf32 a step's channels of g and of weight * x_hat. TILES: how many
// tiles of 16 rows a warp has.
template <int TILES>
struct ProductStage {
  static constexpr int ROWS = 2 * TILES * kTile;
  static constexpr int TOKENS = 64;
  static constexpr int STEP = 64;          // channels
  static constexpr int STRIDE = STEP + 4;  // eight rows in different banks

  std::uint32_t g[ROWS * STRIDE];
  std::uint32_t x_hat[TOKENS * STRIDE];
  float of_weight[ROWS];  // sums of g * weight and g * bias over the channels
  float of_bias[ROWS];
  float of_a[TOKENS];  // sums of a and a * x_hat over the channels
  float of_a_x_hat[TOKENS];
  float of_b[2][TOKENS];  // likewise of b / s, of each half of the tiles of rows
  float of_b_x_hat[2][TOKENS];
};

// The gradient of the matrix from a chunk of images, and the means: for 64 tokens of the chunk's images.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(kThreads, 2) products(const PromptPoolBackward arguments, const Workspace workspace) {
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
    float sum_a_x_hat = 0.0f;

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
              through_affine(arguments, channel,
                             load_eight(row_of<Element>(arguments.grad_normed, image, token) + channel), a);
#pragma unroll
              for (int i = 0; i < kEight; ++i) {
                sum_a += a[i];
                sum_a_x_hat += a[i] * values[i];
              }
            }
            float weight[kEight];
            load_floats(arguments.weight + channel, weight);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
              values[i] *= weight[i];
            }
          }
          std::uint32_t* const to = stage.x_hat + thread() / 4 * Stage::STRIDE + place;
#pragma unroll
          for (int i = 0; i < kEight; i += 4) {
            store16(to + i,
                    {{to_tf32(values[i]), to_tf32(values[i + 1]), to_tf32(values[i + 2]), to_tf32(values[i + 3])}});
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

        const std::uint32_t* const right =
            stage.x_hat + (warp() % 4 * 16 + lane() % 8 + lane() / 16 * 8) * Stage::STRIDE + lane() / 8 % 2 * 4;
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
      float sum_b_x_hat[4] = {};
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
              sum_b_x_hat[column] += matrix[patch] * product;
              const float of_image = s[column] * product + stage.of_bias[row];
              grad_matrix[patch] = image == first_image ? of_image : grad_matrix[patch] + of_image;
            }
          }
        }
      }
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const float b = sum_of_lanes<4, kLanes>(sum_b[column]);
        const float b_x_hat = sum_of_lanes<4, kLanes>(sum_b_x_hat[column]);
        if (lane() < 4) {
          const int place = first_place + column / 2 * 8 + column % 2;
          float& all_b = stage.of_b[warp() / 4][place];
          float& all_b_x_hat = stage.of_b_x_hat[warp() / 4][place];
          all_b = first_row == 0 ? b : all_b + b;
          all_b_x_hat = first_row == 0 ? b_x_hat : all_b_x_hat + b_x_hat;
        }
      }
      first_row += Stage::ROWS;
    } while (first_row < num_rows);

    sum_a = sum_of_lanes<1, 4>(sum_a);
    sum_a_x_hat = sum_of_lanes<1, 4>(sum_a_x_hat);
    if (lane() % 4 == 0) {
      stage.of_a[thread() / 4] = sum_a;
      stage.of_a_x_hat[thread() / 4] = sum_a_x_hat;
    }
    sync_threads();
    if (thread() < Stage::TOKENS && first_token + thread() < num_tokens) {
      const int place = thread();
      const std::int64_t at = image * num_tokens + first_token + place;
      const float s = prompt_factor(arguments.rstd[at], arguments.eps, arguments.prompt_eps);
      const float b = s * (stage.of_b[0][place] + stage.of_b[1][place]);
      const float b_x_hat = s * (stage.of_b_x_hat[0][place] + stage.of_b_x_hat[1][place]);
      workspace.means[2 * at] = (stage.of_a[place] + b) / static_cast<float>(channels);
      workspace.means[2 * at + 1] = (stage.of_a_x_hat[place] + s * s * b_x_hat) / static_cast<float>(channels);
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

// The gradients of x and branch, and those of weight and bias from an image: for a slab of its channels.
template <typename Token, typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    gradients(const PromptPoolBackward arguments, const Workspace workspace) {
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
        const TokenNumbers numbers{arguments.mean[at], arguments.rstd[at], workspace.means[2 * at],
                                   workspace.means[2 * at + 1]};
        float product[kEight];
        columns_of(products[tile], half, product);
        if (token >= prefix) {
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            of_bias[i] += product[i];
          }
        }
        const auto load_grad_normed = [&] {
          return load_eight(row_of<Element>(arguments.grad_normed, image, token) + channel);
        };
        finish_eight<Token, Element>(arguments, image, token, at, channel, numbers, product,
                                     load_eight(row_of<Token>(arguments.total, image, token) + channel),
                                     load_grad_normed, of_weight);
      }
    }
  }

  stage.affine[warp() / 4][0][place + lane() / 4] = sum_of_rows(of_weight);
  stage.affine[warp() / 4][1][place + lane() / 4] = sum_of_rows(of_bias);
  sync_threads();
  const int which = thread() / kSlab;
  const int column = thread() % kSlab;
  if (first_channel + column < channels) {
    workspace.affine[(image * 2 + which) * channels + first_channel + column] =
        stage.affine[0][which][column] + stage.affine[1][which][column];
  }
}

// ---- one pass

// Begins to copy a slab of this warp's 16 tokens.
template <typename Element>
__device__ __forceinline__ void fetch_slab(const KeptSlab<Element>& kept, const Tensor3& tensor, std::int64_t image,
                                           int num_tokens, int first_channel, int channels) {
  using Slab = KeptSlab<Element>;
#pragma unroll 1
  for (int i = computed_here(lane()); i < kTile * Slab::PIECES; i += kLanes) {
    const int token = warp() * kTile + i / Slab::PIECES;
    const int channel = first_channel + i % Slab::PIECES * Slab::ELEMENTS;
    if (token < num_tokens && channel < channels) {
      copy_async(kept.piece(token, i % Slab::PIECES), row_of<Element>(tensor, image, token) + channel);
    }
  }
}

// What ``products_and_gradients`` has in shared memory before the tokens. TILES: half the tiles of 16 rows.
template <int TILES>
struct ClusterStage {
  static constexpr int ROWS = 2 * TILES * kTile;
  static constexpr int WARPS = 16;              // at most; with more, registers would not do
  static constexpr int TOKENS = WARPS * kTile;  // at most
  static constexpr int STRIDE = kSlab + 8;      // four rows in different banks

  std::uint32_t g[ROWS * STRIDE];  // as tf32
  float of_weight[ROWS];           // sums over the slab of g * weight and g * bias
  float of_bias[ROWS];
  float matrix[ROWS];               // sums over the patches
  float grad_weight[WARPS][kSlab];  // sums over a warp's tokens and the chunk's images
  float grad_bias[kSlab];           // sums over the chunk's images, in the order of g
  float sums[2][2][TOKENS];  // over the slab: of a + b, of a * x_hat + s^2 b * x_hat; of an image and the next one
};

// Whether there is room to keep grad_normed too. Else it is read twice, the second time soon enough for the L2 cache.
template <typename Token, int TILES>
__host__ __device__ __forceinline__ constexpr bool keeps_grad_normed() {
  return sizeof(Token) < sizeof(float) || TILES == 1;
}

// A product takes eight rows in this order, in both factors: then the rows that a lane has of a left factor, lane % 4
// and lane % 4 + 4, are its columns of y, and neither four lanes nor four columns of a right factor meet in a bank.
__device__ __forceinline__ int row_in_order(int number) { return number ^ number / 4 * 2; }

// All of the backward but sums over chunks, by a cluster of blocks for each chunk of images.
template <typename Token, typename Element, int TILES>
__global__ void __launch_bounds__(ClusterStage<TILES>::WARPS* kLanes, 1)
    products_and_gradients(const PromptPoolBackward arguments, const Workspace workspace) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Stage = ClusterStage<TILES>;
  constexpr int EIGHTS = Stage::ROWS / kDepth;
  auto& stage = *reinterpret_cast<Stage*>(shared_memory());
  const PromptPoolSizes& sizes = arguments.sizes;
  const auto num_tokens = static_cast<int>(sizes.prefix + sizes.patches);
  const auto prefix = static_cast<int>(sizes.prefix);
  const auto num_rows = static_cast<int>(sizes.rows);
  const auto channels = static_cast<int>(sizes.channels);
  const auto blocks = static_cast<int>(ceil_div(channels, kSlab));
  const auto num_eights = static_cast<int>(ceil_div(num_rows, kDepth));
  const auto num_threads = static_cast<int>(ceil_div(num_tokens, kTile) * kLanes);
  const std::int64_t chunk = block() / blocks;
  const std::int64_t first_image = chunk * workspace.images;
  const std::int64_t end = min(first_image + workspace.images, sizes.batch);
  const int first_channel = cluster_rank() * kSlab;
  const int first_token = warp() * kTile + lane() / 4;  // this lane's, and the eighth after it

  auto* const matrices = reinterpret_cast<Bytes16*>(&stage + 1);
  auto* const tokens = reinterpret_cast<Token*>(matrices + num_threads * num_eights);
  const KeptSlab<Token> kept_total(tokens);
  const KeptSlab<Element> kept_grad_normed(tokens + num_tokens * kSlab);
  const auto fetch = [&](std::int64_t image) {
    fetch_slab(kept_total, arguments.total, image, num_tokens, first_channel, channels);
    if (keeps_grad_normed<Token, TILES>() && arguments.grad_normed.data) {
      fetch_slab(kept_grad_normed, arguments.grad_normed, image, num_tokens, first_channel, channels);
    }
    commit_copies();
  };
  const auto load_grad_normed = [&](std::int64_t image, int token, int eight) {
    if constexpr (keeps_grad_normed<Token, TILES>()) {
      return kept_grad_normed.load(token, eight);
    } else {
      return load_eight(row_of<Element>(arguments.grad_normed, image, token) + first_channel + eight * kEight);
    }
  };
  fetch(first_image);

  // The matrix's columns of this warp's tokens, as tf32 a left factor. A lane reads back only what it puts here.
  Bytes16* const matrix = matrices + warp() * num_eights * kLanes + lane();
  for (int j = 0; j < num_eights; ++j) {
    Bytes16 words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = j * kDepth + row_in_order(lane() % 4 + i / 2 * 4);
      const int token = first_token + i % 2 * 8;
      const bool inside = row < num_rows && token >= prefix && token < num_tokens;
      words.words[i] = to_tf32(inside ? row_of(arguments.matrix, row)[token - prefix] : 0.0f);
    }
    store16(matrix + j * kLanes, words);
  }

  for (int row = warp(); row < num_rows; row += num_threads / kLanes) {
    float sum = 0.0f;
    for (int patch = lane(); patch < static_cast<int>(sizes.patches); patch += kLanes) {
      sum += row_of(arguments.matrix, row)[patch];
    }
    sum = sum_of_lanes<1, kLanes>(sum);
    if (lane() == 0) {
      stage.matrix[row] = sum;
    }
  }

  float of_matrix[EIGHTS][4] = {};  // from the chunk's images so far, as y is laid out
  for (std::int64_t image = first_image; image < end; ++image) {
    TokenNumbers numbers[2] = {};
    float s[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token + half * 8;
      if (token < num_tokens) {
        numbers[half].mean = arguments.mean[image * num_tokens + token];
        numbers[half].rstd = arguments.rstd[image * num_tokens + token];
      }
      s[half] = prompt_factor(numbers[half].rstd, arguments.eps, arguments.prompt_eps);
    }

    sync_threads();  // the last image's g has been read
    // Four lanes take a row.
    for (int row = thread() / 4; row < Stage::ROWS; row += num_threads / 4) {
      float weighted = 0.0f;
      float biased = 0.0f;
#pragma unroll 2
      for (int group = 0; group < kSlab / kGroup; ++group) {
        const int eight = group * 4 + lane() % 4;
        const int channel = first_channel + eight * kEight;
        float g[kEight] = {};
        if (row < num_rows && channel < channels) {
          float factors[kEight];
          load_floats(row_of<float>(arguments.grad_pooled, image, row) + channel, g);
          load_floats(arguments.weight + channel, factors);
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            weighted += g[i] * factors[i];
          }
          load_floats(arguments.bias + channel, factors);
#pragma unroll
          for (int i = 0; i < kEight; ++i) {
            biased += g[i] * factors[i];
          }
        }
        put_in_slab(stage.g + row * Stage::STRIDE, eight, g);
      }
      weighted = sum_of_lanes<1, 4>(weighted);
      biased = sum_of_lanes<1, 4>(biased);
      if (lane() % 4 == 0) {
        stage.of_weight[row] = weighted;
        stage.of_bias[row] = biased;
      }
    }
    wait_for_copies<0>();
    sync_threads();

    // The gradient of bias is the sum of b / (s * weight) over the patches, and g is the same for all of them.
    for (int place = thread(); place < kSlab; place += num_threads) {
      float sum = image == first_image ? 0.0f : stage.grad_bias[place];
      for (int row = 0; row < num_rows; ++row) {
        sum += stage.matrix[row] * float_of(stage.g[row * Stage::STRIDE + place]);
      }
      stage.grad_bias[place] = sum;
    }

    float y[EIGHTS][4] = {};
    float sum_a[2] = {};
    float sum_a_x_hat[2] = {};
#pragma unroll 1
    for (int group = 0; group < kSlab / kGroup; ++group) {
      const int eight = group * 4 + lane() % 4;
      const int channel = first_channel + eight * kEight;
      float x_hat[2][kEight] = {};
      std::uint32_t left[2][kEight] = {};  // weight * x_hat
      if (channel < channels) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = first_token + half * 8;
          if (token < num_tokens) {
            widen(kept_total.load(token, eight), x_hat[half]);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
              x_hat[half][i] = (x_hat[half][i] - numbers[half].mean) * numbers[half].rstd;
            }
            if (arguments.grad_normed.data) {
              float a[kEight];
              through_affine(arguments, channel, load_grad_normed(image, token, eight), a);
#pragma unroll
              for (int i = 0; i < kEight; ++i) {
                sum_a[half] += a[i];
                sum_a_x_hat[half] += a[i] * x_hat[half][i];
              }
            }
          }
        }
        // Only now: there are no registers for weight and norm_weight at once.
        float weight[kEight];
        load_floats(arguments.weight + channel, weight);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          left[0][i] = to_tf32(weight[i] * x_hat[0][i]);
          left[1][i] = to_tf32(weight[i] * x_hat[1][i]);
        }
      }
      const std::uint32_t* const right = stage.g + row_in_order(lane() / 8 + lane() / 4 % 2 * 4) * Stage::STRIDE +
                                         group * kGroup + place_of(lane() % 4, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t a[4] = {left[0][2 * i], left[1][2 * i], left[0][2 * i + 1], left[1][2 * i + 1]};
#pragma unroll
        for (int j = 0; j < EIGHTS; ++j) {
          if (j < num_eights) {
            const Bytes8 b = load8(right + j * kDepth * Stage::STRIDE + place_of(0, i));
            mma_tf32(y[j], a, b.words[0], b.words[1]);
          }
        }
      }
    }

    float sum_b[2] = {};
    float sum_b_x_hat[2] = {};
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
      if (j < num_eights) {
        const Bytes16 factors = load16(matrix + j * kLanes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = j * kDepth + row_in_order(lane() % 4 + i / 2 * 4);
          const int half = i % 2;
          const float product = y[j][2 * half + i / 2];
          sum_b[half] += float_of(factors.words[i]) * stage.of_weight[row];
          sum_b_x_hat[half] += float_of(factors.words[i]) * product;
          of_matrix[j][2 * half + i / 2] += s[half] * product + stage.of_bias[row];
        }
      }
    }
    float (&sums)[2][Stage::TOKENS] = stage.sums[(image - first_image) % 2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token + half * 8;
      // A prefix token has no b, which 0 * g would be only where g is finite.
      const float b = token >= prefix ? s[half] * sum_b[half] : 0.0f;
      const float b_x_hat = token >= prefix ? s[half] * sum_b_x_hat[half] : 0.0f;
      const float sum = sum_of_lanes<1, 4>(sum_a[half] + b);
      const float sum_normed = sum_of_lanes<1, 4>(sum_a_x_hat[half] + s[half] * s[half] * b_x_hat);
      if (lane() % 4 == 0) {
        sums[0][token] = sum;
        sums[1][token] = sum_normed;
      }
    }
    // The others read these sums until they come to the next image's barrier: only then may the one after the next
    // image write where they are.
    sync_cluster();

    // A lane adds one of the sums of one token, always in the order of the blocks' ranks.
    float sum = 0.0f;
    for (int rank = 0; rank < blocks; ++rank) {
      sum += cluster_peer(&sums[0][0], rank)[lane() / kTile * Stage::TOKENS + warp() * kTile + lane() % kTile];
    }
    sum /= static_cast<float>(channels);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      numbers[half].mean_grad = shuffle(sum, lane() / 4 + half * 8);
      numbers[half].mean_product = shuffle(sum, kTile + lane() / 4 + half * 8);
    }

#pragma unroll 1
    for (int group = 0; group < kSlab / kGroup; ++group) {
      const int eight = group * 4 + lane() % 4;
      const int channel = first_channel + eight * kEight;
      float products[4][4] = {};  // b / (s * weight)
      const std::uint32_t* const right = stage.g + group * kGroup + lane() / 4;
#pragma unroll 2
      for (int j = 0; j < num_eights; ++j) {
        const Bytes16 left = load16(matrix + j * kLanes);
        const std::uint32_t* const first = right + (j * kDepth + lane() % 4) * Stage::STRIDE;
        const std::uint32_t* const second = right + (j * kDepth + row_in_order(lane() % 4 + 4)) * Stage::STRIDE;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mma_tf32(products[i], left.words, first[i * kDepth], second[i * kDepth]);
        }
      }

      float of_weight[kEight] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + half * 8;
        if (token < num_tokens && channel < channels) {
          float product[kEight];
          columns_of(products, half, product);
          finish_eight<Token, Element>(
              arguments, image, token, image * num_tokens + token, channel, numbers[half], product,
              kept_total.load(token, eight), [&] { return load_grad_normed(image, token, eight); }, of_weight);
        }
      }
      const float sum_of_image = sum_of_rows(of_weight);
      float& grad_weight = stage.grad_weight[warp()][eight * kEight + lane() / 4];
      grad_weight = image == first_image ? sum_of_image : grad_weight + sum_of_image;
    }
    sync_warp();  // all its lanes have read what is overwritten now
    if (image + 1 < end) {
      fetch(image + 1);
    }
  }
  sync_cluster();  // before a block ends: until here others read its sums

  const std::int64_t first_eight = ((chunk * blocks + cluster_rank()) * (num_threads / kLanes) + warp()) * num_eights;
#pragma unroll
  for (int j = 0; j < EIGHTS; ++j) {
    if (j < num_eights) {
      const float (&sums)[4] = of_matrix[j];
      store16(workspace.matrix + (first_eight + j) * kLanes * 4 + lane() * 4,
              {{bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])}});
    }
  }
  for (int column = thread(); column < kSlab; column += num_threads) {
    if (first_channel + column < channels) {
      float sum = 0.0f;
      for (int other = 0; other < num_threads / kLanes; ++other) {
        sum += stage.grad_weight[other][column];
      }
      float* const affine = workspace.affine + chunk * 2 * channels + first_channel + column;
      affine[0] = sum;
      affine[channels] =
          stage.grad_bias[column / kGroup * kGroup + place_of(column / kEight % 4, column % kEight / 2) + column % 2];
    }
  }
#endif
}

// ---- sums over images

// Where the sum of a column goes.
struct InOrder {
  __device__ __forceinline__ std::int64_t operator()(std::int64_t column) const { return column; }
};

// The same of the matrix as ``products_and_gradients`` leaves it; -1 for nowhere.
struct ByLanes {
  int prefix;
  int patches;
  int rows;

  __device__ __forceinline__ std::int64_t operator()(std::int64_t column) const {
    const auto i = static_cast<int>(column % 4);
    const auto of_lane = static_cast<int>(column / 4 % kLanes);
    const std::int64_t eight = column / (4 * kLanes);
    const std::int64_t eights = ceil_div(rows, kDepth);
    const auto row = static_cast<int>(eight % eights) * kDepth + row_in_order(of_lane % 4 + i % 2 * 4);
    const auto patch = static_cast<int>(eight / eights) * kTile + of_lane / 4 + i / 2 * 8 - prefix;
    return row < rows && patch >= 0 && patch < patches ? std::int64_t{row} * patches + patch : -1;
  }
};

// out: the sum of partial (chunks, stride) over the chunks, of ``size`` columns. Each warp adds every eighth chunk.
template <typename Order>
__global__ void __launch_bounds__(kThreads) add_chunks(const float* partial, std::int64_t stride, std::int64_t chunks,
                                                       std::int64_t size, float* out, const Order place_of_sum) {
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
    const std::int64_t place = place_of_sum(column);
    if (place >= 0) {
      out[place] = sum;
    }
  }
}

// ---- launches

// Images whose gradients of the matrix ``products`` adds itself: few chunks are left, but blocks enough to fill any
// device.
std::int64_t images_in_chunk(const PromptPoolSizes& sizes) {
  constexpr std::int64_t kEnough = 512;
  const std::int64_t token_blocks = ceil_div(sizes.prefix + sizes.patches, ProductStage<1>::TOKENS);
  return max(ceil_div(sizes.batch * token_blocks, kEnough), std::int64_t{1});
}

// Of ``products_and_gradients``, at most: enough to fill any device at a ViT's sizes.
std::int64_t most_clusters(const PromptPoolSizes& sizes) {
  constexpr std::int64_t kEnough = 256;
  return min(sizes.batch, kEnough / ceil_div(sizes.channels, kSlab));
}

// Whether its tokens, channels and rows are not too many for a cluster.
bool fits_in_a_cluster(const PromptPoolSizes& sizes) {
  using Most = ClusterStage<2>;
  return sizes.prefix + sizes.patches <= Most::TOKENS && ceil_div(sizes.channels, kSlab) <= kBlocksInCluster &&
         sizes.rows <= Most::ROWS;
}

// The gradient of the matrix as ``products_and_gradients`` has it.
std::int64_t padded_matrix(const PromptPoolSizes& sizes) {
  return ceil_div(sizes.prefix + sizes.patches, kTile) * kTile * ceil_div(sizes.rows, kDepth) * kDepth;
}

Workspace workspace_in_two_passes(const PromptPoolSizes& sizes, float* memory) {
  Workspace workspace;
  workspace.images = images_in_chunk(sizes);
  workspace.chunks = ceil_div(sizes.batch, workspace.images);
  workspace.means = memory;
  workspace.affine = workspace.means + sizes.batch * (sizes.prefix + sizes.patches) * 2;
  workspace.matrix = workspace.affine + sizes.batch * sizes.channels * 2;
  return workspace;
}

// As many images in a chunk as make all clusters run at once.
Workspace workspace_in_one_pass(const PromptPoolSizes& sizes, float* memory, std::int64_t clusters) {
  Workspace workspace;
  workspace.images = ceil_div(sizes.batch, clusters);
  workspace.chunks = ceil_div(sizes.batch, workspace.images);
  workspace.affine = memory;
  workspace.matrix = workspace.affine + workspace.chunks * sizes.channels * 2;
  return workspace;
}

// ``products_and_gradients`` for some sizes, and the launch of one cluster.
struct OnePass {
  void (*kernel)(PromptPoolBackward, Workspace);
  LaunchShape shape;
};

template <typename Token, typename Element>
OnePass one_pass_of(const PromptPoolSizes& sizes) {
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t slabs = ceil_div(sizes.channels, kSlab);
  const auto with = [&](auto tiles) {
    constexpr int TILES = decltype(tiles)::value;
    constexpr std::size_t kept = sizeof(Token) + (keeps_grad_normed<Token, TILES>() ? sizeof(Element) : 0);
    const std::int64_t memory = static_cast<std::int64_t>(sizeof(ClusterStage<TILES>)) +
                                padded_matrix(sizes) * static_cast<std::int64_t>(sizeof(float)) +
                                tokens * kSlab * static_cast<std::int64_t>(kept);
    OnePass one_pass{products_and_gradients<Token, Element, TILES>, shape_of(slabs, memory, slabs)};
    one_pass.shape.threads = static_cast<int>(ceil_div(tokens, kTile) * kLanes);
    return one_pass;
  };
  return sizes.rows <= ClusterStage<1>::ROWS ? with(Tiles<1>{}) : with(Tiles<2>{});
}

// How many clusters the one pass takes; 0 if it can't be.
std::int64_t count_clusters(const PromptPoolSizes& sizes, const OnePass& one_pass, const Device& device) {
  if (!fits_in_a_cluster(sizes)) {
    return 0;
  }
  return min(clusters_at_once(one_pass.kernel, one_pass.shape, device), most_clusters(sizes));
}

template <typename Token, typename Element>
Status gradients_in_two_passes(const PromptPoolBackward& arguments, const Workspace& workspace, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  const Status status = with_tiles(sizes.rows, [&](auto tiles) {
    using Stage = ProductStage<decltype(tiles)::value>;
    const std::int64_t blocks = workspace.chunks * ceil_div(sizes.prefix + sizes.patches, Stage::TOKENS);
    return launch(products<Token, Element, decltype(tiles)::value>, shape_of(blocks, sizeof(Stage)), stream, arguments,
                  workspace);
  });
  if (status.code != Code::ok) {
    return status;
  }
  const std::int64_t blocks = sizes.batch * ceil_div(sizes.channels, kSlab);
  return launch(gradients<Token, Element>, shape_of(blocks, sizeof(GradientStage)), stream, arguments, workspace);
}

template <typename Token, typename Element>
Status backward(const PromptPoolBackward& arguments, Stream stream) {
  const PromptPoolSizes& sizes = arguments.sizes;
  OnePass one_pass = one_pass_of<Token, Element>(sizes);
  std::int64_t clusters = 0;
  if (arguments.one_pass && sizes.batch > 0) {
    const Device device = current_device();
    if (device.status.code != Code::ok) {
      return device.status;
    }
    clusters = count_clusters(sizes, one_pass, device);
  }
  Workspace workspace = workspace_in_two_passes(sizes, arguments.workspace);
  Status status;
  if (clusters > 0) {
    workspace = workspace_in_one_pass(sizes, arguments.workspace, clusters);
    one_pass.shape.blocks = workspace.chunks * one_pass.shape.cluster;
    status = launch(one_pass.kernel, one_pass.shape, stream, arguments, workspace);
  } else if (sizes.batch > 0) {
    status = gradients_in_two_passes<Token, Element>(arguments, workspace, stream);
  }
  const auto add = [&](const float* partial, std::int64_t stride, std::int64_t chunks, std::int64_t size, float* out,
                       auto order) {
    if (status.code == Code::ok && size > 0) {
      const LaunchShape shape = shape_of(ceil_div(size, kLanes), kThreads * sizeof(float));
      status = launch(add_chunks<decltype(order)>, shape, stream, partial, stride, chunks, size, out, order);
    }
  };
  if (clusters > 0) {
    const ByLanes order{static_cast<int>(sizes.prefix), static_cast<int>(sizes.patches), static_cast<int>(sizes.rows)};
    const std::int64_t of_slab = padded_matrix(sizes);
    add(workspace.matrix, of_slab, one_pass.shape.blocks, of_slab, arguments.grad_matrix, order);
  } else {
    const std::int64_t of_matrix = sizes.rows * sizes.patches;
    add(workspace.matrix, of_matrix, workspace.chunks, of_matrix, arguments.grad_matrix, InOrder{});
  }
  const std::int64_t channels = sizes.channels;
  const std::int64_t chunks = clusters > 0 ? workspace.chunks : sizes.batch;
  add(workspace.affine, 2 * channels, chunks, channels, arguments.grad_weight, InOrder{});
  add(workspace.affine + channels, 2 * channels, chunks, channels, arguments.grad_bias, InOrder{});
  return status;
}

}  // namespace

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
  check.pointer("layer_scale", arguments.layer_scale, arguments.layer_scale != nullptr);
  check.pointer("matrix", arguments.matrix.data, sizes.rows, sizeof(float));
  check.pointer("weight", arguments.weight);
  check.pointer("bias", arguments.bias);
  check.pointer("norm_weight", arguments.norm_weight, arguments.norm_weight != nullptr);
  check.pointer("mean", arguments.mean, sizes.batch, sizeof(float));
  check.pointer("rstd", arguments.rstd, sizes.batch, sizeof(float));
  check.pointer("workspace", arguments.workspace, sizes.batch);
  check.pointer("grad_x", arguments.grad_x, arguments.grad_x != nullptr);
  check.pointer("grad_branch", arguments.grad_branch, arguments.grad_branch != nullptr);
  check.pointer("grad_matrix", arguments.grad_matrix, sizes.rows, sizeof(float));
  check.pointer("grad_weight", arguments.grad_weight, 1, sizeof(float));
  check.pointer("grad_bias", arguments.grad_bias, 1, sizeof(float));
  if (check.status().code != Code::ok) {
    return check.status();
  }
  return with_types(
      sizes, [&](auto token, auto element) { return backward<decltype(token), decltype(element)>(arguments, stream); });
}

std::int64_t prompt_pool_backward_workspace(const PromptPoolSizes& sizes) {
  const std::int64_t channels = 2 * sizes.channels;
  const std::int64_t of_matrix = sizes.rows * sizes.patches;
  const std::int64_t chunks = ceil_div(sizes.batch, images_in_chunk(sizes));
  const std::int64_t two_passes = sizes.batch * (2 * (sizes.prefix + sizes.patches) + channels) + chunks * of_matrix;
  if (!fits_in_a_cluster(sizes)) {
    return two_passes;
  }
  const std::int64_t of_chunk = channels + ceil_div(sizes.channels, kSlab) * padded_matrix(sizes);
  return max(two_passes, most_clusters(sizes) * of_chunk);
}

}  // namespace vapt_fast
