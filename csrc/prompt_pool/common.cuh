// What the forward and the backward of prompt_pool share.
//
// All products are mma.m16n8k8 in tf32 with float32 accumulators. Tiles in shared memory are laid out so that their
// operands are read without bank conflicts.

#pragma once

#include <cmath>
#include <type_traits>

#include "common/check.h"
#include "common/device.cuh"
#include "common/vec8.cuh"
#include "prompt_pool/api.h"

namespace vapt_fast::prompt_pool {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMmaM = 16;
constexpr int kMmaK = 8;            // also N
constexpr int kBlockC = 128;        // channels of a block: 32 for each of four warps
constexpr int kWarpC = 32;          // channels of a warp: a Vec8 for each of four lanes
constexpr int kMaxClusterSize = 8;  // on every device

__host__ __device__ __forceinline__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// ---- layouts

template <typename Element>
__device__ __forceinline__ const Element* row_of(const Tensor3& tensor, std::int64_t image, std::int64_t row) {
  return static_cast<const Element*>(tensor.data) + image * tensor.batch_stride + row * tensor.row_stride;
}

__device__ __forceinline__ const float* row_of(const Matrix& matrix, std::int64_t row) {
  return matrix.data + row * matrix.row_stride;
}

// Where a warp's 32 channels are in shared memory. Column j of product i is channel 8 (j / 2) + 2 i + j % 2, so that
// the columns a lane holds of the four products are the eight channels of a vector; in shared memory the columns of a
// product are adjacent. Returns the column of channels 2 i and 2 i + 1 of vector ``vec``.
__device__ __forceinline__ int smem_column(int vec, int i) { return i * kMmaK + vec * 2; }

// The vector that a lane holds of the four products in row lane / 4, or lane / 4 + 8 for the second half.
__device__ __forceinline__ void accumulator_row(const float (&products)[4][4], int half, float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = products[i][2 * half];
    to[2 * i + 1] = products[i][2 * half + 1];
  }
}

// Stores vector ``vec`` of a row of a tile as tf32, in the order of ``smem_column``.
__device__ __forceinline__ void store_tile(std::uint32_t* row, int vec, const float (&values)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    std::uint32_t* const to = row + vec / 4 * kWarpC + smem_column(vec % 4, i);
    to[0] = to_tf32(values[2 * i]);
    to[1] = to_tf32(values[2 * i + 1]);
  }
}

// A block's channels of all tokens in shared memory. The 16-byte chunks of odd tokens are swizzled, so that eight lanes
// read a vector of two adjacent tokens each without bank conflicts.
template <typename Element>
class SmemTile {
 public:
  static constexpr int CHUNK = sizeof(Bytes16) / sizeof(Element);  // elements
  static constexpr int CHUNKS = kBlockC / CHUNK;                   // of a token

  __device__ __forceinline__ explicit SmemTile(void* memory) : tokens_(static_cast<Element*>(memory)) {}

  __device__ __forceinline__ Vec8<Element> load(int token, int vec) const {
    Vec8<Element> to;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      to.bytes[i] = load16(chunk(token, vec * COUNT + i));
    }
    return to;
  }

  __device__ __forceinline__ void store(int token, int vec, const Vec8<Element>& from) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      store16(chunk(token, vec * COUNT + i), from.bytes[i]);
    }
  }

  __device__ __forceinline__ Element* chunk(int token, int number) const {
    constexpr int SWIZZLE = sizeof(Element) == 4 ? 1 : 4;
    return tokens_ + token * kBlockC + (number ^ token % 2 * SWIZZLE) * CHUNK;
  }

 private:
  static constexpr int COUNT = kVec / CHUNK;

  Element* tokens_;
};

// ---- statistics

__device__ __forceinline__ float rstd_of(float squares, std::int64_t channels, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(channels) + eps);
}

// s, from rstd itself: where the variance is large rstd is small, so nothing cancels.
__device__ __forceinline__ float prompt_factor(float rstd, float eps, float prompt_eps) {
  return 1.0f / sqrtf(1.0f + (prompt_eps - eps) * rstd * rstd);
}

// ---- launches

// A grid has 2^31 - 1 blocks, and offsets within an image are 32-bit.
inline bool too_large(const PromptPoolSizes& sizes) {
  constexpr std::int64_t kMost = 1 << 28;
  if (max(max(sizes.prefix, sizes.patches), max(sizes.channels, sizes.rows)) > kMost) {
    return true;
  }
  const std::int64_t blocks = ceil_div(sizes.channels, kBlockC) * max(sizes.rows, std::int64_t{1});
  return sizes.batch > kMost / max(blocks, sizes.prefix + sizes.patches) || sizes.rows > kMost / sizes.patches;
}

inline Check checked_sizes(const PromptPoolSizes& sizes) {
  using Size = long long;  // of %lld
  const Size batch = sizes.batch, prefix = sizes.prefix, patches = sizes.patches;
  const Size channels = sizes.channels, rows = sizes.rows;
  Check check;
  if (sizes.dtype != Dtype::float16 && sizes.dtype != Dtype::bfloat16) {
    check.fail(Code::invalid, "dtype must be float16 or bfloat16, got number %d", static_cast<int>(sizes.dtype));
  } else if (batch < 0 || prefix < 0 || rows < 0) {
    check.fail(Code::invalid, "sizes must not be negative, got %lld images, %lld prefix tokens, %lld rows", batch,
               prefix, rows);
  } else if (patches < 1) {
    check.fail(Code::invalid, "there must be a patch, got %lld", patches);
  } else if (channels < kVec || channels % kVec) {
    check.fail(Code::unsupported, "tokens must have 8, 16, 24, ... channels, got %lld", channels);
  } else if (too_large(sizes)) {
    check.fail(Code::unsupported, "too large: %lld images, %lld + %lld tokens, %lld channels, %lld rows", batch, prefix,
               patches, channels, rows);
  }
  return check;
}

// Calls ``function`` with a value of the tokens' type and one of normed's.
template <typename Function>
auto dispatch_types(const PromptPoolSizes& sizes, Function function) {
  if (sizes.dtype == Dtype::float16) {
    return sizes.float32_tokens ? function(float{}, Float16{}) : function(Float16{}, Float16{});
  }
  return sizes.float32_tokens ? function(float{}, BFloat16{}) : function(BFloat16{}, BFloat16{});
}

template <int TILES>
using Tiles = std::integral_constant<int, TILES>;

// Calls ``function`` with the number of 16-row tiles that each half of the warps needs for the rows, 4 at most.
template <typename Function>
auto dispatch_tiles(std::int64_t rows, Function function) {
  if (rows <= 2 * kMmaM) {
    return function(Tiles<1>{});
  }
  if (rows <= 4 * kMmaM) {
    return function(Tiles<2>{});
  }
  return function(Tiles<4>{});
}

inline LaunchShape launch_shape(std::int64_t blocks, std::int64_t shared_memory, std::int64_t cluster = 1) {
  return {blocks, kThreads, shared_memory, static_cast<int>(cluster)};
}

}  // namespace vapt_fast::prompt_pool
