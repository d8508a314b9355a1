// The operators that cannot go through the CPU's kernels: making memory, looking at it (views), copying, storages.
#include "sim.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>

namespace sim {

namespace {

using at::Tensor;
using std::optional;

const auto kKeys = c10::DispatchKeySet(c10::DispatchKey::CUDA);

c10::OptionalDeviceGuard on(optional<at::Device> device) {
  if (!device || !device->has_index()) return c10::OptionalDeviceGuard();
  check_device(device->index());
  return c10::OptionalDeviceGuard(*device);
}

void refuse_pinning(optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
}

Tensor empty(at::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device> device,
             optional<bool> pin, optional<at::MemoryFormat> format) {
  refuse_pinning(pin);
  auto guard = on(device);
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device> device, optional<bool> pin) {
  refuse_pinning(pin);
  auto guard = on(device);
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& src, const Tensor& dst, bool non_blocking) {
  Tensor to = dst;
  return copy_kernel(to, src, non_blocking);
}

// Also the CPU's: its kernels come here for out= tensors of another device, and the error must be PyTorch's own.
Tensor copy_from_and_resize(const Tensor& src, const Tensor& dst) {
  if (dst.sizes() != src.sizes()) dst.resize_(src.sizes());
  return copy_from(src, dst, false);
}

at::Scalar local_scalar(const Tensor& self) {
  Tensor host = at::empty(self.sizes(), self.options().device(at::kCPU));
  copy_kernel(host, self, false);
  return host.item();
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_empty(Tensor& self) {
  at::Storage storage(at::Storage::use_byte_size_t(), 0, allocate_on(self.get_device(), 0), device_allocator(), true);
  return self.set_(std::move(storage), 0, {0}, {});
}

void record_stream(Tensor& self, at::Stream stream) {
  Lock lock(machine().mutex);
  if (BlockPtr block = find_block(self.storage().data())) block->recorded.insert(stream.id());
}

// softmax(half, dtype=float32) is one kernel on CUDA, which the CPU lacks.
Tensor softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  Tensor input = half_to_float ? self.to(at::kFloat) : self, out = at::empty_like(input);
  return at::_softmax_out(out, input, dim, false);
}

Tensor log_softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  Tensor input = half_to_float ? self.to(at::kFloat) : self, out = at::empty_like(input);
  return at::_log_softmax_out(out, input, dim, false);
}

// The fused recurrent cells exist on CUDA only: nn.LSTM and nn.GRU call them there. Forward only, as plain operators.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                                             const optional<Tensor>& input_bias, const optional<Tensor>& hidden_bias) {
  Tensor gates = input + hidden;
  if (input_bias && input_bias->defined()) gates = gates + *input_bias + *hidden_bias;
  auto parts = gates.chunk(4, 1);
  Tensor next = parts[1].sigmoid() * cell + parts[0].sigmoid() * parts[2].tanh();
  return {parts[3].sigmoid() * next.tanh(), next, gates};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& state,
                                    const optional<Tensor>& input_bias, const optional<Tensor>& hidden_bias) {
  bool biased = input_bias && input_bias->defined();
  auto ours = (biased ? input + *input_bias : input).chunk(3, 1);
  auto theirs = (biased ? hidden + *hidden_bias : hidden).chunk(3, 1);
  Tensor reset = (ours[0] + theirs[0]).sigmoid(), update = (ours[1] + theirs[1]).sigmoid();
  Tensor fresh = (ours[2] + reset * theirs[2]).tanh();
  return {(state - fresh) * update + fresh, at::cat({reset, update, fresh}, 1)};
}

// Scaled dot product attention always takes its plain composition ("math"): the fused kernels are CUDA's own.
int64_t fused_choice(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool,
                     optional<double>, bool) {
  return 0;
}

