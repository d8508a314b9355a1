// Streams, events and the current device: PyTorch's device guard for the simulated machine.
//
// A stream is a queue of effects that have not happened yet. Nothing runs it in the background: it runs when something
// waits for it, so that a program that forgets to wait sees the bytes from before.
#include "sim.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>

namespace sim {

namespace {
thread_local int this_device = 0;
thread_local std::array<int64_t, kMaxDevices> this_stream{};
thread_local bool capturing = false;

struct Event {
  MarkerPtr marker;
  bool timed = false;
};

c10::Stream to_stream(int device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)), id);
}

void run_first(StreamState& stream);

void run_until(const MarkerPtr& marker) {
  StreamState& stream = stream_state(marker->device, marker->stream);
  while (!marker->reached && !stream.queue.empty()) run_first(stream);
}

// The job leaves the queue before it runs: one that raises has had its effect and is not tried again.
void run_first(StreamState& stream) {
  Job job = std::move(stream.queue.front());
  stream.queue.pop_front();
  switch (job.kind) {
    case Job::kCopy: run_copy(job.copy); break;
    case Job::kMark: job.marker->reached = true; break;
    case Job::kWait: run_until(job.marker); break;
    case Job::kRetire: retire_now(job.block); break;
  }
}

constexpr int kMaxPolls = 100;

// Whether work that ends at `time` is done. A query that says no costs the host as much as a launch, so that a loop of
// queries ends; and since such a loop may sleep in between, the hundredth one waits.
bool poll(double time, int& polls) {
  Machine& m = machine();
  if (time > m.now && ++polls < kMaxPolls) {
    m.now += m.link.launch;
    return false;
  }
  wait_until(time);
  polls = 0;
  return true;
}

bool touches(const Copy& copy, const std::vector<BlockPtr>& blocks) {
  for (const BlockPtr& block : blocks)
    if (block && (block == copy.src_block || block == copy.dst_block)) return true;
  return false;
}
}  // namespace

void check_device(int device) {
  if (device < 0 || device >= machine().device_count)
    throw_cuda_error(kInvalidDevice, "cuda:" + std::to_string(device) + " was asked for, this machine has " +
                                         std::to_string(machine().device_count) + " device(s)");
}

void check_alive(int device) {
  if (machine().devices[device].lost)
    throw_cuda_error(kIllegalAddress, "the context of cuda:" + std::to_string(device) + " is spoilt");
}

// What was queued on a spoilt device never runs.
void drop_queued(int device) {
  for (auto& [id, stream] : machine().devices[device].streams)
    for (; !stream.queue.empty(); stream.queue.pop_front()) {
      Job& job = stream.queue.front();
      if (job.kind == Job::kMark) job.marker->reached = true;
      if (job.kind == Job::kRetire) retire_now(job.block);
    }
}

bool set_capturing(bool wanted) { return std::exchange(capturing, wanted); }
bool is_capturing() { return capturing; }

void check_no_capture() {
  if (capturing) throw_cuda_error(kCaptureUnsupported, "a call that waits, or locks memory");
}

void use_device(int device) {
  check_device(device);
  check_alive(device);
  Device& used = machine().devices[device];
  if (!std::exchange(used.has_context, true)) used.context = machine().context_bytes;
}

int current_device() { return this_device; }

StreamState& stream_state(int device, int64_t id) {
  StreamState& stream = machine().devices[device].streams[id];
  stream.device = device;
  stream.id = id;
  return stream;
}

StreamState& current_stream(int device) { return stream_state(device, this_stream[device]); }

void run_all(StreamState& stream) {
  while (!stream.queue.empty()) run_first(stream);
  release_deferred();
}

void run_before_touching(StreamState& stream, const std::vector<BlockPtr>& blocks) {
  size_t needed = 0;
  for (size_t i = 0; i < stream.queue.size(); ++i) {
    const Job& job = stream.queue[i];
    if (job.kind == Job::kWait || (job.kind == Job::kCopy && touches(job.copy, blocks))) needed = i + 1;
  }
  while (needed-- > 0 && !stream.queue.empty()) run_first(stream);
}

