// Planned faults, the notice given before each copy, and Python exceptions raised from C++.
#include "sim.h"

#include <exception>

// The interpreter's own symbols, resolved when the library is loaded: building must not need Python's headers.
extern "C" {
int PyGILState_Ensure();
void PyGILState_Release(int);
void Py_DecRef(void*);
void Py_IncRef(void*);
}

// PyTorch's own exception for "a Python error, pass it on as it is" (torch/csrc/Exceptions.h, torch 2.13), declared anew
// because that header needs Python.h. libtorch_python catches it by name and reads these members.
struct python_error : public std::exception {
  python_error(void* type, void* value) : type(type), value(value) {}
  python_error(const python_error& other)
      : std::exception(other), type(other.type), value(other.value), traceback(other.traceback), message(other.message) {
    int state = PyGILState_Ensure();
    for (void* object : {type, value, traceback})
      if (object) Py_IncRef(object);
    PyGILState_Release(state);
  }
  ~python_error() override {
    int state = PyGILState_Ensure();
    for (void* object : {type, value, traceback})
      if (object) Py_DecRef(object);
    PyGILState_Release(state);
  }
  const char* what() const noexcept override { return message.c_str(); }

  void* type;
  void* value;
  void* traceback = nullptr;
  std::string message = "an exception injected by simcuda";
};

namespace sim {

using NoticeFn = void (*)(const CopyNotice*, void** error);
NoticeFn notice_fn = nullptr;

std::optional<Fault> next_fault(int kind, const std::string& op, int64_t rows) {
  std::optional<Fault> hit;
  for (Fault& fault : machine().faults) {
    if (fault.kind != kind || fault.times == 0 || fault.op != op || rows < fault.min_rows) continue;
    if (--fault.countdown > 0) continue;
    fault.fired++;
    if (fault.times > 0) fault.times--;
    fault.countdown = 1;
    if (!hit) hit = fault;
  }
  return hit;
}

// `fault.error_*` are references that Python counted for this one raise.
void raise_fault(const Fault& fault, int code, const std::string& detail) {
  if (fault.error_value) throw python_error(fault.error_type, fault.error_value);
  throw_cuda_error(code, detail);
}

void announce_copy(const CopyNotice& notice) {
  if (notice_fn == nullptr) return;
  void* error[2] = {nullptr, nullptr};
  notice_fn(&notice, error);
  if (error[1]) throw python_error(error[0], error[1]);
}

void announce_driver_call(int kind, size_t nbytes) {
  DriverFn fn = driver_fn;  // another thread may take it away now
  if (fn == nullptr) return;
  void* error[2] = {nullptr, nullptr};
  fn(kind, nbytes, error);
  if (error[1]) throw python_error(error[0], error[1]);
}

}  // namespace sim
