// What the products of forward and backward share: kernels of CUTLASS for sm_90a, their checks and launches.

#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/device.cuh"
#include "mlp/api.h"

namespace vapt_fast {
namespace mlp {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

// Of TMA, in elements.
constexpr int kAlignment = 8;
constexpr std::int64_t kMostStride = std::int64_t{1} << 38;

// Of four candidates the fastest on an H200 (ViT-B/16, 64 images): a tile of 128 x 256, on which two warpgroups work
// together, and two thread blocks a cluster, side by side, which share what they read of a.
using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;

// d (M, N) = FusionOperation(a b), a (M, K) with contiguous rows, b (K, N) of LayoutB.
template <typename Element, typename LayoutB, typename FusionOperation>
struct Product {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment, Element, RowMajor,
      kAlignment, EpilogueSchedule, FusionOperation>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, LayoutB, kAlignment,
      float, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Fusion = typename Epilogue::FusionCallbacks::Arguments;
};

// The stride of CUTLASS for a matrix whose rows are ``row_stride`` elements apart.
template <typename Stride>
Stride stride(std::int64_t row_stride) {
  Stride made{};
  if constexpr (cute::is_static<cute::tuple_element_t<0, Stride>>::value) {
    cute::get<1>(made) = row_stride;
  } else {
    cute::get<0>(made) = row_stride;
  }
  return made;
}

inline Check checked_sizes(const MlpSizes& sizes) {
  constexpr std::int64_t most = std::numeric_limits<int>::max();
  Check check;
  if (sizes.rows < 0) {
    check.fail(Code::invalid, "rows must not be negative");
  }
  if (sizes.depth <= 0 || sizes.depth % kAlignment || sizes.hidden <= 0 || sizes.hidden % kAlignment) {
    check.fail(Code::invalid, "depth and hidden must be positive multiples of %d", kAlignment);
  }
  if (sizes.rows > most || sizes.depth > most || sizes.hidden > most) {
    check.fail(Code::unsupported, "no size may exceed %d", static_cast<int>(most));
  }
  return check;
}

// Checks a matrix (rows, columns) that TMA reads.
inline void check_rows(Check& check, const char* name, const Rows& matrix, std::int64_t columns) {
  check.pointer(name, matrix.data);
  if (matrix.row_stride > kMostStride) {
    check.fail(Code::unsupported, "the stride of %s's rows must be at most 2^38", name);
  }
  if (matrix.row_stride < columns || matrix.row_stride % kAlignment) {
    check.fail(Code::invalid, "rows of %s must not overlap and must begin at multiples of 16 bytes", name);
  }
}

template <typename Product>
Status launch_product(const MlpSizes& sizes, const Rows& a, const Rows& b, void* d,
                      const typename Product::Fusion& fusion, Stream stream) {
  using Kernel = typename Product::Kernel;
  using Element = typename Kernel::ElementD;
  LaunchShape shape;
  shape.threads = Kernel::MaxThreadsPerBlock;
  shape.shared_memory = Kernel::SharedStorageSize;
  shape.blocks = shape.cluster = cute::size<0>(Cluster{});
  shape.blocks_y = shape.cluster_y = cute::size<1>(Cluster{});

  // As many thread blocks as run at once: each computes tiles until none is left.
  cutlass::KernelHardwareInfo hardware;
  const Device device = current_device();
  if (device.status.code != Code::ok) {
    return device.status;
  }
  hardware.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count();
  const auto kernel = cutlass::device_kernel<Kernel>;
  hardware.max_active_clusters = static_cast<int>(max_active_clusters(kernel, shape, device));
  if (hardware.max_active_clusters == 0) {
    Check check;
    check.fail(Code::unsupported, "the device has no room for a cluster of its kernel");
    return check.status();
  }

  typename Kernel::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(sizes.rows), static_cast<int>(sizes.hidden),
                             static_cast<int>(sizes.depth), 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(a.data);
  arguments.mainloop.dA = stride<typename Kernel::StrideA>(a.row_stride);
  arguments.mainloop.ptr_B = static_cast<const Element*>(b.data);
  arguments.mainloop.dB = stride<typename Kernel::StrideB>(b.row_stride);
  arguments.epilogue.thread = fusion;
  arguments.epilogue.ptr_D = static_cast<Element*>(d);
  arguments.epilogue.dD = stride<typename Kernel::StrideD>(sizes.hidden);
  arguments.hw_info = hardware;
  const auto parameters = Kernel::to_underlying_arguments(arguments, nullptr);  // no workspace is needed
  const dim3 grid = Kernel::get_grid_shape(parameters);
  shape.blocks = grid.x;
  shape.blocks_y = static_cast<int>(grid.y);
  return launch(kernel, shape, stream, parameters);
}

// Calls ``launch(element)`` with the type of the elements.
template <typename Launch>
Status dispatch(Dtype dtype, Launch launch) {
  return dtype == Dtype::float16 ? launch(cutlass::half_t{}) : launch(cutlass::bfloat16_t{});
}

}  // namespace mlp
}  // namespace vapt_fast
