// wgmma, the products of a warpgroup on sm_90a: asynchronous, of matrices in shared memory.
//
// A warpgroup is four warps, the first of which has a number that is a multiple of 4. All its threads call the functions
// here together, with the same matrices. The order is: writes to shared memory, by store16 or cp_async and its wait;
// fence_shared; a barrier; wgmma_fence; products; wgmma_commit; wgmma_wait. Before that wait the accumulators are not to
// be touched, nor the matrices to be changed.

#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.cuh"

namespace vapt_fast {

constexpr int kWarpgroupSize = 4 * kWarpSize;

// 64 columns of a matrix of 16-bit elements in shared memory, from a multiple of 1,024 bytes on: a row has 128 bytes, in
// units of 16, and unit u of row r lies at unit u ^ r % 8 of it.
struct SharedMatrix {
  static constexpr int kRowBytes = 128;
  static constexpr int kUnitBytes = 16;

  std::uint32_t first_unit;  // in the shared window

  __device__ __forceinline__ static int offset(int row, int unit) {
    return row * kRowBytes + (unit ^ row % 8) * kUnitBytes;
  }

  // What begins at a row, a multiple of 8.
  __device__ __forceinline__ SharedMatrix rows_from(int row) const {
    return {first_unit + static_cast<std::uint32_t>(row * (kRowBytes / kUnitBytes))};
  }

  // What begins at a column, a multiple of 16.
  __device__ __forceinline__ SharedMatrix columns_from(int column) const {
    return {first_unit + static_cast<std::uint32_t>(column * 2 / kUnitBytes)};
  }

  // As wgmma is told of it.
  __device__ __forceinline__ std::uint64_t descriptor() const {
    constexpr std::uint64_t kSwizzle = 1;                          // of 128 bytes
    constexpr std::uint64_t kStride = 8 * kRowBytes / kUnitBytes;  // of eight rows
    return kSwizzle << 62 | kStride << 32 | first_unit;
  }
};

}  // namespace vapt_fast

#ifndef __CUDACC__
#include "emulation/wgmma.h"
#else

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VAPT_FAST_HAS_WGMMA
#endif

namespace vapt_fast {

__device__ __forceinline__ SharedMatrix shared_matrix(const void* shared) {
  return {shared_address(shared) / SharedMatrix::kUnitBytes};
}

// Makes what this thread has written to shared memory visible to products.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders the accesses to registers before it and the products after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Commits the products since the last group as a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last PENDING, which completes the accumulators ``done``.
template <int PENDING, int... COUNTS>
__device__ __forceinline__ void wgmma_wait(float (&... done)[COUNTS]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  const auto use_from_here = [](auto& values) {  // or the compiler may move a use above the wait
#pragma unroll
    for (float& value : values) {
      asm volatile("" : "+f"(value)::"memory");
    }
  };
  (use_from_here(done), ...);
}

#define VAPT_FAST_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VAPT_FAST_C8(i) VAPT_FAST_C4(i), VAPT_FAST_C4(i + 4)
#define VAPT_FAST_C16(i) VAPT_FAST_C8(i), VAPT_FAST_C8(i + 8)
#define VAPT_FAST_C32(i) VAPT_FAST_C16(i), VAPT_FAST_C16(i + 16)
#define VAPT_FAST_NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VAPT_FAST_NAMES16 VAPT_FAST_NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VAPT_FAST_NAMES32 \
  VAPT_FAST_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// The instruction for COUNT accumulators a thread, and what its operands are called: the first COUNT are accumulators.
#define VAPT_FAST_WGMMA(COUNT, COLUMNS, DTYPE, FACTORS, ACCUMULATE, TRANSPOSED, ...)                              \
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS     \
               "k16.f32." DTYPE "." DTYPE " {" VAPT_FAST_NAMES##COUNT "}, " FACTORS ", p, 1, 1, " TRANSPOSED ";}" \
               : VAPT_FAST_C##COUNT(0)                                                                            \
               : __VA_ARGS__, "l"(b.descriptor()), "r"(static_cast<int>(accumulate)))

