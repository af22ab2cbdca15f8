// Eight channels at a time: vector loads, conversions, sums.

#pragma once

#include "common/device.cuh"

namespace vapt_fast {

constexpr int kVec = 8;  // channels of a Vec8

template <typename Element>
struct Vec8 {
  Bytes16 bytes[1];
};

template <typename Element>
__device__ __forceinline__ Vec8<Element> load_vec8(const Element* from) {
  return {{load16(from)}};
}

template <typename Element>
__device__ __forceinline__ void widen(const Vec8<Element>& vec, float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    unpack<Element>(vec.bytes[0].words[i / 2], to[i], to[i + 1]);
  }
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

}  // namespace vapt_fast
