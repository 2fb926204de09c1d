// SPDX-License-Identifier: Apache-2.0
//
// What has happened, from any thread, to the one that runs the job. wait() also ends when the user
// cancels and after a while, so that progress can be shown.
#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "job/move.h"
#include "job/move_machine.h"

namespace drover::job {

class EventQueue {
 public:
  static std::unique_ptr<EventQueue> create();
  virtual ~EventQueue() = default;
  // Any thread; never blocks.
  virtual void push(Event event) = 0;
  // The next event; CancelWished once when the user cancels; nothing after `timeout`.
  virtual std::optional<Event> wait(Cancel& cancel, std::chrono::milliseconds timeout) = 0;
};

}  // namespace drover::job
