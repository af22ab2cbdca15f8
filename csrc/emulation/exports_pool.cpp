// The launchers of prompt_pool for Python's ctypes.

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
}
