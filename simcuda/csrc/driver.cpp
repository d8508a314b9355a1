// The driver's lock: who page-locks, unlocks, allocates or frees holds it, and who uses a device in another thread waits.
//
// It is held for an instant of real time, unless somebody looks at it (on_driver_call): then for as long as he does.
// How long it would have been held on a real machine is virtual time, and counted.
#include "sim.h"

#include <condition_variable>

extern "C" {
int PyGILState_Check();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace sim {

DriverFn driver_fn = nullptr;

namespace {

std::mutex guard;  // of the two below; nobody waits for anything else while he has it
std::condition_variable changed;
std::thread::id owner;
int depth = 0;

bool is_free() { return depth == 0 || owner == std::this_thread::get_id(); }

// Waits without the GIL, which the owner may need to go on.
void enter(bool stay) {
  void* python = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  {
    std::unique_lock<std::mutex> lock(guard);
    changed.wait(lock, is_free);
    if (stay) {
      owner = std::this_thread::get_id();
      depth++;
    }
  }
  if (python) PyEval_RestoreThread(python);
}

void leave() {
  std::lock_guard<std::mutex> lock(guard);
  if (--depth == 0) changed.notify_all();
}

}  // namespace

void wait_for_driver() {
  if (driver_fn != nullptr) enter(false);
}

DriverCall::DriverCall(int kind, size_t nbytes) : kind_(kind) {
  if (driver_fn == nullptr) return;
  enter(true);
  holds_ = true;
  try {
    announce_driver_call(kind, nbytes);
  } catch (...) {
    leave();
    throw;
  }
}

DriverCall::~DriverCall() {
  if (holds_) leave();
}

void DriverCall::took(double seconds) const {
  DriverCounters& counters = machine().driver[kind_];
  counters.calls++;
  counters.seconds += seconds;
  counters.longest = std::max(counters.longest, seconds);
}

}  // namespace sim
