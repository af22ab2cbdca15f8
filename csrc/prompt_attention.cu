// Attention whose keys and values are the prompts' and the tokens', read from two places: see
// vapt_fast/prompt_attention.h for the formula and the arguments.
//
// One block of threads computes one head of one image; in the backward one head of the keys and values, which
// with grouped queries serves several heads. Keys are numbered prompts first, and padded to tiles of 16 only.
// All products are 16 x 8 x 16 on the tensor cores, summed in float32. Softmax is in base 2: with s the
// scores times log2(e), p = exp2(s - lse).
//
// Forward: keys and values lie in shared memory, a warp holds some tiles of 16 queries in registers and goes
// over the keys in chunks (online softmax).
//
// Backward: keys and values lie in shared memory, a warp holds the gradients of some tiles of 16 keys in
// registers, and all warps go together over the queries, in steps of 32:
//
//     s, dp    = k q^T, v do^T     (keys, queries)
//     ds       = p (dp - delta)    delta = sum over d of out * do
//     dv, dk  += p do, ds q
//     dq       = ds^T k            one step later, from all warps' ds in shared memory
//
// Nothing is added to memory, so each sum is in a fixed order. More keys than the warps or the shared memory hold at
// once take several passes over the queries; in between dq waits in the workspace, in float32, so that the number
// of passes changes no bit.

#include "vapt_fast/prompt_attention.h"

#include <cmath>
#include <cstdio>
#include <string>

#include "vapt_fast/device.cuh"

namespace vapt_fast {
namespace {

constexpr int kTile = 16;  // rows and depth of a product
constexpr int kPiece = 8;  // elements in 16 bytes
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = INFINITY;

// Elements from row to row in shared memory, for rows of DIM: an odd number of 16 bytes, so that the eight
// rows of a matrix lie in different banks.
template <int DIM>
constexpr int kStride = (DIM / kPiece | 1) * kPiece;

__host__ __device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A number as a type.
template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Rows of one head of one image in memory.
struct Rows {
  const char* data;
  std::int64_t stride;  // in bytes
};

__device__ __forceinline__ Rows rows_of(const Tensor4& tensor, int image, int head) {
  const std::int64_t first = image * tensor.batch_stride + head * tensor.head_stride;
  return {static_cast<const char*>(tensor.data) + first * 2, tensor.token_stride * 2};
}

// Where this lane's row begins for load_matrices of a tile (16, 16) at ``tile``: as the left factor, or with
// load_matrices_transposed as the right one.
template <int STRIDE, typename Element>
__device__ __forceinline__ const Element* left_rows(const Element* tile) {
  return tile + lane() % 16 * STRIDE + lane() / 16 * kPiece;
}

// Likewise with the matrices in the other order: as the right factor's transpose, and with
// load_matrices_transposed as the transpose of the left one.
template <int STRIDE, typename Element>
__device__ __forceinline__ const Element* right_rows(const Element* tile) {
  return tile + (lane() % 8 + lane() / 16 * 8) * STRIDE + lane() / 8 % 2 * kPiece;
}

// Two elements of a row in memory, at ``column``; 0 outside.
__device__ __forceinline__ std::uint32_t load_pair(Rows rows, int row, int num_rows, int column, int dim) {
  if (row >= num_rows || column >= dim) {
    return 0;
  }
  return load4(rows.data + row * rows.stride + column * 2);
}

// The left factor from memory: rows ``first`` to first + 15, columns 16 k to 16 k + 15.
__device__ __forceinline__ void load_left(std::uint32_t (&a)[4], Rows rows, int first, int num_rows, int k,
                                          int dim) {
  for (int i = 0; i < 4; ++i) {
    const int row = first + lane() / 4 + i % 2 * 8;
    a[i] = load_pair(rows, row, num_rows, k * kTile + i / 2 * 8 + lane() % 4 * 2, dim);
  }
}

// Begins to copy ``count`` rows to shared memory; where there are none, and past ``dim``, puts 0. ``row``
// gives the address of a row or null.
template <int DIM, int THREADS, typename Element, typename Row>
__device__ __forceinline__ void copy_rows(Element* to, int count, int dim, Row row) {
  constexpr int PIECES = DIM / kPiece;
#pragma unroll 1  // the copies are asynchronous; unrolled, their addresses would take registers
  for (int i = thread(); i < count * PIECES; i += THREADS) {
    const int piece = i % PIECES * kPiece;
    const char* from = row(i / PIECES);
    Element* const at = to + i / PIECES * kStride<DIM> + piece;
    if (from && piece < dim) {
      copy_async(at, from + piece * 2);
    } else {
      store16(at, {});
    }
  }
}

// Sum or maximum over the four lanes that share a row of a product.
__device__ __forceinline__ float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// Stores this lane's part of one of its two rows of a product, times ``factor``, as float32 or as elements.
template <typename Element, int COLUMNS>
__device__ __forceinline__ void store_row(char* to, const float (&x)[COLUMNS][4], int row, float factor,
                                          int dim, bool as_float) {
#pragma unroll
  for (int column = 0; column < COLUMNS; ++column) {
    const int at = column * 8 + lane() % 4 * 2;
    const float first = x[column][2 * row] * factor;
    const float second = x[column][2 * row + 1] * factor;
    if (column * 8 >= dim) {
      return;
    }
    if (as_float) {
      reinterpret_cast<float*>(to)[at] = first;
      reinterpret_cast<float*>(to)[at + 1] = second;
    } else {
      store4(to + at * 2, pack<Element>(first, second));
    }
  }
}

// ---- forward

template <int DIM>
struct ForwardTiles {
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * kLanes;
  static constexpr int QUERIES = DIM <= 80 ? 2 : 1;                               // tiles that a warp holds
  static constexpr int KEYS = 2;                                                  // tiles in a chunk
  static constexpr int BLOCKS = DIM <= 32 ? 4 : DIM == 80 || DIM == 128 ? 2 : 3;  // at once
  static constexpr int CHUNK = KEYS * kTile;

