// Every other operator: run on the CPU's kernel, over aliases of the device's memory.
//
// Operands are not copied. Each device tensor gets a CPU twin over the same bytes; the CPU kernel runs on the twins; what
// it changed about them (sizes, storage) is carried back, and what it made anew becomes device memory.
#include "sim.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <unordered_set>

namespace sim {

namespace {

// Operators that hand a result to the host, so that CUDA waits for the stream in them.
const std::unordered_set<std::string> kSynchronizing = {
    "aten::equal", "aten::nonzero", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::masked_select", "aten::is_nonzero", "aten::_assert_async"};

// Operands that may stay on the CPU beside device tensors, as in PyTorch: indices and packed-sequence lengths.
const std::unordered_set<std::string> kHostOperands = {
    "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_unsafe_index_put", "aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward"};

// Operators that run in cuBLAS, whose handle needs a workspace.
const std::unordered_set<std::string> kBlas = {"aten::_int_mm", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};

struct Twin {
  at::Tensor device, cpu;
  c10::Storage storage;  // the device's
  void* data;
};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), schema_(op.schema()), stack_(stack) {}

  void run() {
    size_t count = schema_.arguments().size(), base = stack_->size() - count;
    for (size_t i = 0; i < count; ++i) look_at((*stack_)[base + i], schema_.arguments()[i].name());
    if (device_ < 0) device_ = current_device();
    check_device(device_);
    c10::OptionalDeviceGuard guard(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device_)));
    for (size_t i = 0; i < count; ++i) replace((*stack_)[base + i], schema_.arguments()[i]);
    before();
    if (schema_.name() == "aten::_int_mm" && schema_.overload_name() == "out") int_mm();
    else op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (Twin& twin : twins_) carry_back(twin);
    size_t returns = schema_.returns().size(), first = stack_->size() - returns;
    for (size_t i = 0; i < returns; ++i) bring_home((*stack_)[first + i]);
  }

 private:
  // First look: which device is it, and is there only one?
  void look_at(const c10::IValue& value, const std::string& name) {
    if (value.isTensor()) look_at_tensor(value.toTensor(), name);
    else if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) look_at_tensor(tensor, name);
    else if (value.isList() && is_tensor_list(value))
      for (const c10::IValue& item : value.toListRef())
        if (item.isTensor()) look_at_tensor(item.toTensor(), name);
    if (value.isDevice() && value.toDevice().is_cuda() && device_ < 0)
      device_ = value.toDevice().has_index() ? value.toDevice().index() : current_device();
  }

  void look_at_tensor(const at::Tensor& tensor, const std::string& name) {
    if (!tensor.defined()) return;
    if (!tensor.is_cuda()) {
      bool scalar = tensor.is_cpu() && tensor.dim() == 0 && !is_written(name);
      if (!scalar && !kHostOperands.count(schema_.name()) && !tensor.is_meta()) mixed(tensor.device(), name);
      return;
    }
    int index = tensor.get_device();
    if (tensor_device_ >= 0 && index != tensor_device_) mixed(tensor.device(), name);
    tensor_device_ = device_ = index;
    if (stranger_) mixed(*stranger_, stranger_name_);
  }

  void mixed(c10::Device other, const std::string& name) {
    if (tensor_device_ < 0) {  // reported once the device's tensor is seen
      stranger_ = other;
      stranger_name_ = name;
      return;
    }
    std::string method = schema_.name().substr(schema_.name().find("::") + 2);
    c10::Device first(c10::kCUDA, static_cast<c10::DeviceIndex>(tensor_device_));
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", first, " and ",
                other, "! (when checking argument for argument ", name, " in method wrapper_CUDA_", method, ")");
  }

  bool is_written(const std::string& name) const {
    for (const auto& argument : schema_.arguments())
      if (argument.name() == name) return argument.alias_info() && argument.alias_info()->isWrite();
    return false;
  }

  static bool is_tensor_list(const c10::IValue& value) {
    auto element = value.type()->containedType(0);
    return element->isSubtypeOf(*c10::OptionalType::ofTensor());
  }

  void replace(c10::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) value = twin_of(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> twins;
      for (const at::Tensor& tensor : value.toTensorVector()) twins.push_back(twin_of(tensor));
      value = std::move(twins);
    } else if (value.isList() && is_tensor_list(value)) {
      c10::List<std::optional<at::Tensor>> twins;
      for (const c10::IValue& item : value.toListRef())
        twins.push_back(item.isTensor() ? std::optional(twin_of(item.toTensor())) : std::nullopt);
      value = std::move(twins);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::kCPU);
    } else if (is_generator(argument)) {
      std::optional<at::Generator> given;
      if (value.isGenerator()) given = value.toGenerator();
      value = cpu_generator(given, device_);
    }
  }

  static bool is_generator(const c10::Argument& argument) {
    const c10::TypePtr& type = argument.real_type();
    if (type->kind() == c10::TypeKind::GeneratorType) return true;
    auto optional = type->cast<c10::OptionalType>();
    return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
  }

  at::Tensor twin_of(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (const Twin& twin : twins_)
      if (twin.device.is_same(tensor)) return twin.cpu;
    c10::Storage shared;
    for (const Twin& twin : twins_)
      if (twin.storage.unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) shared = twin.cpu.storage();
    at::Tensor cpu = cpu_twin(tensor, std::move(shared));
    twins_.push_back({tensor, cpu, tensor.storage(), tensor.storage().mutable_data()});
    return cpu;
  }

 public:
  static at::Tensor cpu_twin(const at::Tensor& tensor, c10::Storage storage) {
    const c10::Storage& device = tensor.storage();
    if (!storage) {
      // The twin's storage keeps the device's alive, and may be resized by the kernel like any CPU storage.
      auto* keep = new c10::Storage(device);
      c10::DataPtr data(device.mutable_data(), keep, [](void* p) { delete static_cast<c10::Storage*>(p); },
                        c10::Device(c10::kCPU));
      storage = c10::Storage(c10::Storage::use_byte_size_t(), device.nbytes(), std::move(data), c10::GetAllocator(c10::kCPU),
                             /*resizable=*/true);
    }
    auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU);
    at::Tensor twin = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
    auto* impl = twin.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) impl->_set_conj(true);
    if (tensor.is_neg()) impl->_set_neg(true);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return twin;
  }

 private:
  void before() {
    wait_for_driver();
    Machine& m = machine();
    std::string name = schema_.name().substr(schema_.name().find("::") + 2);
    std::optional<Fault> fault;
    {
      Lock lock(m.mutex);
      int64_t rows = twins_.empty() || twins_[0].device.dim() == 0 ? 0 : twins_[0].device.size(0);
      if (!m.faults.empty()) fault = next_fault(kFailOperator, name, rows);
    }
    if (fault) raise_fault(*fault, kUnknown, name + ", injected");
    if (kBlas.count(schema_.name())) take_workspace();
    Lock lock(m.mutex);
    check_alive(device_);
    check_last_error();
    StreamState& stream = current_stream(device_);
    std::vector<BlockPtr> blocks;
    for (const Twin& twin : twins_) blocks.push_back(find_block(twin.data));
    run_before_touching(stream, blocks);
    launch(stream);
    if (kSynchronizing.count(schema_.name())) {
      wait_until(stream.ready);
      run_all(stream);
    }
  }

  void take_workspace() {
    Machine& m = machine();
    std::tuple<std::thread::id, int, int64_t> key;
    size_t nbytes;
    {
      Lock lock(m.mutex);
      key = {std::this_thread::get_id(), device_, current_stream(device_).id};
      nbytes = m.workspaces.count(key) ? 0 : m.workspace_bytes;
    }
    if (nbytes == 0) return;
    Lock lock(m.mutex);
    m.takes_workspace = true;
    c10::DataPtr memory;
    try {
      memory = allocate_on(device_, nbytes);
    } catch (...) {
      m.takes_workspace = false;
      throw;
    }
    m.takes_workspace = false;
    m.workspaces.emplace(key, std::move(memory));
  }

  // CUDA's conditions, and its results: float32 is exact for the 1024 products of int8 that it adds up at a time, and on most
  // CPUs several times as fast as their integer kernel.
  void int_mm() {
    std::vector<at::Tensor> operands;
    for (const c10::IValue& value : torch::jit::last(*stack_, 3)) operands.push_back(value.toTensor());
    torch::jit::drop(*stack_, 3);
    const at::Tensor &left = operands[0], &right = operands[1], &out = operands[2];
    int64_t rows = left.size(0), depth = left.size(1), columns = right.size(1), step = 512, most = 1024;
    TORCH_CHECK(rows > 16, "self.size(0) needs to be greater than 16, but got ", rows);
    TORCH_CHECK(depth > 0 && depth % 8 == 0, "self.size(1) needs to be greater than 0 and a multiple of 8, but got ", depth);
    TORCH_CHECK(columns > 0 && columns % 8 == 0, "mat2.size(1) needs to be greater than 0 and a multiple of 8, but got ", columns);
    for (int64_t k = 0; k < depth; k += most) {
      int64_t wide = std::min(most, depth - k);
      at::Tensor factors = right.narrow(0, k, wide).to(at::kFloat);
      at::Tensor floats = at::empty({step, wide}, at::kFloat);
      for (int64_t i = 0; i < rows; i += step) {
        int64_t count = std::min(step, rows - i);
        at::Tensor part = floats.narrow(0, 0, count).copy_(left.narrow(0, i, count).narrow(1, k, wide));
        at::Tensor target = out.narrow(0, i, count), sums = at::empty({count, columns}, at::kFloat);
        at::mm_out(sums, part, factors);  // autocast leaves it alone
        if (k) target.add_(sums.to(at::kInt));
        else target.copy_(sums);
      }
    }
    stack_->push_back(out);
  }

  // What the kernel did to a twin (out= and in-place operators may resize) happens to the device's tensor.
  void carry_back(Twin& twin) {
    auto *from = twin.cpu.unsafeGetTensorImpl(), *to = twin.device.unsafeGetTensorImpl();
    c10::Storage memory = twin.cpu.storage();
    if (memory.mutable_data() != twin.data && twin.storage.mutable_data() == twin.data) {
      size_t nbytes = memory.nbytes();
      twin.storage.set_data_ptr(adopt_on(device_, memory.set_data_ptr(c10::DataPtr()), nbytes));
      twin.storage.set_nbytes(nbytes);
    } else if (memory.nbytes() != twin.storage.nbytes() && memory.mutable_data() == twin.data) {
      twin.storage.set_nbytes(memory.nbytes());
    }
    if (from->sizes() != to->sizes() || from->strides() != to->strides() || from->storage_offset() != to->storage_offset())
      to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
  }

  void bring_home(c10::IValue& value) {
    if (value.isTensor()) value = device_tensor(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(device_tensor(tensor));
      value = std::move(tensors);
    }
  }

  at::Tensor device_tensor(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (const Twin& twin : twins_)
      if (twin.cpu.is_same(tensor)) return twin.device;
    TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, "simcuda has no ", tensor.layout(),
                                " tensors on its devices (operator ", schema_.name(), ")");
    at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
        device_storage(tensor), c10::DispatchKeySet(c10::DispatchKey::CUDA), tensor.dtype());
    auto* impl = result.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) impl->_set_conj(true);
    if (tensor.is_neg()) impl->_set_neg(true);
    return result;
  }

  c10::Storage device_storage(const at::Tensor& tensor) {
    c10::Storage storage = tensor.storage();
    for (const Twin& twin : twins_)
      if (twin.cpu.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return twin.storage;
    for (const auto& [cpu, device] : adopted_)
      if (cpu.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return device;
    size_t nbytes = storage.nbytes();
    c10::DataPtr memory;
    if (storage.use_count() > 2) {  // known outside this call (a CPU scalar handed through): not ours to take
      memory = allocate_on(device_, nbytes);
      if (nbytes) std::memcpy(memory.get(), storage.data(), nbytes);
    } else {
      memory = adopt_on(device_, storage.set_data_ptr(c10::DataPtr()), nbytes);
    }
    c10::Storage device(c10::Storage::use_byte_size_t(), nbytes, std::move(memory), device_allocator(),
                        /*resizable=*/true);
    adopted_.emplace_back(storage, device);
    return device;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  int device_ = -1, tensor_device_ = -1;
  std::optional<c10::Device> stranger_;
  std::string stranger_name_;
  std::vector<Twin> twins_;
  std::vector<std::pair<c10::Storage, c10::Storage>> adopted_;
};

}  // namespace

void clear_workspaces() {
  decltype(machine().workspaces) freed;
  {
    Lock lock(machine().mutex);
    freed.swap(machine().workspaces);
  }
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

at::Tensor cpu_alias(const at::Tensor& tensor) { return Call::cpu_twin(tensor, c10::Storage()); }

}  // namespace sim
