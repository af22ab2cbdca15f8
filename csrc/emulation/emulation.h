// The primitives of common/device.cuh on a CPU. A CUDA kernel compiled by any C++17 compiler runs there, can be debugged
// there, and is checked by AddressSanitizer and ThreadSanitizer.
//
// Each CUDA thread is a fiber; a warp-wide operation is an exchange among 32 fibers. To ThreadSanitizer fibers are
// threads that only barriers order, not the turns they take: one run finds a missing barrier, whatever the turns were.
// Shared memory is a heap buffer of exactly the requested size, filled with NaN. An asynchronous copy leaves NaN at its
// destination when it is issued and copies as late as it may: when it is waited for.
//
// The process ends with a message if a kernel hangs, or if the lanes of a warp diverge at a warp-wide operation.
//
// The functions here belong to the kernel and are instrumented with it. Those of ``runtime``, which fibers call in turns
// without any order, are in *.cpp here, which must be compiled without sanitizers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "common/launch.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace vapt_fast {

using std::max;  // global in nvcc
using std::min;

namespace runtime {

constexpr std::size_t kSlot = 64;                      // bytes that a lane can exchange at once
constexpr std::int64_t kMaxSharedMemory = 227 * 1024;  // bytes per block, as on sm_90

struct Copy {
  void* shared;
  const void* global;
};

int thread_id();
std::int64_t block_id();
char* shared_memory();

void sync_threads();
void sync_warp();

// Gives the lane's data to the warp and returns all lanes', kSlot bytes apart, valid until the next exchange. All lanes
// must name the same operation.
const char* exchange(const char* operation, const void* data, std::size_t size);

void begin_copy(Copy copy);
void cp_async_commit();
// The next copy of a group that is not among the last ``pending``; null when there is none.
const Copy* next_copy(int pending);

// Notes that this thread has written to one of 16 bytes, if they are of its block's shared memory.
void wrote(const void* to);

void run(const LaunchShape& shape, const std::function<void()>& kernel);

}  // namespace runtime

inline int thread_id() { return runtime::thread_id(); }
inline int lane_id() { return thread_id() % kWarpSize; }
inline int warp_id() { return thread_id() / kWarpSize; }
inline std::int64_t block_id() { return runtime::block_id(); }
inline char* shared_memory() { return runtime::shared_memory(); }

inline int opaque(int value) { return value; }

[[noreturn]] inline void trap() { std::abort(); }

inline void sync_threads() { runtime::sync_threads(); }
inline void sync_warp() { runtime::sync_warp(); }

template <typename T>
T shuffle(T value, int source) {
  const char* all = runtime::exchange("shuffle", &value, sizeof value);
  std::memcpy(&value, all + source * runtime::kSlot, sizeof value);
  return value;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_id() ^ mask);
}

inline Bytes16 load16(const void* from) { return *static_cast<const Bytes16*>(from); }
inline void store16(void* to, Bytes16 bytes) {
  *static_cast<Bytes16*>(to) = bytes;
  runtime::wrote(to);
}
inline void store4(void* to, std::uint32_t word) {
  *static_cast<std::uint32_t*>(to) = word;
  runtime::wrote(to);
}
inline Bytes8 load8(const void* from) { return *static_cast<const Bytes8*>(from); }

inline void cp_async(void* shared, const void* global) {
  store16(shared, {{~0u, ~0u, ~0u, ~0u}});
  runtime::begin_copy({shared, global});
}

inline void cp_async_commit() { runtime::cp_async_commit(); }

template <int PENDING>
void cp_async_wait() {
  while (const runtime::Copy* copy = runtime::next_copy(PENDING)) {
    store16(copy->shared, load16(copy->global));
  }
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  const Bytes16 mine = load16(row);
  const char* rows = runtime::exchange("ldmatrix_x4", &mine, sizeof mine);
  for (int m = 0; m < 4; ++m) {
    const char* from = rows + (8 * m + lane_id() / 4) * runtime::kSlot;
    std::memcpy(&r[m], from + lane_id() % 4 * sizeof r[m], sizeof r[m]);
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(BFloat16 element) { return float_of(static_cast<std::uint32_t>(element.bits) << 16); }

inline float to_float(Float16 element) {
  const std::uint32_t sign = (element.bits & 0x8000u) << 16;
  const std::uint32_t rest = element.bits & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity, NaN
    return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  }
  // The bits moved to where float32 has them are too small by 2^112, also for a subnormal.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

template <typename Element>
Element round_to(float value);

template <>
inline BFloat16 round_to<BFloat16>(float value) {
  const std::uint32_t bits = bits_of(value);
  if (std::isnan(value)) {
    return {0x7fff};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 round_to<Float16>(float value) {
  const auto sign = static_cast<std::uint16_t>(bits_of(value) >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (std::isnan(value)) {
    return {0x7fff};
  }
  if (size >= 65520.0f) {  // rounds to infinity
    return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  }
  if (size < 0x1p-14f) {  // subnormal: multiples of 2^-24
    return {static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(size * 0x1p24f)))};
  }
  const std::uint32_t bits = bits_of(size) - (112u << 23);
  return {static_cast<std::uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1u)) >> 13)};
}

template <typename Element>
std::uint32_t pack(float first, float second) {
  return round_to<Element>(first).bits | static_cast<std::uint32_t>(round_to<Element>(second).bits) << 16;
}

template <typename Element>
void unpack(std::uint32_t word, float& first, float& second) {
  first = to_float(Element{static_cast<std::uint16_t>(word)});
  second = to_float(Element{static_cast<std::uint16_t>(word >> 16)});
}

template <typename... Parameters>
Status supported(void (*)(Parameters...), int) {
  return {};
}

template <typename... Parameters>
Status launch(void (*kernel)(Parameters...), LaunchShape shape, Stream, Parameters... arguments) {
  if (shape.shared_memory > runtime::kMaxSharedMemory) {
    return {Code::unsupported, "the kernel needs more shared memory than the device has"};
  }
  runtime::run(shape, [&] { kernel(arguments...); });
  return {};
}

}  // namespace vapt_fast