  static std::int64_t shared_memory(std::int64_t keys) {
    return (keys + kTile - 1) / kTile * kTile * kStride<DIM> * 2 * 2;
  }
};

template <typename Element, int DIM>
__global__ void __launch_bounds__(ForwardTiles<DIM>::THREADS, ForwardTiles<DIM>::BLOCKS)
    forward(const PromptAttentionForward arguments) {
  using Tiles = ForwardTiles<DIM>;
  constexpr int STRIDE = kStride<DIM>;
  constexpr int COLUMNS = DIM / 8;  // tiles of 8 columns
  constexpr int DEPTH = DIM / kTile;
  const PromptAttentionSizes& sizes = arguments.sizes;
  const auto dim = static_cast<int>(sizes.head_dim);
  const auto num_queries = static_cast<int>(sizes.queries);
  const auto num_prompts = static_cast<int>(sizes.prompts);
  const int num_keys = num_prompts + static_cast<int>(sizes.tokens);
  const int padded_keys = ceil_div(num_keys, kTile) * kTile;
  const auto num_heads = static_cast<int>(sizes.heads);
  const int image = static_cast<int>(block()) / num_heads;
  const int head = static_cast<int>(block()) % num_heads;
  const int group = head / (num_heads / static_cast<int>(sizes.groups));

  // Half of the keys is on its way while the warps work on the other half.
  auto* const keys = reinterpret_cast<Element*>(shared_memory());
  Element* const values = keys + padded_keys * STRIDE;
  const int half = min(ceil_div(padded_keys, 2 * Tiles::CHUNK) * Tiles::CHUNK, padded_keys);
  for (int first = 0; first < padded_keys; first += half) {
    const auto copy = [&](Element* to, const Tensor4& of_prompts, const Tensor4& of_tokens) {
      const Rows prompts = rows_of(of_prompts, image, group);
      const Rows tokens = rows_of(of_tokens, image, group);
      copy_rows<DIM, Tiles::THREADS>(
          to + first * STRIDE, min(half, padded_keys - first), dim, [&](int row) -> const char* {
            const int key = first + row;
            return key < num_prompts ? prompts.data + key * prompts.stride
                   : key < num_keys  ? tokens.data + (key - num_prompts) * tokens.stride
                                     : nullptr;
          });
    };
    copy(keys, arguments.prompt_k, arguments.k);
    copy(values, arguments.prompt_v, arguments.v);
    commit_copies();
  }

  const float scale = arguments.scale * kLog2E;
  constexpr int STEP = Tiles::WARPS * Tiles::QUERIES * kTile;
  for (int step = 0; step < num_queries; step += STEP) {
    const int first_query = step + warp() * Tiles::QUERIES * kTile;
    const Rows queries = rows_of(arguments.q, computed_here(image), computed_here(head));
    std::uint32_t q[Tiles::QUERIES][DEPTH][4];
    float acc[Tiles::QUERIES][COLUMNS][4] = {};
    // Of the rows lane / 4 and lane / 4 + 8 of each tile; total is of this lane's columns only.
    float peak[Tiles::QUERIES][2];
    float total[Tiles::QUERIES][2] = {};
#pragma unroll
    for (int i = 0; i < Tiles::QUERIES; ++i) {
      peak[i][0] = peak[i][1] = -kInfinity;
#pragma unroll
      for (int k = 0; k < DEPTH; ++k) {
        load_left(q[i][k], queries, first_query + i * kTile, num_queries, k, dim);
      }
    }

#pragma unroll 1
    for (int first = 0; first < padded_keys; first += Tiles::CHUNK) {
      if (step == 0 && (first == 0 || first == half)) {
        if (first == 0 && half < padded_keys) {
          wait_for_copies<1>();
        } else {
          wait_for_copies<0>();
        }
        sync_threads();
      }
      if (first_query >= num_queries) {
        continue;
      }

      float s[Tiles::QUERIES][2 * Tiles::KEYS][4] = {};
#pragma unroll
      for (int tile = 0; tile < Tiles::KEYS; ++tile) {
        if (first + tile * kTile < padded_keys) {
          const Element* const rows = right_rows<STRIDE>(keys + (first + tile * kTile) * STRIDE);
#pragma unroll
          for (int k = 0; k < DEPTH; ++k) {
            std::uint32_t b[4];
            load_matrices(b, rows + k * kTile);
#pragma unroll
            for (int i = 0; i < Tiles::QUERIES; ++i) {
              mma<Element>(s[i][2 * tile], q[i][k], b[0], b[1]);
              mma<Element>(s[i][2 * tile + 1], q[i][k], b[2], b[3]);
            }
          }
        }
      }

      std::uint32_t p[Tiles::QUERIES][Tiles::KEYS][4];
#pragma unroll
      for (int i = 0; i < Tiles::QUERIES; ++i) {
#pragma unroll
        for (int column = 0; column < 2 * Tiles::KEYS; ++column) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[i][column][j] *= scale;
          }
        }
        if (first + Tiles::CHUNK > num_keys) {
#pragma unroll
          for (int column = 0; column < 2 * Tiles::KEYS; ++column) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (first + column * 8 + lane() % 4 * 2 + j % 2 >= num_keys) {
                s[i][column][j] = -kInfinity;
              }
            }
          }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float new_peak = -kInfinity;
#pragma unroll
          for (int column = 0; column < 2 * Tiles::KEYS; ++column) {
            new_peak = fmaxf(new_peak, fmaxf(s[i][column][2 * row], s[i][column][2 * row + 1]));
          }
          new_peak = fmaxf(peak[i][row], max_of_row(new_peak));
          // Scores may have overflown to -inf, and -inf less -inf is NaN.
          const float shift = new_peak == -kInfinity ? 0.0f : new_peak;
          const float decay = exp2_fast(peak[i][row] - shift);
          peak[i][row] = new_peak;
          total[i][row] *= decay;
#pragma unroll
          for (int column = 0; column < 2 * Tiles::KEYS; ++column) {
            float (&x)[4] = s[i][column];
            x[2 * row] = exp2_fast(x[2 * row] - shift);
            x[2 * row + 1] = exp2_fast(x[2 * row + 1] - shift);
            total[i][row] += x[2 * row] + x[2 * row + 1];
            p[i][column / 2][column % 2 * 2 + row] = pack<Element>(x[2 * row], x[2 * row + 1]);
          }
#pragma unroll
          for (int column = 0; column < COLUMNS; ++column) {
            acc[i][column][2 * row] *= decay;
            acc[i][column][2 * row + 1] *= decay;
          }
        }
      }

#pragma unroll
      for (int tile = 0; tile < Tiles::KEYS; ++tile) {
        if (first + tile * kTile < padded_keys) {
          const Element* const rows = left_rows<STRIDE>(values + (first + tile * kTile) * STRIDE);
#pragma unroll
          for (int column = 0; column < COLUMNS; column += 2) {
            std::uint32_t b[4];
            load_matrices_transposed(b, rows + column * 8);
#pragma unroll
            for (int i = 0; i < Tiles::QUERIES; ++i) {
              mma<Element>(acc[i][column], p[i][tile], b[0], b[1]);
              mma<Element>(acc[i][column + 1], p[i][tile], b[2], b[3]);
            }
          }
        }
      }
    }

    const Rows out = rows_of(arguments.out, computed_here(image), computed_here(head));
