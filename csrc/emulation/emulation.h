// The primitives of vapt_fast/device.cuh for a CPU, so that a CUDA kernel compiled with any C++17 compiler
// runs there, is debugged there, and is watched by AddressSanitizer and ThreadSanitizer.
//
// Each CUDA thread is a fiber. What a warp does together is an exchange among its 32 fibers. To
// ThreadSanitizer fibers are threads that only barriers order, not the turns they take: one run finds a
// missing barrier, whatever the turns were. Shared memory is a heap buffer of exactly the size asked for,
// filled with NaN. An asynchronous copy leaves NaN at its destination when it is issued and copies as late as
// it may: when it is waited for.
//
// A kernel that would hang, whose lanes part ways at a common operation, or a block of which ends while others of its
// cluster read its shared memory, ends the process with a message. Of the banks of shared memory only those that
// load_matrices reads are watched.
//
// The functions here belong to the kernel and are instrumented with it. Those of ``runtime``, which fibers
// call in turns without any order, are in emulation.cpp, which must be compiled without sanitizers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>

#include "vapt_fast/launch.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace vapt_fast {

using std::max;  // nvcc has them without a namespace
using std::min;

namespace runtime {

constexpr std::size_t kSlot = 64;  // bytes that a lane can exchange

struct Copy {
  void* shared;
  const void* global;
};

int thread();
std::int64_t block();
int cluster_rank();
char* shared_memory();
char* peer_shared_memory(int rank);

void sync_some(int id, int threads);  // 0 for all threads of the block
void sync_warp();
void sync_cluster();

// Gives the lane's data to the warp and returns everyone's, kSlot bytes apart, good until the next exchange.
// All lanes must name the same operation.
const char* exchange(const char* operation, const void* data, std::size_t size);

// Given the addresses of the rows of four matrices, kSlot bytes apart: counts those rows that lie in the banks of
// another row of their matrix, once for a warp.
void watch_banks(const char* addresses);
std::int64_t bank_conflicts();  // counted since the last call

void begin_copy(Copy copy);
void commit_copies();
// The next copy of a group that is not among the last ``pending``; null when there is none.
const Copy* next_copy(int pending);

// Bytes of shared memory that a block may have; 227 KiB, as on sm_90, until it is set.
std::int64_t shared_memory_limit();
void set_shared_memory_limit(std::int64_t bytes);

// Clusters that run at once, as the device is said to do: 2 until it is set.
std::int64_t clusters_at_once();
void set_clusters_at_once(std::int64_t count);

void run(const LaunchShape& shape, const std::function<void()>& kernel);

}  // namespace runtime

inline int thread() { return runtime::thread(); }
inline int lane() { return thread() % kLanes; }
inline int warp() { return thread() / kLanes; }
inline std::int64_t block() { return runtime::block(); }
inline char* shared_memory() { return runtime::shared_memory(); }

inline int computed_here(int value) { return value; }

inline void sync_threads() { runtime::sync_some(0, 0); }
inline void sync_warp() { runtime::sync_warp(); }
inline void sync_some(int id, int threads) { runtime::sync_some(id, threads); }

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
  return shuffle(value, lane() ^ mask);
}

inline Bytes16 load16(const void* from) { return *static_cast<const Bytes16*>(from); }
inline void store16(void* to, Bytes16 bytes) { *static_cast<Bytes16*>(to) = bytes; }
inline Bytes8 load8(const void* from) { return *static_cast<const Bytes8*>(from); }

inline void copy_async(void* shared, const void* global) {
  store16(shared, {{~0u, ~0u, ~0u, ~0u}});
  runtime::begin_copy({shared, global});
}

inline void commit_copies() { runtime::commit_copies(); }

template <int PENDING>
void wait_for_copies() {
  while (const runtime::Copy* copy = runtime::next_copy(PENDING)) {
    store16(copy->shared, load16(copy->global));
  }
}

// What a lane gives to load_matrices.
struct MatrixRow {
  Bytes16 elements;
  const void* address;
};

inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
  const MatrixRow mine{load16(row), row};
  const char* rows = runtime::exchange("load_matrices", &mine, sizeof mine);
  runtime::watch_banks(rows + offsetof(MatrixRow, address));
  for (int m = 0; m < 4; ++m) {
    const char* from = rows + (8 * m + lane() / 4) * runtime::kSlot;
    std::memcpy(&r[m], from + lane() % 4 * sizeof r[m], sizeof r[m]);
  }
}

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
    word &= ~0x1fffu;  // the tensor cores do not look at the rest
  }
  const char* all = runtime::exchange("mma_tf32", mine, sizeof mine);
  const auto of = [all](int from, int i) {
    float value;
    std::memcpy(&value, all + from * runtime::kSlot + i * sizeof value, sizeof value);
    return value;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4;
    const int column = 2 * (lane() % 4) + i % 2;
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

inline Device current_device() { return {{}, runtime::shared_memory_limit(), true}; }

template <typename... Parameters>
std::int64_t clusters_at_once(void (*)(Parameters...), const LaunchShape& shape, const Device& device) {
  return device.has_clusters && shape.shared_memory <= device.shared_memory ? runtime::clusters_at_once() : 0;
}

template <typename... Parameters>
Status launch(void (*kernel)(Parameters...), LaunchShape shape, Stream, Parameters... arguments) {
  Status status;
  if (shape.shared_memory > runtime::shared_memory_limit()) {
    status.code = Code::unsupported;
    std::snprintf(status.message, sizeof status.message,
                  "the kernel needs %lld bytes of shared memory, the device has %lld",
                  static_cast<long long>(shape.shared_memory), static_cast<long long>(runtime::shared_memory_limit()));
    return status;
  }
  runtime::run(shape, [&] { kernel(arguments...); });
  return status;
}

}  // namespace vapt_fast
