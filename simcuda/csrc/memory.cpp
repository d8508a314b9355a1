// Device memory: an allocator with a capacity, stream-ordered frees, and poison in what was freed.
//
// How much of the device a block takes, and when that is free again for others: segments.cpp.
// A free follows the rules of PyTorch's caching allocator: it is ordered behind the stream the memory was allocated on,
// and put off for streams named with record_stream. Anything else that still uses the memory afterwards is caught.
#include "sim.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace sim {

namespace {

constexpr size_t kQuarantine = size_t{32} << 20;  // bytes of freed memory kept poisoned before it is reused
constexpr size_t kSpare = size_t{32} << 20;       // bytes kept for reuse after that
constexpr size_t kAlignment = 512;

std::string mib(size_t nbytes) {
  char text[32];
  if (nbytes >= size_t{1} << 30) snprintf(text, sizeof text, "%.2f GiB", nbytes / 1073741824.0);
  else if (nbytes >= size_t{1} << 20) snprintf(text, sizeof text, "%.2f MiB", nbytes / 1048576.0);
  else if (nbytes >= size_t{1} << 10) snprintf(text, sizeof text, "%.2f KiB", nbytes / 1024.0);
  else snprintf(text, sizeof text, "%zu bytes", nbytes);
  return text;
}

[[noreturn]] void throw_out_of_memory(int index, size_t nbytes) {
  Device& device = machine().devices[index];
  device.ooms++;
  size_t free = device.free();
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", mib(nbytes), ". GPU ", index,
      " has a total capacity of ", mib(device.capacity), " of which ", mib(free), " is free. Of the allocated memory ",
      mib(device.allocated), " is allocated by PyTorch, and ", mib(device.reserved - device.allocated),
      " is reserved by PyTorch but unallocated. ",
      "(simulated device)");
  std::abort();  // TORCH_CHECK_WITH(false) has thrown
}

void count_out(const BlockPtr& block) {
  Device& device = machine().devices[block->device];
  device.allocated -= block->place.nbytes;
  if (!block->is_workspace) device.requested -= block->nbytes;
  give_up(block->device, block->place);
}

void delete_block(void* context) {
  auto* holder = static_cast<BlockPtr*>(context);
  if (holder == nullptr) return;
  if (machine().allocator == kAsync && peek_last_error() != kSuccess) {
    // cudaFreeAsync checks it, and raises in a destructor.
    fprintf(stderr, "simcuda: terminate: memory was freed while this thread had an error left behind: %s\n",
            error_string(peek_last_error()));
    std::terminate();
  }
  Lock lock(machine().mutex);
  BlockPtr block = *holder;
  delete holder;
  Machine& m = machine();
  m.blocks.erase(block->ptr);
  Device& device = m.devices[block->device];
  device.live--;
  std::vector<MarkerPtr> markers;
  for (int64_t id : block->recorded) {
    StreamState& stream = stream_state(block->device, id);
    if (id != block->stream && !stream.queue.empty()) markers.push_back(mark(stream));
  }
  if (!markers.empty()) {
    m.deferred.emplace_back(block, std::move(markers));
    return;
  }
  count_out(block);
  retire(block);
}

// Counts the bytes in, or raises; the caller provides the memory.
Place take(int index, size_t nbytes) {
  use_device(index);
  Machine& m = machine();
  Device& device = m.devices[index];
  if (m.allocator == kAsync) check_last_error();
  if (auto fault = next_fault(kFailAlloc)) {
    if (fault->error_value) raise_fault(*fault, kMemoryAllocation, "injected");
    throw_out_of_memory(index, nbytes);
  }
  release_deferred();
  int64_t stream = current_stream(index).id;
  std::optional<Place> found = place(index, nbytes, stream);
  if (!found && !m.deferred.empty()) {
    // As the caching allocator does before it gives up: wait for the streams that hold back frees.
    for (auto& [id, other] : device.streams) run_all(other);
    release_deferred();
    found = place(index, nbytes, stream);
  }
  if (!found) throw_out_of_memory(index, nbytes);
  device.allocated += found->nbytes;
  if (!m.takes_workspace) device.requested += nbytes;
  device.allocated_ever += found->nbytes;
  device.allocations++;
  device.live++;
  device.peak = std::max(device.peak, device.allocated);
  device.requested_peak = std::max(device.requested_peak, device.requested);
  return *found;
}

c10::DataPtr hand_out(BlockPtr block) {
  machine().blocks[block->ptr] = block;
  void* ptr = block->ptr;
  auto device = c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(block->device));
  return {ptr, new BlockPtr(std::move(block)), &delete_block, device};
}

// Memory that left the quarantine, or new. Asking the system anew each time costs more than the operators do.
char* host_memory(size_t nbytes) {
  Machine& m = machine();
  auto spare = m.spare.find(nbytes);
  if (spare != m.spare.end() && !spare->second.empty()) {
    char* ptr = spare->second.back();
    spare->second.pop_back();
    m.spare_bytes -= nbytes;
    return ptr;
  }
  void* ptr = nullptr;
  TORCH_CHECK(posix_memalign(&ptr, kAlignment, nbytes) == 0, "simcuda: the host itself has no memory left for ", nbytes,
              " bytes of simulated device memory");
  return static_cast<char*>(ptr);
}