#pragma unroll
    for (int i = 0; i < Tiles::QUERIES; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int query = first_query + i * kTile + row * 8 + lane() / 4;
        const float sum = sum_of_row(total[i][row]);
        if (query >= num_queries) {
          continue;
        }
        // Without any key the output is 0, and lse a number that makes no NaN in the backward.
        const bool empty = peak[i][row] == -kInfinity;
        const float factor = empty ? 1.0f : 1.0f / sum;
        store_row<Element>(const_cast<char*>(out.data) + query * out.stride, acc[i], row, factor, dim, false);
        if (lane() % 4 == 0) {
          arguments.lse[block() * num_queries + query] = empty ? 0.0f : peak[i][row] + log2f(sum);
        }
      }
    }
  }
}

// ---- backward

template <int DIM, bool PROMPTS_ONLY>
struct BackwardTiles {
  static constexpr int WARPS = PROMPTS_ONLY ? 4 : 8;
  static constexpr int THREADS = WARPS * kLanes;
  static constexpr int KEYS = DIM <= (PROMPTS_ONLY ? 64 : 80) ? 2 : 1;  // tiles whose gradients a warp holds
  static constexpr int QUERIES = 2;                                     // tiles in a step
  static constexpr int STEP = QUERIES * kTile;
};

// Elements from row to row of ds (keys, queries of a step) in shared memory.
constexpr int kStrideOfScores = kStride<BackwardTiles<32, false>::STEP>;

// How the keys are divided, and where things are in shared memory, in bytes.
struct BackwardPlan {
  int passes;
  int pass_keys;  // a multiple of a tile
  int padded_queries;
  std::int64_t queries, grad_outs;  // (2, STEP, DIM): of this step and the next one
  std::int64_t keys, values;        // (pass_keys, DIM)
  std::int64_t scores;              // (2, pass_keys, STEP): ds of this step and the last one
  std::int64_t statistics;          // (heads of the group, padded_queries, 2): lse and delta, float32
  std::int64_t size;
  std::int64_t kept;  // floats of dq in the workspace, for each block of threads
};

