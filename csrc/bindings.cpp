// vapt_fast._C: the launchers as Python functions, which get addresses, strides, sizes and a stream, run on the
// current device, and raise where a launcher returns anything but ok. Nothing of PyTorch: one build serves all its
// versions.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "vapt_fast/prompt_attention.h"

namespace py = pybind11;
namespace vf = vapt_fast;

namespace pybind11::detail {

// (address, stride of B, of T, of h) in Python, or None.
template <>
struct type_caster<vf::Tensor4> {
  PYBIND11_TYPE_CASTER(vf::Tensor4, const_name("tuple[int, int, int, int] | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source) || py::len(source) != 4) return false;
    const auto [data, batch, token, head] =
        source.cast<std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>>();
    value = {reinterpret_cast<void*>(data), batch, token, head};
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

vf::Dtype dtype(const std::string& name) {
  if (name == "float16") return vf::Dtype::float16;
  if (name == "bfloat16") return vf::Dtype::bfloat16;
  throw py::value_error("dtype must be float16 or bfloat16, got " + name);
}

std::string describe(const vf::PromptAttentionSizes& sizes) {
  return std::string("dtype=") + (sizes.dtype == vf::Dtype::float16 ? "float16" : "bfloat16") +
         ", batch=" + std::to_string(sizes.batch) + ", queries=" + std::to_string(sizes.queries) +
         ", tokens=" + std::to_string(sizes.tokens) + ", prompts=" + std::to_string(sizes.prompts) +
         ", heads=" + std::to_string(sizes.heads) + ", groups=" + std::to_string(sizes.groups) +
         ", head_dim=" + std::to_string(sizes.head_dim);
}

// Runs a launcher on ``stream``, a cudaStream_t as an integer, and raises unless its status is ok.
template <typename Arguments>
void launch(const char* op, vf::Status (*launcher)(const Arguments&, vf::Stream), const Arguments& arguments,
            std::uintptr_t stream) {
  vf::Status status;
  {
    const py::gil_scoped_release released;
    status = launcher(arguments, reinterpret_cast<vf::Stream>(stream));
  }
  if (status.code == vf::Code::ok) return;
  const std::string message = std::string(op) + "(" + describe(arguments.sizes) + "): " + status.message;
  if (status.code == vf::Code::invalid) throw py::value_error(message);
  if (status.code == vf::Code::unsupported) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw py::error_already_set();
  }
  throw std::runtime_error(message);
}

void bind_prompt_attention(py::module_& module) {
  using Sizes = vf::PromptAttentionSizes;
  using py::arg;

  py::class_<Sizes>(module, "PromptAttentionSizes", "Sizes of prompt_attention; see csrc/include.")
      .def(py::init([](const std::string& dtype_name, std::int64_t batch, std::int64_t queries, std::int64_t tokens,
                       std::int64_t prompts, std::int64_t heads, std::int64_t groups, std::int64_t head_dim) {
             return Sizes{dtype(dtype_name), batch, queries, tokens, prompts, heads, groups, head_dim};
           }),
           py::kw_only(), arg("dtype"), arg("batch"), arg("queries"), arg("tokens"), arg("prompts"), arg("heads"),
           arg("groups"), arg("head_dim"))
      .def("__repr__", [](const Sizes& sizes) { return "PromptAttentionSizes(" + describe(sizes) + ")"; });

  module.def(
      "prompt_attention_forward",
      [](const Sizes& sizes, float scale, vf::Tensor4 q, vf::Tensor4 k, vf::Tensor4 v, vf::Tensor4 prompt_k,
         vf::Tensor4 prompt_v, vf::Tensor4 out, std::uintptr_t lse, std::uintptr_t stream) {
        const vf::PromptAttentionForward arguments{.sizes = sizes,
                                                   .scale = scale,
                                                   .q = q,
                                                   .k = k,
                                                   .v = v,
                                                   .prompt_k = prompt_k,
                                                   .prompt_v = prompt_v,
                                                   .out = out,
                                                   .lse = reinterpret_cast<float*>(lse)};
        launch("prompt_attention_forward", vf::launch_prompt_attention_forward, arguments, stream);
      },
      py::kw_only(), arg("sizes"), arg("scale"), arg("q"), arg("k"), arg("v"), arg("prompt_k"), arg("prompt_v"),
      arg("out"), arg("lse"), arg("stream"));

  module.def(
      "prompt_attention_backward",
      [](const Sizes& sizes, float scale, vf::Tensor4 q, vf::Tensor4 k, vf::Tensor4 v, vf::Tensor4 prompt_k,
         vf::Tensor4 prompt_v, vf::Tensor4 out, std::uintptr_t lse, vf::Tensor4 grad_out, vf::Tensor4 grad_q,
         vf::Tensor4 grad_k, vf::Tensor4 grad_v, vf::Tensor4 grad_prompt_k, vf::Tensor4 grad_prompt_v,
         bool float32_prompt_grads, std::uintptr_t stream) {
        const vf::PromptAttentionBackward arguments{.sizes = sizes,
                                                    .scale = scale,
                                                    .q = q,
                                                    .k = k,
                                                    .v = v,
                                                    .prompt_k = prompt_k,
                                                    .prompt_v = prompt_v,
                                                    .out = out,
                                                    .lse = reinterpret_cast<const float*>(lse),
                                                    .grad_out = grad_out,
                                                    .grad_q = grad_q,
                                                    .grad_k = grad_k,
                                                    .grad_v = grad_v,
                                                    .grad_prompt_k = grad_prompt_k,
                                                    .grad_prompt_v = grad_prompt_v,
                                                    .float32_prompt_grads = float32_prompt_grads};
        launch("prompt_attention_backward", vf::launch_prompt_attention_backward, arguments, stream);
      },
      py::kw_only(), arg("sizes"), arg("scale"), arg("q"), arg("k"), arg("v"), arg("prompt_k"), arg("prompt_v"),
      arg("out"), arg("lse"), arg("grad_out"), arg("grad_q"), arg("grad_k"), arg("grad_v"), arg("grad_prompt_k"),
      arg("grad_prompt_v"), arg("float32_prompt_grads"), arg("stream"));

  module.def("prompt_attention_forward_shared_memory", vf::prompt_attention_forward_shared_memory, arg("sizes"));
  module.def("prompt_attention_backward_shared_memory", vf::prompt_attention_backward_shared_memory, arg("sizes"),
             py::kw_only(), arg("prompts_only"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of vapt_fast: their launchers, by addresses.";
  module.attr("architectures") = VAPT_FAST_ARCHITECTURES;  // as in CMAKE_CUDA_ARCHITECTURES
  module.attr("runtime_version") = CUDART_VERSION;         // of CUDA, 13000 for 13.0; also of the compiler
  module.def("driver_version", [] {
    int version = 0;  // without a driver it stays 0
    const cudaError_t error = cudaDriverGetVersion(&version);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    return version;
  }, "The newest CUDA that the driver serves, 13000 for 13.0; 0 without a driver.");
  bind_prompt_attention(module);
}
