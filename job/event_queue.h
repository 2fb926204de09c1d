// SPDX-License-Identifier: Apache-2.0
//
// What has happened, from any thread, to the one that runs the job. wait() also ends when the user
// cancels and after a while, so that progress can be shown.
#pragma once

#include <chrono>
#include <deque>
#include <mutex>
#include <optional>

#include "base/unique_fd.h"
#include "job/move.h"
#include "job/move_machine.h"

namespace drover::job {

class EventQueue {
 public:
  // Any thread; never blocks.
  void push(Event event);
  // The next event; CancelWished once when the user cancels; nothing after `timeout`.
  std::optional<Event> wait(Cancel& cancel, std::chrono::milliseconds timeout);
  EventQueue();

 private:
  std::optional<Event> pop();
  UniqueFd wake_;  // an eventfd, counts what is queued
  std::mutex mutex_;
  std::deque<Event> events_;
  bool cancel_taken_ = false;
};

}  // namespace drover::job
