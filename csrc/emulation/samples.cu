// Small kernels that use the primitives correctly, or with one mistake, which the emulation has to find. ``samples KERNEL
// MISTAKE`` prints "right" or "wrong".

#include <cstdlib>
#include <string_view>
#include <vector>

#include "common/device.cuh"

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
