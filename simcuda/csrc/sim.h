// What the parts of the simulator share: the state of the simulated machine, and what each file offers the others.
//
// Two things are kept apart. *Effects* (which bytes are where) are late: a queued copy runs when something waits for it.
// *Virtual time* is settled at once, when work is queued, so that it does not depend on when the effect runs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <thread>
#include <tuple>
#include <vector>

namespace sim {

constexpr int kMaxDevices = 16;
constexpr unsigned char kPoison = 0xDB;

// CUDA's own error numbers (driver_types.h), as torch.cuda.cudart() returns them.
enum CudaError : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidDevice = 101,
  kIllegalAddress = 700,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kUnknown = 999,
};
const char* error_name(int code);
const char* error_string(int code);
// Raises torch.AcceleratorError "CUDA error: ...".
[[noreturn]] void throw_cuda_error(int code, const std::string& detail);
// The error that the last failed runtime call of this thread left behind (cudaGetLastError's).
int peek_last_error();
void set_last_error(int code);
// What C10_CUDA_KERNEL_LAUNCH_CHECK does: raises a left-over error, and clears it.
void check_last_error();
// What a refused registration also leaves on the device: the next wait there raises it, once.
void leave_for_next_wait(int device, int code);
void check_queued_error(int device);

// ---- the driver's lock (driver.cpp) ----------------------------------------------------------------------------------

enum DriverCallKind : int { kPinCall = 0, kUnpinCall = 1, kMallocCall = 2, kFreeCall = 3 };
constexpr int kDriverCalls = 4;
struct DriverCounters { uint64_t calls = 0; double seconds = 0, longest = 0; };  // virtual time
// A call that holds it, to its end. Never made with the machine's mutex held: it waits, and may run Python.
class DriverCall {
 public:
  DriverCall(int kind, size_t nbytes);
  ~DriverCall();
  DriverCall(const DriverCall&) = delete;
  // Counts what it took, with the machine's mutex held.
  void took(double seconds) const;

 private:
  int kind_;
  bool holds_ = false;
};
// What any other use of a device does first, without the machine's mutex.
void wait_for_driver();

// ---- virtual time (link.cpp) ----------------------------------------------------------------------------------------

// Bytes a second and seconds; filled from simcuda/link.py, in this order.
struct Link {
  double h2d_pinned, d2h_pinned, h2d_pageable, d2h_pageable, d2d;
  double copy_latency, pin_untouched, pin_touched, unpin, host_copy, launch;
  double segment_free;
};

// Something that does one thing at a time (a copy engine, the compute units): its busy spans of virtual time.
class Engine {
 public:
  // The first span of `length` seconds that starts at `earliest` or later and overlaps no earlier reservation.
  static double first_fit(const std::vector<Engine*>& engines, double earliest, double length);
  void reserve(double start, double end);
  void forget_before(double now);
  void clear() { busy_.clear(); }

 private:
  std::map<double, double> busy_;  // start -> end, disjoint
};

// ---- memory (memory.cpp, pinned.cpp) --------------------------------------------------------------------------------

// What stands between tensors and the driver: nothing, PyTorch's caching allocator with fixed or expandable segments, or
// the driver's own pool.
enum AllocatorKind : int { kExact = 0, kNative = 1, kExpandable = 2, kAsync = 3 };

// Device memory that an allocator has from the driver. An expandable one is endless, and has pages.
struct Segment {
  int64_t stream = 0;
  bool small = false, expandable = false;
  size_t size = 0;
  std::map<size_t, size_t> used;  // offset -> bytes
  std::set<size_t> pages;         // those that the driver gave
};

// Which bytes of an allocator's a block has.
struct Place {
  size_t nbytes = 0;  // rounded
  Segment* segment = nullptr;
  size_t offset = 0;
  bool pooled = false;
};
// Finds room for a block, or nothing. Without room the caching allocators empty their cache, once.
std::optional<Place> place(int device, size_t nbytes, int64_t stream);
void give_up(int device, const Place& place);
void empty_cache(int device);

