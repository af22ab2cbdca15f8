// What forward and backward share: rows in shared memory, chunks of them, tiles of results.

#pragma once

#include <type_traits>

#include "common/check.h"
#include "common/vec8.cuh"
#include "common/wgmma.cuh"
#include "prompt_attention/api.h"

namespace vapt_fast::prompt_attention {

// A tile is what a warpgroup computes: 64 rows of scores, over all columns, a chunk of at most 64 at a time. Each of its
// warps has 16 rows. The kernels' CHANNELS are those of a head, with zeros after its own: 64, 80, 96 or 128.
constexpr int kTile = 64;
constexpr int kMostRows = 13 * kTile;     // of queries and keys, each in whole tiles, with heads of 64 channels
constexpr int kMostWideRows = 5 * kTile;  // of queries, and of keys, with wider heads
constexpr int kMostChannels = 128;
constexpr int kPanel = 64;  // channels of a SharedMatrix
constexpr int kDepth = 16;  // of a product
constexpr int kWarpRows = 16;
constexpr int kStagedRows = kWarpRows / 2;
constexpr float kLog2E = 1.4426950408889634f;

// A matrix of CHANNELS columns in shared memory: panels of 64 columns, one after the other, each of all rows, which are a
// multiple of 8.
template <int CHANNELS>
struct Matrix {
  static constexpr int kPanels = (CHANNELS + kPanel - 1) / kPanel;
  static constexpr int kUnits = kPanels * SharedMatrix::kRowBytes / SharedMatrix::kUnitBytes;  // of a row
  static constexpr int kRowBytes = kPanels * SharedMatrix::kRowBytes;
  static constexpr int kStagedBytes = kStagedRows * kRowBytes;  // of a warp's results, see store_tile
  static constexpr int kSums = kPanels * kPanel / 2;            // of a thread, of a tile that has as many columns

  SharedMatrix first;         // panel
  std::uint32_t panel_units;  // from a panel to the next

  __device__ __forceinline__ Matrix(const char* shared, int rows)
      : first(shared_matrix(shared)), panel_units(rows * SharedMatrix::kRowBytes / SharedMatrix::kUnitBytes) {}
  __device__ __forceinline__ Matrix(SharedMatrix first, std::uint32_t panel_units)
      : first(first), panel_units(panel_units) {}

  // Where a unit of 16 bytes of a row lies in a matrix of ``rows`` rows.
  __device__ __forceinline__ static int offset(int row, int unit, int rows) {
    if constexpr (kPanels == 1) {
      return SharedMatrix::offset(row, unit);
    } else {
      constexpr int kPanelUnits = kUnits / kPanels;
      return unit / kPanelUnits * rows * SharedMatrix::kRowBytes + SharedMatrix::offset(row, unit % kPanelUnits);
    }
  }

  // What begins at a row, a multiple of 8.
  __device__ __forceinline__ Matrix rows_from(int row) const { return {first.rows_from(row), panel_units}; }

  // What begins at a column, a multiple of 16, as far as its panel goes.
  __device__ __forceinline__ SharedMatrix columns_from(int column) const {
    return {first.columns_from(column % kPanel).first_unit + column / kPanel * panel_units};
  }
};

// Those of a thread's sums that are of a panel's columns.
template <int PANEL, int COUNT>
__device__ __forceinline__ auto& panel_of(float (&sums)[COUNT]) {
  return reinterpret_cast<float (&)[kPanel / 2]>(sums[PANEL * kPanel / 2]);
}

// Of a thread's accumulators, number i is in row first_row() + row_of(i) of its warpgroup's tile and in column
// first_column() + column_of(i).
__device__ __forceinline__ int warp_row() { return warp_id() % 4 * kWarpRows; }
__device__ __forceinline__ int first_row() { return warp_row() + lane_id() / 4; }
__device__ __forceinline__ int first_column() { return lane_id() % 4 * 2; }
__device__ __forceinline__ constexpr int row_of(int i) { return i / 2 % 2 * 8; }
__device__ __forceinline__ constexpr int column_of(int i) { return i / 4 * 8 + i % 2; }

__host__ __device__ __forceinline__ int round_up(int count, int to) { return (count + to - 1) / to * to; }

// The rows that chunks of 64 and a last one of 16, 32 or 64 cover.
__host__ __device__ __forceinline__ int chunk_rows(int count) {
  const int rows = round_up(count, kDepth);
  return rows % kTile == 3 * kDepth ? rows + kDepth : rows;
}

// Calls ``use`` with the size of each chunk, as a type, and its first row.
template <typename Use>
__device__ __forceinline__ void for_each_chunk(int count, Use use) {
  const int rows = chunk_rows(count);
  int first = 0;
  for (; first + kTile <= rows; first += kTile) {
    use(std::integral_constant<int, kTile>{}, first);
  }
  if (rows - first == 32) {
    use(std::integral_constant<int, 32>{}, first);
  } else if (rows - first == 16) {
    use(std::integral_constant<int, 16>{}, first);
  }
}

// The image and head of a block. What is computed from them, addresses, does not stay in registers.
struct Position {
  int image;
  int head;

