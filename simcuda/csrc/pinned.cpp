// Page-locked host memory: PyTorch's pinned allocator, and cudaHostRegister on memory of one's own.
//
// As in PyTorch the allocator rounds up to a power of two, and memory freed under a queued copy stays until the copy ran
// (CachingHostAllocator's record_event); registered memory has no such protection, so unregistering it there is an error.
#include "sim.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/util/llvmMathExtras.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace sim {

namespace {

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// The seconds that locking a range takes: pages that were touched before are cheaper than pages still to be made.
double pin_seconds(const char* ptr, size_t nbytes) {
  const Link& link = machine().link;
  size_t page = page_size();
  auto start = reinterpret_cast<uintptr_t>(ptr) / page * page;
  size_t pages = (reinterpret_cast<uintptr_t>(ptr) + nbytes - start + page - 1) / page;
  std::vector<unsigned char> resident(pages);
  if (mincore(reinterpret_cast<void*>(start), pages * page, resident.data()) != 0) return nbytes / link.pin_untouched;
  size_t touched = 0;
  for (unsigned char flag : resident) touched += flag & 1;
  double share = static_cast<double>(touched) / static_cast<double>(pages);
  return nbytes * share / link.pin_touched + nbytes * (1 - share) / link.pin_untouched;
}

bool fits(size_t nbytes) {
  const Machine& m = machine();
  return nbytes <= m.pinned_limit - std::min(m.pinned_limit, m.pinned_bytes);
}

void enter(PinnedPtr range) {
  Machine& m = machine();
  m.pinned_bytes += range->nbytes;
  if (range->registered) m.registered_bytes += range->nbytes;
  m.pinned_peak = std::max(m.pinned_peak, m.pinned_bytes);
  m.pins++;
  m.pinned[range->ptr] = std::move(range);
}

void delete_pinned(void* context) {
  auto* holder = static_cast<PinnedPtr*>(context);
  if (holder == nullptr) return;
  Lock lock(machine().mutex);
  PinnedPtr range = *holder;
  delete holder;
  machine().pinned.erase(range->ptr);
  if (machine().strict_host_frees && range.use_count() > 1) {
    range->released = true;
    std::memset(range->ptr, kPoison, range->nbytes);
  }
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t requested) override {
    Machine& m = machine();
    if (requested == 0) return {nullptr, nullptr, &delete_pinned, c10::Device(c10::kCPU)};
    size_t nbytes = c10::llvm::PowerOf2Ceil(requested);
    DriverCall call(kPinCall, nbytes);
    Lock lock(m.mutex);
    std::string detail = "cannot lock " + std::to_string(nbytes) + " bytes of host memory (" +
                         std::to_string(requested) + " asked, rounded up to a power of two)";
    if (auto fault = next_fault(kFailPinnedAlloc)) raise_fault(*fault, kMemoryAllocation, detail + ", injected");
    if (!fits(nbytes))
      throw_cuda_error(kMemoryAllocation, detail + ": " + std::to_string(m.pinned_bytes) + " are locked, the limit is " +
                                              std::to_string(m.pinned_limit));
    void* ptr = nullptr;
    TORCH_CHECK(posix_memalign(&ptr, page_size(), nbytes) == 0, "simcuda: the host has no memory left for ", nbytes,
                " bytes");
    auto range = std::make_shared<Pinned>();
    range->ptr = static_cast<char*>(ptr);
    range->nbytes = nbytes;
    double seconds = static_cast<double>(nbytes) / m.link.pin_untouched;
    m.now += seconds;
    call.took(seconds);
    enter(range);
    return {ptr, new PinnedPtr(range), &delete_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dst, const void* src, std::size_t n) const override { std::memcpy(dst, src, n); }
  bool record_event(void* ptr, void*, c10::Stream) override {
    Lock lock(machine().mutex);
    return find_pinned(ptr) != nullptr;  // a queued copy holds the range itself
  }
  void empty_cache() override {}
  at::HostStats get_stats() override {
    Lock lock(machine().mutex);
    const Machine& m = machine();
    at::HostStats stats;
    stats.allocated_bytes.current = stats.active_bytes.current = m.pinned_bytes - m.registered_bytes;
    stats.allocated_bytes.peak = stats.active_bytes.peak = m.pinned_peak;
    stats.num_host_alloc = m.pins;
    return stats;
  }
  void reset_accumulated_stats() override { Lock lock(machine().mutex); machine().pins = 0; }
  void reset_peak_stats() override { Lock lock(machine().mutex); machine().pinned_peak = machine().pinned_bytes; }
};
PinnedAllocator the_pinned_allocator;
REGISTER_HOST_ALLOCATOR(c10::kCUDA, &the_pinned_allocator);

}  // namespace

Pinned::~Pinned() {
  Machine& m = machine();
  Lock lock(m.mutex);
  m.pinned_bytes -= nbytes;
  if (registered) m.registered_bytes -= nbytes;
  else std::free(ptr);
}

c10::Allocator* pinned_allocator() { return &the_pinned_allocator; }

PinnedPtr find_pinned(const void* ptr) {
  auto& ranges = machine().pinned;
  auto after = ranges.upper_bound(static_cast<const char*>(ptr));
  if (ptr == nullptr || after == ranges.begin()) return nullptr;
  PinnedPtr& range = std::prev(after)->second;
  return static_cast<const char*>(ptr) < range->ptr + range->nbytes ? range : nullptr;
}

static int try_register(char* ptr, size_t nbytes, int64_t flags) {
  Machine& m = machine();
  if (is_capturing()) return kCaptureUnsupported;
  if (ptr == nullptr || nbytes == 0) return kInvalidValue;
  if (auto fault = next_fault(kFailPin)) {
    if (fault->error_value) raise_fault(*fault, kMemoryAllocation, "injected");
    return kMemoryAllocation;
  }
  constexpr int64_t kReadOnly = 8;  // needs a device that shares the host's page tables
  if (flags & kReadOnly) return kNotSupported;
  auto next = m.pinned.lower_bound(ptr);
  if (find_pinned(ptr) || (next != m.pinned.end() && next->first < ptr + nbytes)) return kAlreadyRegistered;
  if (!fits(nbytes)) return kMemoryAllocation;
  m.now += pin_seconds(ptr, nbytes);
  auto range = std::make_shared<Pinned>();
  range->ptr = ptr;
  range->nbytes = nbytes;
  range->registered = true;
  enter(std::move(range));
  return kSuccess;
}

int host_register(char* ptr, size_t nbytes, int64_t flags) {
  DriverCall call(kPinCall, nbytes);
  Lock lock(machine().mutex);
  double start = machine().now;
  int code = try_register(ptr, nbytes, flags);
  call.took(machine().now - start);
  if (code != kSuccess) {
    set_last_error(code);
    if (code != kCaptureUnsupported) leave_for_next_wait(current_device(), code);
  }
  return code;
}

int host_unregister(char* ptr) {
  DriverCall call(kUnpinCall, 0);
  Lock lock(machine().mutex);
  auto& ranges = machine().pinned;
  auto it = ranges.find(ptr);
  if (it == ranges.end() || !it->second->registered) {
    set_last_error(kNotRegistered);
    return kNotRegistered;
  }
  double seconds = static_cast<double>(it->second->nbytes) / machine().link.unpin;
  machine().now += seconds;
  call.took(seconds);
  machine().unpins++;
  it->second->released = true;  // seen by copies that are still queued
  ranges.erase(it);
  return kSuccess;
}

}  // namespace sim
