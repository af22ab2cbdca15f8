// Runs prompt_attention forward and backward on tensors that end where their memory ends, for
// AddressSanitizer and ThreadSanitizer. ``attention B QUERIES TOKENS PROMPTS HEADS GROUPS DIM SHARED KILOBYTES``, the
// last one of shared memory, prints "finite" or "not finite".

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vapt_fast/device.cuh"
#include "vapt_fast/prompt_attention.h"

using namespace vapt_fast;

namespace {

constexpr std::uint16_t kNaN = 0xffff;
constexpr int kPadding = 8;  // elements of NaN between rows

// (B or 1, T, h, d) in memory of exactly the size that is needed: no padding behind the last row.
struct Tensor {
  std::vector<std::uint16_t> memory;
  Tensor4 view;
  std::int64_t sizes[4];

  Tensor(std::int64_t batch, std::int64_t rows, std::int64_t heads, std::int64_t dim, bool shared = false)
      : sizes{shared ? 1 : batch, rows, heads, dim} {
    view.head_stride = dim + kPadding;
    view.token_stride = heads * view.head_stride;
    view.batch_stride = shared ? 0 : rows * view.token_stride;
    const std::int64_t all = sizes[0] * rows * heads;
    memory.assign(static_cast<std::size_t>(all > 0 ? all * view.head_stride - kPadding : 0), kNaN);
    view.data = memory.empty() ? nullptr : memory.data();
  }

  std::uint16_t& at(std::int64_t image, std::int64_t row, std::int64_t head, std::int64_t column) {
    return memory[static_cast<std::size_t>(image * view.batch_stride + row * view.token_stride +
                                           head * view.head_stride + column)];
  }

  // Calls ``function`` with every element.
  template <typename Function>
  void each(Function function) {
    for (std::int64_t image = 0; image < sizes[0]; ++image) {
      for (std::int64_t row = 0; row < sizes[1]; ++row) {
        for (std::int64_t head = 0; head < sizes[2]; ++head) {
          for (std::int64_t column = 0; column < sizes[3]; ++column) {
            function(at(image, row, head, column));
          }
        }
      }
    }
  }

  void fill(std::uint32_t seed) {
    each([&seed](std::uint16_t& element) {
      seed = seed * 1664525u + 1013904223u;
      element = round_to<Float16>(static_cast<float>(seed >> 8) * 0x1p-23f - 1.0f).bits;
    });
  }

  bool finite() {
    bool all = true;
    each([&all](std::uint16_t element) { all = all && std::isfinite(to_float(Float16{element})); });
    return all;
  }
};

bool launched(const Status& status) {
  if (status.code != Code::ok) {
    std::fprintf(stderr, "%s\n", status.message);
  }
  return status.code == Code::ok;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 10) {
    return EXIT_FAILURE;
  }
  PromptAttentionSizes sizes;
  sizes.dtype = Dtype::float16;
  std::int64_t* const given[] = {&sizes.batch, &sizes.queries, &sizes.tokens,  &sizes.prompts,
                                 &sizes.heads, &sizes.groups,  &sizes.head_dim};
  for (int i = 0; i < 7; ++i) {
    *given[i] = std::atoll(arguments[i + 1]);
  }
  const bool shared = std::atoi(arguments[8]) != 0;
  const std::int64_t shared_memory = std::atoll(arguments[9]) * 1024;
  const auto of_queries = [&] { return Tensor(sizes.batch, sizes.queries, sizes.heads, sizes.head_dim); };
  const auto of_tokens = [&] { return Tensor(sizes.batch, sizes.tokens, sizes.groups, sizes.head_dim); };
  const auto of_prompts = [&](bool repeated) {
    return Tensor(sizes.batch, sizes.prompts, sizes.groups, sizes.head_dim, repeated);
  };
  Tensor q = of_queries(), k = of_tokens(), v = of_tokens(), prompt_k = of_prompts(shared),
         prompt_v = of_prompts(shared), grad_out = of_queries();
  std::uint32_t seed = 0;
  for (Tensor* tensor : {&q, &k, &v, &prompt_k, &prompt_v, &grad_out}) {
    tensor->fill(++seed);
  }

  Tensor out = of_queries();
  std::vector<float> lse(static_cast<std::size_t>(sizes.batch * sizes.heads * sizes.queries), NAN);
  PromptAttentionForward forward{sizes,         0.5f,          q.view,   k.view,    v.view,
                                 prompt_k.view, prompt_v.view, out.view, lse.data()};
  bool right = launched(launch_prompt_attention_forward(forward, nullptr)) && out.finite();

  Tensor grad_q = of_queries(), grad_k = of_tokens(), grad_v = of_tokens();
  for (const bool prompts_only : {false, true}) {
    Tensor grad_prompt_k = of_prompts(false), grad_prompt_v = of_prompts(false);
    PromptAttentionBackward backward{sizes,
                                     0.5f,
                                     q.view,
                                     k.view,
                                     v.view,
                                     prompt_k.view,
                                     prompt_v.view,
                                     out.view,
                                     lse.data(),
                                     grad_out.view,
                                     grad_q.view,
                                     grad_k.view,
                                     grad_v.view,
                                     grad_prompt_k.view,
                                     grad_prompt_v.view,
                                     false,
                                     shared_memory};
    if (prompts_only) {
      backward.grad_q.data = backward.grad_k.data = backward.grad_v.data = nullptr;
    }
    std::vector<float> workspace(static_cast<std::size_t>(
        prompt_attention_backward_workspace(sizes, prompts_only, shared_memory)), NAN);
    backward.workspace = workspace.data();
    right = launched(launch_prompt_attention_backward(backward, nullptr)) && right;
    for (Tensor* grad : {&grad_q, &grad_k, &grad_v, &grad_prompt_k, &grad_prompt_v}) {
      right = grad->finite() && right;
    }
  }
  std::puts(right ? "finite" : "not finite");
  return EXIT_SUCCESS;
}
