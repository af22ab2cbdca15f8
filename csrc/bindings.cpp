// vapt_fast._C: the launchers as Python functions, which get addresses, strides, sizes and a stream, run on the
// current device, and raise where a launcher returns anything but ok. Nothing of PyTorch: one build serves all its
// versions.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "vapt_fast/prompt_pool.h"

namespace py = pybind11;
namespace vf = vapt_fast;

namespace pybind11::detail {

// Views: (address, stride, ...) in Python, or None.
template <std::size_t STRIDES>
bool load_view(handle source, std::uintptr_t& address, std::array<std::int64_t, STRIDES>& strides) {
  if (source.is_none()) return true;
  if (!isinstance<tuple>(source) || py::len(source) != 1 + STRIDES) return false;
  const auto items = reinterpret_borrow<tuple>(source);
  address = items[0].cast<std::uintptr_t>();
  for (std::size_t i = 0; i < STRIDES; ++i) strides[i] = items[i + 1].cast<std::int64_t>();
  return true;
}

template <>
struct type_caster<vf::Tensor3> {
  PYBIND11_TYPE_CASTER(vf::Tensor3, const_name("tuple[int, int, int] | None"));

  bool load(handle source, bool) {
    std::uintptr_t address = 0;
    std::array<std::int64_t, 2> strides{};
    if (!load_view(source, address, strides)) return false;
    value = {reinterpret_cast<const void*>(address), strides[0], strides[1]};
    return true;
  }
};

template <>
struct type_caster<vf::PoolingMatrix> {
  PYBIND11_TYPE_CASTER(vf::PoolingMatrix, const_name("tuple[int, int] | None"));

