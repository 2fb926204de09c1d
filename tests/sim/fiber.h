// SPDX-License-Identifier: Apache-2.0
//
// Threads of the simulation: blocking code runs on a stack of its own and gives way where it would
// block. One system thread, so that a seed's run is always the same.
//
//   Fiber fiber([&] { ...; Fiber::suspend(); ... });
//   fiber.resume();                       // runs until it suspends or ends
//
// Stacks come from a pool of the system thread's: a seed makes a dozen fibers, and must be cheap.
#pragma once

#include <functional>
#include <memory>

namespace drover::sim {

class Fiber {
 public:
  explicit Fiber(std::function<void()> run);
  ~Fiber();  // it has ended (checked)
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From outside of any fiber: runs it until it suspends or ends.
  void resume();
  [[nodiscard]] bool ended() const { return ended_; }
  // The fiber that runs now; null outside of all.
  static Fiber* current();
  // From inside the current fiber: back to who resumed it.
  static void suspend();

 private:
  struct Stack;
  static void entry();
  std::function<void()> run_;
  std::unique_ptr<Stack> stack_;
  bool ended_ = false;
};

}  // namespace drover::sim
