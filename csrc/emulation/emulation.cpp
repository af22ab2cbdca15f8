// The runtime of the emulation: fibers, barriers, exchanges. Compiled without sanitizers; where they are linked in, it
// tells them which fiber runs and what a barrier orders.

#include "common/device.cuh"
#include "common/wgmma.cuh"

#include <malloc.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

extern "C" {
// Of ThreadSanitizer and AddressSanitizer; null where these are not linked in.
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
void __tsan_write_range(void* address, std::size_t size) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size) __attribute__((weak));
}

namespace vapt_fast::runtime {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr unsigned kSwitchOrdersNothing = 1;

Limits device{227 * 1024, 2};  // shared memory as on sm_90
std::int64_t conflicts = 0;

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

Launch* current_launch = nullptr;
Cluster* cluster = nullptr;
Thread* current = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulation: block %lld, thread %d: %s\n",
               current ? static_cast<long long>(current->block->index) : -1, current ? current->index : -1, what);
  std::abort();
}

void acquire(void* address) {
  if (__tsan_acquire) {
    __tsan_acquire(address);
  }
}

void release(void* address) {
  if (__tsan_release) {
    __tsan_release(address);
  }
}

// ---- turns

void thread_main();

// Resumes a fiber, or starts it. Twenty times as fast as swapcontext, which makes a system call for the signal mask.
[[noreturn]] __attribute__((noinline)) void resume(Fiber& fiber) {
  if (fiber.started) {
    __builtin_longjmp(fiber.registers, 1);
  }
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = fiber.size;
  makecontext(&context, thread_main, 0);
  setcontext(&context);
  fail("could not be started");
}

__attribute__((noinline)) void switch_to(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  }
  if (__tsan_switch_to_fiber) {
    __tsan_switch_to_fiber(to.tsan, kSwitchOrdersNothing);
  }
  if (__builtin_setjmp(from.registers) == 0) {
    resume(to);
  }
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  }
}

bool can_run(const Thread& thread) {
  return !thread.finished && !(thread.waits_at && thread.waits_at->generation == thread.generation);
}

// Lets another thread of the cluster run, or the host when all are finished.
void yield() {
  Thread* const from = current;
  const std::size_t count = cluster->threads.size();
  const auto position = static_cast<std::size_t>(from - cluster->threads.data());
  for (std::size_t i = 1; i <= count; ++i) {
    Thread& next = cluster->threads[(position + i) % count];
    if (can_run(next)) {
      if (&next != from) {
        current = &next;
        switch_to(from->fiber, next.fiber);
      }
      return;
    }
  }
  for (const Thread& thread : cluster->threads) {
    if (!thread.finished) {
      current = const_cast<Thread*>(&thread);
      fail("hangs: waits for threads that wait elsewhere or have ended");
    }
  }
  switch_to(from->fiber, current_launch->host);
}

void thread_main() {
  if (__sanitizer_finish_switch_fiber) {
    Fiber& host = current_launch->host;
    const void* bottom;
    std::size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!host.bottom) {  // the first fiber comes from the host
      host.bottom = bottom;
      host.size = size;
    }
  }
  acquire(&current_launch->begin);
  (*current_launch->kernel)();
  if (!current->groups.empty() || !current->open.empty()) {
    fail("ends without having waited for its copies");
  }
  if (!current->accumulators.empty()) {
    fail("ends without having waited for its products");
  }
  Block& block = *current->block;
  release(&block.end);
  if (--block.running == 0 && __tsan_write_range) {
    // The block's shared memory is no more: no other block of the cluster may still read it.
    acquire(&block.end);
    __tsan_write_range(block.shared.get(), static_cast<std::size_t>(current_launch->shape->shared_memory));
  }
  release(&current_launch->end);
  current->finished = true;
  yield();
}

// ---- barriers

void wait(Barrier& barrier, int threads, bool orders_memory) {
  char* const order = &barrier.order[barrier.generation % 2];
  if (orders_memory) {
    release(order);
  }
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    current->waits_at = &barrier;
    current->generation = barrier.generation;
    yield();
    current->waits_at = nullptr;
  }
  if (orders_memory) {
    acquire(order);
  }
}

