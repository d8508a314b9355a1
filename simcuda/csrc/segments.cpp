// What an allocator takes from the driver for what tensors ask of it: rounding, segments, and pieces that nobody can use.
//
// This is bookkeeping only: which bytes of which segment a block has, never where its bytes are in the host's memory.
// After c10/cuda/CUDACachingAllocator.cpp (torch 2.13) and CUDAMallocAsyncAllocator.cpp.
#include "sim.h"

#include <algorithm>

namespace sim {

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kRounding = 512;             // kMinBlockSize
constexpr size_t kSmall = kMiB;               // kSmallSize: up to here a block lies in a segment of
constexpr size_t kSmallSegment = 2 * kMiB;    // kSmallBuffer,
constexpr size_t kLargeSegment = 20 * kMiB;   // kLargeBuffer: for blocks
constexpr size_t kOwnSegment = 10 * kMiB;     // kMinLargeAlloc: below this; larger ones have one of their own
constexpr size_t kEndless = SIZE_MAX / 2;

size_t up(size_t nbytes, size_t step) { return (nbytes + step - 1) / step * step; }

struct Gap {
  Segment* segment = nullptr;
  size_t offset = 0, size = 0, unmapped = 0;
};

size_t page_size(const Segment& segment) { return segment.small ? kSmallSegment : kLargeSegment; }

size_t unmapped_pages(const Segment& segment, size_t start, size_t end) {
  size_t missing = 0, page = page_size(segment);
  for (size_t i = start / page; i * page < end; ++i) missing += !segment.pages.count(i);
  return missing;
}

// The smallest gap that holds `nbytes`; of expandable segments those first that need no more of the driver.
Gap best_gap(Device& device, int64_t stream, bool small, size_t nbytes) {
  Gap best;
  for (auto& owned : device.segments) {
    Segment& segment = *owned;
    if (segment.stream != stream || segment.small != small) continue;
    size_t at = 0;
    auto consider = [&](size_t end) {
      if (end - at < nbytes) return;
      Gap gap{&segment, at, end - at, 0};
      if (segment.expandable) gap.unmapped = unmapped_pages(segment, at, at + nbytes);
      auto rank = [](const Gap& g) { return std::make_pair(g.unmapped, g.size); };
      if (!best.segment || rank(gap) < rank(best)) best = gap;
    };
    for (const auto& [start, size] : segment.used) {
      consider(start);
      at = start + size;
    }
    consider(segment.size);
  }
  return best;
}

bool take_from_driver(Device& device, size_t nbytes) {
  if (nbytes > device.free()) return false;
  device.reserved += nbytes;
  return true;
}

bool place_in_segment(Device& device, Place& place, int64_t stream, bool expandable) {
  bool small = place.nbytes <= kSmall;
  Gap gap = best_gap(device, stream, small, place.nbytes);
  if (!gap.segment) {
    auto segment = std::make_unique<Segment>();
    segment->stream = stream;
    segment->small = small;
    segment->expandable = expandable;
    segment->size = expandable ? kEndless
                    : small    ? kSmallSegment
                    : place.nbytes < kOwnSegment ? kLargeSegment
                                                 : up(place.nbytes, kSmallSegment);
    if (!expandable && !take_from_driver(device, segment->size)) return false;
    gap = {segment.get(), 0, segment->size, 0};
    if (expandable) gap.unmapped = unmapped_pages(*segment, 0, place.nbytes);
    device.segments.push_back(std::move(segment));
  }
  Segment& segment = *gap.segment;
  if (segment.expandable) {
    size_t page = page_size(segment);
    if (!take_from_driver(device, gap.unmapped * page)) return false;
    for (size_t i = gap.offset / page; i * page < gap.offset + place.nbytes; ++i) segment.pages.insert(i);
  } else if (!small && gap.size - place.nbytes <= kSmall) {
    place.nbytes = gap.size;  // as should_split: the rest is too small for this pool
  }
  segment.used[gap.offset] = place.nbytes;
  place.segment = &segment;
  place.offset = gap.offset;
  return true;
}

// Gives the driver what no block uses; the segments, or pages of them, that it freed.
size_t release_unused(Device& device) {
  size_t freed = 0;
  for (auto it = device.segments.begin(); it != device.segments.end();) {
    Segment& segment = **it;
    if (segment.expandable) {
      size_t page = page_size(segment);
      for (auto at = segment.pages.begin(); at != segment.pages.end();) {
        size_t start = *at * page, end = start + page;
        auto after = segment.used.lower_bound(end);
        bool in_use = after != segment.used.begin() && std::prev(after)->first + std::prev(after)->second > start;
        if (in_use) {
          ++at;
          continue;
        }
        at = segment.pages.erase(at);
        device.reserved -= page;
        freed++;
      }
      if (segment.used.empty()) it = device.segments.erase(it);
      else ++it;
    } else if (segment.used.empty()) {
      device.reserved -= segment.size;
      freed++;
      it = device.segments.erase(it);
    } else {
      ++it;
    }
  }
  return freed;
}

}  // namespace

std::optional<Place> place(int index, size_t nbytes, int64_t stream) {
  Machine& m = machine();
  Device& device = m.devices[index];
  Place result{nbytes, nullptr, 0};
  bool placed = false;
  switch (m.allocator) {
    case kExact:
      placed = take_from_driver(device, nbytes);
      break;
    case kAsync: {
      result.pooled = true;
      size_t wanted = up(device.pooled + nbytes, kSmallSegment), more = wanted > device.pool ? wanted - device.pool : 0;
      placed = take_from_driver(device, more);
      if (placed) {
        device.pool += more;
        device.pooled += nbytes;
      }
      break;
    }
    default:
      result.nbytes = up(nbytes, kRounding);
      placed = place_in_segment(device, result, stream, m.allocator == kExpandable);
      if (!placed) {
        m.devices[index].retries++;
        empty_cache(index);
        placed = place_in_segment(device, result, stream, m.allocator == kExpandable);
      }
  }
  if (!placed) return std::nullopt;
  device.reserved_peak = std::max(device.reserved_peak, device.reserved);
  return result;
}

void give_up(int index, const Place& place) {
  Device& device = machine().devices[index];
  if (place.segment) place.segment->used.erase(place.offset);
  else if (place.pooled) device.pooled -= place.nbytes;
  else device.reserved -= place.nbytes;
}

void empty_cache(int index) {
  Machine& m = machine();
  Device& device = m.devices[index];
  release_deferred();
  if (device.segments.empty() && device.pool == 0) return;
  // cudaFree and cudaDeviceSynchronize: for whatever any stream of the device still does.
  for (auto& [id, stream] : device.streams) {
    wait_until(stream.ready);
    run_all(stream);
  }
  size_t freed = release_unused(device), kept = up(device.pooled, kSmallSegment);
  if (device.pool > kept) {
    device.reserved -= device.pool - kept;
    device.pool = kept;
    freed++;
  }
  device.emptied++;
  device.segments_freed += freed;
  m.now += static_cast<double>(freed) * m.link.segment_free;
}

}  // namespace sim
