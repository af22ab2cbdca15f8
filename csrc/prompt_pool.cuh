// What prompt_pool's forward and backward share: eight channels at a time, where things are, sums, checks of
// arguments.
//
// All products are 16 x 8 x 8 on the tensor cores, of tf32, summed in float32. What a product reads of shared memory
// is laid out so that no two lanes meet in a bank.

#pragma once

#include "vapt_fast/prompt_pool.h"

#include <cmath>
#include <cstdio>

#include "vapt_fast/device.cuh"

namespace vapt_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTile = 16;            // rows of a product
constexpr int kDepth = 8;            // of a product, and its columns
constexpr int kEight = 8;            // channels that a thread takes at once
constexpr int kSlab = 128;           // channels of a block: 32 of each of four warps
constexpr int kGroup = 32;           // channels of a warp: eight of each four lanes
constexpr int kBlocksInCluster = 8;  // at most, on every device

__host__ __device__ __forceinline__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// ---- eight channels

template <typename Element>
struct Eight {
  Bytes16 bytes[sizeof(Element) / 2];
};

template <typename Element>
__device__ __forceinline__ Eight<Element> load_eight(const Element* from) {
  Eight<Element> eight;
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Element) / 2; ++i) {
    eight.bytes[i] = load16(from + i * 4);
  }
  return eight;
}

template <typename Element>
__device__ __forceinline__ void store_eight(Element* to, const Eight<Element>& eight) {
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Element) / 2; ++i) {
    store16(to + i * 4, eight.bytes[i]);
  }
}

template <typename Element>
__device__ __forceinline__ void widen(const Eight<Element>& eight, float (&to)[kEight]) {
  if constexpr (sizeof(Element) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      to[i] = float_of(eight.bytes[i / 4].words[i % 4]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      unpack<Element>(eight.bytes[0].words[i / 2], to[i], to[i + 1]);
    }
  }
}

template <typename Element>
__device__ __forceinline__ Eight<Element> narrow(const float (&from)[kEight]) {
  Eight<Element> eight;
  if constexpr (sizeof(Element) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      eight.bytes[i / 4].words[i % 4] = bits_of(from[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      eight.bytes[0].words[i / 2] = pack<Element>(from[i], from[i + 1]);
    }
  }
  return eight;
}

template <typename Element>
__device__ __forceinline__ void load_floats(const Element* from, float (&to)[kEight]) {
  widen(load_eight(from), to);
}

// ---- where things are

template <typename Element>
__device__ __forceinline__ const Element* row_of(const Tensor3& tensor, std::int64_t image, std::int64_t row) {
  return static_cast<const Element*>(tensor.data) + image * tensor.batch_stride + row * tensor.row_stride;
}

__device__ __forceinline__ const float* row_of(const PoolingMatrix& matrix, std::int64_t row) {
  return matrix.data + row * matrix.row_stride;
}

// Where a warp's 32 channels lie in shared memory, from the first one. Column j of product i is channel
// 8 (j / 2) + 2 i + j % 2, so that a lane's columns of the four products are eight channels in a row; in shared
// memory the columns of a product lie side by side. ``eight``: of which eight channels, 2 i is the first of two.
__device__ __forceinline__ int place_of(int eight, int i) { return i * kDepth + eight * 2; }

// The eight channels, of a lane's columns of the four products, in row lane / 4 or lane / 4 + 8.
__device__ __forceinline__ void columns_of(const float (&products)[4][4], int half, float (&to)[kEight]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = products[i][2 * half];
    to[2 * i + 1] = products[i][2 * half + 1];
  }
}

// Puts eight channels into a row of a slab in shared memory; ``eight`` counts from the slab's first.
__device__ __forceinline__ void put_in_slab(std::uint32_t* row, int eight, const float (&values)[kEight]) {
#pragma unroll
  for (int i = 0; i < kEight / 2; ++i) {
    std::uint32_t* const to = row + eight / 4 * kGroup + place_of(eight % 4, i);
    to[0] = to_tf32(values[2 * i]);
    to[1] = to_tf32(values[2 * i + 1]);
  }
}

// A slab of all tokens in shared memory. The pieces of 16 bytes of a token and the next one are in another order, so
// that the eight lanes that read eight channels of both meet in no bank.
template <typename Element>
class KeptSlab {
 public:
  static constexpr int ELEMENTS = sizeof(Bytes16) / sizeof(Element);  // of a piece
  static constexpr int PIECES = kSlab / ELEMENTS;                     // of a token

  __device__ __forceinline__ explicit KeptSlab(void* memory) : tokens_(static_cast<Element*>(memory)) {}

  // ``eight`` counts from the slab's first.
  __device__ __forceinline__ Eight<Element> load(int token, int eight) const {
    Eight<Element> to;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      to.bytes[i] = load16(piece(token, eight * COUNT + i));
    }
    return to;
  }

  __device__ __forceinline__ void store(int token, int eight, const Eight<Element>& from) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      store16(piece(token, eight * COUNT + i), from.bytes[i]);
    }
  }

  __device__ __forceinline__ Element* piece(int token, int number) const {
    constexpr int OTHER_BANKS = sizeof(Element) == 4 ? 1 : 4;
    return tokens_ + token * kSlab + (number ^ token % 2 * OTHER_BANKS) * ELEMENTS;
  }

 private:
  static constexpr int COUNT = kEight / ELEMENTS;

  Element* tokens_;
};

// ---- sums

// Over lanes that differ in the bits of ``FIRST`` to LAST / 2, powers of 2.
template <int FIRST, int LAST>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int mask = FIRST; mask < LAST; mask *= 2) {
    x += shuffle_xor(x, mask);
  }
  return x;
}