MarkerPtr mark(StreamState& stream) {
  auto marker = std::make_shared<Marker>();
  marker->device = stream.device;
  marker->stream = stream.id;
  marker->time = stream.ready;
  if (stream.queue.empty()) marker->reached = true;
  else stream.queue.push_back(Job{Job::kMark, {}, marker, nullptr});
  return marker;
}

void wait(StreamState& stream, const MarkerPtr& marker) {
  if (!marker) return;
  stream.ready = std::max(stream.ready, marker->time);
  bool same = marker->device == stream.device && marker->stream == stream.id;
  if (!same && !marker->reached) stream.queue.push_back(Job{Job::kWait, {}, marker, nullptr});
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device device(int index) const { return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)}; }

  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device from = getDevice();
    if (to.has_index()) setDevice(to);
    return from;
  }
  c10::Device getDevice() const override { return device(this_device); }
  void setDevice(c10::Device to) const override {
    if (!to.has_index()) return;
    check_device(to.index());
    this_device = to.index();
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index() && to.index() >= 0 && to.index() < machine().device_count) this_device = to.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(machine().device_count);
  }

  int index_of(c10::Device d) const {
    int index = d.has_index() ? d.index() : this_device;
    check_device(index);
    return index;
  }
  c10::Stream getStream(c10::Device d) const override {
    int index = index_of(d);
    return to_stream(index, this_stream[index]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return to_stream(index_of(d), 0); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    Lock lock(machine().mutex);
    int index = index_of(d);
    use_device(index);
    StreamState& stream = stream_state(index, machine().next_id++);
    stream.ready = machine().now;
    return to_stream(index, stream.id);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    c10::Stream from = getStream(to.device());
    this_stream[to.device_index()] = to.id();
    return from;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return reinterpret_cast<void*>(s.id()); }

  bool queryStream(const c10::Stream& s) const override {
    Lock lock(machine().mutex);
    StreamState& stream = stream_state(index_of(s.device()), s.id());
    if (!poll(stream.ready, stream.polls)) return false;
    run_all(stream);
    return true;
  }
  void synchronizeStream(const c10::Stream& s) const override {
    Lock lock(machine().mutex);
    check_no_capture();
    check_alive(index_of(s.device()));
    StreamState& stream = stream_state(index_of(s.device()), s.id());
    wait_until(stream.ready);
    run_all(stream);
    check_queued_error(stream.device);
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    Lock lock(machine().mutex);
    check_no_capture();
    use_device(index);
    for (auto& [id, stream] : machine().devices[index].streams) {
      wait_until(stream.ready);
      run_all(stream);
    }
    check_queued_error(index);
  }

  void record(void** handle, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag flag) const override {
    Lock lock(machine().mutex);
    use_device(index_of(s.device()));
    if (*handle == nullptr) *handle = new Event();
    auto* event = static_cast<Event*>(*handle);
    event->marker = mark(stream_state(index_of(s.device()), s.id()));
    event->timed = flag != c10::EventFlag::PYTORCH_DEFAULT;
  }
  void block(void* handle, const c10::Stream& s) const override {
    Lock lock(machine().mutex);
    if (handle) wait(stream_state(index_of(s.device()), s.id()), static_cast<Event*>(handle)->marker);
  }
  bool queryEvent(void* handle) const override {
    Lock lock(machine().mutex);
    if (handle == nullptr) return true;
    const MarkerPtr& marker = static_cast<Event*>(handle)->marker;
    if (!poll(marker->time, marker->polls)) return false;
    run_until(marker);
    return true;
  }
  void synchronizeEvent(void* handle) const override {
    Lock lock(machine().mutex);
    if (handle == nullptr) return;
    check_no_capture();
    const MarkerPtr& marker = static_cast<Event*>(handle)->marker;
    check_alive(marker->device);
    wait_until(marker->time);
    run_until(marker);
    release_deferred();
    check_queued_error(marker->device);
  }
  void destroyEvent(void* handle, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(handle);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const auto *from = static_cast<Event*>(first), *to = static_cast<Event*>(second);
    TORCH_CHECK(from && to, "Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(from->marker->reached && to->marker->reached,
                "Both events must be completed before calculating elapsed time.");
    return (to->marker->time - from->marker->time) * 1e3;
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    Lock lock(machine().mutex);
    if (BlockPtr block = find_block(data.get())) block->recorded.insert(s.id());
  }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return c10::DeviceCapability(); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace sim
