// Eight channels at a time: vector loads and stores, conversions, sums.

#pragma once

#include <cstdint>

#include "common/device.cuh"

namespace vapt_fast {

constexpr int kVec = 8;  // channels of a Vec8

template <typename Element>
struct Vec8 {
  Bytes16 bytes[sizeof(Element) / 2];
};

template <typename Element>
__device__ __forceinline__ Vec8<Element> load_vec8(const Element* from) {
  Vec8<Element> vec;
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Element) / 2; ++i) {
    vec.bytes[i] = load16(from + i * 4);
  }
  return vec;
}

template <typename Element>
__device__ __forceinline__ void store_vec8(Element* to, const Vec8<Element>& vec) {
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Element) / 2; ++i) {
    store16(to + i * 4, vec.bytes[i]);
  }
}

template <typename Element>
__device__ __forceinline__ void widen(const Vec8<Element>& vec, float (&to)[kVec]) {
  if constexpr (sizeof(Element) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      to[i] = float_of(vec.bytes[i / 4].words[i % 4]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      unpack<Element>(vec.bytes[0].words[i / 2], to[i], to[i + 1]);
    }
  }
}

template <typename Element>
__device__ __forceinline__ Vec8<Element> narrow(const float (&from)[kVec]) {
  Vec8<Element> vec;
  if constexpr (sizeof(Element) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      vec.bytes[i / 4].words[i % 4] = bits_of(from[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      vec.bytes[0].words[i / 2] = pack<Element>(from[i], from[i + 1]);
    }
  }
  return vec;
}

template <typename Element>
__device__ __forceinline__ void load_as_float(const Element* from, float (&to)[kVec]) {
  widen(load_vec8(from), to);
}

// The sum over the lanes that differ in the bits FIRST to LAST / 2, powers of 2.
template <int FIRST, int LAST>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int mask = FIRST; mask < LAST; mask *= 2) {
    x += shuffle_xor(x, mask);
  }
  return x;
}

__device__ __forceinline__ float sum_of(const float (&values)[kVec]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    sum += values[i];
  }
  return sum;
}

__device__ __forceinline__ float sum_of_squares(const float (&values)[kVec], float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    sum += (values[i] - mean) * (values[i] - mean);
  }
  return sum;
}

}  // namespace vapt_fast
