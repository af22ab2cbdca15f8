// What runs in the emulation: blocks, warps and threads, and what each of them has under way.

#pragma once

#include <cstdlib>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "common/device.cuh"
#include "common/wgmma.cuh"

namespace vapt_fast::runtime {

// A stack, and where it was left.
struct Fiber {
  void* registers[5];  // of __builtin_setjmp
  bool started = false;
  std::unique_ptr<char[]> stack;
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

struct Barrier {
  int arrived = 0;
  std::uint64_t generation = 0;
  char order[2];  // ThreadSanitizer's handles of even and odd generations
};

struct Warp {
  Barrier exchange;  // orders no memory
  Barrier barrier;
  const char* operation = nullptr;
  alignas(16) char slots[2][kWarpSize * kSlot];
};

struct Warpgroup {
  Barrier commit;              // orders no memory
  std::uint64_t products = 0;  // a hash of those of the group that is being committed
};

struct Block {
  std::int64_t index = 0;
  int running = 0;  // threads
  char end;         // ThreadSanitizer's handle of the end of its threads
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
  std::vector<bool> hidden;  // from products, by units of shared memory
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barrier;
};

using Group = std::deque<Copy>;

// Accumulators of products that were issued.
struct Accumulators {
  float* at;
  std::vector<float> values;
  int pending;  // products
};

struct IssuedProduct {
  Product product;
  float* accumulators;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int index = 0;
  int rank = 0;  // of its block in the cluster
  bool finished = false;
  const Barrier* waits_at = nullptr;
  std::uint64_t generation = 0;  // of that barrier
  std::uint64_t exchanges = 0;
  std::deque<Group> groups;  // committed ones
  Group open;
  Copy copy{};                       // the one last given out
  std::vector<std::size_t> written;  // units of shared memory since the last fence_shared
  bool fenced = false;               // by wgmma_fence
  std::vector<Accumulators> accumulators;
  std::deque<std::vector<IssuedProduct>> products;  // committed groups
  std::vector<IssuedProduct> issued;
  IssuedProduct product;  // the one last given out
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  Barrier barrier;
};

struct Launch {
  const LaunchShape* shape;
  const std::function<void()>* kernel;
  Fiber host;
  char begin, end;  // ThreadSanitizer's handles of all fibers
  // Under ThreadSanitizer kept until the end: freeing memory would order the blocks that used it.
  std::deque<Cluster> clusters;
};

extern Launch* current_launch;
extern Thread* current;

// Ends the process.
[[noreturn]] void fail(const char* what);

// Lets the others run until ``threads`` have come here.
void wait(Barrier& barrier, int threads, bool orders_memory);

}  // namespace vapt_fast::runtime
