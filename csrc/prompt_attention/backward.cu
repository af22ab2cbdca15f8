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

// The block's shared memory: four matrices; of ``num_kept`` tiles of queries the gradient of the scores, transposed; for
// each warp 8 rows of results; and of each query lse, all in a row, and out . grad_out.
struct Smem {
  int num_queries;
  int num_keys;
  int num_kept;

  __host__ __device__ __forceinline__ int query_bytes() const {
    return chunk_rows(num_queries) * SharedMatrix::kRowBytes;
  }
  __host__ __device__ __forceinline__ int key_rows() const { return round_up(num_keys, kTile); }
  __host__ __device__ __forceinline__ int key_bytes() const { return key_rows() * SharedMatrix::kRowBytes; }
  __host__ __device__ __forceinline__ int grad_out() const { return query_bytes(); }
  // The last tile of queries may end in what follows: that makes rows of scores which nobody reads.
  __host__ __device__ __forceinline__ int keys() const { return 2 * query_bytes(); }
  __host__ __device__ __forceinline__ int values() const { return keys() + key_bytes(); }
  __host__ __device__ __forceinline__ int grad_scores(int tile) const { return values() + (1 + tile) * key_bytes(); }
  __host__ __device__ __forceinline__ int results(int warp) const {
    return grad_scores(num_kept) + warp * kStagedBytes;
  }
  __host__ __device__ __forceinline__ int lse() const { return results(kThreads / kWarpSize); }
  __host__ __device__ __forceinline__ int row_dot() const {
    return lse() + round_up(num_queries, kTile) * static_cast<int>(sizeof(float));
  }
  __host__ __device__ __forceinline__ int size() const {
    return row_dot() + round_up(num_queries, kTile) * static_cast<int>(sizeof(float));
  }
};

// What the tiles are computed from.
struct Block {
  Smem smem;
  char* shared;
  float factor;  // of scores in base 2
  SharedMatrix queries;
  SharedMatrix grad_out;
  SharedMatrix keys;
  SharedMatrix values;
  const float* lse;
  const float* row_dot;

