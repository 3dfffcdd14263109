// What tch lacks, as C functions: an autograd node whose backward is a Rust closure, backward from a given
// gradient, and opening libtorch_cuda. Tensors cross as `at::Tensor*`, owned by the side that made them.

#include <dlfcn.h>
#include <malloc.h>
#include <cstring>
#include <string>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// Rust's side of a node. `grads` and `results` hold null where there is no gradient. On failure `call` returns a
// message from `strdup`; null means success.
struct Callbacks {
  void* state;
  char* (*call)(void* state, at::Tensor* const* grads, size_t n, at::Tensor** results, size_t m);
  void (*drop)(void* state);
};

struct RustNode : public Node {
  Callbacks rust;
  size_t inputs;

  RustNode(Callbacks rust, size_t inputs) : rust(rust), inputs(inputs) {}
  ~RustNode() override { release_variables(); }

  std::string name() const override { return "RustBackward"; }

  void release_variables() override {
    if (rust.state != nullptr) rust.drop(rust.state);
    rust.state = nullptr;
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(rust.state != nullptr, "backward through a graph whose buffers were already freed");
    std::vector<at::Tensor*> in(grads.size(), nullptr), out(inputs, nullptr);
    for (size_t i = 0; i < grads.size(); i++)
      if (grads[i].defined()) in[i] = &grads[i];
    char* message = rust.call(rust.state, in.data(), in.size(), out.data(), out.size());
    variable_list results(inputs);
    for (size_t i = 0; i < inputs; i++) {
      if (out[i] == nullptr) continue;
      results[i] = std::move(*out[i]);
      delete out[i];
    }
    if (message != nullptr) {
      std::string text(message);
      free(message);
      throw std::runtime_error(text);
    }
    return results;
  }
};

template <typename F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

}  // namespace

extern "C" {

// Makes `outputs` the results of one node whose inputs are `inputs`. Takes `rust` over, also on failure.
char* lasp_attach(at::Tensor* const* inputs, size_t n, at::Tensor* const* outputs, size_t m, Callbacks rust) {
  std::shared_ptr<RustNode> node;
  return guarded([&] {
    node = std::shared_ptr<RustNode>(new RustNode(rust, n), torch::autograd::deleteNode);
    variable_list ins;
    for (size_t i = 0; i < n; i++) ins.push_back(*inputs[i]);
    if (!torch::autograd::compute_requires_grad(ins)) return;
    node->set_next_edges(torch::autograd::collect_next_edges(ins));
    for (size_t i = 0; i < m; i++) torch::autograd::set_history(*outputs[i], node);
  });
}

// Accumulates into the leaves' .grad, starting from `grad` at `output`. May be called inside another backward.
char* lasp_backward(at::Tensor* output, at::Tensor* grad) {
  return guarded([&] { torch::autograd::backward({*output}, {*grad}); });
}

// Linkers drop libtorch_cuda, as nothing refers to it: opened before the first tensor, it registers itself.
char* lasp_open_cuda() {
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) return nullptr;
  const char* why = dlerror();
  return strdup(why == nullptr ? "dlopen failed" : why);
}

// glibc gives blocks of 32 MiB and more back to the system when they are freed, and every page of the next one faults.
void lasp_keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

void lasp_free(char* message) { free(message); }

}  // extern "C"
