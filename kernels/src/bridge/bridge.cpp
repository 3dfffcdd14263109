// What tch lacks, as C functions: an autograd node whose backward is a Rust closure, backward from a given
// gradient, opening libtorch_cuda and what only it has: streams, memory statistics, attention with its log-sum-exp; and
// libtorch's profiler.
// Tensors cross as `at::Tensor*`. Arguments stay the caller's; the gradients that a node's backward is given, and all results, belong to
// whoever gets them.

#include <dlfcn.h>
#include <malloc.h>
#include <cstdlib>
#include <cstring>
#include <string>

#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/csrc/autograd/variable.h>

namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// Rust's side of a node. `grads` and `results` hold null where there is no gradient, and tensors that whoever is given them has to
// delete: Rust can let go of a gradient before it has computed the others. On failure `call` returns a message from `strdup`;
// null means success.
struct Callbacks {
  void* state;
  char* (*call)(void* state, at::Tensor** grads, size_t n, at::Tensor** results, size_t m);
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
      if (grads[i].defined()) in[i] = new at::Tensor(std::move(grads[i]));
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
  // Streams share so many queues to a GPU, by default 8, and wait for what others have put into the same one: a send behind a
  // receive that waits for another rank could wait for ever.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  // Of blocks of some GiB, as long sequences want them, an eighth of the memory would be lost between segments of fixed size.
  if (getenv("PYTORCH_CUDA_ALLOC_CONF") == nullptr) setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True", 0);
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) return nullptr;
  const char* why = dlerror();
  return strdup(why == nullptr ? "dlopen failed" : why);
}

// The path of libtorch_cpu, or null.
char* lasp_libtorch_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&at::_ops::add_Tensor::call), &info) == 0 || info.dli_fname == nullptr) return nullptr;
  return strdup(info.dli_fname);
}

// The stream that libtorch enqueues on for this thread and device.
char* lasp_current_stream(int device, void** stream) {
  using Get = int (*)(int, void**);
  static Get get = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  if (get == nullptr) return strdup("libtorch_cuda is not open");
  return get(device, stream) == 0 ? nullptr : strdup("aoti_torch_get_current_cuda_stream failed");
}

// Bytes in tensors of a device: now, at most since the last reset, and at most reserved by the caching allocator.
char* lasp_device_memory(int device, int64_t* now, int64_t* peak, int64_t* reserved) {
  return guarded([&] {
    auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(device);
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *now = stats.allocated_bytes[all].current;
    *peak = stats.allocated_bytes[all].peak;
    *reserved = stats.reserved_bytes[all].peak;
  });
}

char* lasp_reset_peak_memory(int device) {
  return guarded([&] { at::getDeviceAllocator(at::kCUDA)->resetPeakStats(device); });
}

// A copy of `x`, of the CPU, on a GPU. The GPU reads it from pinned memory when its stream gets there; libtorch keeps that memory
// from being used again before.
char* lasp_upload(at::Tensor* x, int device, at::Tensor** out) {
  return guarded([&] {
    *out = new at::Tensor(x->pin_memory().to(at::Device(at::kCUDA, device), x->scalar_type(), /*non_blocking=*/true));
  });
}

// Makes `grad` the place where backward adds up the gradient of the leaf `x`.
char* lasp_set_grad(at::Tensor* x, at::Tensor* grad) {
  return guarded([&] { x->mutable_grad() = *grad; });
}

// Attention of q, k, v [B, H, T, K] by cuDNN or by flash attention: o and the log-sum-exp of the scaled scores.
char* lasp_attention(int cudnn, at::Tensor* q, at::Tensor* k, at::Tensor* v, int causal, double scale, at::Tensor** o,
                     at::Tensor** lse) {
  return guarded([&] {
    at::Tensor out, sums;
    if (cudnn) {
      auto all = at::_scaled_dot_product_cudnn_attention(*q, *k, *v, std::nullopt, true, 0.0, causal != 0, false, scale);
      out = std::get<0>(all), sums = std::get<1>(all);
    } else {
      auto all = at::_scaled_dot_product_flash_attention(*q, *k, *v, 0.0, causal != 0, false, scale);
      out = std::get<0>(all), sums = std::get<1>(all);
    }
    *o = new at::Tensor(out);
    *lse = new at::Tensor(sums);
  });
}

char* lasp_attention_backward(int cudnn, at::Tensor* d_o, at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* o,
                              at::Tensor* lse, int causal, double scale, at::Tensor** dq, at::Tensor** dk,
                              at::Tensor** dv) {
  return guarded([&] {
    // Without dropout the state of the random numbers is not looked at.
    const auto seed = at::zeros({}, q->options().dtype(at::kLong)), none = at::Tensor();
    std::tuple<at::Tensor, at::Tensor, at::Tensor> all;
    if (cudnn) {
      all = at::_scaled_dot_product_cudnn_attention_backward(*d_o, *q, *k, *v, *o, *lse, seed, seed, none, none, none,
                                                             q->size(2), k->size(2), 0.0, causal != 0, scale);
    } else {
      all = at::_scaled_dot_product_flash_attention_backward(*d_o, *q, *k, *v, *o, *lse, none, none, q->size(2),
                                                             k->size(2), 0.0, causal != 0, seed, seed, scale);
    }
    *dq = new at::Tensor(std::get<0>(all));
    *dk = new at::Tensor(std::get<1>(all));
    *dv = new at::Tensor(std::get<2>(all));
  });
}

// Records from here to `lasp_profile_end` what libtorch does on this thread and, with `cuda`, what all GPUs do.
char* lasp_profile_begin(int cuda) {
  return guarded([&] {
    namespace profiler = torch::profiler::impl;
    profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
    std::set<profiler::ActivityType> activities{profiler::ActivityType::CPU};
    if (cuda) activities.insert(profiler::ActivityType::CUDA);
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities);
  });
}

// Writes what was recorded to `path`, in Chrome's trace format.
char* lasp_profile_end(const char* path) {
  return guarded([&] { torch::autograd::profiler::disableProfiler()->save(path); });
}

// glibc gives blocks of 32 MiB and more back to the system when they are freed, and every page of the next one faults.
void lasp_keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

void lasp_free(char* message) { free(message); }

}  // extern "C"
