// The backward of prompt_attention for heads of more than 64 channels: see prompt_attention/api.h.
//
// A block computes an image and head, in two passes: of its four matrices two lie in shared memory as a whole, and two in
// parts, a tile for each warpgroup. The first pass has all queries, with the gradient of out, and gives the gradients of
// keys and values; the second one has all keys and values, and gives the gradient of queries.

#include "prompt_attention/backward.cuh"

namespace vapt_fast {
namespace prompt_attention {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kThreads = kWarpgroups * kWarpgroupSize;
constexpr int kPartRows = kWarpgroups * kTile;

// The block's shared memory: two matrices of ``rows`` rows, parts of two more, and of each query lse, all in a row, and
// out . grad_out.
template <int CHANNELS>
struct Smem {
  int rows;
  int num_queries;

  __host__ __device__ __forceinline__ int whole(int matrix) const {
    return matrix * rows * Matrix<CHANNELS>::kRowBytes;
  }
  __host__ __device__ __forceinline__ int part(int matrix) const {
    return whole(2) + matrix * kPartRows * Matrix<CHANNELS>::kRowBytes;
  }
  __host__ __device__ __forceinline__ int lse() const { return part(2); }
  __host__ __device__ __forceinline__ int row_dot() const {
    return lse() + round_up(num_queries, kTile) * static_cast<int>(sizeof(float));
  }
  __host__ __device__ __forceinline__ int size() const {
    return row_dot() + round_up(num_queries, kTile) * static_cast<int>(sizeof(float));
  }
};

// With the place where the warps put their results together.
template <int CHANNELS>
struct WideBlock : Block<CHANNELS> {
  char* results;

  __device__ __forceinline__ char* staging() const { return results + warp_id() * Matrix<CHANNELS>::kStagedBytes; }
};

// Copies a part of the ``count`` rows of ``source``, from row ``first`` on, and zeros after the last.
template <int CHANNELS, typename Source>
__device__ __forceinline__ void load_part(char* shared, const Source& source, int first, int count, int channels) {
  constexpr int kUnits = Matrix<CHANNELS>::kUnits;
  const int unit = thread_id() % kUnits;
#pragma unroll 4
  for (int row = thread_id() / kUnits; row < kPartRows; row += kThreads / kUnits) {
    char* const to = shared + Matrix<CHANNELS>::offset(row, unit, kPartRows);
    if (first + row < count && unit * kVec < channels) {
      cp_async(to, source.at(first + row) + unit * kVec);
    } else {
      store16(to, Bytes16{});
    }
  }
}

// Makes what was copied visible to the products of all threads.
__device__ __forceinline__ void finish_loads() {
  cp_async_commit();
  cp_async_wait<0>();
  fence_shared();
  sync_threads();
}

// The gradients of the first ``num_keys`` keys and values.
template <typename Element, int CHANNELS>
__device__ __forceinline__ void keys_pass(const PromptAttentionBackward& arguments, const Smem<CHANNELS>& smem,
                                          int num_keys) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& in = arguments.in;
  const int num_queries = smem.num_queries;
  const int num_prompts = static_cast<int>(sizes.prompts);
  const int channels = static_cast<int>(sizes.channels);
  const int rows = chunk_rows(num_queries);
  char* const shared = shared_memory();
  auto* const lse = reinterpret_cast<float*>(shared + smem.lse());
  auto* const row_dot = reinterpret_cast<float*>(shared + smem.row_dot());
  {
    const Position position(sizes);
    load_rows<kThreads, CHANNELS>(shared, rows, 0, Rows<const Element>(in.q, position), num_queries, channels);
    clear_from<kThreads, CHANNELS>(shared, rows, num_queries);
    load_grad_out<kThreads, CHANNELS, Element>(arguments, position, shared + smem.whole(1), rows, 0, lse, row_dot);
  }
  const WideBlock<CHANNELS> block{{num_queries,
                                   num_keys,
                                   arguments.scale * kLog2E,
                                   {shared, rows},
                                   {shared + smem.whole(1), rows},
                                   {shared + smem.part(0), kPartRows},
                                   {shared + smem.part(1), kPartRows},
                                   lse,
                                   row_dot},
                                  shared + smem.part(0)};
  const int row = warpgroup_id() * kTile;
  for (int first = 0; first < num_keys; first += kPartRows) {
    {
      const Position position(sizes);
      const JointRows<const Element> k{{in.prompt_k, position}, {in.k, position}, num_prompts};
      const JointRows<const Element> v{{in.prompt_v, position}, {in.v, position}, num_prompts};
      load_part<CHANNELS>(shared + smem.part(0), k, first, num_keys, channels);
      load_part<CHANNELS>(shared + smem.part(1), v, first, num_keys, channels);
    }
    finish_loads();
    const int key = first + row;
    float grad_keys[Matrix<CHANNELS>::kSums] = {};
    float grad_values[Matrix<CHANNELS>::kSums] = {};
    if (key < num_keys) {
      sum_over_queries<Element>(block, grad_keys, grad_values, key, row, [](const auto&, int, int) {});
    }
    sync_threads();  // the parts have been read: results take their place
    if (key < num_keys) {
      store_keys<Element>(arguments, block, grad_keys, grad_values, key);
    }
    sync_threads();  // the results have left
  }
}

// The gradient of queries.
template <typename Element, int CHANNELS>
__device__ __forceinline__ void queries_pass(const PromptAttentionBackward& arguments, const Smem<CHANNELS>& smem) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& in = arguments.in;
  const int num_queries = smem.num_queries;
  const int num_keys = static_cast<int>(sizes.prompts + sizes.tokens);
  const int channels = static_cast<int>(sizes.channels);
  const int rows = chunk_rows(num_keys);
  char* const shared = shared_memory();
  auto* const lse = reinterpret_cast<float*>(shared + smem.lse());
  auto* const row_dot = reinterpret_cast<float*>(shared + smem.row_dot());
  {
    const Position position(sizes);
    load_keys<kThreads, CHANNELS, Element>(shared, in.prompt_k, in.k, sizes, position, rows);
    load_keys<kThreads, CHANNELS, Element>(shared + smem.whole(1), in.prompt_v, in.v, sizes, position, rows);
  }
  const WideBlock<CHANNELS> block{{num_queries,
                                   num_keys,
                                   arguments.scale * kLog2E,
                                   {shared + smem.part(0), kPartRows},
                                   {shared + smem.part(1), kPartRows},
                                   {shared, rows},
                                   {shared + smem.whole(1), rows},
                                   lse,
                                   row_dot},
                                  shared + smem.part(0)};
  const int row = warpgroup_id() * kTile;
  for (int first = 0; first < num_queries; first += kPartRows) {
    {
      const Position position(sizes);
      load_part<CHANNELS>(shared + smem.part(0), Rows<const Element>(in.q, position), first, num_queries, channels);
      load_grad_out<kThreads, CHANNELS, Element>(arguments, position, shared + smem.part(1), kPartRows, first, lse,
                                                 row_dot);
    }
    finish_loads();
    const int query = first + row;
    float grad_queries[Matrix<CHANNELS>::kSums] = {};
    if (query < num_queries) {
      sum_over_keys<Element>(block, grad_queries, query, row);
    }
    sync_threads();  // the parts have been read: results take their place
    if (query < num_queries) {
      store_queries<Element>(arguments, block, grad_queries, query);
    }
    sync_threads();  // the results have left
  }
}