BlockPtr new_block(int device, size_t nbytes, Place place) {
  auto block = std::make_shared<Block>();
  block->nbytes = nbytes;
  block->device = device;
  block->stream = current_stream(device).id;
  block->place = place;
  block->is_workspace = machine().takes_workspace;
  return block;
}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    wait_for_driver();
    auto reserved = [] {
      Lock lock(machine().mutex);
      return machine().devices[current_device()].reserved;
    };
    size_t before = reserved();
    c10::DataPtr memory = allocate_on(current_device(), nbytes);
    size_t after = reserved();
    if (after > before) {  // its cache had too little: the driver was asked
      DriverCall call(kMallocCall, after - before);
      Lock lock(machine().mutex);
      call.took(0);
    }
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dst, const void* src, std::size_t n) const override { std::memcpy(dst, src, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    DriverCall call(kFreeCall, 0);
    Lock lock(machine().mutex);
    double start = machine().now;
    for (int index = 0; index < machine().device_count; ++index) sim::empty_cache(index);
    call.took(machine().now - start);
  }
  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override {
    Lock lock(machine().mutex);
    if (BlockPtr block = find_block(ptr.get())) block->recorded.insert(stream.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    check_device(index);
    Lock lock(machine().mutex);
    const Device& device = machine().devices[index];
    c10::CachingDeviceAllocator::DeviceStats stats;
    c10::CachingAllocator::Stat bytes, blocks, reserved, requested, segments;
    reserved.current = device.reserved;
    reserved.peak = device.reserved_peak;
    requested.current = device.requested;
    requested.peak = device.requested_peak;
    segments.current = device.segments.size();
    bytes.current = device.allocated;
    bytes.peak = device.peak;
    bytes.allocated = device.allocated_ever;
    bytes.freed = device.allocated_ever - device.allocated;
    blocks.current = device.live;
    blocks.peak = blocks.allocated = device.allocations;
    blocks.freed = device.allocations > device.live ? device.allocations - device.live : 0;
    stats.allocated_bytes[0] = stats.active_bytes[0] = bytes;
    stats.reserved_bytes[0] = reserved;
    stats.requested_bytes[0] = requested;
    stats.allocation[0] = stats.active[0] = blocks;
    stats.segment[0] = segments;
    stats.num_ooms = device.ooms;
    stats.num_alloc_retries = device.retries;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    check_device(index);
    Lock lock(machine().mutex);
    Device& device = machine().devices[index];
    device.allocated_ever = device.allocated;
    device.allocations = device.live;
    device.ooms = 0;
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    Lock lock(machine().mutex);
    use_device(index);
    Device& device = machine().devices[index];
    device.peak = device.allocated;
    device.requested_peak = device.requested;
    device.reserved_peak = device.reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    wait_for_driver();
    Lock lock(machine().mutex);
    use_device(index);
    const Device& device = machine().devices[index];
    return {device.free(), device.capacity};
  }
};
DeviceAllocator the_allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &the_allocator);

}  // namespace

Block::~Block() {
  if (adopted || ptr == nullptr) return;
  Machine& m = machine();
  Lock lock(m.mutex);
  if (m.spare_bytes + nbytes > kSpare) {
    std::free(ptr);
    return;
  }
  m.spare_bytes += nbytes;
  m.spare[nbytes].push_back(ptr);
}

c10::Allocator* device_allocator() { return &the_allocator; }

c10::DataPtr allocate_on(int device, size_t nbytes) {
  Lock lock(machine().mutex);
  check_device(device);
  if (nbytes == 0) return {nullptr, nullptr, &delete_block, c10::Device(c10::kCUDA, device)};
  BlockPtr block = new_block(device, nbytes, take(device, nbytes));
  block->ptr = host_memory(nbytes);
  std::memset(block->ptr, kPoison, nbytes);  // a fresh page would read as zeros, which hides a copy that never came
  return hand_out(std::move(block));
}

c10::DataPtr adopt_on(int device, c10::DataPtr memory, size_t nbytes) {
  Lock lock(machine().mutex);
  if (nbytes == 0 || memory.get() == nullptr) return allocate_on(device, 0);
  BlockPtr block = new_block(device, nbytes, take(device, nbytes));
  block->ptr = static_cast<char*>(memory.get());
  block->adopted = std::move(memory);
  return hand_out(std::move(block));
}

BlockPtr find_block(const void* ptr) {
  auto& blocks = machine().blocks;
  auto after = blocks.upper_bound(static_cast<const char*>(ptr));
  if (ptr == nullptr || after == blocks.begin()) return nullptr;
  BlockPtr& block = std::prev(after)->second;
  return static_cast<const char*>(ptr) < block->ptr + block->nbytes ? block : nullptr;
}

static void poison(const BlockPtr& block) {
  Machine& m = machine();
  std::memset(block->ptr, kPoison, block->nbytes);
  block->poisoned = true;
  m.quarantine.push_back(block);
  m.quarantined += block->nbytes;
  while (m.quarantined > kQuarantine) {
    m.quarantined -= m.quarantine.front()->nbytes;
    m.quarantine.pop_front();
  }
}

void retire(const BlockPtr& block) {
  StreamState& stream = stream_state(block->device, block->stream);
  if (stream.queue.empty()) return poison(block);
  Job job{Job::kRetire, {}, nullptr, block};
  stream.queue.push_back(std::move(job));
}

void retire_now(const BlockPtr& block) { poison(block); }

void release_deferred() {
  Machine& m = machine();
  for (auto it = m.deferred.begin(); it != m.deferred.end();) {
    bool done = std::all_of(it->second.begin(), it->second.end(), [](const MarkerPtr& marker) { return marker->reached; });
    if (!done) {
      ++it;
      continue;
    }
    BlockPtr block = it->first;
    it = m.deferred.erase(it);
    count_out(block);
    retire(block);
  }
}

}  // namespace sim