// One allocation on a device. The memory itself outlives the free as long as a queued copy knows it.
struct Block {
  char* ptr = nullptr;
  size_t nbytes = 0;
  int device = 0;
  int64_t stream = 0;            // the stream it was allocated on, whose order its reuse follows
  std::set<int64_t> recorded;    // tensor.record_stream
  bool poisoned = false;
  bool is_workspace = false;     // a library's own: no tensor asked for it
  Place place;
  c10::DataPtr adopted;          // memory that a CPU kernel allocated for its output, taken over
  ~Block();
};
using BlockPtr = std::shared_ptr<Block>;

// One page-locked range of host memory.
struct Pinned {
  char* ptr = nullptr;
  size_t nbytes = 0;      // what is locked: a power of two for the allocator's own
  bool registered = false;
  bool released = false;  // unregistered or freed while a copy may still be queued
  ~Pinned();
};
using PinnedPtr = std::shared_ptr<Pinned>;

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
c10::DataPtr allocate_on(int device, size_t nbytes);
// Takes over memory that a CPU kernel allocated, so that it counts as device memory from now on.
c10::DataPtr adopt_on(int device, c10::DataPtr memory, size_t nbytes);
BlockPtr find_block(const void* ptr);
PinnedPtr find_pinned(const void* ptr);
int host_register(char* ptr, size_t nbytes, int64_t flags);
int host_unregister(char* ptr);
// Marks the memory free in stream order: poisoned now, or behind what its stream still has queued.
void retire(const BlockPtr& block);
void retire_now(const BlockPtr& block);
void release_deferred();

// ---- streams (streams.cpp) ------------------------------------------------------------------------------------------

enum class Direction { H2D = 0, D2H = 1, D2D = 2 };
const char* direction_name(Direction direction);

// An event's place in its stream.
struct Marker {
  int device = 0;
  int64_t stream = 0;
  bool reached = false;
  double time = 0;
  int polls = 0;
};
using MarkerPtr = std::shared_ptr<Marker>;

// An injected fault (faults.cpp): what to raise, and how many bytes to write before.
struct Fault {
  int64_t id = 0;
  int kind = 0;
  int64_t countdown = 0, times = 1;
  int64_t after_bytes = -1;  // -1: half of the copy
  std::string op;            // of an operator's fault: which one, and
  int64_t min_rows = 0;      // with how many rows of its first tensor at least
  bool late = false, flip = false;
  void* error_type = nullptr;   // a Python class and instance, or null for the kind's natural error
  void* error_value = nullptr;
  int64_t fired = 0;
};

struct Copy {
  char* dst = nullptr;
  const char* src = nullptr;
  size_t nbytes = 0;
  Direction direction = Direction::H2D;
  BlockPtr dst_block, src_block;
  PinnedPtr pinned;
  bool flip = false;
  std::optional<Fault> fault;
  std::string describe() const;
};
void run_copy(const Copy& copy);

struct Job {
  enum Kind { kCopy, kMark, kWait, kRetire } kind;
  Copy copy;
  MarkerPtr marker;
  BlockPtr block;
};

struct StreamState {
  int device = 0;
  int64_t id = 0;
  std::deque<Job> queue;
  int polls = 0;
  double ready = 0;  // the virtual time at which all that was queued is done
};

StreamState& stream_state(int device, int64_t id);
StreamState& current_stream(int device);
int current_device();
void check_device(int device);
void run_all(StreamState& stream);
// Runs what an operation on `blocks` that starts on this stream has to come after: every wait queued there, and the
// copies that touch the same memory. Copies of other memory stay late.
void run_before_touching(StreamState& stream, const std::vector<BlockPtr>& blocks);
MarkerPtr mark(StreamState& stream);
void wait(StreamState& stream, const MarkerPtr& marker);

// ---- faults and callbacks (faults.cpp) ------------------------------------------------------------------------------