void prepare(Cluster& prepared, const LaunchShape& shape, std::int64_t first_block) {
  prepared.blocks.resize(static_cast<std::size_t>(shape.cluster));
  prepared.threads.resize(static_cast<std::size_t>(shape.cluster * shape.threads));
  for (int rank = 0; rank < shape.cluster; ++rank) {
    Block& block = prepared.blocks[static_cast<std::size_t>(rank)];
    block.index = first_block + rank;
    block.running = shape.threads;
    block.warps.resize(static_cast<std::size_t>(shape.threads / kWarpSize));
    const auto bytes = static_cast<std::size_t>(shape.shared_memory);
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes) != 0) {
      fail("finds no memory");
    }
    std::memset(memory, 0xff, bytes);
    block.shared.reset(static_cast<char*>(memory));
    block.hidden.resize(bytes / SharedMatrix::kUnitBytes + 1);
    block.warpgroups.resize(static_cast<std::size_t>((shape.threads + kWarpgroupSize - 1) / kWarpgroupSize));
    for (int index = 0; index < shape.threads; ++index) {
      Thread& thread = prepared.threads[static_cast<std::size_t>(rank * shape.threads + index)];
      thread.block = &block;
      thread.index = index;
      thread.rank = rank;
      thread.fiber.stack.reset(new char[kStack]);
      thread.fiber.bottom = thread.fiber.stack.get();
      thread.fiber.size = kStack;
      if (__tsan_create_fiber) {
        thread.fiber.tsan = __tsan_create_fiber(0);
      }
    }
  }
}

Warp& current_warp() { return current->block->warps[static_cast<std::size_t>(current->index / kWarpSize)]; }

}  // namespace

int thread_id() { return current->index; }
std::int64_t block_id() { return current->block->index; }
int cluster_rank() { return current->rank; }
char* shared_memory() { return current->block->shared.get(); }

char* peer_shared_memory(int rank) {
  if (rank < 0 || rank >= static_cast<int>(cluster->blocks.size())) {
    fail("asks for a block outside its cluster");
  }
  return cluster->blocks[static_cast<std::size_t>(rank)].shared.get();
}

void sync_threads() { wait(current->block->barrier, current_launch->shape->threads, true); }

void sync_warp() { wait(current_warp().barrier, kWarpSize, true); }

void sync_cluster() { wait(cluster->barrier, static_cast<int>(cluster->threads.size()), true); }

const char* exchange(const char* operation, const void* data, std::size_t size) {
  Warp& warp = current_warp();
  if (size > kSlot) {
    fail("exchanges too much at once");
  }
  if (warp.exchange.arrived == 0) {
    warp.operation = operation;
  } else if (std::strcmp(warp.operation, operation) != 0) {
    std::fprintf(stderr, "emulation: lanes diverge: %s and %s\n", warp.operation, operation);
    fail("its warp does something else");
  }
  // Two buffers: the other one is not written again before all lanes have read this one.
  char* const slots = warp.slots[current->exchanges++ % 2];
  char* const slot = slots + current->index % kWarpSize * kSlot;
  for (std::size_t i = 0; i < size; ++i) {
    slot[i] = static_cast<const char*>(data)[i];
    asm volatile("" ::: "memory");  // not memcpy, which ThreadSanitizer would watch
  }
  wait(warp.exchange, kWarpSize, false);
  return slots;
}

void count_bank_conflicts(const char* addresses) {
  if (current->index % kWarpSize != 0) {
    return;
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* in_group[8] = {};  // of four banks
    for (int row = 0; row < 8; ++row) {
      const void* address;
      std::memcpy(&address, addresses + (8 * matrix + row) * kSlot, sizeof address);
      const void*& other = in_group[reinterpret_cast<std::uintptr_t>(address) / 16 % 8];
      conflicts += other && other != address;
      other = address;
    }
  }
}

void begin_copy(Copy copy) { current->open.push_back(copy); }

void cp_async_commit() { current->groups.push_back(std::exchange(current->open, {})); }

const Copy* next_copy(int pending) {
  while (static_cast<int>(current->groups.size()) > pending) {
    Group& group = current->groups.front();
    if (!group.empty()) {
      current->copy = group.front();
      group.pop_front();
      return &current->copy;
    }
    current->groups.pop_front();
  }
  return nullptr;
}

void wrote(const void* to) {
  Block& block = *current->block;
  const char* const shared = block.shared.get();
  if (to >= shared && to < shared + current_launch->shape->shared_memory) {
    const auto unit = static_cast<std::size_t>(static_cast<const char*>(to) - shared) / SharedMatrix::kUnitBytes;
    block.hidden[unit] = true;
    current->written.push_back(unit);
  }
}

// ---- products

void fence_shared() {
  for (const std::size_t unit : current->written) {
    current->block->hidden[unit] = false;
  }
  current->written.clear();
}

void wgmma_fence() { current->fenced = true; }

void begin_product(const Product& product, float* accumulators) {
  if (!current->fenced) {
    fail("multiplies without a wgmma_fence");
  }
  float* const end = accumulators + product.count;
  auto found = std::find_if(current->accumulators.begin(), current->accumulators.end(),
                            [=](const Accumulators& other) { return other.at == accumulators; });
  if (found == current->accumulators.end()) {
    current->accumulators.push_back({accumulators, std::vector<float>(accumulators, end), 0});
    found = current->accumulators.end() - 1;
    std::fill_n(accumulators, product.count, std::numeric_limits<float>::quiet_NaN());
  }
  ++found->pending;
  current->issued.push_back({product, accumulators});
}

