// The C functions that Python calls through ctypes (simcuda/library.py). None of them raises.
#include "sim.h"

using namespace sim;

namespace sim {
using NoticeFn = void (*)(const CopyNotice*, void** error);
extern NoticeFn notice_fn;
extern DriverFn driver_fn;
}  // namespace sim

extern "C" {

void sim_configure(int devices, uint64_t capacity) {
  Lock lock(machine().mutex);
  machine().device_count = devices;
  for (Device& device : machine().devices) device.capacity = capacity;
}
int sim_device_count() { return machine().device_count; }
void sim_set_link(const double* constants) {
  Lock lock(machine().mutex);
  Link& link = machine().link;
  double* fields[] = {&link.h2d_pinned, &link.d2h_pinned, &link.h2d_pageable, &link.d2h_pageable, &link.d2d,
                      &link.copy_latency, &link.pin_untouched, &link.pin_touched, &link.unpin,
                      &link.host_copy, &link.launch, &link.segment_free};
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = constants[i];
}
void sim_set_capacity(int device, uint64_t nbytes) {
  Lock lock(machine().mutex);
  machine().devices[device].capacity = nbytes;
}
uint64_t sim_capacity(int device) {
  Lock lock(machine().mutex);
  return machine().devices[device].capacity;
}
int sim_has_context(int device) {
  Lock lock(machine().mutex);
  return machine().devices[device].has_context;
}
void sim_reset_contexts(uint64_t nbytes) {
  Lock lock(machine().mutex);
  machine().context_bytes = nbytes;
  for (Device& device : machine().devices) {
    device.has_context = false;
    device.context = 0;
  }
}
void sim_set_workspaces(uint64_t nbytes) {
  clear_workspaces();
  Lock lock(machine().mutex);
  machine().workspace_bytes = nbytes;
}
void sim_clear_workspaces() { clear_workspaces(); }
void sim_counters(int index, uint64_t* out) {
  Lock lock(machine().mutex);
  const Device& device = machine().devices[index];
  uint64_t values[] = {device.requested, device.requested_peak, device.allocations, device.copies[0], device.bytes[0],
                       device.copies[1], device.bytes[1], device.copies[2], device.bytes[2]};
  std::copy(std::begin(values), std::end(values), out);
}
void sim_allocator_counters(int index, uint64_t* out) {
  Lock lock(machine().mutex);
  const Device& device = machine().devices[index];
  uint64_t values[] = {device.allocated, device.reserved, device.reserved_peak, device.segments.size(),
                       device.retries, device.emptied, device.segments_freed};
  std::copy(std::begin(values), std::end(values), out);
}
int sim_set_allocator(int kind) {
  Lock lock(machine().mutex);
  for (int index = 0; index < machine().device_count; ++index) empty_cache(index);
  return std::exchange(machine().allocator, kind);
}
int sim_allocator() { return machine().allocator; }
int sim_set_lost(int device, int lost) {
  Lock lock(machine().mutex);
  if (lost) drop_queued(device);
  return std::exchange(machine().devices[device].lost, lost != 0);
}
int sim_set_capturing(int capturing) { return set_capturing(capturing != 0); }
int sim_is_capturing() { return is_capturing(); }
void sim_host_counters(uint64_t* out) {
  Lock lock(machine().mutex);
  const Machine& m = machine();
  uint64_t values[] = {m.pinned_bytes, m.pinned_peak, m.pins, m.registered_bytes, m.unpins};
  std::copy(std::begin(values), std::end(values), out);
}
void sim_driver_counters(int kind, double* out) {
  Lock lock(machine().mutex);
  const DriverCounters& counters = machine().driver[kind];
  double values[] = {static_cast<double>(counters.calls), counters.seconds, counters.longest};
  std::copy(std::begin(values), std::end(values), out);
}
void sim_on_driver_call(DriverFn callback) { driver_fn = callback; }
void sim_reset_counters() {
  Lock lock(machine().mutex);
  Machine& m = machine();
  for (DriverCounters& counters : m.driver) counters = {};
  for (Device& device : m.devices) {
    device.peak = device.allocated;
    device.requested_peak = device.requested;
    device.reserved_peak = device.reserved;
    device.retries = device.emptied = device.segments_freed = 0;
    device.allocations = 0;
    for (int i = 0; i < 3; ++i) device.copies[i] = device.bytes[i] = 0;
  }
  m.pinned_peak = m.pinned_bytes;
  m.pins = m.unpins = 0;
}
void sim_set_pinned_limit(uint64_t nbytes) {
  Lock lock(machine().mutex);
  machine().pinned_limit = nbytes;
}
int sim_set_strict_host_frees(int strict) {
  Lock lock(machine().mutex);
  return std::exchange(machine().strict_host_frees, strict != 0);
}
int sim_peek_last_error() { return peek_last_error(); }
// The runtime's own, for who finds this library as he would find libcudart.
int cudaGetLastError() {
  int code = peek_last_error();
  set_last_error(kSuccess);
  return code;
}
void sim_set_last_error(int code) { set_last_error(code); }
const char* sim_error_name(int code) { return error_name(code); }
const char* sim_error_string(int code) { return error_string(code); }

int64_t sim_add_fault(int kind, int64_t nth, int64_t times, int64_t after_bytes, int late, int flip, void* type,
                      void* value, const char* op, int64_t min_rows) {
  Lock lock(machine().mutex);
  Fault fault;
  fault.id = machine().next_id++;
  fault.kind = kind;
  fault.countdown = nth;
  fault.times = times;
  fault.after_bytes = after_bytes;
  fault.late = late;
  fault.flip = flip;
  fault.op = op;
  fault.min_rows = min_rows;
  fault.error_type = type;
  fault.error_value = value;
  machine().faults.push_back(fault);
  return fault.id;
}
int64_t sim_fault_fired(int64_t id) {
  Lock lock(machine().mutex);
  for (const Fault& fault : machine().faults)
    if (fault.id == id) return fault.fired;
  return -1;
}
void sim_remove_fault(int64_t id) {
  Lock lock(machine().mutex);
  auto& faults = machine().faults;
  faults.erase(std::remove_if(faults.begin(), faults.end(), [id](const Fault& f) { return f.id == id; }), faults.end());
}
void sim_on_copy(NoticeFn callback) { notice_fn = callback; }

double sim_now() {
  Lock lock(machine().mutex);
  return machine().now;
}
void sim_advance(double seconds) {
  Lock lock(machine().mutex);
  machine().now += seconds;
}
void sim_reset_clock() {
  Lock lock(machine().mutex);
  Machine& m = machine();
  m.now = 0;
  for (Device& device : m.devices) {
    for (Engine* engine : {&device.h2d, &device.d2h, &device.compute}) engine->clear();
    for (auto& [id, stream] : device.streams) stream.ready = 0;
  }
}
void sim_compute(int index, int64_t id, double seconds) {
  Lock lock(machine().mutex);
  Machine& m = machine();
  StreamState& stream = stream_state(index, id);
  Engine* engine = &m.devices[index].compute;
  launch(stream);
  engine->forget_before(m.now);
  double start = Engine::first_fit({engine}, stream.ready, seconds);
  engine->reserve(start, start + seconds);
  stream.ready = start + seconds;
}
double sim_stream_ready(int index, int64_t id) {
  Lock lock(machine().mutex);
  return stream_state(index, id).ready;
}
int64_t sim_queued(int index, int64_t id) {
  Lock lock(machine().mutex);
  return static_cast<int64_t>(stream_state(index, id).queue.size());
}

}  // extern "C"