// Bytes of shared memory for passes of ``tiles`` tiles of keys, and where they begin.
template <int DIM, bool PROMPTS_ONLY>
void lay_out(BackwardPlan& plan, const PromptAttentionSizes& sizes, int tiles) {
  using Tiles = BackwardTiles<DIM, PROMPTS_ONLY>;
  const std::int64_t heads = sizes.heads / sizes.groups;
  plan.pass_keys = tiles * kTile;
  plan.padded_queries = ceil_div(static_cast<int>(sizes.queries), Tiles::STEP) * Tiles::STEP;
  const std::int64_t of_keys = std::int64_t{plan.pass_keys} * kStride<DIM> * 2;
  const std::int64_t of_queries = 2 * Tiles::STEP * kStride<DIM> * 2;
  plan.queries = 0;
  plan.grad_outs = plan.queries + of_queries;
  plan.keys = plan.grad_outs + of_queries;
  plan.values = plan.keys + of_keys;
  plan.scores = plan.values + of_keys;
  plan.statistics = plan.scores + (PROMPTS_ONLY ? 0 : std::int64_t{2} * plan.pass_keys * kStrideOfScores * 2);
  plan.size = plan.statistics + heads * plan.padded_queries * 8;
}

// As few passes as the warps and ``shared_memory`` bytes allow; if not even one tile fits, plan.size says so.
template <int DIM, bool PROMPTS_ONLY>
BackwardPlan backward_plan(const PromptAttentionSizes& sizes, std::int64_t shared_memory) {
  using Tiles = BackwardTiles<DIM, PROMPTS_ONLY>;
  const auto num_keys = static_cast<int>(sizes.prompts + (PROMPTS_ONLY ? 0 : sizes.tokens));
  const int tiles = max(ceil_div(num_keys, kTile), 1);
  BackwardPlan plan;
  int pass_tiles = min(tiles, Tiles::WARPS * Tiles::KEYS);
  lay_out<DIM, PROMPTS_ONLY>(plan, sizes, pass_tiles);
  while (plan.size > shared_memory && pass_tiles > 1) {
    lay_out<DIM, PROMPTS_ONLY>(plan, sizes, --pass_tiles);
  }
  plan.passes = ceil_div(tiles, pass_tiles);
  lay_out<DIM, PROMPTS_ONLY>(plan, sizes, ceil_div(tiles, plan.passes));  // all of about the same length
  plan.kept = PROMPTS_ONLY || plan.passes == 1 ? 0 : sizes.heads / sizes.groups * plan.padded_queries * DIM;
  return plan;
}

// Puts lse and delta of 16 queries of a head into shared memory; past the last one lse = inf makes p 0.
template <typename Element, int DIM>
__device__ __forceinline__ void load_statistics(float* statistics, const float* lse, Rows out, Rows grad_out,
                                                int first, int num_queries, int dim) {
  // The diagonal of a product, not a sum: where a query sees but one key, out is its v, and the same order of
  // summation as in v do^T makes the difference of both exactly 0.
  float product[2][4] = {};
#pragma unroll 2
  for (int k = 0; k < DIM / kTile; ++k) {
    std::uint32_t a[4];
    load_left(a, out, first, num_queries, k, dim);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first + j * 8 + lane() / 4;
      const int column = k * kTile + lane() % 4 * 2;
      const std::uint32_t b0 = load_pair(grad_out, row, num_queries, column, dim);
      const std::uint32_t b1 = load_pair(grad_out, row, num_queries, column + 8, dim);
      mma<Element>(product[j], a, b0, b1);
    }
  }
  if (lane() % 4 == lane() / 8) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = j * 8 + lane() / 4;
      statistics[2 * row] = first + row < num_queries ? lse[first + row] : kInfinity;
      statistics[2 * row + 1] = lane() / 4 % 2 ? product[j][2 * j + 1] : product[j][2 * j];
    }
  }
}

