// prompt_pool in vapt_fast._C.

#include "common/binding.h"
#include "prompt_pool/api.h"

namespace vapt_fast {
using Sizes = PromptPoolSizes;

static std::string describe(const Sizes& sizes) {
  return std::string("dtype=") + name_of(sizes.dtype) +
         ", float32_tokens=" + (sizes.float32_tokens ? "True" : "False") + ", batch=" + std::to_string(sizes.batch) +
         ", prefix=" + std::to_string(sizes.prefix) + ", patches=" + std::to_string(sizes.patches) +
         ", channels=" + std::to_string(sizes.channels) + ", rows=" + std::to_string(sizes.rows);
}

static void read(Keywords& given, PromptPoolForward& to) {
  given.read("sizes", to.sizes).read("eps", to.eps).read("prompt_eps", to.prompt_eps);
  given.read("x", to.x).read("branch", to.branch).read("layer_scale", to.layer_scale).read("matrix", to.matrix);
  given.read("weight", to.weight).read("bias", to.bias);
  given.read("norm_weight", to.norm_weight).read("norm_bias", to.norm_bias);
  given.read("total", to.total).read("normed", to.normed).read("pooled", to.pooled);
  given.read("mean", to.mean).read("rstd", to.rstd).read("one_pass", to.one_pass);
}

static void read(Keywords& given, PromptPoolBackward& to) {
  given.read("sizes", to.sizes).read("eps", to.eps).read("prompt_eps", to.prompt_eps);
  given.read("total", to.total).read("grad_total", to.grad_total);
  given.read("grad_normed", to.grad_normed).read("grad_pooled", to.grad_pooled);
  given.read("layer_scale", to.layer_scale).read("matrix", to.matrix);
  given.read("weight", to.weight).read("bias", to.bias).read("norm_weight", to.norm_weight);
  given.read("mean", to.mean).read("rstd", to.rstd).read("workspace", to.workspace);
  given.read("grad_x", to.grad_x).read("grad_branch", to.grad_branch).read("grad_matrix", to.grad_matrix);
  given.read("grad_weight", to.grad_weight).read("grad_bias", to.grad_bias).read("one_pass", to.one_pass);
}

void bind_prompt_pool(py::module_& module) {
  using py::arg;
  const auto make_sizes = [](const std::string& dtype, bool float32_tokens, std::int64_t batch, std::int64_t prefix,
                             std::int64_t patches, std::int64_t channels, std::int64_t rows) {
    return Sizes{dtype_of(dtype), float32_tokens, batch, prefix, patches, channels, rows};
  };
  py::class_<Sizes>(module, "PromptPoolSizes", py::module_local(), "The sizes of prompt_pool; see its api.h.")
      .def(py::init(make_sizes), py::kw_only(), arg("dtype"), arg("float32_tokens"), arg("batch"), arg("prefix"),
           arg("patches"), arg("channels"), arg("rows"))
      .def("__repr__", [](const Sizes& sizes) { return "PromptPoolSizes(" + describe(sizes) + ")"; });
  bind_launcher(module, "prompt_pool_forward", launch_prompt_pool_forward);
  bind_launcher(module, "prompt_pool_backward", launch_prompt_pool_backward);
  module.def("prompt_pool_backward_workspace", prompt_pool_backward_workspace, arg("sizes"));
}

}  // namespace vapt_fast