  __device__ __forceinline__ Block(const Smem& smem, float scale)
      : smem(smem),
        shared(shared_memory()),
        factor(scale * kLog2E),
        queries(shared_matrix(shared)),
        grad_out(shared_matrix(shared + smem.grad_out())),
        keys(shared_matrix(shared + smem.keys())),
        values(shared_matrix(shared + smem.values())),
        lse(reinterpret_cast<const float*>(shared + smem.lse())),
        row_dot(reinterpret_cast<const float*>(shared + smem.row_dot())) {}
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
  constexpr int kStep = kThreads / kUnits;
  constexpr int kBatch = 6;  // rows that a thread loads before it needs the first
  const int end = chunk_rows(count);
  for (int first = thread_id() / kUnits; first < end; first += kBatch * kStep) {
    Vec8<Element> grads[kBatch] = {};
    Vec8<Element> values[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kStep;
      if (row < count && is_channel) {
        grads[i] = load_vec8(grad_out.at(row) + unit * kVec);
        values[i] = load_vec8(out.at(row) + unit * kVec);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kStep;
      if (row >= end) {
        break;  // a whole warp: it has four rows
      }
      store16(shared + smem.grad_out() + SharedMatrix::offset(row, unit), grads[i].bytes[0]);
      float grad[kVec];
      float value[kVec];
      widen(grads[i], grad);
      widen(values[i], value);
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        dot += grad[j] * value[j];
      }
      dot = lane_sum<1, kUnits>(dot);
      if (unit == 0) {
        // Beyond the queries the softmax is 0.
        lse[row] = row < count ? arguments.lse[block_id() * count + row] : INFINITY;
        row_dot[row] = dot;
      }
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
  clear_rows<kThreads>(shared, num_queries, chunk_rows(num_queries));
  load_keys<kThreads, Element>(shared + smem.keys(), in.prompt_k, in.k, sizes, position, smem.key_rows());
  load_keys<kThreads, Element>(shared + smem.values(), in.prompt_v, in.v, sizes, position, smem.key_rows());
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

// Stores the gradient of scores, 64 keys from row ``key`` on and the columns of one chunk, for sum_of_kept.
template <int COUNT>
__device__ __forceinline__ void keep(char* to, const std::uint32_t (&grad_scores)[COUNT][4], int key, int num_keys) {
  const int row = key + first_row();
#pragma unroll
  for (int i = 0; i < 4 * COUNT; ++i) {
    const int half = i % 2 * 8;
    const std::uint32_t word = row + half < num_keys ? grad_scores[i / 4][i % 4] : 0;  // what nobody reads may be NaN
    store4(to + SharedMatrix::offset(row + half, i / 2) + first_column() * 2, word);
  }
}

// The gradients of 64 keys and values, from row ``key`` on: scores have a row for each of them, a column for each query.
template <typename Element>
__device__ __forceinline__ void sum_over_queries(const Block& block, float (&grad_keys)[kChannels / 2],
                                                 float (&grad_values)[kChannels / 2], int key) {
  const SharedMatrix keys = block.keys.rows_from(key);
  const SharedMatrix values = block.values.rows_from(key);
  const bool is_needed = key + warp_row() < block.smem.num_keys;  // or the warp computes what nobody reads
  for_each_chunk(block.smem.num_queries, [&](auto size, int query) {
    constexpr int QUERIES = decltype(size)::value;
    const SharedMatrix queries = block.queries.rows_from(query);
    const SharedMatrix grad_out = block.grad_out.rows_from(query);
    const int column = query + first_column();
    float scores[QUERIES / 2];
    float grads[QUERIES / 2];
    multiply<Element>(scores, grads, keys, queries, values, grad_out);
    wgmma_wait<1>(scores);
    if (is_needed) {
#pragma unroll
      for (int i = 0; i < QUERIES / 2; i += 4) {
        const Bytes8 lse = load8(block.lse + column + column_of(i));
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
          scores[j] = exp2_approx(scores[j] * block.factor - float_of(lse.words[j % 2]));
        }
      }
    }
    wgmma_wait<0>(grads);
    if (is_needed) {
#pragma unroll
      for (int i = 0; i < QUERIES / 2; i += 4) {
        const Bytes8 row_dot = load8(block.row_dot + column + column_of(i));
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
          grads[j] = scores[j] * (grads[j] - float_of(row_dot.words[j % 2]));
        }
      }
    }
    std::uint32_t softmax[QUERIES / kDepth][4];
    std::uint32_t grad_scores[QUERIES / kDepth][4];
    pack_tile<Element>(softmax, scores);
    pack_tile<Element>(grad_scores, grads);
    wgmma_fence();
    accumulate<Element>(grad_values, softmax, grad_out);
    accumulate<Element>(grad_keys, grad_scores, queries);
    wgmma_commit();
    if (query < block.smem.num_kept * kTile) {
      keep(block.shared + block.smem.grad_scores(query / kTile), grad_scores, key, block.smem.num_keys);
    }
    wgmma_wait<0>(grad_values, grad_keys);
  });
}

// The gradient of 64 queries, from row ``query`` on: scores have a row for each of them, a column for each key.
template <typename Element>
__device__ __forceinline__ void sum_over_keys(const Block& block, float (&grad_queries)[kChannels / 2], int query) {
  const SharedMatrix queries = block.queries.rows_from(query);
  const SharedMatrix grad_out = block.grad_out.rows_from(query);
  const bool is_needed = query + warp_row() < block.smem.num_queries;
  const int row = query + first_row();
  const float lse[2] = {block.lse[row], block.lse[row + 8]};
  const float row_dot[2] = {block.row_dot[row], block.row_dot[row + 8]};
  for_each_chunk(block.smem.num_keys, [&](auto size, int key) {
    constexpr int KEYS = decltype(size)::value;
    float scores[KEYS / 2];
    float grads[KEYS / 2];
    multiply<Element>(scores, grads, queries, block.keys.rows_from(key), grad_out, block.values.rows_from(key));
    wgmma_wait<1>(scores);
    if (is_needed) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        scores[i] = exp2_approx(scores[i] * block.factor - lse[i / 2 % 2]);
      }
    }
    wgmma_wait<0>(grads);
    if (is_needed) {
      const int valid = block.smem.num_keys - key - first_column();
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        grads[i] = column_of(i) < valid ? scores[i] * (grads[i] - row_dot[i / 2 % 2]) : 0.0f;
      }
    }
    std::uint32_t grad_scores[KEYS / kDepth][4];
    pack_tile<Element>(grad_scores, grads);
    wgmma_fence();
    accumulate<Element>(grad_queries, grad_scores, block.keys.rows_from(key));
    wgmma_commit();
    wgmma_wait<0>(grad_queries);
  });
}

// The same by the gradient of scores that the keys' tiles have kept.
template <typename Element>
__device__ __forceinline__ void sum_of_kept(const Block& block, float (&grad_queries)[kChannels / 2], int tile) {
  const SharedMatrix grad_scores = shared_matrix(block.shared + block.smem.grad_scores(tile));
  for_each_chunk(block.smem.num_keys, [&](auto size, int key) {
    wgmma_fence();
#pragma unroll
    for (int k = key; k < key + decltype(size)::value; k += kDepth) {
      wgmma_by_rows<Element>(grad_queries, grad_scores.rows_from(k), block.keys.rows_from(k), true);
    }
    wgmma_commit();
    wgmma_wait<0>(grad_queries);
  });
}

