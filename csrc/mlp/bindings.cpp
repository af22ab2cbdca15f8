// mlp in vapt_fast._C.

#include "mlp/api.h"

#include "common/binding.h"

namespace vapt_fast {
static std::string describe(const MlpSizes& sizes) {
  return std::string("dtype=") + name_of(sizes.dtype) + ", rows=" + std::to_string(sizes.rows) +
         ", depth=" + std::to_string(sizes.depth) + ", hidden=" + std::to_string(sizes.hidden);
}

static void read(Keywords& given, MlpSizes& to) {
  std::string dtype;
  given.read("dtype", dtype).read("num_rows", to.rows).read("depth", to.depth).read("num_hidden", to.hidden);
  to.dtype = dtype_of(dtype);
}

static void read(Keywords& given, MlpForward& to) {
  read(given, to.sizes);
  given.read("x", to.x).read("weight", to.weight).read("bias", to.bias);
  given.read("activated", to.activated).read("hidden", to.hidden);
}

static void read(Keywords& given, MlpBackward& to) {
  read(given, to.sizes);
  given.read("grad_y", to.grad_y).read("weight", to.weight).read("hidden", to.hidden);
  given.read("grad_hidden", to.grad_hidden);
}

void bind_mlp(py::module_& module) {
  bind_launcher(module, "mlp_forward", launch_mlp_forward);
  bind_launcher(module, "mlp_backward", launch_mlp_backward);
}

}  // namespace vapt_fast