template <typename Element, int CHANNELS>
__global__ void __launch_bounds__(kThreads, 1)
    prompt_attention_bwd_wide_kernel(const PromptAttentionBackward arguments, const Smem<CHANNELS> smem) {
#ifdef VAPT_FAST_HAS_WGMMA
  const PromptAttentionInputs& grads = arguments.grads;
  const int num_prompts = static_cast<int>(arguments.sizes.prompts);
  const int num_tokens = static_cast<int>(arguments.sizes.tokens);
  if (grads.k.data || grads.prompt_k.data) {
    keys_pass<Element>(arguments, smem, grads.k.data ? num_prompts + num_tokens : num_prompts);
  }
  if (grads.q.data) {
    queries_pass<Element>(arguments, smem);
  }
#else
  trap();
#endif
}

}  // namespace

Status launch_wide_backward(const PromptAttentionBackward& arguments, Stream stream) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const int num_queries = static_cast<int>(sizes.queries);
  const int num_keys = static_cast<int>(sizes.prompts + sizes.tokens);
  LaunchShape shape;
  shape.blocks = sizes.batch * sizes.heads;
  shape.threads = kThreads;
  return dispatch_wide(sizes, [&](auto element, auto channels) {
    constexpr int CHANNELS = decltype(channels)::value;
    const Smem<CHANNELS> smem{max(chunk_rows(num_queries), chunk_rows(num_keys)), num_queries};
    shape.shared_memory = smem.size();
    return launch(prompt_attention_bwd_wide_kernel<decltype(element), CHANNELS>, shape, stream, arguments, smem);
  });
}

}  // namespace prompt_attention
}  // namespace vapt_fast
