// The primitives of common/device.cuh on a CPU. A CUDA kernel compiled by any C++17 compiler runs there, can be debugged
// there, and is checked by AddressSanitizer and ThreadSanitizer.
//
// Each CUDA thread is a fiber; a warp-wide operation is an exchange among 32 fibers. To ThreadSanitizer fibers are
// threads that only barriers order, not the turns they take: one run finds a missing barrier, whatever the turns were.
// Shared memory is a heap buffer of exactly the requested size, filled with NaN. An asynchronous copy leaves NaN at its
// destination when it is issued and copies as late as it may: when it is waited for.
//
// The process ends with a message if a kernel hangs, if the lanes of a warp diverge at a warp-wide operation, or if a
// block ends while others of its cluster read its shared memory. Bank conflicts are counted for ldmatrix_x4 only.
//
// The functions here belong to the kernel and are instrumented with it. Those of ``runtime``, which fibers call in turns
// without any order, are in *.cpp here, which must be compiled without sanitizers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
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

constexpr std::size_t kSlot = 64;  // bytes that a lane can exchange at once

struct Copy {
  void* shared;
  const void* global;
};

int thread_id();
std::int64_t block_id();
int cluster_rank();
char* shared_memory();
char* peer_shared_memory(int rank);

void sync_threads();
void sync_warp();
void sync_cluster();

// Gives the lane's data to the warp and returns all lanes', kSlot bytes apart, valid until the next exchange. All lanes
// must name the same operation.
const char* exchange(const char* operation, const void* data, std::size_t size);

// Counts bank conflicts of four matrices, once per warp, from the addresses of their rows, kSlot bytes apart.
void count_bank_conflicts(const char* addresses);

void begin_copy(Copy copy);
void cp_async_commit();
// The next copy of a group that is not among the last ``pending``; null when there is none.
const Copy* next_copy(int pending);

// Notes that this thread has written to one of 16 bytes, if they are of its block's shared memory.
void wrote(const void* to);

// The emulated device: bytes of shared memory per block, clusters that it runs at once.
struct Limits {
  std::int64_t shared_memory;
  std::int64_t clusters;
};

const Limits& limits();

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

inline int cluster_rank() { return runtime::cluster_rank(); }
inline void sync_cluster() { runtime::sync_cluster(); }

template <typename T>
T* cluster_peer(T* shared, int rank) {
  const std::ptrdiff_t offset = reinterpret_cast<char*>(shared) - runtime::shared_memory();
  return reinterpret_cast<T*>(runtime::peer_shared_memory(rank) + offset);
}

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

struct MatrixRow {
  Bytes16 elements;
  const void* address;
};

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  const MatrixRow mine{load16(row), row};
  const char* rows = runtime::exchange("ldmatrix_x4", &mine, sizeof mine);
  runtime::count_bank_conflicts(rows + offsetof(MatrixRow, address));
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

inline std::uint32_t to_tf32(float value) {
  return std::isnan(value) ? 0x7fffffffu : (bits_of(value) + 0x1000u) & ~0x1fffu;
}

inline void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (std::uint32_t& word : mine) {
    word &= ~0x1fffu;  // the tensor cores ignore the rest
  }
  const char* all = runtime::exchange("mma_tf32", mine, sizeof mine);
  const auto of = [all](int from, int i) {
    float value;
    std::memcpy(&value, all + from * runtime::kSlot + i * sizeof value, sizeof value);
    return value;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane_id() / 4;
    const int column = 2 * (lane_id() % 4) + i % 2;
    for (int k = 0; k < 8; ++k) {
      c[i] += of(4 * row + k % 4, i / 2 + 2 * (k / 4)) * of(4 * column + k % 4, 4 + k / 4);
    }
  }
}

template <typename... Parameters>
Status supported(void (*)(Parameters...), int) {
  return {};
}

struct Device {
  Status status;
  std::int64_t shared_memory;
  bool has_clusters;
};

inline Device current_device() { return {{}, runtime::limits().shared_memory, true}; }

template <typename... Parameters>
std::int64_t max_active_clusters(void (*)(Parameters...), const LaunchShape& shape, const Device& device) {
  return shape.shared_memory <= device.shared_memory ? runtime::limits().clusters : 0;
}

template <typename... Parameters>
Status launch(void (*kernel)(Parameters...), LaunchShape shape, Stream, Parameters... arguments) {
  if (shape.shared_memory > runtime::limits().shared_memory) {
    return {Code::unsupported, "the kernel needs more shared memory than the device has"};
  }
  runtime::run(shape, [&] { kernel(arguments...); });
  return {};
}

}  // namespace vapt_fast
