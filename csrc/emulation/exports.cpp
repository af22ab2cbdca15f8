// The launchers for Python's ctypes.

#include "vapt_fast/device.cuh"
#include "vapt_fast/prompt_pool.h"

using namespace vapt_fast;

extern "C" {

void prompt_pool_forward(const PromptPoolForward* arguments, Status* status) {
  *status = launch_prompt_pool_forward(*arguments, nullptr);
}

void prompt_pool_backward(const PromptPoolBackward* arguments, Status* status) {
  *status = launch_prompt_pool_backward(*arguments, nullptr);
}

std::int64_t prompt_pool_workspace(const PromptPoolSizes* sizes) { return prompt_pool_backward_workspace(*sizes); }

std::int64_t bank_conflicts() { return runtime::bank_conflicts(); }

void set_clusters_at_once(std::int64_t count) { runtime::set_clusters_at_once(count); }

void set_shared_memory_limit(std::int64_t bytes) { runtime::set_shared_memory_limit(bytes); }

// The emulation's conversions, to compare with PyTorch's: elements are 16-bit words.
void to_float(Dtype dtype, std::int64_t count, const std::uint16_t* from, float* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = dtype == Dtype::float16 ? to_float(Float16{from[i]}) : to_float(BFloat16{from[i]});
  }
}

void from_float(Dtype dtype, std::int64_t count, const float* from, std::uint16_t* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = dtype == Dtype::float16 ? round_to<Float16>(from[i]).bits : round_to<BFloat16>(from[i]).bits;
  }
}
}
