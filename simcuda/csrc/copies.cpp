// Copies between tensors, and which of them happen late.
//
// The steps are those of PyTorch's copy_kernel_cuda (aten/src/ATen/native/cuda/Copy.cu): a copy over the link is always
// one flat run of bytes of one dtype; everything else goes through a contiguous temporary on one of the sides.
#include "sim.h"

#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace sim {

const char* direction_name(Direction direction) {
  switch (direction) {
    case Direction::H2D: return "host-to-device";
    case Direction::D2H: return "device-to-host";
    default: return "device-to-device";
  }
}

std::string Copy::describe() const {
  return std::string(direction_name(direction)) + " copy of " + std::to_string(nbytes) + " bytes";
}

namespace {

// msync on a range with a hole fails with ENOMEM: an unmapped arena shows as an error instead of a crash.
bool is_mapped(const char* ptr, size_t nbytes) {
  auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto start = reinterpret_cast<uintptr_t>(ptr) / page * page;
  return msync(reinterpret_cast<void*>(start), reinterpret_cast<uintptr_t>(ptr) + nbytes - start, MS_ASYNC) == 0;
}

void check_memory(const Copy& copy) {
  for (const BlockPtr& block : {copy.src_block, copy.dst_block})
    if (block && block->poisoned)
      throw_cuda_error(kIllegalAddress, "a queued " + copy.describe() + (block == copy.src_block ? " reads" : " writes") +
                                            " freed memory of cuda:" + std::to_string(block->device) + " (block of " +
                                            std::to_string(block->nbytes) + " bytes): wait for the copy before the " +
                                            "tensor is freed, or call tensor.record_stream(stream)");
  if (!copy.pinned) return;
  const char* host = copy.direction == Direction::H2D ? copy.src : copy.dst;
  if (copy.pinned->released || (copy.pinned->registered && !is_mapped(host, copy.nbytes)))
    throw_cuda_error(kIllegalAddress, "a queued " + copy.describe() + (host == copy.src ? " reads" : " writes") +
                                          " pinned host memory that was freed or unregistered (range of " +
                                          std::to_string(copy.pinned->nbytes) + " bytes): wait for the copy first");
}

struct Plan {
  Direction direction;
  int device;  // whose stream carries it
  int peer;    // the destination's device, for device-to-device
};

Plan plan_copy(const at::Tensor& dst, const at::Tensor& src) {
  if (dst.is_cuda() && src.is_cuda()) return {Direction::D2D, src.get_device(), static_cast<int>(dst.get_device())};
  if (dst.is_cuda()) return {Direction::H2D, static_cast<int>(dst.get_device()), static_cast<int>(dst.get_device())};
  return {Direction::D2H, static_cast<int>(src.get_device()), static_cast<int>(src.get_device())};
}

PinnedPtr pinned_range(const char* host, size_t nbytes) {
  PinnedPtr range = find_pinned(host);
  if (range && host + nbytes > range->ptr + range->nbytes)
    throw_cuda_error(kInvalidValue, "a copy of " + std::to_string(nbytes) + " bytes runs over the end of its pinned range " +
                                        "(CUDA does not copy across two registrations): split it there");
  return range;
}

void count(const Plan& plan, size_t nbytes) {
  Machine& m = machine();
  auto which = static_cast<size_t>(plan.direction);
  for (int device : std::set<int>{plan.device, plan.peer}) {
    m.devices[device].copies[which]++;
    m.devices[device].bytes[which] += nbytes;
  }
}

// A flat copy of bytes over the link.
void transfer(const at::Tensor& dst, const at::Tensor& src, bool non_blocking) {
  Machine& m = machine();
  Plan plan = plan_copy(dst, src);
  Copy copy;
  copy.dst = static_cast<char*>(dst.data_ptr());
  copy.src = static_cast<const char*>(src.const_data_ptr());
  copy.nbytes = src.nbytes();
  copy.direction = plan.direction;

  CopyNotice notice{static_cast<int>(plan.direction), plan.device, 0, non_blocking, static_cast<int64_t>(copy.nbytes), 0};
  const char* host = plan.direction == Direction::D2D ? nullptr : plan.direction == Direction::H2D ? copy.src : copy.dst;
  {
    Lock lock(m.mutex);
    notice.stream = current_stream(plan.device).id;
    notice.pinned = host && find_pinned(host);
  }
  if (!notice.pinned && plan.direction != Direction::D2D) check_no_capture();
  announce_copy(notice);  // without the lock: this may run Python

  Lock lock(m.mutex);
  check_alive(plan.device);
  if (host) copy.pinned = pinned_range(host, copy.nbytes);
  copy.src_block = find_block(copy.src);
  copy.dst_block = find_block(copy.dst);
  StreamState& stream = current_stream(plan.device);
  count(plan, copy.nbytes);
  copy.fault = next_fault(kFailCopy);
  if (copy.fault && copy.fault->flip) {
    copy.flip = true;
    copy.fault.reset();
  }
  bool fails_now = copy.fault && !copy.fault->late;
  if (plan.direction == Direction::D2D) {
    // Ordered with the current streams of both devices, and never with the host.
    StreamState& other = current_stream(plan.peer);
    wait(stream, mark(other));
    schedule_copy(stream, plan.direction, true, copy.nbytes, plan.peer);
    stream.queue.push_back(Job{Job::kCopy, copy, nullptr, nullptr});
    wait(other, mark(stream));
    if (fails_now) run_all(stream);
    return;
  }
  double end = schedule_copy(stream, plan.direction, copy.pinned != nullptr, copy.nbytes, plan.peer);
  if (non_blocking && copy.pinned && !fails_now) {
    stream.queue.push_back(Job{Job::kCopy, copy, nullptr, nullptr});
    return;
  }
  // From or to pageable memory even a non_blocking copy has read, or written, the host's bytes when it returns.
  wait_until(end);
  run_all(stream);
  run_copy(copy);
}

bool is_flat(const at::Tensor& dst, const at::Tensor& src) {
  if (dst.scalar_type() != src.scalar_type() || dst.sizes() != src.sizes()) return false;
  if (dst.is_contiguous() && src.is_contiguous()) return true;
  return dst.strides() == src.strides() && dst.is_non_overlapping_and_dense();
}

void copy_across(const at::Tensor& dst, const at::Tensor& src, bool non_blocking) {
  if (is_flat(dst, src)) return transfer(dst, src, non_blocking);
  // Conversions run on the device for non_blocking copies, and on the host for others to save device memory.
  c10::DeviceType converts = non_blocking ? c10::kCUDA : c10::kCPU;
  at::Tensor flat_dst, flat_src;
  auto contiguous = at::MemoryFormat::Contiguous;
  if (src.device().type() == converts || plan_copy(dst, src).direction == Direction::D2D) {
    flat_dst = dst.is_contiguous() ? dst : at::empty_like(dst, contiguous);
    flat_src = src.to(dst.scalar_type()).expand_as(dst).contiguous();
  } else {
    bool keep = dst.is_contiguous() && dst.scalar_type() == src.scalar_type();
    flat_dst = keep ? dst : at::empty_like(dst, dst.options().dtype(src.scalar_type()), contiguous);
    flat_src = src.expand_as(dst).contiguous();
  }
  flat_dst._set_conj(dst.is_conj());
  flat_src._set_conj(src.is_conj());
  flat_dst._set_neg(dst.is_neg());
  flat_src._set_neg(src.is_neg());
  transfer(flat_dst, flat_src, non_blocking);
  if (flat_dst.is_conj() != flat_src.is_conj()) flat_dst.conj_physical_();
  if (flat_dst.is_neg() != flat_src.is_neg()) flat_dst.neg_();
  if (!flat_dst.is_same(dst)) dst.copy_(flat_dst, non_blocking);
}

}  // namespace