void wgmma_commit() {
  Warpgroup& warpgroup = current->block->warpgroups[static_cast<std::size_t>(current->index / kWarpgroupSize)];
  std::uint64_t products = 0;
  for (const auto& [product, accumulators] : current->issued) {
    for (const std::uint64_t part : {product.a, product.b, static_cast<std::uint64_t>(product.accumulate)}) {
      products = (products ^ part) * 0x100000001b3u;
    }
  }
  if (warpgroup.commit.arrived == 0) {
    warpgroup.products = products;
  } else if (warpgroup.products != products) {
    fail("its warpgroup multiplies something else");
  }
  wait(warpgroup.commit, kWarpgroupSize, false);
  current->products.push_back(std::exchange(current->issued, {}));
}

bool next_product(int pending) {
  current->fenced = false;
  while (static_cast<int>(current->products.size()) > pending) {
    std::vector<IssuedProduct>& group = current->products.front();
    if (!group.empty()) {
      current->product = group.front();
      group.erase(group.begin());
      return true;
    }
    current->products.pop_front();
  }
  return false;
}

void compute_product() {
  const IssuedProduct& issued = current->product;
  const auto of = std::find_if(current->accumulators.begin(), current->accumulators.end(),
                               [&](const Accumulators& other) { return other.at == issued.accumulators; });
  issued.product.compute(issued.product, of->values.data());
  if (--of->pending == 0) {
    std::copy(of->values.begin(), of->values.end(), of->at);
    current->accumulators.erase(of);
  }
}

void check_complete(const float* accumulators) {
  for (const Accumulators& pending : current->accumulators) {
    if (pending.at == accumulators) {
      fail("takes accumulators for complete whose products it has not waited for");
    }
  }
}

std::ptrdiff_t find_element(std::uint64_t descriptor, int row, int column) {
  const auto start = static_cast<std::ptrdiff_t>(descriptor & 0x3fffu) * SharedMatrix::kUnitBytes;
  const auto eight_rows = static_cast<std::ptrdiff_t>(descriptor >> 32 & 0x3fffu) * SharedMatrix::kUnitBytes;
  if (descriptor >> 62 != 1) {
    fail("multiplies a matrix that is not swizzled");
  }
  std::ptrdiff_t offset = start + row / 8 * eight_rows + row % 8 * SharedMatrix::kRowBytes + 2 * column;
  offset ^= offset >> 3 & 0x70;  // the swizzle is one of addresses
  if (offset >= current_launch->shape->shared_memory) {
    fail("multiplies what is beyond its shared memory");
  }
  if (current->block->hidden[static_cast<std::size_t>(offset / SharedMatrix::kUnitBytes)]) {
    fail("multiplies what was written without fence_shared");
  }
  return offset;
}

const Limits& limits() { return device; }

void run(const LaunchShape& shape, const std::function<void()>& kernel) {
  if (shape.blocks < 1 || shape.blocks > 0x7fffffff || shape.blocks % shape.cluster || shape.cluster < 1 ||
      shape.threads < kWarpSize || shape.threads > 1024 || shape.threads % kWarpSize) {
    fail("no such launch");
  }
  mallopt(M_TRIM_THRESHOLD, 1 << 30);  // or the stacks' pages go back to the system after each block
  Launch launch;
  launch.shape = &shape;
  launch.kernel = &kernel;
  launch.host.started = true;
  launch.host.tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  current_launch = &launch;
  for (std::int64_t first = 0; first < shape.blocks; first += shape.cluster) {
    cluster = &launch.clusters.emplace_back();
    prepare(*cluster, shape, first);
    release(&launch.begin);
    current = &cluster->threads.front();
    switch_to(launch.host, current->fiber);
    if (!__tsan_create_fiber) {
      launch.clusters.clear();
    }
  }
  acquire(&launch.end);
  for (Cluster& done : launch.clusters) {
    for (Thread& thread : done.threads) {
      if (__tsan_destroy_fiber) {
        __tsan_destroy_fiber(thread.fiber.tsan);
      }
    }
  }
  current_launch = nullptr;
  cluster = nullptr;
  current = nullptr;
}

}  // namespace vapt_fast::runtime

// ---- for the tests, by ctypes

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT void set_limits(std::int64_t shared_memory, std::int64_t clusters) {
  vapt_fast::runtime::device = {shared_memory, clusters};
}

// Those since the last call.
EXPORT std::int64_t bank_conflicts() { return std::exchange(vapt_fast::runtime::conflicts, 0); }

EXPORT float from_float16(std::uint16_t bits) { return vapt_fast::to_float(vapt_fast::Float16{bits}); }
EXPORT float from_bfloat16(std::uint16_t bits) { return vapt_fast::to_float(vapt_fast::BFloat16{bits}); }
EXPORT std::uint16_t to_float16(float value) { return vapt_fast::round_to<vapt_fast::Float16>(value).bits; }
EXPORT std::uint16_t to_bfloat16(float value) { return vapt_fast::round_to<vapt_fast::BFloat16>(value).bits; }
}
