// prompt_attention in vapt_fast._C.

#include "common/binding.h"
#include "prompt_attention/api.h"

namespace vapt_fast {
using Sizes = PromptAttentionSizes;

static void read_sizes(Keywords& given, Sizes& to) {
  std::string dtype;
  given.read("dtype", dtype).read("batch", to.batch).read("queries", to.queries).read("tokens", to.tokens);
  given.read("prompts", to.prompts).read("heads", to.heads).read("channels", to.channels);
  to.dtype = dtype_of(dtype);
}

// What both launches are given.
template <typename Arguments>
static void read_common(Keywords& given, Arguments& to) {
  read_sizes(given, to.sizes);
  given.read("q", to.in.q).read("k", to.in.k).read("v", to.in.v);
  given.read("prompt_k", to.in.prompt_k).read("prompt_v", to.in.prompt_v).read("scale", to.scale);
}

static void read(Keywords& given, PromptAttentionForward& to) {
  read_common(given, to);
  given.read("out", to.out).read("lse", to.lse);
}

static void read(Keywords& given, PromptAttentionBackward& to) {
  read_common(given, to);
  given.read("out", to.out).read("lse", to.lse).read("grad_out", to.grad_out);
  given.read("grad_q", to.grads.q).read("grad_k", to.grads.k).read("grad_v", to.grads.v);
  given.read("grad_prompt_k", to.grads.prompt_k).read("grad_prompt_v", to.grads.prompt_v);
}

static std::string describe(const Sizes& sizes) {
  return std::string("dtype=") + name_of(sizes.dtype) + ", batch=" + std::to_string(sizes.batch) +
         ", queries=" + std::to_string(sizes.queries) + ", tokens=" + std::to_string(sizes.tokens) +
         ", prompts=" + std::to_string(sizes.prompts) + ", heads=" + std::to_string(sizes.heads) +
         ", channels=" + std::to_string(sizes.channels);
}

void bind_prompt_attention(py::module_& module) {
  bind_launcher(module, "prompt_attention_forward", launch_prompt_attention_forward);
  bind_launcher(module, "prompt_attention_backward", launch_prompt_attention_backward);
}

}  // namespace vapt_fast
