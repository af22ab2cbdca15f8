// The launch of mlp's backward: see mlp/api.h.

#include "mlp/gemm.cuh"

namespace vapt_fast {
namespace mlp {
namespace {

// grad * gelu'(hidden), exactly; CUTLASS's dGELU is that of the tanh approximation.
template <typename T>
struct GeluBackward;

template <int N>
struct GeluBackward<cutlass::Array<float, N>> {
  CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& grad,
                                                     const cutlass::Array<float, N>& hidden) const {
    constexpr float kRootHalf = 0.70710678118654752f;
    constexpr float kInverseRoot2Pi = 0.39894228040143268f;
    cutlass::Array<float, N> product;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      const float h = hidden[i];
      const float cdf = 0.5f + 0.5f * erff(h * kRootHalf);
      const float pdf = kInverseRoot2Pi * __expf(-0.5f * h * h);
      product[i] = grad[i] * (cdf + h * pdf);
    }
    return product;
  }
};

// grad_hidden = GeluBackward(grad_y weight, hidden)
template <typename Element>
using Backward =
    Product<Element, RowMajor,
            cutlass::epilogue::fusion::LinCombDeEltAct<RowMajor, GeluBackward, Element, float, Element, void>>;

Check checked(const MlpBackward& arguments) {
  const MlpSizes& sizes = arguments.sizes;
  Check check = checked_sizes(sizes);
  if (!check.ok() || sizes.rows == 0) {
    return check;
  }
  check_rows(check, "grad_y", arguments.grad_y, sizes.depth);
  check_rows(check, "weight", arguments.weight, sizes.hidden);
  check.pointer("hidden", arguments.hidden);
  check.pointer("grad_hidden", arguments.grad_hidden);
  return check;
}

}  // namespace
}  // namespace mlp

Status launch_mlp_backward(const MlpBackward& arguments, Stream stream) {
  const Check check = mlp::checked(arguments);
  if (!check.ok() || arguments.sizes.rows == 0) {
    return check.status();
  }
  return mlp::dispatch(arguments.sizes.dtype, [&](auto element) {
    using Element = decltype(element);
    using Product = mlp::Backward<Element>;
    typename Product::Fusion fusion;
    fusion.aux_ptr = static_cast<const Element*>(arguments.hidden);
    fusion.dAux = mlp::stride<decltype(fusion.dAux)>(arguments.sizes.hidden);
    return mlp::launch_product<Product>(arguments.sizes, arguments.grad_y, arguments.weight, arguments.grad_hidden,
                                        fusion, stream);
  });
}

}  // namespace vapt_fast
