// The runtime of the emulation's products. Compiled without sanitizers, as emulation.cpp is.

#include <algorithm>
#include <limits>

#include "emulation/runtime.h"

namespace vapt_fast::runtime {

void wrote(const void* to) {
  Block& block = *current->block;
  const char* const shared = block.shared.get();
  if (to >= shared && to < shared + current_launch->shape->shared_memory) {
    const auto unit = static_cast<std::size_t>(static_cast<const char*>(to) - shared) / SharedMatrix::kUnitBytes;
    block.hidden[unit] = true;
    current->written.push_back(unit);
  }
}

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

void check_complete(const float* accumulators, int count) {
  for (const Accumulators& pending : current->accumulators) {
    if (pending.at >= accumulators && pending.at < accumulators + count) {
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

}  // namespace vapt_fast::runtime
