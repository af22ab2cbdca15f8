// What the backward's kernels share: tiles of keys, which give the gradients of keys and values, and tiles of queries,
// which give the gradient of queries. Both compute the scores again. No two warpgroups add to the same sum.

#pragma once

#include "prompt_attention/common.cuh"

namespace vapt_fast::prompt_attention {

// What the tiles are computed from: matrices in shared memory, each as far as it lies there.
template <int CHANNELS>
struct Block {
  static constexpr int kChannels = CHANNELS;

  int num_queries;
  int num_keys;
  float factor;  // of scores in base 2
  Matrix<CHANNELS> queries;
  Matrix<CHANNELS> grad_out;
  Matrix<CHANNELS> keys;
  Matrix<CHANNELS> values;
  const float* lse;
  const float* row_dot;  // out . grad_out
};

// Copies the gradient of out, with zeros after the last row, to a matrix of ``rows`` rows: from row ``begin`` on, as far as
// that goes. Computes the products with out, and copies lse.
template <int THREADS, int CHANNELS, typename Element>
__device__ __forceinline__ void load_grad_out(const PromptAttentionBackward& arguments, const Position& position,
                                              char* shared, int rows, int begin, float* lse, float* row_dot) {
  const Rows<const Element> grad_out(arguments.grad_out, position);
  const Rows<const Element> out(arguments.out, position);
  const int count = static_cast<int>(arguments.sizes.queries);
  constexpr int kUnits = Matrix<CHANNELS>::kUnits;
  const int unit = thread_id() % kUnits;
  const bool is_channel = unit * kVec < arguments.sizes.channels;
  constexpr int kStep = THREADS / kUnits;
  int end = chunk_rows(count);
  if constexpr (CHANNELS > kPanel) {
    end = min(end, begin + rows);
  }
  constexpr int kBatch = 6;  // rows that a thread loads before it needs the first
  for (int first = begin + thread_id() / kUnits; first < end; first += kBatch * kStep) {
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
        break;  // a whole warp: it has few rows
      }
      store16(shared + Matrix<CHANNELS>::offset(row - begin, unit, rows), grads[i].bytes[0]);
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

// Issues scores = a b^T and grads = grad_a grad_b^T, two groups.
template <typename Element, int CHANNELS, int COUNT>
__device__ __forceinline__ void multiply(float (&scores)[COUNT], float (&grads)[COUNT], const Matrix<CHANNELS>& a,
                                         const Matrix<CHANNELS>& b, const Matrix<CHANNELS>& grad_a,
                                         const Matrix<CHANNELS>& grad_b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < CHANNELS; k += kDepth) {
    wgmma<Element>(scores, a.columns_from(k), b.columns_from(k), k > 0);
  }
  wgmma_commit();
#pragma unroll
  for (int k = 0; k < CHANNELS; k += kDepth) {
    wgmma<Element>(grads, grad_a.columns_from(k), grad_b.columns_from(k), k > 0);
  }
  wgmma_commit();
}

// The gradients of 64 keys and values, from key ``key`` on, which is row ``row`` of their matrices: scores have a row for
// each of them, a column for each query. Calls ``keep(grad_scores, key, query)`` with the columns of each chunk.
template <typename Element, int CHANNELS, typename Keep>
__device__ __forceinline__ void sum_over_queries(const Block<CHANNELS>& block,
                                                 float (&grad_keys)[Matrix<CHANNELS>::kSums],
                                                 float (&grad_values)[Matrix<CHANNELS>::kSums], int key, int row,
                                                 Keep keep) {
  const Matrix<CHANNELS> keys = block.keys.rows_from(row);
  const Matrix<CHANNELS> values = block.values.rows_from(row);
  const bool is_needed = key + warp_row() < block.num_keys;  // or the warp computes what nobody reads
  for_each_chunk(block.num_queries, [&](auto size, int query) {
    constexpr int QUERIES = decltype(size)::value;
    const Matrix<CHANNELS> queries = block.queries.rows_from(query);
    const Matrix<CHANNELS> grad_out = block.grad_out.rows_from(query);
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
    keep(grad_scores, key, query);
    wgmma_wait<0>(grad_values, grad_keys);
  });
}

// The gradient of 64 queries, from query ``query`` on, which is row ``row`` of their matrices: scores have a row for each
// of them, a column for each key.
template <typename Element, int CHANNELS>
__device__ __forceinline__ void sum_over_keys(const Block<CHANNELS>& block,
                                              float (&grad_queries)[Matrix<CHANNELS>::kSums], int query, int row) {
  const Matrix<CHANNELS> queries = block.queries.rows_from(row);
  const Matrix<CHANNELS> grad_out = block.grad_out.rows_from(row);
  const bool is_needed = query + warp_row() < block.num_queries;
  const int mine = query + first_row();
  const float lse[2] = {block.lse[mine], block.lse[mine + 8]};
  const float row_dot[2] = {block.row_dot[mine], block.row_dot[mine + 8]};
  for_each_chunk(block.num_keys, [&](auto size, int key) {
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
      const int valid = block.num_keys - key - first_column();
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

// The warpgroup, as a number that the compiler knows to be the same for all lanes.
__device__ __forceinline__ int warpgroup_id() { return shuffle(warp_id(), 0) / 4; }

// Stores the gradients of keys and values. ``block`` is a Block, and says where each warp puts its results together.
template <typename Element, typename Block>
__device__ __forceinline__ void store_keys(const PromptAttentionBackward& arguments, const Block& block,
                                           const float (&grad_keys)[Matrix<Block::kChannels>::kSums],
                                           const float (&grad_values)[Matrix<Block::kChannels>::kSums], int key) {
  const PromptAttentionSizes& sizes = arguments.sizes;
  const PromptAttentionInputs& to = arguments.grads;
  const Position position(sizes);
  const int num_prompts = static_cast<int>(sizes.prompts);
  const int channels = static_cast<int>(sizes.channels);
  const JointRows<Element> k{{to.prompt_k, position}, {to.k, position}, num_prompts};
  const JointRows<Element> v{{to.prompt_v, position}, {to.v, position}, num_prompts};
  char* const staging = block.staging();
  store_tile<Element, Block::kChannels>(staging, grad_keys, arguments.scale, k, key, block.num_keys, channels);
  store_tile<Element, Block::kChannels>(staging, grad_values, 1.0f, v, key, block.num_keys, channels);
}

// Stores the gradient of queries.
template <typename Element, typename Block>
__device__ __forceinline__ void store_queries(const PromptAttentionBackward& arguments, const Block& block,
                                              const float (&grad_queries)[Matrix<Block::kChannels>::kSums], int query) {
  const Rows<Element> q(arguments.grads.q, Position(arguments.sizes));
  store_tile<Element, Block::kChannels>(block.staging(), grad_queries, arguments.scale, q, query, block.num_queries,
                                        static_cast<int>(arguments.sizes.channels));
}

// The launch for heads of more than 64 channels, of checked arguments.
Status launch_wide_backward(const PromptAttentionBackward& arguments, Stream stream);

}  // namespace vapt_fast::prompt_attention
