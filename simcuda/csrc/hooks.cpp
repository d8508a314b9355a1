// What libtorch asks of CUDA through its hooks (is it there, pinned memory, whose pointer) and random number generators.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>

namespace sim {

namespace {

// A device's generator is a CPU generator that says it lives on the device.
struct SimGenerator final : c10::GeneratorImpl {
  SimGenerator(int device, at::Generator inner)
      : GeneratorImpl(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)),
                      c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new SimGenerator(device().index(), inner.clone()); }
  at::Generator inner;
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs = {}) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(machine().device_count); }
  int getNumGPUs() const override { return machine().device_count; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device()); }
  c10::DeviceIndex current_device() const override { return getCurrentDevice(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { guard()->setDevice(c10::Device(c10::kCUDA, index)); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    c10::DeviceIndex from = getCurrentDevice();
    if (index >= 0) setCurrentDevice(index);
    return from;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  void deviceSynchronize(c10::DeviceIndex index) const override { guard()->synchronizeDevice(index); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  bool isPinnedPtr(const void* ptr) const override {
    Lock lock(machine().mutex);
    return find_pinned(ptr) != nullptr;
  }
  at::Device getDeviceFromPtr(void* ptr) const override {
    Lock lock(machine().mutex);
    BlockPtr block = find_block(ptr);
    TORCH_CHECK(block, "The specified pointer resides on host memory and is not registered with any CUDA device.");
    return {c10::kCUDA, static_cast<c10::DeviceIndex>(block->device)};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index = -1) const override {
    return default_generator(index < 0 ? sim::current_device() : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index = -1) const override {
    return new_generator(index < 0 ? sim::current_device() : index);
  }
  std::string showConfig() const override { return "simcuda (simulated)"; }
  static const c10::impl::DeviceGuardImplInterface* guard() { return c10::impl::getDeviceGuardImpl(c10::kCUDA); }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

}  // namespace

at::Generator new_generator(int device) {
  check_device(device);
  return at::make_generator<SimGenerator>(device, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(int device) {
  static std::vector<at::Generator>* generators = new std::vector<at::Generator>(kMaxDevices);
  check_device(device);
  Lock lock(machine().mutex);
  at::Generator& generator = (*generators)[device];
  if (!generator.defined()) {
    generator = new_generator(device);
    generator.seed();
  }
  return generator;
}

at::Generator cpu_generator(const std::optional<at::Generator>& given, int device) {
  const at::Generator& generator = given && given->defined() ? *given : default_generator(device);
  TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
              generator.device().type(), "'");
  return static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

}  // namespace sim