enum FaultKind : int { kFailAlloc = 0, kFailPinnedAlloc = 1, kFailPin = 2, kFailCopy = 3, kFailOperator = 4 };
std::optional<Fault> next_fault(int kind, const std::string& op = "", int64_t rows = 0);
[[noreturn]] void raise_fault(const Fault& fault, int code, const std::string& detail);
struct CopyNotice { int direction, device, pinned, non_blocking; int64_t nbytes, stream; };
void announce_copy(const CopyNotice& notice);
using DriverFn = void (*)(int kind, uint64_t nbytes, void** error);
void announce_driver_call(int kind, size_t nbytes);

// ---- the machine ----------------------------------------------------------------------------------------------------

struct Device {
  size_t capacity = SIZE_MAX, allocations = 0, live = 0, ooms = 0, allocated_ever = 0;
  size_t allocated = 0, peak = 0;            // as the allocator counts: rounded
  size_t requested = 0, requested_peak = 0;  // to the byte
  size_t reserved = 0, reserved_peak = 0;    // what the driver gave
  size_t pool = 0, pooled = 0;               // of the driver's own pool: its size, and what is in use
  size_t retries = 0, emptied = 0, segments_freed = 0;
  std::vector<std::unique_ptr<Segment>> segments;
  bool lost = false;  // an illegal access has spoilt the context: every call fails
  size_t context = 0;  // bytes that this process's context takes, beside what is allocated
  bool has_context = false;
  int queued_error = kSuccess;
  size_t free() const { return capacity - std::min(capacity, reserved + context); }
  size_t copies[3] = {0, 0, 0}, bytes[3] = {0, 0, 0};
  std::map<int64_t, StreamState> streams;
  Engine h2d, d2h, compute;
};

struct Machine {
  std::recursive_mutex mutex;  // never held while Python runs: a deleter may need it under the GIL
  int device_count = 1;
  Device devices[kMaxDevices];
  Link link{};
  double now = 0;  // the host's virtual clock
  std::map<const char*, BlockPtr> blocks;
  std::map<const char*, PinnedPtr> pinned;
  int allocator = kExact;
  size_t context_bytes = 0;  // what each new context takes
  size_t pinned_bytes = 0, pinned_peak = 0, pinned_limit = SIZE_MAX, pins = 0, unpins = 0, registered_bytes = 0;
  DriverCounters driver[kDriverCalls];
  bool strict_host_frees = false;
  std::deque<BlockPtr> quarantine;
  size_t quarantined = 0;
  std::map<size_t, std::vector<char*>> spare;  // by size
  size_t spare_bytes = 0;
  std::vector<std::pair<BlockPtr, std::vector<MarkerPtr>>> deferred;
  std::vector<Fault> faults;
  int64_t next_id = 1;
  bool takes_workspace = false;  // while one is allocated
  // cuBLAS: what each thread's handle takes on each stream from the allocator, until somebody clears them.
  size_t workspace_bytes = 0;
  std::map<std::tuple<std::thread::id, int, int64_t>, c10::DataPtr> workspaces;
};
Machine& machine();
// A call that makes the driver's context on a device, as the first use of one does.
void use_device(int device);
// Raises if the device's context is spoilt.
void check_alive(int device);
void drop_queued(int device);
// Raises if this thread captures a graph, in which nobody can wait, nor lock memory.
void check_no_capture();
bool set_capturing(bool capturing);
bool is_capturing();
using Lock = std::lock_guard<std::recursive_mutex>;

void launch(StreamState& stream);
double copy_seconds(Direction direction, bool pinned, size_t nbytes);
// Puts a copy on the timeline of its stream and its engines; the virtual time at which it ends.
double schedule_copy(StreamState& stream, Direction direction, bool pinned, size_t nbytes, int peer);
void wait_until(double time);

// ---- operators (ops.cpp) --------------------------------------------------------------------------------------------

void clear_workspaces();
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack);
at::Tensor cpu_alias(const at::Tensor& tensor);
at::Generator cpu_generator(const std::optional<at::Generator>& generator, int device);
const at::Generator& default_generator(int device);
at::Generator new_generator(int device);
at::Tensor& copy_kernel(at::Tensor& dst, const at::Tensor& src, bool non_blocking);

}  // namespace sim