// Adds to the gradients of a warp's COUNT tiles of keys what 16 queries contribute, and leaves their ds in
// shared memory. Pointers are to the first tile and the first query, the next tile is WARPS tiles further.
template <int COUNT, typename Element, int DIM, bool PROMPTS_ONLY, int KEYS>
__device__ __forceinline__ void add_grads_of_keys(float (&dk)[KEYS][DIM / 8][4],
                                                  float (&dv)[KEYS][DIM / 8][4], const Element* keys,
                                                  const Element* values, const Element* queries,
                                                  const Element* grad_outs, Element* scores,
                                                  const float* statistics, int num_keys, float scale) {
  constexpr int STRIDE = kStride<DIM>;
  constexpr int NEXT = BackwardTiles<DIM, PROMPTS_ONLY>::WARPS * kTile;
  float s[COUNT][2][4] = {};
  float dp[COUNT][2][4] = {};
  const auto multiply = [&](float (&c)[COUNT][2][4], const Element* left, const Element* right) {
    left = left_rows<STRIDE>(left);
    right = right_rows<STRIDE>(right);
#pragma unroll 2  // more loads in flight would take too many registers
    for (int k = 0; k < DIM; k += kTile) {
      std::uint32_t b[4];
      load_matrices(b, right + k);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        std::uint32_t a[4];
        load_matrices(a, left + i * NEXT * STRIDE + k);
        mma<Element>(c[i][0], a, b[0], b[1]);
        mma<Element>(c[i][1], a, b[2], b[3]);
      }
    }
  };
  multiply(s, keys, queries);
  multiply(dp, values, grad_outs);

  // As left factors.
  std::uint32_t p[COUNT][4];
  std::uint32_t ds[COUNT][4];
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int query = column * 8 + lane() % 4 * 2;
    float lse[2];
    float delta[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      lse[j] = statistics[2 * (query + j)];
      delta[j] = statistics[2 * (query + j) + 1];
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int key = i * NEXT + row * 8 + lane() / 4;
        float x[2];
        float dx[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          x[j] = exp2_fast(s[i][column][2 * row + j] * scale - lse[j]);
          dx[j] = x[j] * (dp[i][column][2 * row + j] - delta[j]);
          if (key >= num_keys) {
            x[j] = dx[j] = 0.0f;
          }
        }
        p[i][2 * column + row] = pack<Element>(x[0], x[1]);
        ds[i][2 * column + row] = pack<Element>(dx[0], dx[1]);
        if (!PROMPTS_ONLY) {
          store4(scores + key * kStrideOfScores + query, ds[i][2 * column + row]);
        }
      }
    }
  }

  const auto add = [&](float (&c)[KEYS][DIM / 8][4], const std::uint32_t (&a)[COUNT][4],
                       const Element* right) {
    right = left_rows<STRIDE>(right);
#pragma unroll
    for (int column = 0; column < DIM / 8; column += 2) {
      std::uint32_t b[4];
      load_matrices_transposed(b, right + column * 8);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        mma<Element>(c[i][column], a[i], b[0], b[1]);
        mma<Element>(c[i][column + 1], a[i], b[2], b[3]);
      }
    }
  };
  add(dv, p, grad_outs);
  add(dk, ds, queries);
}

// Adds ds^T k of 16 queries, 16 columns and all keys of a pass.
template <typename Element, int DIM>
__device__ __forceinline__ void add_grads_of_queries(float (&dq)[2][4], const Element* scores,
                                                     const Element* keys, int pass_keys) {
  scores = right_rows<kStrideOfScores>(scores);
  keys = left_rows<kStride<DIM>>(keys);
#pragma unroll 2
  for (int key = 0; key < pass_keys; key += kTile) {
    std::uint32_t a[4];
    std::uint32_t b[4];
    load_matrices_transposed(a, scores + key * kStrideOfScores);
    load_matrices_transposed(b, keys + key * kStride<DIM>);
    mma<Element>(dq[0], a, b[0], b[1]);
    mma<Element>(dq[1], a, b[2], b[3]);
  }
}