// One launch for up to 110 pairs, as CUDA's multi_tensor_apply packs them (depth_to_max_tensors in MultiTensorApply.cuh).
void foreach_copy(at::TensorList targets, at::TensorList sources, bool non_blocking) {
  constexpr size_t kPairs = 110;
  bool fused = targets.size() == sources.size() && !targets.empty();
  for (size_t i = 0; fused && i < targets.size(); ++i)
    fused = targets[i].device() == targets[0].device() && sources[i].device() == targets[0].device() &&
            targets[i].scalar_type() == sources[i].scalar_type() && targets[i].sizes() == sources[i].sizes() &&
            targets[i].is_contiguous() && sources[i].is_contiguous();
  if (!fused) return at::native::foreach_tensor_copy_list_kernel_slow_(targets, sources, non_blocking);
  wait_for_driver();
  for (size_t start = 0; start < targets.size(); start += kPairs) {
    size_t end = std::min(start + kPairs, targets.size());
    {
      Lock lock(machine().mutex);
      check_last_error();
      std::vector<BlockPtr> blocks;
      for (size_t i = start; i < end; ++i)
        for (const Tensor* tensor : {&targets[i], &sources[i]}) blocks.push_back(find_block(tensor->const_data_ptr()));
      StreamState& stream = current_stream(targets[0].get_device());
      run_before_touching(stream, blocks);
      launch(stream);
    }
    for (size_t i = start; i < end; ++i) cpu_alias(targets[i]).copy_(cpu_alias(sources[i]));
  }
}

// UntypedStorage.resize_ through a byte tensor over it: new memory, the old bytes kept, in stream order.
void resize_storage(const Tensor& bytes, int64_t nbytes) {
  c10::Storage storage = bytes.storage();
  Lock lock(machine().mutex);
  int device = bytes.get_device();
  size_t kept = std::min(storage.nbytes(), static_cast<size_t>(nbytes));
  run_before_touching(current_stream(device), {find_block(storage.data())});
  c10::DataPtr fresh = allocate_on(device, static_cast<size_t>(nbytes));
  if (kept) std::memcpy(fresh.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(nbytes);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { run_on_cpu(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_kernel);
  m.impl("_foreach_copy_", &foreach_copy);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("set_", &set_empty);
  m.impl("set_.source_Storage", [](Tensor& self, at::Storage source) -> Tensor& { return at::native::set_(self, source); });
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("record_stream", &record_stream);
  m.impl("_softmax", &softmax);
  m.impl("_log_softmax", &log_softmax);
  m.impl("_fused_sdp_choice", &fused_choice);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  // One operator on a device, but composed of others that ask which device it is: the whole runs on the CPU's side.
  for (const char* name : {"convolution", "convolution_backward", "convolution_overrideable"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY(simcuda, m) {
  m.def("resize_storage(Tensor bytes, int nbytes) -> ()", &resize_storage);
  m.def("seed_source(int device) -> Generator?", [](int64_t device) -> optional<at::Generator> { return default_generator(static_cast<int>(device)); });
  m.def("initialize() -> ()", []() { at::globalContext().lazyInitDevice(c10::kCUDA); });
  m.def("elapsed_milliseconds(int first, int second) -> float", [](int64_t first, int64_t second) {
    return c10::impl::getDeviceGuardImpl(c10::kCUDA)->elapsedTime(
        reinterpret_cast<void*>(first), reinterpret_cast<void*>(second), 0);
  });
  m.def("host_register(int ptr, int nbytes, int flags) -> int", [](int64_t ptr, int64_t nbytes, int64_t flags) -> int64_t {
    return host_register(reinterpret_cast<char*>(ptr), static_cast<size_t>(nbytes), flags);
  });
  // torch.cuda._sleep: a kernel that takes no memory. Only its launch is modelled, which raises a left-over error.
  m.def("sleep(int cycles) -> ()", [](int64_t) {
    wait_for_driver();
    Lock lock(machine().mutex);
    check_last_error();
    launch(current_stream(current_device()));
  });
  m.def("host_unregister(int ptr) -> int",
        [](int64_t ptr) -> int64_t { return host_unregister(reinterpret_cast<char*>(ptr)); });
}

}  // namespace sim

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &sim::fused_choice)
}  // namespace at::native
