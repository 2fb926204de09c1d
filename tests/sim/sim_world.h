// SPDX-License-Identifier: Apache-2.0
//
// The ground of the simulation of a whole move: one virtual clock, what happens on it, fibers that
// wait for it, and the network between the two hosts. The fault model is told in move_sim.h.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "tests/sim/fiber.h"

namespace drover::sim {

using Task = std::function<void()>;

// Thrown where a fiber waits when its process is killed. What its destructors do on the way out
// must have no effect on anybody else: the fakes see to that.
struct Killed {};

// A program that runs on one of the hosts and may be killed: with it go its fibers and what it had
// planned.
struct Process {
  explicit Process(std::string its_name) : name(std::move(its_name)) {}
  std::string name;
  bool alive = true;
  bool killed = false;
};
using ProcessPtr = std::shared_ptr<Process>;

class World;

// What fibers wait for. notify() wakes all that wait now.
class Signal {
 public:
  explicit Signal(World& world) : world_(world) {}
  void notify();

 private:
  friend class World;
  World& world_;
  std::vector<Fiber*> waiting_;
};

class World {
 public:
  World(std::uint64_t seed, bool trace);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  Random random;
  [[nodiscard]] Duration between(Duration least, Duration most) {
    const auto span = static_cast<std::uint64_t>((most - least).count());
    return least + Duration(static_cast<Duration::rep>(random.below(span + 1)));
  }
  [[nodiscard]] bool chance(unsigned per_mille) { return random.below(1000) < per_mille; }

  // --- time ---
  [[nodiscard]] Instant now() const { return now_; }
  // `process`, if given, must still be alive then.
  std::uint64_t at(Instant when, Task task, ProcessPtr process = nullptr);
  std::uint64_t after(Duration delay, Task task, ProcessPtr process = nullptr) {
    return at(now_ + delay, std::move(task), std::move(process));
  }
  void cancel(std::uint64_t handle);
  // What was still to happen does not.
  void clear();
  // The next thing happens. False: nothing is left to happen.
  bool step();
  [[nodiscard]] std::uint64_t steps() const { return steps_; }

  // --- fibers ---
  // Starts it soon.
  Fiber* start(const ProcessPtr& process, std::function<void()> run);
  [[nodiscard]] bool has_ended(const Fiber* fiber) const;
  // From a fiber. False: the deadline came first. Throws Killed.
  bool wait(Signal& signal, Instant deadline);
  void sleep(Duration time);
  // The same where nothing may be thrown: returns at once when the process is dead.
  void wait_in_destructor(Signal& signal);
  // The current fiber's process is dead: whatever it does now does not happen.
  [[nodiscard]] bool dead() const;
  // Ends a process: its fibers unwind now, youngest first.
  void kill(const ProcessPtr& process);

  // --- what was found ---
  void violate(std::string what) {
    if (violation_) return;
    trace("VIOLATION {}", what);
    violation_ = std::move(what);
  }
  [[nodiscard]] const std::optional<std::string>& violation() const { return violation_; }
  [[nodiscard]] bool tracing() const { return trace_; }
  template <class... Args>
  void trace(fmt::format_string<Args...> format, Args&&... args) const {
    if (trace_) print(fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  friend class Signal;
  struct Slot {
    Task task;
    ProcessPtr process;
    std::uint32_t generation = 1;
    bool used = false;
  };
  struct Due {
    Instant when;
    std::uint64_t order = 0;
    std::uint32_t slot = 0;
    std::uint32_t generation = 0;
    bool operator>(const Due& other) const {
      return when != other.when ? when > other.when : order > other.order;
    }
  };
  struct Thread {
    std::unique_ptr<Fiber> fiber;
    ProcessPtr process;
    bool woken = false;
    bool scheduled = false;
  };
  void print(const std::string& text) const;
  Thread* thread_of(const Fiber* fiber);
  [[nodiscard]] const Thread* thread_of(const Fiber* fiber) const;
  void wake(Fiber* fiber);
  void resume(Fiber* fiber);
  void throw_if_killed();

  const bool trace_;
  Instant now_{std::chrono::seconds(1000)};
  std::uint64_t order_ = 0;
  std::uint64_t steps_ = 0;
  std::vector<Due> due_;  // a heap, the next first
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_;
  std::vector<Thread> threads_;
  std::optional<std::string> violation_;
};

// The way between the hosts. Messages keep their order in a Pipe and have none between pipes; while
// the network is cut they wait, as TCP's do.
class Network;

class Pipe {
 public:
  explicit Pipe(Network& network);
  ~Pipe();
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  void send(Task deliver);
  void close() {
    messages_.clear();
    closed_ = true;
  }
  [[nodiscard]] std::size_t waiting() const { return messages_.size(); }

 private:
  friend class Network;
  void arm();
  void deliver();
  Network& network_;
  std::deque<Task> messages_;
  std::shared_ptr<bool> here_ = std::make_shared<bool>(true);
  bool armed_ = false;
  bool closed_ = false;
};

class Network {
 public:
  explicit Network(World& world) : changed(world), world_(world) {}
  // What is on the way never arrives.
  void clear();
  [[nodiscard]] bool cut() const { return cut_; }
  void set_cut(bool cut);
  void set_delay(Duration most) { delay_ = most; }
  [[nodiscard]] Duration delay() { return world_.between(delay_ / 4, delay_); }
  [[nodiscard]] World& world() { return world_; }
  // How many cuts there were: to know whether one lasts.
  [[nodiscard]] std::uint64_t cuts() const { return cuts_; }
  Signal changed;

 private:
  friend class Pipe;
  World& world_;
  bool cut_ = false;
  std::uint64_t cuts_ = 0;
  Duration delay_ = std::chrono::microseconds(300);
  std::vector<Pipe*> pipes_;
};

}  // namespace drover::sim
