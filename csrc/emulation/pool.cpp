// Runs prompt_pool forward and backward on tensors that end where their memory ends, for AddressSanitizer and
// ThreadSanitizer. ``pool FLOAT32_TOKENS ONE_PASS DELTA GAIN AFFINE BATCH PREFIX PATCHES CHANNELS ROWS`` prints
// "finite" or "not finite".

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vapt_fast/device.cuh"
#include "vapt_fast/prompt_pool.h"

using namespace vapt_fast;

namespace {

float value_of(float element) { return element; }
float value_of(Float16 element) { return to_float(element); }
void set(float& element, float value) { element = value; }
void set(Float16& element, float value) { element = round_to<Float16>(value); }

// Rows of ``length`` elements with ``gap`` elements of NaN between them, and none behind the last one.
template <typename Element>
struct Rows {
  std::vector<Element> memory;
  std::int64_t length;
  std::int64_t stride;

  explicit Rows(std::int64_t rows, std::int64_t length_, std::int64_t gap = 0)
      : length(length_), stride(length_ + gap) {
    memory.resize(static_cast<std::size_t>(rows > 0 ? rows * stride - gap : 0));
    for (Element& element : memory) {
      set(element, NAN);
    }
  }

  // Calls ``function`` with every element that is not in a gap.
  template <typename Function>
  void each(Function function) {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if (static_cast<std::int64_t>(i) % stride < length) {
        function(memory[i]);
      }
    }
  }

  void fill() {
    static std::uint32_t state = 0;
    each([](Element& element) {
      state = state * 1664525u + 1013904223u;
      set(element, static_cast<float>(state >> 8) * 0x1p-23f - 1.0f);
    });
  }

  bool finite() {
    bool all = true;
    each([&all](const Element& element) { all = all && std::isfinite(value_of(element)); });
    return all;
  }

  Element* data() { return memory.empty() ? nullptr : memory.data(); }
  Tensor3 view(std::int64_t rows) { return {data(), rows * stride, stride}; }
};

bool launched(const Status& status) {
  if (status.code != Code::ok) {
    std::fprintf(stderr, "%s\n", status.message);
  }
  return status.code == Code::ok;
}

template <typename... Tensors>
bool all_finite(Tensors&... tensors) {
  return (tensors.finite() && ...);
}

template <typename Token>
bool run(const PromptPoolSizes& sizes, bool one_pass, bool with_branch, bool with_layer_scale, bool with_affine) {
  constexpr std::int64_t kGap = 8;
  const std::int64_t tokens = sizes.prefix + sizes.patches;
  const std::int64_t channels = sizes.channels;
  const std::int64_t all = sizes.batch * tokens;
  Rows<Token> x(all, channels, kGap);
  Rows<Token> grad_total(all, channels, kGap);
  Rows<Float16> branch(all, channels, kGap);
  Rows<Float16> grad_normed(all, channels, kGap);
  Rows<float> grad_pooled(sizes.batch * sizes.rows, channels, kGap);
  Rows<float> matrix(sizes.rows, sizes.patches, 1);
  Rows<float> weight(1, channels);
  Rows<float> bias(1, channels);
  Rows<float> layer_scale(1, channels);
  Rows<float> norm_weight(1, channels);
  Rows<float> norm_bias(1, channels);
  const auto fill = [](auto&... tensors) { (tensors.fill(), ...); };
  fill(x, grad_total, branch, grad_normed, grad_pooled, matrix, weight, bias, layer_scale, norm_weight, norm_bias);

  Rows<Token> total(with_branch ? all : 0, channels);
  Rows<Float16> normed(all, channels);
  Rows<float> pooled(sizes.batch * sizes.rows, channels);
  Rows<float> mean(1, all);
  Rows<float> rstd(1, all);
  PromptPoolForward forward;
  forward.sizes = sizes;
  forward.x = x.view(tokens);
  if (with_branch) {
    forward.branch = branch.view(tokens);
    forward.total = total.data();
  }
  forward.layer_scale = with_layer_scale ? layer_scale.data() : nullptr;
  forward.matrix = {matrix.data(), matrix.stride};
  forward.weight = weight.data();
  forward.bias = bias.data();
  forward.norm_weight = with_affine ? norm_weight.data() : nullptr;
  forward.norm_bias = with_affine ? norm_bias.data() : nullptr;
  forward.normed = normed.data();
  forward.pooled = pooled.data();
  forward.mean = mean.data();
  forward.rstd = rstd.data();
  forward.one_pass = one_pass;
  if (!launched(launch_prompt_pool_forward(forward, nullptr)) || !all_finite(total, normed, pooled, mean, rstd)) {
    return false;
  }

  Rows<Token> grad_x(all, channels);
  Rows<Float16> grad_branch(with_branch ? all : 0, channels);
  Rows<float> grad_matrix(sizes.rows, sizes.patches);
  Rows<float> grad_weight(1, channels);
  Rows<float> grad_bias(1, channels);
  Rows<float> workspace(1, prompt_pool_backward_workspace(sizes));
  PromptPoolBackward backward;
  backward.sizes = sizes;
  backward.total = with_branch ? total.view(tokens) : x.view(tokens);
  backward.grad_total = grad_total.view(tokens);
  backward.grad_normed = grad_normed.view(tokens);
  backward.grad_pooled = grad_pooled.view(sizes.rows);
  backward.layer_scale = forward.layer_scale;
  backward.matrix = forward.matrix;
  backward.weight = forward.weight;
  backward.bias = forward.bias;
  backward.norm_weight = forward.norm_weight;
  backward.mean = forward.mean;
  backward.rstd = forward.rstd;
  backward.workspace = workspace.data();
  backward.grad_x = grad_x.data();
  backward.grad_branch = grad_branch.data();
  backward.grad_matrix = grad_matrix.data();
  backward.grad_weight = grad_weight.data();
  backward.grad_bias = grad_bias.data();
  backward.one_pass = one_pass;
  return launched(launch_prompt_pool_backward(backward, nullptr)) &&
         all_finite(grad_x, grad_branch, grad_matrix, grad_weight, grad_bias);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 11) {
    return EXIT_FAILURE;
  }
  std::int64_t given[10];
  for (int i = 0; i < 10; ++i) {
    given[i] = std::atoll(arguments[i + 1]);
  }
  const auto [float32_tokens, one_pass, branch, layer_scale, affine, batch, prefix, patches, channels, rows] = given;
  const PromptPoolSizes sizes{Dtype::float16, float32_tokens != 0, batch, prefix, patches, channels, rows};
  const auto function = float32_tokens ? run<float> : run<Float16>;
  std::puts(function(sizes, one_pass != 0, branch != 0, layer_scale != 0, affine != 0) ? "finite" : "not finite");
  return EXIT_SUCCESS;
}
