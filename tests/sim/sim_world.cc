// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_world.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "base/check.h"

namespace drover::sim {

World::World(std::uint64_t seed, bool trace) : random(seed), trace_(trace) {}

World::~World() {
  for (const Thread& thread : threads_) CHECK(thread.fiber->ended(), "every process has ended");
}

void World::print(const std::string& text) const {
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(
      now_ - Instant(std::chrono::seconds(1000)));
  fmt::print("{:>8} {:>12.3f} ms  {}\n", steps_, static_cast<double>(us.count()) / 1000.0, text);
}

// --- time ---

std::uint64_t World::at(Instant when, Task task, ProcessPtr process) {
  std::uint32_t index = 0;
  if (free_.empty()) {
    index = static_cast<std::uint32_t>(slots_.size());
    slots_.emplace_back();
  } else {
    index = free_.back();
    free_.pop_back();
  }
  Slot& slot = slots_[index];
  slot.task = std::move(task);
  slot.process = std::move(process);
  slot.used = true;
  due_.push_back({std::max(when, now_), order_++, index, slot.generation});
  std::ranges::push_heap(due_, std::greater<>());
  return (std::uint64_t{slot.generation} << 32) | index;
}

void World::cancel(std::uint64_t handle) {
  const auto index = static_cast<std::uint32_t>(handle);
  if (index >= slots_.size()) return;
  Slot& slot = slots_[index];
  if (!slot.used || slot.generation != handle >> 32) return;
  const Task gone = std::move(slot.task);
  slot.task = nullptr;  // its place in the heap is passed over
}

void World::clear() {
  const std::vector<Slot> gone = std::exchange(slots_, {});
  due_.clear();
  free_.clear();
}

bool World::step() {
  while (!due_.empty()) {
    std::ranges::pop_heap(due_, std::greater<>());
    const Due due = due_.back();
    due_.pop_back();
    Slot& slot = slots_[due.slot];
    Task task = std::move(slot.task);
    slot.task = nullptr;
    const ProcessPtr process = std::move(slot.process);
    slot.process = nullptr;
    slot.used = false;
    ++slot.generation;
    free_.push_back(due.slot);
    if (!task || (process && !process->alive)) continue;
    now_ = due.when;
    ++steps_;
    task();
    return true;
  }
  return false;
}

// --- fibers ---

World::Thread* World::thread_of(const Fiber* fiber) {
  const auto found = std::ranges::find_if(
      threads_, [&](const Thread& thread) { return thread.fiber.get() == fiber; });
  return found == threads_.end() ? nullptr : &*found;
}

const World::Thread* World::thread_of(const Fiber* fiber) const {
  return const_cast<World*>(this)->thread_of(fiber);
}

Fiber* World::start(const ProcessPtr& process, std::function<void()> run) {
  Thread thread;
  thread.process = process;
  thread.fiber = std::make_unique<Fiber>([run = std::move(run), process] {
    try {
      if (process->alive) run();
    } catch (const Killed&) {
      CHECK(!process->alive, "only what was killed ends so");
    }
  });
  Fiber* const fiber = thread.fiber.get();
  threads_.push_back(std::move(thread));
  wake(fiber);
  return fiber;
}

bool World::has_ended(const Fiber* fiber) const { return thread_of(fiber)->fiber->ended(); }

void World::wake(Fiber* fiber) {
  Thread* const thread = thread_of(fiber);
  thread->woken = true;
  if (std::exchange(thread->scheduled, true)) return;
  after(Duration(0), [this, fiber] {
    Thread* const woken = thread_of(fiber);
    woken->scheduled = false;
    if (!woken->fiber->ended()) woken->fiber->resume();
  });
}

void Signal::notify() {
  for (Fiber* fiber : std::exchange(waiting_, {})) world_.wake(fiber);
}

bool World::dead() const {
  const Fiber* const fiber = Fiber::current();
  return fiber != nullptr && !thread_of(fiber)->process->alive;
}

void World::throw_if_killed() {
  // On the way out, what destructors call must not throw.
  if (dead() && std::uncaught_exceptions() == 0) throw Killed();
}

bool World::wait(Signal& signal, Instant deadline) {
  Fiber* const fiber = Fiber::current();
  CHECK(fiber != nullptr, "only a fiber waits");
  throw_if_killed();
  if (dead()) return false;
  thread_of(fiber)->woken = false;
  signal.waiting_.push_back(fiber);
  std::uint64_t timer = 0;
  const bool timed = deadline != Instant::max();
  bool late = false;
  if (timed) {
    timer = at(deadline, [this, fiber, &late, &signal] {
      late = true;
      std::erase(signal.waiting_, fiber);
      wake(fiber);
    });
  }
  Fiber::suspend();
  if (timed && !late) cancel(timer);
  std::erase(signal.waiting_, fiber);
  throw_if_killed();
  return !late;
}

void World::sleep(Duration time) {
  Signal never(*this);
  wait(never, now_ + time);
}

void World::wait_in_destructor(Signal& signal) {
  Fiber* const fiber = Fiber::current();
  if (fiber == nullptr || dead()) return;
  thread_of(fiber)->woken = false;
  signal.waiting_.push_back(fiber);
  Fiber::suspend();
  std::erase(signal.waiting_, fiber);
}

void World::kill(const ProcessPtr& process) {
  CHECK(Fiber::current() == nullptr, "a process is killed by somebody else");
  process->alive = false;
  process->killed = true;
  // By index: what unwinds may start nothing, but a vector of threads may not be held on to.
  for (std::size_t i = threads_.size(); i-- > 0;) {
    if (threads_[i].process != process || threads_[i].fiber->ended()) continue;
    threads_[i].fiber->resume();
    CHECK(threads_[i].fiber->ended(), "what is killed waits for nothing");
  }
}

// --- the network ---

Pipe::Pipe(Network& network) : network_(network) { network_.pipes_.push_back(this); }

Pipe::~Pipe() {
  *here_ = false;
  std::erase(network_.pipes_, this);
}

void Pipe::send(Task deliver) {
  if (closed_) return;
  messages_.push_back(std::move(deliver));
  arm();
}

void Pipe::arm() {
  if (armed_ || messages_.empty() || network_.cut()) return;
  armed_ = true;
  network_.world().after(network_.delay(), [this, here = here_] {
    if (*here) deliver();
  });
}

void Pipe::deliver() {
  armed_ = false;
  if (messages_.empty() || network_.cut()) return;
  const Task message = std::move(messages_.front());
  messages_.pop_front();
  arm();
  message();  // may be the end of this pipe
}

void Network::clear() {
  // Messages hold on to their connection, and with it to their pipe.
  std::vector<std::deque<Task>> gone;
  for (Pipe* pipe : pipes_) gone.push_back(std::exchange(pipe->messages_, {}));
}

void Network::set_cut(bool cut) {
  if (cut_ == cut) return;
  cut_ = cut;
  if (cut) ++cuts_;
  world_.trace("the network is {}", cut ? "cut" : "whole again");
  if (!cut) {
    for (Pipe* pipe : pipes_) pipe->arm();
  }
  changed.notify();
}

}  // namespace drover::sim