  __device__ __forceinline__ explicit Position(const PromptAttentionSizes& sizes) {
    const int block = opaque(static_cast<int>(block_id()));
    image = block / static_cast<int>(sizes.heads);
    head = block % static_cast<int>(sizes.heads);
  }
};

// Their rows.
template <typename Element>
struct Rows {
  Element* first;
  std::int64_t stride;
  bool exist;

  __device__ __forceinline__ Rows(const Tensor4& tensor, const Position& position)
      : first(static_cast<Element*>(tensor.data) + position.image * tensor.batch_stride +
              position.head * tensor.head_stride),
        stride(tensor.row_stride),
        exist(tensor.data) {}

  __device__ __forceinline__ Element* at(int row) const { return first + row * stride; }
  __device__ __forceinline__ bool has(int) const { return exist; }
};

// Rows of prompts, then of tokens.
template <typename Element>
struct JointRows {
  Rows<Element> prompts;
  Rows<Element> tokens;
  int num_prompts;

  __device__ __forceinline__ Element* at(int row) const {
    return row < num_prompts ? prompts.at(row) : tokens.at(row - num_prompts);
  }
  __device__ __forceinline__ bool has(int row) const { return row < num_prompts ? prompts.exist : tokens.exist; }
};

// Copies ``count`` rows to a matrix of ``rows`` rows, from row ``first`` of it on, with all THREADS; asynchronously.
template <int THREADS, int CHANNELS, typename Element>
__device__ __forceinline__ void load_rows(char* shared, int rows, int first, const Rows<Element>& source, int count,
                                          int channels) {
  constexpr int kUnits = Matrix<CHANNELS>::kUnits;
  constexpr int kStep = THREADS / kUnits;  // a multiple of 8, so that a thread's units are all in one column
  const int unit = thread_id() % kUnits;
  int row = thread_id() / kUnits;
  char* to = shared + Matrix<CHANNELS>::offset(first + row, unit, rows);
  const Element* from = source.at(row) + unit * kVec;
  const bool is_channel = unit * kVec < channels;
#pragma unroll 4
  for (; row < count; row += kStep, to += kStep * SharedMatrix::kRowBytes, from += kStep * source.stride) {
    if (is_channel) {
      cp_async(to, from);
    } else {
      store16(to, Bytes16{});
    }
  }
}

// Fills rows of shared memory with zeros.
template <int THREADS>
__device__ __forceinline__ void clear_rows(char* shared, int first, int end) {
  constexpr int kUnits = Matrix<kPanel>::kUnits;
  for (int unit = first * kUnits + thread_id(); unit < end * kUnits; unit += THREADS) {
    store16(shared + unit * SharedMatrix::kUnitBytes, Bytes16{});
  }
}

// Fills a matrix of ``rows`` rows with zeros from row ``first`` on.
template <int THREADS, int CHANNELS>
__device__ __forceinline__ void clear_from(char* shared, int rows, int first) {
  clear_rows<THREADS>(shared, first, rows);
  if constexpr (CHANNELS > kPanel) {
    clear_rows<THREADS>(shared, rows + first, 2 * rows);
  }
}

// Copies the prompts' rows, then the tokens', and zeros, to a matrix of ``rows`` rows.
template <int THREADS, int CHANNELS, typename Element>
__device__ __forceinline__ void load_keys(char* shared, const Tensor4& of_prompts, const Tensor4& of_tokens,
                                          const PromptAttentionSizes& sizes, const Position& position, int rows) {
  const int num_prompts = static_cast<int>(sizes.prompts);
  const int num_tokens = static_cast<int>(sizes.tokens);
  const int channels = static_cast<int>(sizes.channels);
  load_rows<THREADS, CHANNELS>(shared, rows, 0, Rows<const Element>(of_prompts, position), num_prompts, channels);
  load_rows<THREADS, CHANNELS>(shared, rows, num_prompts, Rows<const Element>(of_tokens, position), num_tokens,
                               channels);
  clear_from<THREADS, CHANNELS>(shared, rows, num_prompts + num_tokens);
}

// Stores a warp's 16 rows of a tile times ``factor``, by way of 8 rows in shared memory. The tile's first row is row
// ``first`` of ``to``, which has ``count``.
template <typename Element, int CHANNELS, typename Destination>
__device__ __forceinline__ void store_tile(char* staging, const float (&tile)[Matrix<CHANNELS>::kSums], float factor,
                                           const Destination& to, int first, int count, int channels) {
  constexpr int kUnits = Matrix<CHANNELS>::kUnits;
  const int lane = opaque(lane_id());
  const int unit = lane % kUnits;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sync_warp();  // the last rows have left
#pragma unroll
    for (int i = 2 * half; i < CHANNELS / 2; i += 4) {
      const std::uint32_t word = pack<Element>(tile[i] * factor, tile[i + 1] * factor);
      store4(staging + Matrix<CHANNELS>::offset(lane / 4, i / 4, kStagedRows) + lane % 4 * 4, word);
    }
    sync_warp();
#pragma unroll
    for (int from = lane / kUnits; from < kStagedRows; from += kWarpSize / kUnits) {
      const int row = first + warp_row() + half * kStagedRows + from;
      if (row < count && unit * kVec < channels && to.has(row)) {
        store16(to.at(row) + unit * kVec, load16(staging + Matrix<CHANNELS>::offset(from, unit, kStagedRows)));
      }
    }
  }
}