template <typename Element, int DIM, bool PROMPTS_ONLY>
__global__ void __launch_bounds__(BackwardTiles<DIM, PROMPTS_ONLY>::THREADS)
    backward(const PromptAttentionBackward arguments, const BackwardPlan plan) {
  using Tiles = BackwardTiles<DIM, PROMPTS_ONLY>;
  constexpr int STRIDE = kStride<DIM>;
  constexpr int COLUMNS = DIM / 8;
  const PromptAttentionSizes& sizes = arguments.sizes;
  const auto dim = static_cast<int>(sizes.head_dim);
  const auto num_queries = static_cast<int>(sizes.queries);
  const auto num_prompts = static_cast<int>(sizes.prompts);
  const int num_keys = num_prompts + (PROMPTS_ONLY ? 0 : static_cast<int>(sizes.tokens));
  const auto num_groups = static_cast<int>(sizes.groups);
  const int heads = static_cast<int>(sizes.heads) / num_groups;
  const int image = static_cast<int>(block()) / num_groups;
  const int group = static_cast<int>(block()) % num_groups;

  char* const memory = shared_memory();
  auto* const keys = reinterpret_cast<Element*>(memory + plan.keys);
  auto* const values = reinterpret_cast<Element*>(memory + plan.values);
  auto* const queries = reinterpret_cast<Element*>(memory + plan.queries);
  auto* const grad_outs = reinterpret_cast<Element*>(memory + plan.grad_outs);
  auto* const scores = reinterpret_cast<Element*>(memory + plan.scores);
  auto* const statistics = reinterpret_cast<float*>(memory + plan.statistics);

  const int head_steps = plan.padded_queries / Tiles::STEP;
  const int steps = heads * head_steps;
  const auto copy_step = [&](int step) {
    const int head = group * heads + step / head_steps;
    const int first = step % head_steps * Tiles::STEP;
    const int image_now = computed_here(image);
    const auto copy = [&](Element* to, const Tensor4& tensor) {
      const Rows rows = rows_of(tensor, image_now, head);
      copy_rows<DIM, Tiles::THREADS>(
          to + step % 2 * Tiles::STEP * STRIDE, Tiles::STEP, dim, [&](int row) -> const char* {
            return first + row < num_queries ? rows.data + (first + row) * rows.stride : nullptr;
          });
    };
    copy(queries, arguments.q);
    copy(grad_outs, arguments.grad_out);
  };

#pragma unroll 1
  for (int pass = 0; pass < plan.passes; ++pass) {
    const int first_key = pass * plan.pass_keys;
    const auto copy_keys = [&](Element* to, const Tensor4& of_prompts, const Tensor4& of_tokens) {
      const Rows prompts = rows_of(of_prompts, image, group);
      const Rows tokens = rows_of(of_tokens, image, group);
      copy_rows<DIM, Tiles::THREADS>(to, plan.pass_keys, dim, [&](int row) -> const char* {
        const int key = first_key + row;
        return key < num_prompts ? prompts.data + key * prompts.stride
               : key < num_keys  ? tokens.data + (key - num_prompts) * tokens.stride
                                 : nullptr;
      });
    };
    copy_keys(keys, arguments.prompt_k, arguments.k);
    copy_keys(values, arguments.prompt_v, arguments.v);
    if (steps > 0) {
      copy_step(0);
    }
    commit_copies();
    if (pass == 0) {
      const int head_tiles = plan.padded_queries / kTile;
#pragma unroll 1
      for (int tile = warp(); tile < heads * head_tiles; tile += Tiles::WARPS) {
        const int head = group * heads + tile / head_tiles;
        load_statistics<Element, DIM>(
            statistics + tile * kTile * 2, arguments.lse + (image * sizes.heads + head) * num_queries,
            rows_of(arguments.out, image, head), rows_of(arguments.grad_out, image, head),
            tile % head_tiles * kTile, num_queries, dim);
      }
    }

    // Tiles warp(), warp() + WARPS, ... of the pass are this warp's.
    const int my_tiles = max(ceil_div(plan.pass_keys / kTile - warp(), Tiles::WARPS), 0);
    const int my_first = warp() * kTile;
    float dk[Tiles::KEYS][COLUMNS][4] = {};
    float dv[Tiles::KEYS][COLUMNS][4] = {};
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      wait_for_copies<0>();
      sync_threads();
      if (step + 1 < steps) {
        copy_step(step + 1);
        commit_copies();
      }

      if (!PROMPTS_ONLY && step > 0) {
        // dq of the last step, 16 queries and 16 columns at a time.
        const int last = step - 1;
        const int head = group * heads + last / head_steps;
#pragma unroll 1
        for (int part = warp(); part < Tiles::QUERIES * DIM / kTile; part += Tiles::WARPS) {
          const int tile = part % Tiles::QUERIES;
          const int column = part / Tiles::QUERIES * kTile;
          const int first_query = last % head_steps * Tiles::STEP + tile * kTile;
          if (first_query >= num_queries || column >= dim) {
            continue;
          }
          float dq[2][4] = {};
          float* const kept = arguments.workspace + block() * plan.kept +
                              ((last * Tiles::QUERIES + tile) * (DIM / kTile) + column / kTile) * 256 + lane();
          if (pass > 0) {
            for (int i = 0; i < 8; ++i) {
              dq[i / 4][i % 4] = kept[i * kLanes];
            }
          }
          add_grads_of_queries<Element, DIM>(
              dq, scores + last % 2 * plan.pass_keys * kStrideOfScores + tile * kTile, keys + column,
              plan.pass_keys);
          if (pass + 1 < plan.passes) {
            for (int i = 0; i < 8; ++i) {
              kept[i * kLanes] = dq[i / 4][i % 4];
            }
            continue;
          }
          const Rows rows = rows_of(arguments.grad_q, computed_here(image), head);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            const int query = first_query + row * 8 + lane() / 4;
            if (query < num_queries) {
              store_row<Element>(const_cast<char*>(rows.data) + query * rows.stride + column * 2, dq, row,
                                 arguments.scale, dim - column, false);
            }
          }
        }
      }

      if (step == steps) {
        break;
      }
#pragma unroll 1
      for (int tile = 0; tile < Tiles::QUERIES; ++tile) {
        const int first_query = step % head_steps * Tiles::STEP + tile * kTile;
        if (first_query >= num_queries) {
          break;
        }
        const int row = step % 2 * Tiles::STEP + tile * kTile;
        const auto add = [&](auto count) {
          add_grads_of_keys<decltype(count)::value, Element, DIM, PROMPTS_ONLY>(
              dk, dv, keys + my_first * STRIDE, values + my_first * STRIDE, queries + row * STRIDE,
              grad_outs + row * STRIDE,
              scores + (step % 2 * plan.pass_keys + my_first) * kStrideOfScores + tile * kTile,
              statistics + (step * Tiles::STEP + tile * kTile) * 2, num_keys - first_key - my_first,
              arguments.scale * kLog2E);
        };
        if (my_tiles == 1) {
          add(Constant<1>{});
        } else if (my_tiles == Tiles::KEYS) {
          add(Constant<Tiles::KEYS>{});
        }
      }
    }

    const int image_now = computed_here(image);
    const int group_now = computed_here(group);
