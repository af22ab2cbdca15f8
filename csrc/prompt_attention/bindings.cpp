// prompt_attention in vapt_fast._C.

#include "common/binding.h"
#include "prompt_attention/api.h"

namespace vapt_fast {
namespace {

using Sizes = PromptAttentionSizes;

void read_sizes(Keywords& given, Sizes& to) {
  std::string dtype;
  given.read("dtype", dtype).read("batch", to.batch).read("queries", to.queries).read("tokens", to.tokens);
  given.read("prompts", to.prompts).read("heads", to.heads).read("channels", to.channels);
  to.dtype = dtype_of(dtype);
}

void read_inputs(Keywords& given, PromptAttentionInputs& to) {
  given.read("q", to.q).read("k", to.k).read("v", to.v).read("prompt_k", to.prompt_k).read("prompt_v", to.prompt_v);
}

void read(Keywords& given, PromptAttentionForward& to) { given.read("out", to.out).read("lse", to.lse); }

void read(Keywords& given, PromptAttentionBackward& to) {
  given.read("out", to.out).read("lse", to.lse).read("grad_out", to.grad_out);
  given.read("grad_q", to.grads.q).read("grad_k", to.grads.k).read("grad_v", to.grads.v);
  given.read("grad_prompt_k", to.grads.prompt_k).read("grad_prompt_v", to.grads.prompt_v);
}

std::string describe(const Sizes& sizes) {
  return std::string("dtype=") + name_of(sizes.dtype) + ", batch=" + std::to_string(sizes.batch) +
         ", queries=" + std::to_string(sizes.queries) + ", tokens=" + std::to_string(sizes.tokens) +
         ", prompts=" + std::to_string(sizes.prompts) + ", heads=" + std::to_string(sizes.heads) +
         ", channels=" + std::to_string(sizes.channels);
}

// Binds a launcher as a function of the keywords that are read here, and of ``stream``, a cudaStream_t as an integer.
template <typename Arguments>
void bind_launcher(py::module_& module, const char* name, Status (*launcher)(const Arguments&, Stream)) {
  module.def(name, [name, launcher](const py::kwargs& keywords) {
    Arguments arguments;
    Stream stream = nullptr;
    Keywords given(name, keywords);
    read_sizes(given, arguments.sizes);
    read_inputs(given, arguments.in);
    read(given, arguments);
    given.read("scale", arguments.scale).read("stream", stream).end();
    Status status;
    {
      const py::gil_scoped_release released;
      status = launcher(arguments, stream);
    }
    raise_unless_ok(status, std::string(name) + "(" + describe(arguments.sizes) + ")");
  });
}

}  // namespace

void bind_prompt_attention(py::module_& module) {
  bind_launcher(module, "prompt_attention_forward", launch_prompt_attention_forward);
  bind_launcher(module, "prompt_attention_backward", launch_prompt_attention_backward);
}

}  // namespace vapt_fast
