// CUDA error numbers, their texts, and the error that a failed runtime call leaves behind for the next check.
#include "sim.h"

namespace sim {

namespace {
struct Named { int code; const char* name; const char* text; };
constexpr Named kErrors[] = {
    {kSuccess, "cudaSuccess", "no error"},
    {kInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {kMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {kInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {kIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {kAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {kNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {kNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {kCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {kUnknown, "cudaErrorUnknown", "unknown error"},
};
const Named& find(int code) {
  for (const Named& entry : kErrors)
    if (entry.code == code) return entry;
  return kErrors[std::size(kErrors) - 1];
}
thread_local int last_error = kSuccess;  // per thread, as in the CUDA runtime
}  // namespace

const char* error_name(int code) { return find(code).name; }
const char* error_string(int code) { return find(code).text; }
int peek_last_error() { return last_error; }
void set_last_error(int code) { last_error = code; }

void throw_cuda_error(int code, const std::string& detail) {
  std::string text = std::string("CUDA error: ") + error_string(code) + "\nsimcuda: " + detail;
  throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, code, text);
}

void check_last_error() {
  if (last_error == kSuccess) return;
  int code = last_error;
  last_error = kSuccess;
  throw_cuda_error(code, "an earlier runtime call failed and its error was left for this check");
}

void leave_for_next_wait(int device, int code) { machine().devices[device].queued_error = code; }

void check_queued_error(int device) {
  int code = std::exchange(machine().devices[device].queued_error, kSuccess);
  if (code != kSuccess) throw_cuda_error(code, "a refused registration left its error on the device for this wait");
}

}  // namespace sim
