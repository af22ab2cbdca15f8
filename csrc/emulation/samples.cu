// Small kernels that use the primitives correctly, or with one mistake, which the emulation has to find. ``samples KERNEL
// MISTAKE`` prints "right" or "wrong".

#include <cstdlib>
#include <string_view>
#include <vector>

#include "common/device.cuh"
#include "common/wgmma.cuh"

using namespace vapt_fast;

namespace {

using Mistake = std::string_view;

constexpr int kThreads = 64;
constexpr int kWords = 4;  // that a thread copies

// Copies a block's words, those of its threads in reverse order; twice.
__global__ void reverse(const std::uint32_t* in, std::uint32_t* out, Mistake mistake) {
  auto* const shared = reinterpret_cast<std::uint32_t*>(shared_memory());
  for (int round = 0; round < 2; ++round) {
    const std::int64_t part = (2 * block_id() + round) * kThreads;
    if (round > 0 && mistake != "copied_too_early") {
      sync_threads();  // the last round's words have been read
    }
    const int at = mistake == "beyond_the_end" ? thread_id() + 1 : thread_id();
    cp_async(shared + at * kWords, in + (part + thread_id()) * kWords);
    if (mistake != "no_commit") {
      cp_async_commit();
    }
    if (mistake != "no_wait") {
      cp_async_wait<0>();
    }
    if (mistake != "no_barrier") {
      sync_threads();
    }
    const Bytes16 words = load16(shared + (kThreads - 1 - thread_id()) * kWords);
    const bool elsewhere = mistake == "one_place";
    store16(out + ((elsewhere ? round * kThreads : part) + thread_id()) * kWords, words);
  }
  cp_async_wait<0>();
}

// Stores the sum of all of ``in`` for each thread, by shuffles, shared memory and a cluster.
__global__ void sum(const std::uint32_t* in, std::uint32_t* out, Mistake mistake) {
  auto* const shared = reinterpret_cast<std::uint32_t*>(shared_memory());
  std::uint32_t value = in[block_id() * kThreads + thread_id()];
  if (mistake != "parted_lanes" || lane_id() < 16) {
    for (int mask = 1; mask < kWarpSize; mask *= 2) {
      value += shuffle_xor(value, mask);
    }
  }
  if (lane_id() == 0) {
    shared[warp_id()] = value;
  }
  if (mistake != "no_barrier") {
    sync_threads();
  }
  if (mistake == "no_end" && warp_id() == 0) {
    sync_threads();
  }
  if (thread_id() == 0) {
    shared[2] = shared[0] + shared[1];
  }
  sync_cluster();
  std::uint32_t total = 0;
  for (int rank = 0; rank < 2; ++rank) {
    total += cluster_peer(shared, rank)[2];
  }
  out[block_id() * kThreads + thread_id()] = shuffle(total, cluster_rank());
  if (mistake != "ends_too_early") {
    sync_cluster();  // until the other block has read this one's memory
  }
}

// Small integers, which bfloat16 and their products have exactly.
float factor(int which, int row, int column) { return static_cast<float>((7 * row + (3 + which) * column) % 9 - 4); }

// A warpgroup's products of two matrices (64, 64): a b^T, then of the first 16 columns or rows a b, with a in registers,
// and a^T b.
__global__ void product(float* out, Mistake mistake) {
  char* const shared = shared_memory();
  char* const second = shared + 64 * SharedMatrix::kRowBytes;
  const int row = thread_id() / 2;
  if (mistake == "fenced_too_early") {
    fence_shared();
  }
  for (int unit = thread_id() % 2; unit < 8; unit += 2) {
    for (int which = 0; which < 2; ++which) {
      Bytes16 bytes;
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * unit + 2 * i;
        bytes.words[i] = pack<BFloat16>(factor(which, row, column), factor(which, row, column + 1));
      }
      store16((which ? second : shared) + SharedMatrix::offset(row, unit), bytes);
    }
  }
  if (mistake != "not_fenced" && mistake != "fenced_too_early") {
    fence_shared();
  }
  if (mistake != "no_barrier") {
    sync_threads();
  }
  const SharedMatrix a = shared_matrix(shared);
  const SharedMatrix b = shared_matrix(mistake == "beyond_the_end" ? second + 8 * SharedMatrix::kRowBytes : second);
  float by_columns[32];
  float by_rows[32];
  float transposed[32];
  if (mistake != "no_wgmma_fence") {
    wgmma_fence();
  }
  for (int k = 0; k < 64; k += 16) {
    const bool elsewhere = mistake == "parted_warps" && warp_id() == 3;
    wgmma<BFloat16>(by_columns, a.columns_from(k), b.columns_from(elsewhere ? 0 : k), k > 0);
  }
  wgmma_commit();
  std::uint32_t words[4];
  const int lane = lane_id();
  ldmatrix_x4(words, shared + SharedMatrix::offset(16 * warp_id() + lane % 16, lane / 16));
  wgmma_by_rows<BFloat16>(by_rows, words, b, false);
  wgmma_by_rows<BFloat16>(transposed, a, b, false);
  if (mistake != "no_commit") {
    wgmma_commit();
  }
  wgmma_wait<1>(by_columns);
  if (mistake == "waits_for_too_few") {
    wgmma_wait<1>(by_rows);
  }
  if (mistake != "no_wait") {
    wgmma_wait<0>(by_rows, transposed);
  }
  for (int i = 0; i < 32; ++i) {
    const int to = (16 * warp_id() + lane / 4 + 8 * (i / 2 % 2)) * 64 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    out[to] = by_columns[i];
    out[64 * 64 + to] = by_rows[i];
    out[2 * 64 * 64 + to] = transposed[i];
  }
}