#pragma unroll
    for (int i = 0; i < Tiles::KEYS; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int local_key = my_first + i * Tiles::WARPS * kTile + row * 8 + lane() / 4;
        const int key = first_key + local_key;
        if (local_key >= plan.pass_keys || key >= num_keys) {
          continue;
        }
        const bool of_prompts = key < num_prompts;
        const bool as_float = of_prompts && arguments.float32_prompt_grads;
        const auto address = [&](const Tensor4& tensor, int of) {
          const std::int64_t at =
              image_now * tensor.batch_stride + of * tensor.token_stride + group_now * tensor.head_stride;
          return static_cast<char*>(tensor.data) + at * (as_float ? 4 : 2);
        };
        char* const to_k =
            of_prompts ? address(arguments.grad_prompt_k, key) : address(arguments.grad_k, key - num_prompts);
        store_row<Element>(to_k, dk[i], row, arguments.scale, dim, as_float);
        char* const to_v =
            of_prompts ? address(arguments.grad_prompt_v, key) : address(arguments.grad_v, key - num_prompts);
        store_row<Element>(to_v, dv[i], row, 1.0f, dim, as_float);
      }
    }
    sync_threads();  // before the next pass overwrites the keys
  }
}

// ---- launches

// The first thing wrong with a launch's arguments.
struct Check {
  Status status;
  const PromptAttentionSizes& sizes;

  explicit Check(const PromptAttentionSizes& sizes) : sizes(sizes) {
    // Rows are counted in 32 bits, a grid's blocks in 31.
    constexpr std::int64_t kMost = 0x7fffffff - 1024;
    if (sizes.dtype != Dtype::float16 && sizes.dtype != Dtype::bfloat16) {
      refuse(Code::invalid, "dtype must be float16 or bfloat16, got number %lld",
             static_cast<int>(sizes.dtype));
    } else if (sizes.batch < 0 || sizes.queries < 0 || sizes.tokens < 0 || sizes.prompts < 0) {
      refuse(Code::invalid,
             "batch, queries, tokens and prompts must not be negative, got %lld, %lld, %lld, %lld",
             sizes.batch, sizes.queries, sizes.tokens, sizes.prompts);
    } else if (sizes.groups < 1 || sizes.heads < 1 || sizes.heads % sizes.groups) {
      refuse(Code::invalid, "groups must divide heads, got %lld groups and %lld heads", sizes.groups,
             sizes.heads);
    } else if (sizes.head_dim < kPiece || sizes.head_dim > 128 || sizes.head_dim % kPiece) {
      refuse(Code::unsupported, "heads must have 8, 16, 24, ... or 128 channels, got %lld", sizes.head_dim);
    } else if (sizes.queries > kMost || sizes.tokens > kMost || sizes.prompts > kMost - sizes.tokens) {
      refuse(Code::unsupported, "queries, or prompts and tokens, are too many: %lld, %lld and %lld",
             sizes.queries, sizes.prompts, sizes.tokens);
    } else if (sizes.batch > kMost / sizes.heads) {
      refuse(Code::unsupported, "heads of all images are too many: %lld of %lld", sizes.heads, sizes.batch);
    }
  }

  template <typename... Sizes>
  void refuse(Code code, const char* format, Sizes... of) {
    if (status.code == Code::ok) {
      status.code = code;
      std::snprintf(status.message, sizeof status.message, format, static_cast<long long>(of)...);
    }
  }

  void present(const char* name, const void* data, std::int64_t rows) {
    if (data == nullptr && sizes.batch > 0 && rows > 0) {
      refuse(Code::invalid, (std::string(name) + " must not be null").c_str());
    }
  }

  // Every row must begin at a multiple of ``bytes``; the stride of an axis of length 1 does not matter.
  void rows(const char* name, const Tensor4& tensor, std::int64_t rows, std::int64_t heads, int bytes) {
    const auto aligned = [&](std::int64_t length, std::int64_t stride) {
      return length <= 1 || stride * 2 % bytes == 0;
    };
    if (sizes.batch == 0 || rows == 0) {
      return;
    }
    present(name, tensor.data, rows);
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<unsigned>(bytes) != 0 ||
        !aligned(sizes.batch, tensor.batch_stride) || !aligned(rows, tensor.token_stride) ||
        !aligned(heads, tensor.head_stride)) {
      refuse(Code::invalid,
             (std::string("every row of ") + name + " must begin at a multiple of %lld bytes").c_str(),
             bytes);
    }
  }
};

// Calls ``function`` with the smallest head size, as a type, that holds ``dim``.
template <typename Function>
auto with_head_dim(std::int64_t dim, Function function) {
  if (dim <= 32) {
    return function(Constant<32>{});
  }
  if (dim <= 64) {
    return function(Constant<64>{});
  }
  if (dim <= 80) {
    return function(Constant<80>{});
  }
  if (dim <= 96) {
    return function(Constant<96>{});
  }
  return function(Constant<128>{});
}

// The same, with an element before it.
template <typename Function>
auto with_types(const PromptAttentionSizes& sizes, Function function) {
  return with_head_dim(sizes.head_dim, [&](auto dim) {
    return sizes.dtype == Dtype::float16 ? function(Float16{}, dim) : function(BFloat16{}, dim);
  });
}

}  // namespace

