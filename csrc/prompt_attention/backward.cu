// The backward of prompt_attention: see prompt_attention/api.h.
//
// A block computes an image and head, of which queries, keys, values and the gradient of out lie in its shared memory.
// Its warpgroups share the tiles: those of keys, which give the gradients of keys and values, and those of queries, which
// give the gradient of queries. Both compute the scores again. No two warpgroups add to the same sum.

#include "prompt_attention/common.cuh"

namespace vapt_fast {
namespace prompt_attention {
namespace {

constexpr int kWarpgroups = 3;
constexpr int kThreads = kWarpgroups * kWarpgroupSize;
constexpr std::int64_t kMaxSharedMemory = 227 * 1024;

// The block's shared memory: four matrices; of each query lse, all in a row, and out . grad_out; and for each warp 16
// rows of results.
struct Smem {
  int num_queries;  // multiples of kTile
  int num_keys;

  __host__ __device__ __forceinline__ int grad_out() const { return num_queries * SharedMatrix::kRowBytes; }
  __host__ __device__ __forceinline__ int keys() const { return 2 * grad_out(); }
  __host__ __device__ __forceinline__ int values() const { return keys() + num_keys * SharedMatrix::kRowBytes; }
  __host__ __device__ __forceinline__ int results(int warp) const {
    return values() + num_keys * SharedMatrix::kRowBytes + warp * kWarpBytes;
  }
  __host__ __device__ __forceinline__ int lse() const { return results(kThreads / kWarpSize); }
  __host__ __device__ __forceinline__ int row_dot() const {
    return lse() + num_queries * static_cast<int>(sizeof(float));
  }
  __host__ __device__ __forceinline__ int size() const {
    return row_dot() + num_queries * static_cast<int>(sizeof(float));
  }
};

// The matrices as products read them.
struct Matrices {
  SharedMatrix queries;
  SharedMatrix grad_out;
  SharedMatrix keys;
  SharedMatrix values;
};

// Copies the gradient of out to shared memory, and computes its products with out.
template <typename Element>
__device__ __forceinline__ void load_grad_out(const PromptAttentionBackward& arguments, const Smem& smem, char* shared,
                                              const Position& position) {
  const Rows<const Element> grad_out(arguments.grad_out, position);
  const Rows<const Element> out(arguments.out, position);
  auto* const lse = reinterpret_cast<float*>(shared + smem.lse());
  auto* const row_dot = reinterpret_cast<float*>(shared + smem.row_dot());
  const int count = static_cast<int>(arguments.sizes.queries);
  const int unit = thread_id() % kUnits;
  const bool is_channel = unit * kVec < arguments.sizes.channels;
#pragma unroll 2
  for (int row = thread_id() / kUnits; row < smem.num_queries; row += kThreads / kUnits) {
    Vec8<Element> grads{};
    float dot = 0.0f;
    if (row < count && is_channel) {
      grads = load_vec8(grad_out.at(row) + unit * kVec);
      float grad[kVec];
      float value[kVec];
      widen(grads, grad);
      load_as_float(out.at(row) + unit * kVec, value);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        dot += grad[i] * value[i];
      }
    }
    store16(shared + smem.grad_out() + SharedMatrix::offset(row, unit), grads.bytes[0]);
    dot = lane_sum<1, kUnits>(dot);
    if (unit == 0) {
      // Beyond the queries the softmax is 0.
      lse[row] = row < count ? arguments.lse[block_id() * count + row] : INFINITY;
      row_dot[row] = dot;
    }
  }
}

// Loads all that the products take, and makes it visible to them.
template <typename Element>
__device__ __forceinline__ void load(const PromptAttentionBackward& arguments, const Smem& smem, char* shared) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& in = arguments.in;
  const Position position(sizes);
  const int num_queries = static_cast<int>(sizes.queries);
  load_rows<kThreads>(shared, 0, Rows<const Element>(in.q, position), num_queries, static_cast<int>(sizes.channels));
  clear_rows<kThreads>(shared, num_queries, smem.num_queries);
  load_keys<kThreads, Element>(shared + smem.keys(), in.prompt_k, in.k, sizes, position, smem.num_keys);
  load_keys<kThreads, Element>(shared + smem.values(), in.prompt_v, in.v, sizes, position, smem.num_keys);
  cp_async_commit();
  load_grad_out<Element>(arguments, smem, shared, position);
  cp_async_wait<0>();
  fence_shared();
}

// Issues scores = a b^T and grads = grad_a grad_b^T, two groups.
template <typename Element, int COUNT>
__device__ __forceinline__ void multiply(float (&scores)[COUNT], float (&grads)[COUNT], SharedMatrix a, SharedMatrix b,
                                         SharedMatrix grad_a, SharedMatrix grad_b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kChannels; k += kDepth) {
    wgmma<Element>(scores, a.columns_from(k), b.columns_from(k), k > 0);
  }
  wgmma_commit();
#pragma unroll
  for (int k = 0; k < kChannels; k += kDepth) {
    wgmma<Element>(grads, grad_a.columns_from(k), grad_b.columns_from(k), k > 0);
  }
  wgmma_commit();
}