bool is_product(const std::vector<float>& out) {
  bool right = true;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      float by_columns = 0;
      float by_rows = 0;
      float transposed = 0;
      for (int k = 0; k < 64; ++k) {
        by_columns += factor(0, row, k) * factor(1, column, k);
        by_rows += k < 16 ? factor(0, row, k) * factor(1, k, column) : 0;
        transposed += k < 16 ? factor(0, k, row) * factor(1, k, column) : 0;
      }
      const auto at = static_cast<std::size_t>(64 * row + column);
      right = right && out[at] == by_columns && out[64 * 64 + at] == by_rows && out[2 * 64 * 64 + at] == transposed;
    }
  }
  return right;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    return EXIT_FAILURE;
  }
  const Mistake mistake = arguments[2];
  LaunchShape shape;
  shape.blocks = 2;
  shape.threads = kThreads;
  bool right = true;
  if (std::string_view(arguments[1]) == "reverse") {
    const std::size_t words = 2 * 2 * kThreads * kWords;
    std::vector<std::uint32_t> in(words);
    std::vector<std::uint32_t> out(words);
    for (std::size_t i = 0; i < words; ++i) {
      in[i] = static_cast<std::uint32_t>(i);
    }
    shape.shared_memory = kThreads * kWords * 4;
    launch(reverse, shape, nullptr, static_cast<const std::uint32_t*>(in.data()), out.data(), mistake);
    for (std::size_t i = 0; i < words; ++i) {
      const std::size_t part = i / kWords / kThreads;
      const std::size_t from = kThreads - 1 - i / kWords % kThreads;
      right = right && out[i] == (part * kThreads + from) * kWords + i % kWords;
    }
  } else if (std::string_view(arguments[1]) == "product") {
    std::vector<float> out(3 * 64 * 64);
    shape.blocks = 1;
    shape.threads = kWarpgroupSize;
    shape.shared_memory = 2 * 64 * SharedMatrix::kRowBytes;
    launch(product, shape, nullptr, out.data(), mistake);
    right = is_product(out);
  } else {
    std::vector<std::uint32_t> in(2 * kThreads, 1);
    std::vector<std::uint32_t> out(2 * kThreads);
    shape.shared_memory = 3 * 4;
    shape.cluster = 2;
    launch(sum, shape, nullptr, static_cast<const std::uint32_t*>(in.data()), out.data(), mistake);
    for (const std::uint32_t total : out) {
      right = right && total == 2 * kThreads;
    }
  }
  std::puts(right ? "right" : "wrong");
  return EXIT_SUCCESS;
}