std::int64_t prompt_attention_forward_shared_memory(const PromptAttentionSizes& sizes) {
  return with_head_dim(sizes.head_dim, [&](auto dim) {
    return ForwardTiles<decltype(dim)::value>::shared_memory(sizes.prompts + sizes.tokens);
  });
}

namespace {

BackwardPlan backward_plan(const PromptAttentionSizes& sizes, bool prompts_only, std::int64_t shared_memory) {
  return with_head_dim(sizes.head_dim, [&](auto dim) {
    constexpr int DIM = decltype(dim)::value;
    return prompts_only ? backward_plan<DIM, true>(sizes, shared_memory)
                        : backward_plan<DIM, false>(sizes, shared_memory);
  });
}

}  // namespace

std::int64_t prompt_attention_backward_shared_memory(const PromptAttentionSizes& sizes, bool prompts_only) {
  return backward_plan(sizes, prompts_only, 0).size;
}

std::int64_t prompt_attention_backward_workspace(const PromptAttentionSizes& sizes, bool prompts_only,
                                                 std::int64_t shared_memory) {
  return sizes.batch * sizes.groups * backward_plan(sizes, prompts_only, shared_memory).kept;
}

Status launch_prompt_attention_forward(const PromptAttentionForward& arguments, Stream stream) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  Check check(sizes);
  check.rows("q", arguments.q, sizes.queries, sizes.heads, 16);
  check.rows("k", arguments.k, sizes.tokens, sizes.groups, 16);
  check.rows("v", arguments.v, sizes.tokens, sizes.groups, 16);
  check.rows("prompt_k", arguments.prompt_k, sizes.prompts, sizes.groups, 16);
  check.rows("prompt_v", arguments.prompt_v, sizes.prompts, sizes.groups, 16);
  check.rows("out", arguments.out, sizes.queries, sizes.heads, 4);
  check.present("lse", arguments.lse, sizes.queries);
  if (check.status.code != Code::ok || sizes.batch == 0 || sizes.queries == 0) {
    return check.status;
  }
  return with_types(sizes, [&](auto element, auto dim) {
    constexpr int DIM = decltype(dim)::value;
    LaunchShape shape;
    shape.blocks = sizes.batch * sizes.heads;
    shape.threads = ForwardTiles<DIM>::THREADS;
    shape.shared_memory = prompt_attention_forward_shared_memory(sizes);
    return launch(forward<decltype(element), DIM>, shape, stream, arguments);
  });
}

Status launch_prompt_attention_backward(const PromptAttentionBackward& arguments, Stream stream) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  Check check(sizes);
  check.rows("q", arguments.q, sizes.queries, sizes.heads, 16);
  check.rows("k", arguments.k, sizes.tokens, sizes.groups, 16);
  check.rows("v", arguments.v, sizes.tokens, sizes.groups, 16);
  check.rows("prompt_k", arguments.prompt_k, sizes.prompts, sizes.groups, 16);
  check.rows("prompt_v", arguments.prompt_v, sizes.prompts, sizes.groups, 16);
  check.rows("out", arguments.out, sizes.queries, sizes.heads, 16);
  check.rows("grad_out", arguments.grad_out, sizes.queries, sizes.heads, 16);
  check.present("lse", arguments.lse, sizes.queries);
  const bool prompts_only = !arguments.grad_q.data && !arguments.grad_k.data && !arguments.grad_v.data;
  if (!prompts_only) {
    check.rows("grad_q", arguments.grad_q, sizes.queries, sizes.heads, 4);
    check.rows("grad_k", arguments.grad_k, sizes.tokens, sizes.groups, 4);
    check.rows("grad_v", arguments.grad_v, sizes.tokens, sizes.groups, 4);
  }
  check.rows("grad_prompt_k", arguments.grad_prompt_k, sizes.prompts, sizes.groups, 4);
  check.rows("grad_prompt_v", arguments.grad_prompt_v, sizes.prompts, sizes.groups, 4);
  if (check.status.code != Code::ok || sizes.batch == 0 || (prompts_only && sizes.prompts == 0)) {
    return check.status;
  }
  const BackwardPlan plan = backward_plan(sizes, prompts_only, arguments.shared_memory);
  check.present("workspace", arguments.workspace, plan.kept);
  if (check.status.code != Code::ok) {
    return check.status;
  }
  return with_types(sizes, [&](auto element, auto dim) {
    constexpr int DIM = decltype(dim)::value;
    using Element = decltype(element);
    LaunchShape shape;
    shape.blocks = sizes.batch * sizes.groups;
    shape.shared_memory = plan.size;
    if (prompts_only) {
      shape.threads = BackwardTiles<DIM, true>::THREADS;
      return launch(backward<Element, DIM, true>, shape, stream, arguments, plan);
    }
    shape.threads = BackwardTiles<DIM, false>::THREADS;
    return launch(backward<Element, DIM, false>, shape, stream, arguments, plan);
  });
}

}  // namespace vapt_fast
