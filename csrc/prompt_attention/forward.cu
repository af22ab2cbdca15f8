// The forward of prompt_attention: see prompt_attention/api.h.
//
// A block computes an image and head. All keys and values lie in its shared memory; each of its two warpgroups takes
// every other tile of queries, whose scores never leave the registers.

#include <cfloat>

#include "prompt_attention/common.cuh"

namespace vapt_fast {
namespace prompt_attention {
namespace {

constexpr int kThreads = 2 * kWarpgroupSize;

// The block's shared memory: keys and values, and for each warp its 16 queries and 8 rows of results.
template <int CHANNELS>
struct Smem {
  static constexpr int kStagedBytes = Matrix<CHANNELS>::kStagedBytes;
  int rows;  // of keys

  __host__ __device__ __forceinline__ int values() const { return rows * Matrix<CHANNELS>::kRowBytes; }
  __host__ __device__ __forceinline__ int queries(int warp) const { return 2 * values() + 3 * warp * kStagedBytes; }
  __host__ __device__ __forceinline__ int results(int warp) const { return queries(warp) + 2 * kStagedBytes; }
  __host__ __device__ __forceinline__ int size() const { return queries(kThreads / kWarpSize); }
};

// The softmax of a thread's two rows so far.
template <int CHANNELS>
struct Softmax {
  // All sums are divided by 2^reference. That is the largest score of some chunk, and no score is larger by more than
  // kSlack: then the sums would be corrected, which is rare after the first chunk.
  float reference[2] = {kLowest, kLowest};
  float sum[2] = {};  // the thread's part
  float out[Matrix<CHANNELS>::kSums] = {};

  static constexpr float kLowest = -1e30f;
  static constexpr float kSlack = 8.0f;

  __device__ __forceinline__ void raise(int half, float highest) {
    if (highest > reference[half] + kSlack) {
      const float correction = exp2_approx(reference[half] - highest);
      reference[half] = highest;
      sum[half] *= correction;
#pragma unroll
      for (int i = 2 * half; i < CHANNELS / 2; i += 4) {
        out[i] *= correction;
        out[i + 1] *= correction;
      }
    }
  }

  // Takes in a chunk of scores, which become the numerators of the softmax; columns from ``valid`` on are none.
  template <int COUNT>
  __device__ __forceinline__ void add(float (&scores)[COUNT], float factor, int valid) {
    if (valid < 2 * COUNT) {
      const int mine = valid - first_column();
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        scores[i] = column_of(i) < mine ? scores[i] : -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = scores[2 * half];
#pragma unroll
      for (int i = 2 * half; i < COUNT; i += 4) {
        highest = max(highest, max(scores[i], scores[i + 1]));
      }
      highest = max(highest, shuffle_xor(highest, 1));
      highest = max(highest, shuffle_xor(highest, 2));
      raise(half, highest * factor);
#pragma unroll
      for (int i = 2 * half; i < COUNT; i += 4) {
        scores[i] = exp2_approx(scores[i] * factor - reference[half]);
        scores[i + 1] = exp2_approx(scores[i + 1] * factor - reference[half]);
        sum[half] += scores[i] + scores[i + 1];
      }
    }
  }
};

// Copies the warp's 16 queries of the tile that begins at ``tile``, a group.
template <typename Element, int CHANNELS>
__device__ __forceinline__ void load_queries(char* shared, const PromptAttentionForward& arguments, int tile) {
  constexpr int kUnits = Matrix<CHANNELS>::kUnits;
  const PromptAttentionSizes& sizes = arguments.sizes;
  const Rows<const Element> queries(arguments.in.q, Position(sizes));
  const int first = tile + warp_row();
  const int lane = opaque(lane_id());
  const int unit = lane % kUnits;
#pragma unroll
  for (int row = lane / kUnits; row < kWarpRows; row += kWarpSize / kUnits) {
    char* const to = shared + Matrix<CHANNELS>::offset(row, unit, kWarpRows);
    if (first + row < sizes.queries && unit * kVec < sizes.channels) {
      cp_async(to, queries.at(first + row) + unit * kVec);
    } else {
      store16(to, Bytes16{});
    }
  }
  cp_async_commit();
}

template <typename Element, int CHANNELS>
__device__ __forceinline__ void forward(const PromptAttentionForward& arguments) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const int num_queries = static_cast<int>(sizes.queries);
  const int num_keys = static_cast<int>(sizes.prompts + sizes.tokens);
  const int channels = static_cast<int>(sizes.channels);
  const Smem<CHANNELS> smem{chunk_rows(num_keys)};
  char* const shared = shared_memory();
  char* const my_queries = shared + smem.queries(warp_id());
  const PromptAttentionInputs& in = arguments.in;
  int tile = warp_id() / 4 * kTile;  // its first query
  {
    const Position position(sizes);
    load_keys<kThreads, CHANNELS, Element>(shared, in.prompt_k, in.k, sizes, position, smem.rows);
    load_queries<Element, CHANNELS>(my_queries, arguments, tile);
    load_keys<kThreads, CHANNELS, Element>(shared + smem.values(), in.prompt_v, in.v, sizes, position, smem.rows);
    cp_async_commit();
  }
  cp_async_wait<1>();
  fence_shared();
  sync_threads();
  bool has_values = false;

