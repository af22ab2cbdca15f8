// The sums over chunks of images.

#pragma once

#include "prompt_pool/backward_common.cuh"

namespace vapt_fast::prompt_pool {

// An mma takes its eight rows in this order, in both operands. Then the rows that a lane holds of a left operand,
// lane % 4 and lane % 4 + 4, are its columns of y, and right operands are read without bank conflicts.
__device__ __forceinline__ int permuted_row(int number) { return number ^ number / 4 * 2; }

// Where the sum of a column goes: to the same place.
struct SameOrder {
  __device__ __forceinline__ std::int64_t operator()(std::int64_t column) const { return column; }
};

// The same for the matrix in the order of accumulators; -1 for padding.
struct AccumulatorOrder {
  int prefix;
  int patches;
  int rows;

  __device__ __forceinline__ std::int64_t operator()(std::int64_t column) const {
    const auto i = static_cast<int>(column % 4);
    const auto lane = static_cast<int>(column / 4 % kWarpSize);
    const std::int64_t step = column / (4 * kWarpSize);
    const std::int64_t steps = ceil_div(rows, kMmaK);
    const auto row = static_cast<int>(step % steps) * kMmaK + permuted_row(lane % 4 + i % 2 * 4);
    const auto patch = static_cast<int>(step / steps) * kMmaM + lane / 4 + i / 2 * 8 - prefix;
    return row < rows && patch >= 0 && patch < patches ? std::int64_t{row} * patches + patch : -1;
  }
};

// out: the sum of partial (chunks, stride) over the chunks, for the first ``size`` columns. A warp adds every eighth
// chunk.
template <typename Order>
__global__ void __launch_bounds__(kThreads)
    prompt_pool_bwd_reduce_kernel(const float* partial, std::int64_t stride, std::int64_t chunks, std::int64_t size,
                                  float* out, const Order order) {
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  const std::int64_t column = block_id() * kWarpSize + lane_id();
  float sum = 0.0f;
  if (column < size) {
#pragma unroll 4
    for (std::int64_t chunk = warp_id(); chunk < chunks; chunk += kWarps) {
      sum += partial[chunk * stride + column];
    }
  }
  sums[thread_id()] = sum;
  sync_threads();
  if (warp_id() == 0 && column < size) {
    for (int other = 1; other < kWarps; ++other) {
      sum += sums[other * kWarpSize + lane_id()];
    }
    const std::int64_t to = order(column);
    if (to >= 0) {
      out[to] = sum;
    }
  }
}

}  // namespace vapt_fast::prompt_pool
