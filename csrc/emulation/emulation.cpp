// The runtime of the emulation: fibers, barriers, exchanges. Compiled without sanitizers; where they are linked in, it
// tells them which fiber runs and what a barrier orders.

#include <malloc.h>
#include <ucontext.h>

#include "emulation/runtime.h"

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

Cluster* cluster = nullptr;

}  // namespace

Launch* current_launch = nullptr;
Thread* current = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulation: block %lld, thread %d: %s\n",
               current ? static_cast<long long>(current->block->index) : -1, current ? current->index : -1, what);
  std::abort();
}

namespace {

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

}  // namespace

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

namespace {

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
