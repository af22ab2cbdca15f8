// The backward of prompt_attention for heads of at most 64 channels, and the launcher of all: see
// prompt_attention/api.h.
//
// A block computes an image and head, of which queries, keys, values and the gradient of out lie in its shared memory.
// Its warpgroups share the tiles, first those of keys.

#include "prompt_attention/backward.cuh"

namespace vapt_fast {
namespace prompt_attention {
namespace {

constexpr int kWarpgroups = 3;
constexpr int kThreads = kWarpgroups * kWarpgroupSize;
constexpr std::int64_t kMaxSharedMemory = 227 * 1024;
constexpr int kChannels = 64;
constexpr int kStagedBytes = Matrix<kChannels>::kStagedBytes;

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

// With what else the tiles use of the block's shared memory.
struct NarrowBlock : Block<kChannels> {
  Smem smem;
  char* shared;

  __device__ __forceinline__ NarrowBlock(const Smem& smem, char* shared, float scale)
      : Block<kChannels>{smem.num_queries,
                         smem.num_keys,
                         scale * kLog2E,
                         {shared, chunk_rows(smem.num_queries)},
                         {shared + smem.grad_out(), chunk_rows(smem.num_queries)},
                         {shared + smem.keys(), smem.key_rows()},
                         {shared + smem.values(), smem.key_rows()},
                         reinterpret_cast<const float*>(shared + smem.lse()),
                         reinterpret_cast<const float*>(shared + smem.row_dot())},
        smem(smem),
        shared(shared) {}

  // Where the gradient of the scores of a tile of queries is kept.
  __device__ __forceinline__ char* kept(int tile) const { return shared + smem.grad_scores(tile); }
  // Where this warp puts its results together.
  __device__ __forceinline__ char* staging() const { return shared + smem.results(warp_id()); }
};

// Loads all that the products take, and makes it visible to them.
template <typename Element>
__device__ __forceinline__ void load(const PromptAttentionBackward& arguments, const Smem& smem, char* shared) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& in = arguments.in;
  const Position position(sizes);
  const int num_queries = static_cast<int>(sizes.queries);
  const int rows = chunk_rows(num_queries);
  load_rows<kThreads, kChannels>(shared, rows, 0, Rows<const Element>(in.q, position), num_queries,
                                 static_cast<int>(sizes.channels));
  clear_from<kThreads, kChannels>(shared, rows, num_queries);
  load_keys<kThreads, kChannels, Element>(shared + smem.keys(), in.prompt_k, in.k, sizes, position, smem.key_rows());
  load_keys<kThreads, kChannels, Element>(shared + smem.values(), in.prompt_v, in.v, sizes, position, smem.key_rows());
  cp_async_commit();
  load_grad_out<kThreads, kChannels, Element>(arguments, position, shared + smem.grad_out(), rows, 0,
                                              reinterpret_cast<float*>(shared + smem.lse()),
                                              reinterpret_cast<float*>(shared + smem.row_dot()));
  cp_async_wait<0>();
  fence_shared();
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

// The gradient of a tile of queries by the gradient of scores that the keys' tiles have kept.
template <typename Element>
__device__ __forceinline__ void sum_of_kept(const Block<kChannels>& block, float (&grad_queries)[kChannels / 2],
                                            const char* kept) {
  const SharedMatrix grad_scores = shared_matrix(kept);
  for_each_chunk(block.num_keys, [&](auto size, int key) {
    wgmma_fence();
#pragma unroll
    for (int k = key; k < key + decltype(size)::value; k += kDepth) {
      wgmma_by_rows<Element>(grad_queries, grad_scores.rows_from(k), block.keys.rows_from(k).first, true);
    }
    wgmma_commit();
    wgmma_wait<0>(grad_queries);
  });
}

template <typename Element>
__device__ __forceinline__ void backward(const PromptAttentionBackward& arguments, const Smem& smem) {
  char* const shared = shared_memory();
  load<Element>(arguments, smem, shared);
  sync_threads();
  const NarrowBlock block(smem, shared, arguments.scale);
  const auto keep_chunk = [&](const auto& grad_scores, int key, int query) {
    if (query < block.smem.num_kept * kTile) {
      keep(block.kept(query / kTile), grad_scores, key, block.num_keys);
    }
  };
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
      const int key = tile * kTile;
      sum_over_queries<Element>(block, grad_keys, grad_values, key, key, keep_chunk);
      store_keys<Element>(arguments, block, grad_keys, grad_values, key);
    } else if (tile < tiles) {
      float grad_queries[kChannels / 2] = {};
      const int query = (smem.num_kept + tile - key_tiles) * kTile;
      sum_over_keys<Element>(block, grad_queries, query, query);
      store_queries<Element>(arguments, block, grad_queries, query);
    }
  }
  if (smem.num_kept > 0) {
    fence_shared();
    sync_threads();
    for (int tile = warpgroup_id(); tile < smem.num_kept; tile += kWarpgroups) {
      float grad_queries[kChannels / 2] = {};
      sum_of_kept<Element>(block, grad_queries, block.kept(tile));
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
  if (sizes.channels > kChannels) {
    return launch_wide_backward(arguments, stream);
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
