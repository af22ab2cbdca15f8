// The launchers for Python's ctypes.

#include "vapt_fast/device.cuh"
#include "vapt_fast/prompt_attention.h"

using namespace vapt_fast;

extern "C" {

void prompt_attention_forward(const PromptAttentionForward* arguments, Status* status) {
  *status = launch_prompt_attention_forward(*arguments, nullptr);
}

void prompt_attention_backward(const PromptAttentionBackward* arguments, Status* status) {
  *status = launch_prompt_attention_backward(*arguments, nullptr);
}

std::int64_t prompt_attention_forward_shared_memory(const PromptAttentionSizes* sizes) {
  return vapt_fast::prompt_attention_forward_shared_memory(*sizes);
}

std::int64_t prompt_attention_backward_shared_memory(const PromptAttentionSizes* sizes, bool prompts_only) {
  return vapt_fast::prompt_attention_backward_shared_memory(*sizes, prompts_only);
}

std::int64_t prompt_attention_backward_workspace(const PromptAttentionSizes* sizes, bool prompts_only,
                                                 std::int64_t shared_memory) {
  return vapt_fast::prompt_attention_backward_workspace(*sizes, prompts_only, shared_memory);
}

std::int64_t bank_conflicts() { return runtime::bank_conflicts(); }

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
