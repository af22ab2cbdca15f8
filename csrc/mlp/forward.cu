// The launch of mlp's forward: see mlp/api.h.

#include "mlp/gemm.cuh"

namespace vapt_fast {
namespace mlp {
namespace {

// activated = GELU(hidden), hidden = x weight^T + bias. CUTLASS's GELU is the one by erf.
template <typename Element>
using Forward = Product<Element, ColumnMajor,
                        cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<RowMajor, cutlass::epilogue::thread::GELU,
                                                                              Element, float, Element, Element, void>>;

Check checked(const MlpForward& arguments) {
  const MlpSizes& sizes = arguments.sizes;
  Check check = checked_sizes(sizes);
  if (!check.ok() || sizes.rows == 0) {
    return check;
  }
  check_rows(check, "x", arguments.x, sizes.depth);
  check_rows(check, "weight", arguments.weight, sizes.depth);
  check.optional("bias", arguments.bias);
  check.pointer("activated", arguments.activated);
  check.optional("hidden", arguments.hidden);
  return check;
}

}  // namespace
}  // namespace mlp

Status launch_mlp_forward(const MlpForward& arguments, Stream stream) {
  const Check check = mlp::checked(arguments);
  if (!check.ok() || arguments.sizes.rows == 0) {
    return check.status();
  }
  return mlp::dispatch(arguments.sizes.dtype, [&](auto element) {
    using Element = decltype(element);
    using Product = mlp::Forward<Element>;
    typename Product::Fusion fusion;
    fusion.bias_ptr = static_cast<const Element*>(arguments.bias);
    fusion.aux_ptr = static_cast<Element*>(arguments.hidden);
    fusion.dAux = mlp::stride<decltype(fusion.dAux)>(arguments.sizes.hidden);
    return mlp::launch_product<Product>(arguments.sizes, arguments.x, arguments.weight, arguments.activated, fusion,
                                        stream);
  });
}

}  // namespace vapt_fast