// Issues sum += tile b.
template <typename Element, int COUNT>
__device__ __forceinline__ void accumulate(float (&sum)[kChannels / 2], const std::uint32_t (&tile)[COUNT][4],
                                           SharedMatrix b) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    wgmma_by_rows<Element>(sum, tile[k], b.rows_from(k * kDepth), true);
  }
}

// The gradients of 64 keys and values, from row ``key`` on: scores have a row for each of them, a column for each query.
template <typename Element>
__device__ __forceinline__ void sum_over_queries(float (&grad_keys)[kChannels / 2], float (&grad_values)[kChannels / 2],
                                                 const Matrices& matrices, int key, int num_queries, float factor,
                                                 const float* lse, const float* row_dot) {
  for_each_chunk(num_queries, [&](auto size, int query) {
    constexpr int QUERIES = decltype(size)::value;
    const int column = query + first_column();
    float scores[QUERIES / 2];
    float grads[QUERIES / 2];
    multiply<Element>(scores, grads, matrices.keys.rows_from(key), matrices.queries.rows_from(query),
                      matrices.values.rows_from(key), matrices.grad_out.rows_from(query));
    wgmma_wait<1>(scores);
#pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 4) {
      const Bytes8 two = load8(lse + column + 2 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i + j] = exp2_approx(scores[i + j] * factor - float_of(two.words[j % 2]));
      }
    }
    wgmma_wait<0>(grads);
#pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 4) {
      const Bytes8 two = load8(row_dot + column + 2 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        grads[i + j] = scores[i + j] * (grads[i + j] - float_of(two.words[j % 2]));
      }
    }
    std::uint32_t softmax[QUERIES / kDepth][4];
    std::uint32_t grad_scores[QUERIES / kDepth][4];
    pack_tile<Element>(softmax, scores);
    pack_tile<Element>(grad_scores, grads);
    wgmma_fence();
    accumulate<Element>(grad_values, softmax, matrices.grad_out.rows_from(query));
    accumulate<Element>(grad_keys, grad_scores, matrices.queries.rows_from(query));
    wgmma_commit();
    wgmma_wait<0>(grad_values, grad_keys);
  });
}

// The gradient of 64 queries, from row ``query`` on: scores have a row for each of them, a column for each key.
template <typename Element>
__device__ __forceinline__ void sum_over_keys(float (&grad_queries)[kChannels / 2], const Matrices& matrices, int query,
                                              int num_keys, float factor, const float* lse, const float* row_dot) {
  const int row = query + warp_id() % 4 * kWarpRows + lane_id() / 4;
  const float of_row[2] = {lse[row], lse[row + 8]};
  const float dot_of_row[2] = {row_dot[row], row_dot[row + 8]};
  for_each_chunk(num_keys, [&](auto size, int key) {
    constexpr int KEYS = decltype(size)::value;
    float scores[KEYS / 2];
    float grads[KEYS / 2];
    multiply<Element>(scores, grads, matrices.queries.rows_from(query), matrices.keys.rows_from(key),
                      matrices.grad_out.rows_from(query), matrices.values.rows_from(key));
    wgmma_wait<1>(scores);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      scores[i] = exp2_approx(scores[i] * factor - of_row[i / 2 % 2]);
    }
    wgmma_wait<0>(grads);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      grads[i] = scores[i] * (grads[i] - dot_of_row[i / 2 % 2]);
    }
    if (num_keys - key < KEYS) {
      const int mine = num_keys - key - first_column();
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        grads[i] = column_of(i) < mine ? grads[i] : 0.0f;
      }
    }
    std::uint32_t grad_scores[KEYS / kDepth][4];
    pack_tile<Element>(grad_scores, grads);
    wgmma_fence();
    accumulate<Element>(grad_queries, grad_scores, matrices.keys.rows_from(key));
    wgmma_commit();
    wgmma_wait<0>(grad_queries);
  });
}

// The warpgroup's tile of a round: back and forth, since the first tiles take longer.
__device__ __forceinline__ int tile_of(int round) {
  const int warpgroup = shuffle(warp_id(), 0) / 4;  // which the compiler then knows to be the same for all lanes
  return round * kWarpgroups + (round % 2 ? kWarpgroups - 1 - warpgroup : warpgroup);
}