  bool load(handle source, bool) {
    std::uintptr_t address = 0;
    std::array<std::int64_t, 1> strides{};
    if (!load_view(source, address, strides)) return false;
    value = {reinterpret_cast<const float*>(address), strides[0]};
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

std::string name(vf::Dtype dtype) { return dtype == vf::Dtype::float16 ? "float16" : "bfloat16"; }

std::string describe(const vf::PromptPoolSizes& sizes) {
  return "dtype=" + name(sizes.dtype) + ", float32_tokens=" + (sizes.float32_tokens ? "True" : "False") +
         ", batch=" + std::to_string(sizes.batch) + ", prefix=" + std::to_string(sizes.prefix) +
         ", patches=" + std::to_string(sizes.patches) + ", channels=" + std::to_string(sizes.channels) +
         ", rows=" + std::to_string(sizes.rows);
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

void bind_prompt_pool(py::module_& module) {
  using Sizes = vf::PromptPoolSizes;
  using Address = std::uintptr_t;  // 0 for null
  using py::arg;

  py::class_<Sizes>(module, "PromptPoolSizes", py::module_local(), "Sizes of prompt_pool; see csrc/include.")
      .def(py::init([](const std::string& dtype_name, bool float32_tokens, std::int64_t batch, std::int64_t prefix,
                       std::int64_t patches, std::int64_t channels, std::int64_t rows) {
             return Sizes{dtype(dtype_name), float32_tokens, batch, prefix, patches, channels, rows};
           }),
           py::kw_only(), arg("dtype"), arg("float32_tokens"), arg("batch"), arg("prefix"), arg("patches"),
           arg("channels"), arg("rows"))
      .def("__repr__", [](const Sizes& sizes) { return "PromptPoolSizes(" + describe(sizes) + ")"; });

  module.def(
      "prompt_pool_forward",
      [](const Sizes& sizes, float eps, float prompt_eps, vf::Tensor3 x, vf::Tensor3 branch, Address layer_scale,
         vf::PoolingMatrix matrix, Address weight, Address bias, Address norm_weight, Address norm_bias, Address total,
         Address normed, Address pooled, Address mean, Address rstd, bool one_pass, std::uintptr_t stream) {
        const vf::PromptPoolForward arguments{.sizes = sizes,
                                              .eps = eps,
                                              .prompt_eps = prompt_eps,
                                              .x = x,
                                              .branch = branch,
                                              .layer_scale = reinterpret_cast<const float*>(layer_scale),
                                              .matrix = matrix,
                                              .weight = reinterpret_cast<const float*>(weight),
                                              .bias = reinterpret_cast<const float*>(bias),
                                              .norm_weight = reinterpret_cast<const float*>(norm_weight),
                                              .norm_bias = reinterpret_cast<const float*>(norm_bias),
                                              .total = reinterpret_cast<void*>(total),
                                              .normed = reinterpret_cast<void*>(normed),
                                              .pooled = reinterpret_cast<float*>(pooled),
                                              .mean = reinterpret_cast<float*>(mean),
                                              .rstd = reinterpret_cast<float*>(rstd),
                                              .one_pass = one_pass};
        launch("prompt_pool_forward", vf::launch_prompt_pool_forward, arguments, stream);
      },
      py::kw_only(), arg("sizes"), arg("eps"), arg("prompt_eps"), arg("x"), arg("branch"), arg("layer_scale"),
      arg("matrix"), arg("weight"), arg("bias"), arg("norm_weight"), arg("norm_bias"), arg("total"), arg("normed"),
      arg("pooled"), arg("mean"), arg("rstd"), arg("one_pass"), arg("stream"));

  module.def(
      "prompt_pool_backward",
      [](const Sizes& sizes, float eps, float prompt_eps, vf::Tensor3 total, vf::Tensor3 grad_total,
         vf::Tensor3 grad_normed, vf::Tensor3 grad_pooled, Address layer_scale, vf::PoolingMatrix matrix,
         Address weight, Address bias, Address norm_weight, Address mean, Address rstd, Address workspace,
         Address grad_x, Address grad_branch, Address grad_matrix, Address grad_weight, Address grad_bias,
         bool one_pass, std::uintptr_t stream) {
        const vf::PromptPoolBackward arguments{.sizes = sizes,
                                               .eps = eps,
                                               .prompt_eps = prompt_eps,
                                               .total = total,
                                               .grad_total = grad_total,
                                               .grad_normed = grad_normed,
                                               .grad_pooled = grad_pooled,
                                               .layer_scale = reinterpret_cast<const float*>(layer_scale),
                                               .matrix = matrix,
                                               .weight = reinterpret_cast<const float*>(weight),
                                               .bias = reinterpret_cast<const float*>(bias),
                                               .norm_weight = reinterpret_cast<const float*>(norm_weight),
                                               .mean = reinterpret_cast<const float*>(mean),
                                               .rstd = reinterpret_cast<const float*>(rstd),
                                               .workspace = reinterpret_cast<float*>(workspace),
                                               .grad_x = reinterpret_cast<void*>(grad_x),
                                               .grad_branch = reinterpret_cast<void*>(grad_branch),
                                               .grad_matrix = reinterpret_cast<float*>(grad_matrix),
                                               .grad_weight = reinterpret_cast<float*>(grad_weight),
                                               .grad_bias = reinterpret_cast<float*>(grad_bias),
                                               .one_pass = one_pass};
        launch("prompt_pool_backward", vf::launch_prompt_pool_backward, arguments, stream);
      },
      py::kw_only(), arg("sizes"), arg("eps"), arg("prompt_eps"), arg("total"), arg("grad_total"), arg("grad_normed"),
      arg("grad_pooled"), arg("layer_scale"), arg("matrix"), arg("weight"), arg("bias"), arg("norm_weight"),
      arg("mean"), arg("rstd"), arg("workspace"), arg("grad_x"), arg("grad_branch"), arg("grad_matrix"),
      arg("grad_weight"), arg("grad_bias"), arg("one_pass"), arg("stream"));

  module.def("prompt_pool_backward_workspace", vf::prompt_pool_backward_workspace, arg("sizes"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of vapt_fast: their launchers, by addresses.";
  module.attr("architectures") = VAPT_FAST_ARCHITECTURES;  // those of CMAKE_CUDA_ARCHITECTURES, by commas
  module.attr("runtime_version") = CUDART_VERSION;         // of CUDA, 13000 for 13.0; also of the compiler
  module.def(
      "unsupported_because", [](int device) { return std::string(vf::prompt_pool_supported(device).message); },
      py::arg("device"), "Why a device, which becomes current, can't run the kernels; empty if it can.");
  bind_prompt_pool(module);
}