// Accumulators as the first factor of the next product.
template <typename Element, int COUNT>
__device__ __forceinline__ void pack_tile(std::uint32_t (&packed)[COUNT / 8][4], const float (&tile)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) {
    packed[i / 8][i % 8 / 2] = pack<Element>(tile[i], tile[i + 1]);
  }
}

// Issues sum += tile b, panel by panel.
template <typename Element, int CHANNELS, int COUNT>
__device__ __forceinline__ void accumulate(float (&sum)[Matrix<CHANNELS>::kSums], const std::uint32_t (&tile)[COUNT][4],
                                           const Matrix<CHANNELS>& b) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const Matrix<CHANNELS> rows = b.rows_from(k * kDepth);
    wgmma_by_rows<Element>(panel_of<0>(sum), tile[k], rows.columns_from(0), true);
    if constexpr (CHANNELS > kPanel) {
      wgmma_by_rows<Element>(panel_of<1>(sum), tile[k], rows.columns_from(kPanel), true);
    }
  }
}

inline Check checked_sizes(const PromptAttentionSizes& sizes) {
  Check check;
  const std::int64_t counts[] = {sizes.batch, sizes.queries, sizes.tokens, sizes.prompts, sizes.heads};
  for (const std::int64_t count : counts) {
    if (count < 0) {
      check.fail(Code::invalid, "sizes must not be negative");
    }
  }
  if (sizes.tokens + sizes.prompts < 1) {
    check.fail(Code::invalid, "there must be a key");
  }
  if (sizes.channels < kVec || sizes.channels > kMostChannels || sizes.channels % kVec) {
    check.fail(Code::unsupported, "channels must be 8, 16, 24, ... or %d, got %lld", kMostChannels,
               static_cast<long long>(sizes.channels));
  }
  const std::int64_t keys = sizes.tokens + sizes.prompts;
  const auto padded = [](std::int64_t rows) { return (rows + kTile - 1) / kTile * kTile; };
  if (sizes.channels > kPanel ? max(sizes.queries, keys) > kMostWideRows
                              : padded(sizes.queries) + padded(keys) > kMostRows) {
    check.fail(Code::unsupported, "%lld queries and %lld keys of %lld channels don't fit in shared memory",
               static_cast<long long>(sizes.queries), static_cast<long long>(keys),
               static_cast<long long>(sizes.channels));
  }
  if (sizes.batch * sizes.heads > 0x7fffffff) {
    check.fail(Code::unsupported, "images times heads must be below 2^31");
  }
  return check;
}

inline void check_inputs(Check& check, const PromptAttentionSizes& sizes, const PromptAttentionInputs& in) {
  check.tensor("q", in.q, sizes.batch, sizes.queries, sizes.heads, 2);
  check.tensor("k", in.k, sizes.batch, sizes.tokens, sizes.heads, 2);
  check.tensor("v", in.v, sizes.batch, sizes.tokens, sizes.heads, 2);
  check.tensor("prompt_k", in.prompt_k, sizes.batch, sizes.prompts, sizes.heads, 2);
  check.tensor("prompt_v", in.prompt_v, sizes.batch, sizes.prompts, sizes.heads, 2);
}

template <typename Use>
Status dispatch_dtype(Dtype dtype, Use use) {
  return dtype == Dtype::float16 ? use(Float16{}) : use(BFloat16{});
}

// Of heads with more than 64 channels: calls ``use(element, channels)``, where CHANNELS is the value of a type.
template <typename Use>
Status dispatch_wide(const PromptAttentionSizes& sizes, Use use) {
  return dispatch_dtype(sizes.dtype, [&](auto element) {
    if (sizes.channels <= 80) {
      return use(element, std::integral_constant<int, 80>{});
    }
    if (sizes.channels <= 96) {
      return use(element, std::integral_constant<int, 96>{});
    }
    return use(element, std::integral_constant<int, kMostChannels>{});
  });
}

}  // namespace vapt_fast::prompt_attention