template <typename Element>
__device__ __forceinline__ void backward(const PromptAttentionBackward& arguments) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const int num_queries = static_cast<int>(sizes.queries);
  const int num_prompts = static_cast<int>(sizes.prompts);
  const int num_keys = num_prompts + static_cast<int>(sizes.tokens);
  const int channels = static_cast<int>(sizes.channels);
  const Smem smem{round_up(num_queries, kTile), round_up(num_keys, kTile)};
  char* const shared = shared_memory();
  load<Element>(arguments, smem, shared);
  sync_threads();

  const PromptAttentionInputs& grads = arguments.grads;
  const Matrices matrices{shared_matrix(shared), shared_matrix(shared + smem.grad_out()),
                          shared_matrix(shared + smem.keys()), shared_matrix(shared + smem.values())};
  const auto* const lse = reinterpret_cast<const float*>(shared + smem.lse());
  const auto* const row_dot = reinterpret_cast<const float*>(shared + smem.row_dot());
  char* const results = shared + smem.results(warp_id());
  const float factor = arguments.scale * kLog2E;
  const int key_tiles = grads.k.data || grads.prompt_k.data ? smem.num_keys / kTile : 0;
  const int tiles = key_tiles + (grads.q.data ? smem.num_queries / kTile : 0);
  for (int round = 0; round * kWarpgroups < tiles; ++round) {
    const int tile = tile_of(round);
    if (tile < key_tiles) {
      float tile_k[kChannels / 2] = {};
      float tile_v[kChannels / 2] = {};
      const int key = tile * kTile;
      sum_over_queries<Element>(tile_k, tile_v, matrices, key, num_queries, factor, lse, row_dot);
      const Position position(sizes);
      const JointRows<Element> grad_k{{grads.prompt_k, position}, {grads.k, position}, num_prompts};
      const JointRows<Element> grad_v{{grads.prompt_v, position}, {grads.v, position}, num_prompts};
      store_tile<Element>(results, tile_k, arguments.scale, grad_k, key, num_keys, channels);
      store_tile<Element>(results, tile_v, 1.0f, grad_v, key, num_keys, channels);
    } else if (tile < tiles) {
      float tile_q[kChannels / 2] = {};
      const int query = (tile - key_tiles) * kTile;
      sum_over_keys<Element>(tile_q, matrices, query, num_keys, factor, lse, row_dot);
      const Rows<Element> grad_q(grads.q, Position(sizes));
      store_tile<Element>(results, tile_q, arguments.scale, grad_q, query, num_queries, channels);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1) prompt_attention_bwd_kernel(const PromptAttentionBackward arguments) {
#ifdef VAPT_FAST_HAS_WGMMA
  backward<Element>(arguments);
#else
  trap();
#endif
}

Smem smem_of(std::int64_t queries, std::int64_t keys) {
  return {round_up(static_cast<int>(queries), kTile), round_up(static_cast<int>(keys), kTile)};
}

}  // namespace
}  // namespace prompt_attention

bool prompt_attention_fits(std::int64_t queries, std::int64_t keys) {
  using namespace prompt_attention;
  return max(queries, keys) < kMaxSharedMemory / SharedMatrix::kRowBytes &&
         smem_of(queries, keys).size() <= kMaxSharedMemory;
}

Status launch_prompt_attention_backward(const PromptAttentionBackward& given, Stream stream) {
  using namespace prompt_attention;
  PromptAttentionBackward arguments = given;
  PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& grads = arguments.grads;
  Check check = checked_sizes(sizes);
  check_inputs(check, sizes, arguments.in);
  check.tensor("out", arguments.out, sizes.batch, sizes.queries, sizes.heads, 2);
  check.tensor("grad_out", arguments.grad_out, sizes.batch, sizes.queries, sizes.heads, 2);
  check.pointer("lse", arguments.lse, sizes.batch * sizes.heads * sizes.queries, sizeof(float));
  check.tensor("the gradient of q", grads.q, sizes.batch, grads.q.data ? sizes.queries : 0, sizes.heads, 2);
  check.tensor("the gradient of k", grads.k, sizes.batch, grads.v.data ? sizes.tokens : 0, sizes.heads, 2);
  check.tensor("the gradient of v", grads.v, sizes.batch, grads.k.data ? sizes.tokens : 0, sizes.heads, 2);
  check.tensor("the gradient of prompt_k", grads.prompt_k, sizes.batch, grads.prompt_v.data ? sizes.prompts : 0,
               sizes.heads, 2);
  check.tensor("the gradient of prompt_v", grads.prompt_v, sizes.batch, grads.prompt_k.data ? sizes.prompts : 0,
               sizes.heads, 2);
  if (!check.ok() || sizes.batch * sizes.heads == 0) {
    return check.status();
  }
  if (!grads.q.data && !grads.k.data) {
    sizes.tokens = 0;  // the prompts' gradients don't need their keys and values
  }
  if (sizes.prompts + sizes.tokens == 0) {
    return check.status();
  }
  LaunchShape shape;
  shape.blocks = sizes.batch * sizes.heads;
  shape.threads = kThreads;
  shape.shared_memory = smem_of(sizes.queries, sizes.prompts + sizes.tokens).size();
  return dispatch_dtype(sizes.dtype, [&](auto element) {
    return launch(prompt_attention_bwd_kernel<decltype(element)>, shape, stream, arguments);
  });
}

}  // namespace vapt_fast
