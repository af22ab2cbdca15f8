// The primitives of common/wgmma.cuh on a CPU. A product is computed as late as it may be: when it is waited for. Until
// then its accumulators hold NaN.
//
// The process ends with a message if a product has no wgmma_fence before it, if it reads what was written to shared
// memory without fence_shared (by store16 or cp_async: other writes are not followed), or if the lanes of a warp or the
// warps of a warpgroup give different matrices.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define VAPT_FAST_HAS_WGMMA

namespace vapt_fast {

namespace runtime {

// One thread's part of a product.
struct Product {
  void (*compute)(const Product&, float* c);
  std::uint64_t a;
  std::uint64_t b;
  bool accumulate;
  int count;                  // of the thread's accumulators
  std::uint32_t words[4][4];  // the registers of its quad's lanes, if a is in registers
};

void fence_shared();
void wgmma_fence();
void begin_product(const Product& product, float* accumulators);
void wgmma_commit();
// Whether there is a product in a group that is not among the last ``pending``; it becomes the thread's current one.
bool next_product(int pending);
// Computes the current product.
void compute_product();
void check_complete(const float* accumulators, int count);

// The offset in shared memory of an element of a matrix; ``row`` and ``column`` count from where its descriptor points.
// Fails if a product can't see what was written there.
std::ptrdiff_t find_element(std::uint64_t descriptor, int row, int column);

}  // namespace runtime

inline SharedMatrix shared_matrix(const void* shared) {
  const std::ptrdiff_t offset = static_cast<const char*>(shared) - shared_memory();
  return {static_cast<std::uint32_t>(offset / SharedMatrix::kUnitBytes)};
}

inline void fence_shared() { runtime::fence_shared(); }
inline void wgmma_fence() { runtime::wgmma_fence(); }
inline void wgmma_commit() { runtime::wgmma_commit(); }

template <int PENDING, int... COUNTS>
void wgmma_wait(float (&... done)[COUNTS]) {
  while (runtime::next_product(PENDING)) {
    runtime::compute_product();
  }
  (runtime::check_complete(done, COUNTS), ...);
}

template <typename Element>
float shared_element(std::uint64_t descriptor, int row, int column) {
  Element element;
  std::memcpy(&element, runtime::shared_memory() + runtime::find_element(descriptor, row, column), sizeof element);
  return to_float(element);
}

template <typename Element, bool IN_REGISTERS, bool BY_ROWS>
void compute(const runtime::Product& product, float* c) {
  constexpr int kDepth = 16;
  const int lane = lane_id();
  float a[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) {
      if constexpr (IN_REGISTERS) {
        float pair[2];
        unpack<Element>(product.words[k / 2 % 4][half + 2 * (k / 8)], pair[0], pair[1]);
        a[half][k] = pair[k % 2];
      } else {
        const int row = 16 * (warp_id() % 4) + lane / 4 + 8 * half;
        a[half][k] = BY_ROWS ? shared_element<Element>(product.a, k, row) : shared_element<Element>(product.a, row, k);
      }
    }
  }
  for (int pair = 0; pair < product.count / 2; pair += 2) {
    for (int side = 0; side < 2; ++side) {
      const int column = 4 * pair + 2 * (lane % 4) + side;
      float sum[2] = {};
      for (int k = 0; k < kDepth; ++k) {
        const float b =
            BY_ROWS ? shared_element<Element>(product.b, k, column) : shared_element<Element>(product.b, column, k);
        sum[0] += a[0][k] * b;
        sum[1] += a[1][k] * b;
      }
      for (int half = 0; half < 2; ++half) {
        float& to = c[2 * (pair + half) + side];
        to = sum[half] + (product.accumulate ? to : 0.0f);
      }
    }
  }
}

template <typename Element, bool IN_REGISTERS, bool BY_ROWS, int COUNT>
void issue(float (&c)[COUNT], const std::uint32_t (&words)[4], SharedMatrix a, SharedMatrix b, bool accumulate) {
  static_assert(COUNT % 4 == 0 && COUNT <= 128 && (!BY_ROWS || COUNT == 32));
  runtime::Product product{
      compute<Element, IN_REGISTERS, BY_ROWS>, a.descriptor(), b.descriptor(), accumulate, COUNT, {}};
  const char* all = runtime::exchange("wgmma", words, sizeof words);
  for (int of = 0; of < 4; ++of) {
    std::memcpy(product.words[of], all + (lane_id() / 4 * 4 + of) * runtime::kSlot, sizeof words);
  }
  runtime::begin_product(product, c);
}

template <typename Element, int COUNT>
void wgmma(float (&c)[COUNT], SharedMatrix a, SharedMatrix b, bool accumulate) {
  issue<Element, false, false>(c, {}, a, b, accumulate);
}

template <typename Element, int COUNT>
void wgmma(float (&c)[COUNT], const std::uint32_t (&a)[4], SharedMatrix b, bool accumulate) {
  issue<Element, true, false>(c, a, {}, b, accumulate);
}

template <typename Element, int COUNT>
void wgmma_by_rows(float (&c)[COUNT], const std::uint32_t (&a)[4], SharedMatrix b, bool accumulate) {
  issue<Element, true, true>(c, a, {}, b, accumulate);
}

template <typename Element, int COUNT>
void wgmma_by_rows(float (&c)[COUNT], SharedMatrix a, SharedMatrix b, bool accumulate) {
  issue<Element, false, true>(c, {}, a, b, accumulate);
}

}  // namespace vapt_fast
