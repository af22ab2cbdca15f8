// vapt_fast._C: the launchers as Python functions, which take addresses, strides, sizes and a stream, and run on the
// current device. Nothing here depends on PyTorch: one build serves all its versions.

#include <pybind11/pybind11.h>

#include <string>

#include "prompt_attention/api.h"

namespace vapt_fast {
void bind_mlp(pybind11::module_& module);
void bind_prompt_attention(pybind11::module_& module);
}  // namespace vapt_fast

PYBIND11_MODULE(_C, module) {
  module.doc() = "The launchers of vapt_fast's CUDA kernels.";
  module.attr("runtime_version") = VAPT_FAST_RUNTIME_VERSION;  // of CUDA and of nvcc, 13000 for 13.0
  module.def(
      "unsupported_because",
      [](int device) { return std::string(vapt_fast::prompt_attention_supported(device).message); },
      pybind11::arg("device"), "Why a device, which becomes current, can't run the kernels; empty if it can.");
#ifndef VAPT_FAST_EMULATED  // which CUTLASS's kernels can't be
  vapt_fast::bind_mlp(module);
#endif
  vapt_fast::bind_prompt_attention(module);
}