  // Scores in base 2. A negative scale changes the queries' signs; where it is 0, this is still right.
  const float factor = max(fabsf(arguments.scale) * kLog2E, FLT_MIN);
  const std::uint32_t signs = arguments.scale < 0.0f ? 0x80008000u : 0u;
  const Matrix<CHANNELS> key_matrix(shared, smem.rows);
  const Matrix<CHANNELS> value_matrix(shared + smem.values(), smem.rows);
  // Both warpgroups go through as many tiles, for their barriers.
  for (int both = 0; both < num_queries; both += 2 * kTile, tile += 2 * kTile) {
    std::uint32_t q[CHANNELS / kDepth][4];
    if (has_values) {
      cp_async_wait<0>();  // before, the first queries came with the keys
    }
    sync_warp();
#pragma unroll
    for (int k = 0; k < CHANNELS / kDepth; ++k) {
      const int lane = opaque(lane_id());
      ldmatrix_x4(q[k], my_queries + Matrix<CHANNELS>::offset(lane % kWarpRows, 2 * k + lane / kWarpRows, kWarpRows));
#pragma unroll
      for (std::uint32_t& word : q[k]) {
        word ^= signs;
      }
    }
    sync_warp();
    load_queries<Element, CHANNELS>(my_queries, arguments, tile + 2 * kTile);

    Softmax<CHANNELS> rows;
    for_each_chunk(num_keys, [&](auto size, int key) {
      constexpr int KEYS = decltype(size)::value;
      float scores[KEYS / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < CHANNELS / kDepth; ++k) {
        wgmma<Element>(scores, q[k], key_matrix.rows_from(key).columns_from(k * kDepth), k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>(scores);
      if (tile + warp_row() < num_queries) {  // else the warp computes what nobody reads
        rows.add(scores, factor, num_keys - key);
      }
      if (!has_values) {
        cp_async_wait<1>();  // all but the next queries
        fence_shared();
        sync_threads();
        has_values = true;
      }
      std::uint32_t numerators[KEYS / kDepth][4];
      pack_tile<Element>(numerators, scores);
      wgmma_fence();
      accumulate<Element>(rows.out, numerators, value_matrix.rows_from(key));
      wgmma_commit();
      wgmma_wait<0>(rows.out);
    });

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = lane_sum<1, 4>(rows.sum[half]);
      const float inverse = 1.0f / sum;
      const int query = tile + first_row() + 8 * half;
      if (lane_id() % 4 == 0 && query < num_queries) {
        arguments.lse[block_id() * num_queries + query] = rows.reference[half] + log2_approx(sum);
      }
#pragma unroll
      for (int i = 2 * half; i < CHANNELS / 2; i += 4) {
        rows.out[i] *= inverse;
        rows.out[i + 1] *= inverse;
      }
    }
    const Rows<Element> out(arguments.out, Position(sizes));
    store_tile<Element, CHANNELS>(shared + smem.results(warp_id()), rows.out, 1.0f, out, tile, num_queries, channels);
  }
  cp_async_wait<0>();
}

template <typename Element, int CHANNELS>
__global__ void __launch_bounds__(kThreads, CHANNELS > kPanel ? 1 : 2)
    prompt_attention_fwd_kernel(const PromptAttentionForward arguments) {
#ifdef VAPT_FAST_HAS_WGMMA
  forward<Element, CHANNELS>(arguments);
#else
  trap();
#endif
}

}  // namespace
}  // namespace prompt_attention

Status prompt_attention_supported(int device) {
  return supported(prompt_attention::prompt_attention_fwd_kernel<BFloat16, 64>, device);
}

Status launch_prompt_attention_forward(const PromptAttentionForward& arguments, Stream stream) {
  using namespace prompt_attention;
  const PromptAttentionSizes& sizes = arguments.sizes;
  Check check = checked_sizes(sizes);
  check_inputs(check, sizes, arguments.in);
  check.tensor("out", arguments.out, sizes.batch, sizes.queries, sizes.heads, 2);
  check.pointer("lse", arguments.lse, sizes.batch * sizes.heads * sizes.queries, sizeof(float));
  if (!check.ok() || sizes.batch * sizes.heads * sizes.queries == 0) {
    return check.status();
  }
  LaunchShape shape;
  shape.blocks = sizes.batch * sizes.heads;
  shape.threads = kThreads;
  const auto launch_with = [&](auto element, auto channels) {
    constexpr int CHANNELS = decltype(channels)::value;
    shape.shared_memory = Smem<CHANNELS>{chunk_rows(static_cast<int>(sizes.prompts + sizes.tokens))}.size();
    return launch(prompt_attention_fwd_kernel<decltype(element), CHANNELS>, shape, stream, arguments);
  };
  if (sizes.channels > kPanel) {
    return dispatch_wide(sizes, launch_with);
  }
  return dispatch_dtype(sizes.dtype,
                        [&](auto element) { return launch_with(element, std::integral_constant<int, kPanel>{}); });
}

}  // namespace vapt_fast
