// The link model: what copies, pins and launches cost in virtual time, and what overlaps what.
//
// A device has two copy engines, one for each direction, and one compute engine. Work goes on the first free span of its
// engine at or after the moment its stream and the host allow it, so that streams overlap exactly as far as engines do.
#include "sim.h"

#include <algorithm>

namespace sim {

Machine& machine() {
  static Machine* instance = new Machine();  // never destroyed: tensors may be freed during interpreter shutdown
  return *instance;
}

double Engine::first_fit(const std::vector<Engine*>& engines, double earliest, double length) {
  double start = earliest;
  for (bool moved = true; moved;) {
    moved = false;
    for (Engine* engine : engines)
      for (const auto& [from, to] : engine->busy_)
        if (from < start + length && start < to) {
          start = to;
          moved = true;
        }
  }
  return start;
}

void Engine::reserve(double start, double end) {
  if (end > start) busy_[start] = std::max(end, busy_.count(start) ? busy_[start] : end);
}

void Engine::forget_before(double now) {
  while (!busy_.empty() && busy_.begin()->second <= now) busy_.erase(busy_.begin());
}

void wait_until(double time) {
  Machine& m = machine();
  m.now = std::max(m.now, time);
}

void launch(StreamState& stream) {
  Machine& m = machine();
  m.now += m.link.launch;
  stream.ready = std::max(stream.ready, m.now);
}

double copy_seconds(Direction direction, bool pinned, size_t nbytes) {
  const Link& link = machine().link;
  double rate = direction == Direction::D2D   ? link.d2d
                : direction == Direction::H2D ? (pinned ? link.h2d_pinned : link.h2d_pageable)
                                              : (pinned ? link.d2h_pinned : link.d2h_pageable);
  return link.copy_latency + static_cast<double>(nbytes) / rate;
}

double schedule_copy(StreamState& stream, Direction direction, bool pinned, size_t nbytes, int peer) {
  Machine& m = machine();
  Device& device = m.devices[stream.device];
  std::vector<Engine*> engines;
  if (direction == Direction::D2D) engines = {&device.d2h, &m.devices[peer].h2d};
  else engines = {direction == Direction::H2D ? &device.h2d : &device.d2h};

  launch(stream);
  for (Engine* engine : engines) engine->forget_before(m.now);
  double length = copy_seconds(direction, pinned, nbytes);
  double start = Engine::first_fit(engines, stream.ready, length);
  for (Engine* engine : engines) engine->reserve(start, start + length);
  stream.ready = start + length;
  return stream.ready;
}

}  // namespace sim