__device__ __forceinline__ float sum_of(const float (&values)[kEight]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    sum += values[i];
  }
  return sum;
}

__device__ __forceinline__ float squares_of(const float (&values)[kEight], float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    sum += (values[i] - mean) * (values[i] - mean);
  }
  return sum;
}

__device__ __forceinline__ float rstd_of(float squares, std::int64_t channels, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(channels) + eps);
}

// s, from rstd itself: a small number where the variance is large, so nothing cancels.
__device__ __forceinline__ float prompt_factor(float rstd, float eps, float prompt_eps) {
  return 1.0f / sqrtf(1.0f + (prompt_eps - eps) * rstd * rstd);
}

// ---- launches

template <typename... Arguments>
Status refuse(Code code, const char* format, Arguments... arguments) {
  Status status;
  status.code = code;
  std::snprintf(status.message, sizeof status.message, format, arguments...);
  return status;
}

using Size = long long;  // as snprintf takes it

// Checks arguments one by one, and keeps the first thing that is wrong.
class Check {
 public:
  explicit Check(const PromptPoolSizes& sizes) : sizes_(sizes) {
    if (sizes.dtype != Dtype::float16 && sizes.dtype != Dtype::bfloat16) {
      fail(refuse(Code::invalid, "dtype must be float16 or bfloat16, got number %d", static_cast<int>(sizes.dtype)));
    } else if (sizes.batch < 0 || sizes.prefix < 0 || sizes.rows < 0) {
      fail(refuse(Code::invalid, "sizes must not be negative, got %lld images, %lld prefix tokens, %lld rows",
                  Size(sizes.batch), Size(sizes.prefix), Size(sizes.rows)));
    } else if (sizes.patches < 1) {
      fail(refuse(Code::invalid, "there must be a patch, got %lld", Size(sizes.patches)));
    } else if (sizes.channels < kEight || sizes.channels % kEight) {
      fail(refuse(Code::unsupported, "tokens must have 8, 16, 24, ... channels, got %lld", Size(sizes.channels)));
    } else if (too_large()) {
      fail(refuse(Code::unsupported, "too large: %lld images, %lld + %lld tokens, %lld channels, %lld rows",
                  Size(sizes.batch), Size(sizes.prefix), Size(sizes.patches), Size(sizes.channels), Size(sizes.rows)));
    }
  }

  // A tensor (B, rows, C) whose elements have ``bytes`` bytes.
  void tensor(const char* name, const Tensor3& tensor, std::int64_t rows, std::int64_t bytes) {
    if (sizes_.batch == 0 || rows == 0) {
      return;
    }
    pointer(name, tensor.data);
    const bool images = sizes_.batch == 1 || tensor.batch_stride * bytes % 16 == 0;
    if (!images || (rows > 1 && tensor.row_stride * bytes % 16 != 0)) {
      fail(refuse(Code::invalid, "every row of %s must begin at a multiple of 16 bytes", name));
    }
  }

  // A tensor of ``count`` elements, contiguous, that begins at a multiple of ``bytes``.
  void pointer(const char* name, const void* data, std::int64_t count = 1, std::uintptr_t bytes = 16) {
    if (count == 0) {
      return;
    }
    if (data == nullptr) {
      fail(refuse(Code::invalid, "%s must not be null", name));
    } else if (reinterpret_cast<std::uintptr_t>(data) % bytes) {
      fail(refuse(Code::invalid, "%s must begin at a multiple of %d bytes", name, static_cast<int>(bytes)));
    }
  }

  void fail(const Status& status) {
    if (status_.code == Code::ok) {
      status_ = status;
    }
  }

  const Status& status() const { return status_; }

 private:
  // A grid has 2^31 - 1 blocks, and what belongs to one image is counted in 32 bits.
  bool too_large() const {
    constexpr std::int64_t kMost = 1 << 28;
    if (max(max(sizes_.prefix, sizes_.patches), max(sizes_.channels, sizes_.rows)) > kMost) {
      return true;
    }
    const std::int64_t slabs = ceil_div(sizes_.channels, kSlab) * max(sizes_.rows, std::int64_t{1});
    return sizes_.batch > kMost / max(slabs, sizes_.prefix + sizes_.patches) || sizes_.rows > kMost / sizes_.patches;
  }

  const PromptPoolSizes& sizes_;
  Status status_;
};

// Calls ``function`` with a value of the tokens' type and one of the type of what is normed.
template <typename Function>
auto with_types(const PromptPoolSizes& sizes, Function function) {
  if (sizes.dtype == Dtype::float16) {
    return sizes.float32_tokens ? function(float{}, Float16{}) : function(Float16{}, Float16{});
  }
  return sizes.float32_tokens ? function(float{}, BFloat16{}) : function(BFloat16{}, BFloat16{});
}

template <int TILES>
struct Tiles {
  static constexpr int value = TILES;
};

// Calls ``function`` with the number of tiles, as a type, that a warp needs for the rows, or with the most.
template <typename Function>
auto with_tiles(std::int64_t rows, Function function) {
  if (rows <= 2 * kTile) {
    return function(Tiles<1>{});
  }
  if (rows <= 4 * kTile) {
    return function(Tiles<2>{});
  }
  return function(Tiles<4>{});
}

LaunchShape shape_of(std::int64_t blocks, std::int64_t shared_memory, std::int64_t cluster = 1) {
  LaunchShape shape;
  shape.blocks = blocks;
  shape.threads = kThreads;
  shape.shared_memory = shared_memory;
  shape.cluster = static_cast<int>(cluster);
  return shape;
}

}  // namespace
}  // namespace vapt_fast