void run_copy(const Copy& copy) {
  check_memory(copy);
  if (copy.fault) {
    int64_t wanted = copy.fault->after_bytes;
    size_t written = wanted < 0 ? copy.nbytes / 2 : std::min(copy.nbytes, static_cast<size_t>(wanted));
    std::memcpy(copy.dst, copy.src, written);
    raise_fault(*copy.fault, kUnknown, "injected into a " + copy.describe() + ", " + std::to_string(written) + " written");
  }
  std::memcpy(copy.dst, copy.src, copy.nbytes);
  if (copy.flip) copy.dst[copy.nbytes / 2] ^= 1;
}

at::Tensor& copy_kernel(at::Tensor& dst, const at::Tensor& src, bool non_blocking) {
  if (dst.is_same(src)) return dst;
  wait_for_driver();
  c10::OptionalDeviceGuard guard(dst.is_cuda() ? dst.device() : src.device());
  at::Tensor from = src.sizes() == dst.sizes() ? src : src.expand_as(dst);
  if (dst.numel() == 0) return dst;
  if (dst.device() != src.device()) {
    copy_across(dst, from, non_blocking);
    if (dst.is_conj() != from.is_conj() && is_flat(dst, from)) dst.conj_physical_();
    if (dst.is_neg() != from.is_neg() && is_flat(dst, from)) dst.neg_();
    return dst;
  }
  Machine& m = machine();
  {
    Lock lock(m.mutex);
    check_last_error();
    StreamState& stream = current_stream(dst.get_device());
    run_before_touching(stream, {find_block(dst.const_data_ptr()), find_block(from.const_data_ptr())});
    launch(stream);
  }
  at::Tensor to = cpu_alias(dst);
  to.copy_(cpu_alias(from));
  return dst;
}

}  // namespace sim