// Either dtype, and matrices whose rows are columns (0) or rows (1) of the product's factors.
#define VAPT_FAST_WGMMAS(COUNT, COLUMNS, FACTORS, ACCUMULATE, ZEROS, ONES, ...)       \
  constexpr bool kBrain = std::is_same_v<Element, BFloat16>;                          \
  if constexpr (kBrain && BY_ROWS) {                                                  \
    VAPT_FAST_WGMMA(COUNT, COLUMNS, "bf16", FACTORS, ACCUMULATE, ONES, __VA_ARGS__);  \
  } else if constexpr (kBrain) {                                                      \
    VAPT_FAST_WGMMA(COUNT, COLUMNS, "bf16", FACTORS, ACCUMULATE, ZEROS, __VA_ARGS__); \
  } else if constexpr (BY_ROWS) {                                                     \
    VAPT_FAST_WGMMA(COUNT, COLUMNS, "f16", FACTORS, ACCUMULATE, ONES, __VA_ARGS__);   \
  } else {                                                                            \
    VAPT_FAST_WGMMA(COUNT, COLUMNS, "f16", FACTORS, ACCUMULATE, ZEROS, __VA_ARGS__);  \
  }

// N0 to N5 name the operands after the accumulators.
#define VAPT_FAST_DEFINE(COUNT, COLUMNS, N0, N1, N2, N3, N4, N5)                                                  \
  template <typename Element, bool BY_ROWS>                                                                       \
  __device__ __forceinline__ void wgmma_of(float (&c)[COUNT], SharedMatrix a, SharedMatrix b, bool accumulate) {  \
    VAPT_FAST_WGMMAS(COUNT, COLUMNS, N0 ", " N1, N2, "0, 0", "1, 1", "l"(a.descriptor()))                         \
  }                                                                                                               \
  template <typename Element, bool BY_ROWS>                                                                       \
  __device__ __forceinline__ void wgmma_of(float (&c)[COUNT], const std::uint32_t (&a)[4], SharedMatrix b,        \
                                           bool accumulate) {                                                     \
    VAPT_FAST_WGMMAS(COUNT, COLUMNS, "{" N0 ", " N1 ", " N2 ", " N3 "}, " N4, N5, "0", "1", "r"(a[0]), "r"(a[1]), \
                     "r"(a[2]), "r"(a[3]))                                                                        \
  }

VAPT_FAST_DEFINE(8, "16", "%8", "%9", "%10", "%11", "%12", "%13")
VAPT_FAST_DEFINE(16, "32", "%16", "%17", "%18", "%19", "%20", "%21")
VAPT_FAST_DEFINE(32, "64", "%32", "%33", "%34", "%35", "%36", "%37")

#undef VAPT_FAST_DEFINE
#undef VAPT_FAST_WGMMAS
#undef VAPT_FAST_WGMMA
#undef VAPT_FAST_NAMES32
#undef VAPT_FAST_NAMES16
#undef VAPT_FAST_NAMES8
#undef VAPT_FAST_C32
#undef VAPT_FAST_C16
#undef VAPT_FAST_C8
#undef VAPT_FAST_C4

// c = a b^T, or c += a b^T if ``accumulate``: a (64, 16), b (N, 16) and c (64, N), where N is 2 COUNT.
//
// With g = 16 (warp % 4) + lane / 4 and t = lane % 4, c[i] is c(g + 8 (i / 2 % 2), 8 (i / 4) + 2 t + i % 2).
template <typename Element, int COUNT>
__device__ __forceinline__ void wgmma(float (&c)[COUNT], SharedMatrix a, SharedMatrix b, bool accumulate) {
  wgmma_of<Element, false>(c, a, b, accumulate);
}

// The same with a in registers: a[q] holds a(g + 8 (q % 2), 8 (q / 2) + 2 t) and its right neighbour.
template <typename Element, int COUNT>
__device__ __forceinline__ void wgmma(float (&c)[COUNT], const std::uint32_t (&a)[4], SharedMatrix b, bool accumulate) {
  wgmma_of<Element, false>(c, a, b, accumulate);
}

// c = a b, or c += a b: a (64, 16) in registers, b (16, 64), since the rows of b are swizzled in units of 64 columns.
template <typename Element>
__device__ __forceinline__ void wgmma_by_rows(float (&c)[32], const std::uint32_t (&a)[4], SharedMatrix b,
                                              bool accumulate) {
  wgmma_of<Element, true>(c, a, b, accumulate);
}

// c = a^T b, or c += a^T b: a (16, 64), b (16, 64).
template <typename Element>
__device__ __forceinline__ void wgmma_by_rows(float (&c)[32], SharedMatrix a, SharedMatrix b, bool accumulate) {
  wgmma_of<Element, true>(c, a, b, accumulate);
}

}  // namespace vapt_fast

#endif