// The warpgroup, as a number that the compiler knows to be the same for all lanes.
__device__ __forceinline__ int warpgroup_id() { return shuffle(warp_id(), 0) / 4; }

template <typename Element>
__device__ __forceinline__ void store_keys(const PromptAttentionBackward& arguments, const Block& block,
                                           const float (&grad_keys)[kChannels / 2],
                                           const float (&grad_values)[kChannels / 2], int key) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& to = arguments.grads;
  const Position position(sizes);
  const int num_prompts = static_cast<int>(sizes.prompts);
  const int channels = static_cast<int>(sizes.channels);
  const JointRows<Element> k{{to.prompt_k, position}, {to.k, position}, num_prompts};
  const JointRows<Element> v{{to.prompt_v, position}, {to.v, position}, num_prompts};
  char* const staging = block.shared + block.smem.results(warp_id());
  store_tile<Element>(staging, grad_keys, arguments.scale, k, key, block.smem.num_keys, channels);
  store_tile<Element>(staging, grad_values, 1.0f, v, key, block.smem.num_keys, channels);
}

template <typename Element>
__device__ __forceinline__ void store_queries(const PromptAttentionBackward& arguments, const Block& block,
                                              const float (&grad_queries)[kChannels / 2], int query) {
  const Rows<Element> q(arguments.grads.q, Position(arguments.sizes));
  store_tile<Element>(block.shared + block.smem.results(warp_id()), grad_queries, arguments.scale, q, query,
                      block.smem.num_queries, static_cast<int>(arguments.sizes.channels));
}

template <typename Element>
__device__ __forceinline__ void backward(const PromptAttentionBackward& arguments, const Smem& smem) {
  load<Element>(arguments, smem, shared_memory());
  sync_threads();
  const Block block(smem, arguments.scale);
  const PromptAttentionInputs& grads = arguments.grads;
  const int key_tiles = grads.k.data || grads.prompt_k.data ? smem.key_rows() / kTile : 0;
  const int query_tiles = grads.q.data ? round_up(smem.num_queries, kTile) / kTile : 0;
  const int tiles = key_tiles + query_tiles - smem.num_kept;
  for (int round = 0; round * kWarpgroups < tiles; ++round) {
    // Back and forth, since the first tiles take longer.
    const int tile = round * kWarpgroups + (round % 2 ? kWarpgroups - 1 - warpgroup_id() : warpgroup_id());
    if (tile < key_tiles) {
      float grad_keys[kChannels / 2] = {};
      float grad_values[kChannels / 2] = {};
      sum_over_queries<Element>(block, grad_keys, grad_values, tile * kTile);
      store_keys<Element>(arguments, block, grad_keys, grad_values, tile * kTile);
    } else if (tile < tiles) {
      float grad_queries[kChannels / 2] = {};
      const int query = (smem.num_kept + tile - key_tiles) * kTile;
      sum_over_keys<Element>(block, grad_queries, query);
      store_queries<Element>(arguments, block, grad_queries, query);
    }
  }
  if (smem.num_kept > 0) {
    fence_shared();
    sync_threads();
    for (int tile = warpgroup_id(); tile < smem.num_kept; tile += kWarpgroups) {
      float grad_queries[kChannels / 2] = {};
      sum_of_kept<Element>(block, grad_queries, tile);
      store_queries<Element>(arguments, block, grad_queries, tile * kTile);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    prompt_attention_bwd_kernel(const PromptAttentionBackward arguments, const Smem smem) {
#ifdef VAPT_FAST_HAS_WGMMA
  backward<Element>(arguments, smem);
#else
  trap();
#endif
}

// With as many tiles kept as there is room for, if they may be.
Smem smem_of(std::int64_t queries, std::int64_t keys, bool keeps) {
  Smem smem{static_cast<int>(queries), static_cast<int>(keys), 0};
  if (keeps) {
    const std::int64_t room = (kMaxSharedMemory - smem.size()) / smem.key_bytes();
    smem.num_kept = static_cast<int>(min(room, std::int64_t{round_up(smem.num_queries, kTile) / kTile}));
  }
  return smem;
}

}  // namespace
}  // namespace prompt_attention

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
  const bool keeps = grads.q.data && (grads.k.data || grads.prompt_k.data);
  const Smem smem = smem_of(sizes.queries, sizes.prompts + sizes.tokens, keeps);
  LaunchShape shape;
  shape.blocks = sizes.batch * sizes.heads;
  shape.threads = kThreads;
  shape.shared_memory = smem.size();
  return dispatch_dtype(sizes.dtype, [&](auto element) {
    return launch(prompt_attention_bwd_kernel<decltype(element)>, shape, stream, arguments, smem);
  });
}

}  // namespace vapt_fast
