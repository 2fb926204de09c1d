// SPDX-License-Identifier: Apache-2.0
//
// What has happened, from any thread, to the one that runs a job: a queue that also wakes up when
// the user cancels, and after a while.
//
//   Inbox<Event> inbox;
//   inbox.push(Made{});                                           // any thread
//   while (auto event = inbox.wait(cancel, 100ms)) { ... }        // one thread
//
// Threads: push(): any; it never blocks. wait(): one.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/unique_fd.h"
#include "job/move.h"

namespace drover::job {

template <class Event>
class Inbox {
 public:
  Inbox() : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE)) {
    CHECK(wake_.get() >= 0, "an eventfd can be made");
  }

  void push(Event event) {
    {
      const std::lock_guard lock(mutex_);
      events_.push_back(std::move(event));
    }
    const std::uint64_t one = 1;
    CHECK(::write(wake_.get(), &one, sizeof one) == sizeof one, "an eventfd counts every event");
  }

  // The next event; `cancelled` once when the user cancels; nothing after `timeout`.
  std::optional<Event> wait(Cancel& cancel, std::chrono::milliseconds timeout, Event cancelled) {
    std::array<pollfd, 2> polls = {
        {{wake_.get(), POLLIN, 0}, {cancel_taken_ ? -1 : cancel.fd(), POLLIN, 0}}};
    ::poll(polls.data(), polls.size(), static_cast<int>(timeout.count()));
    if (!cancel_taken_ && cancel.requested()) {
      cancel_taken_ = true;
      return cancelled;
    }
    return pop();
  }

 private:
  std::optional<Event> pop() {
    std::uint64_t value = 0;
    if (::read(wake_.get(), &value, sizeof value) != sizeof value) return std::nullopt;
    const std::lock_guard lock(mutex_);
    CHECK(!events_.empty(), "what is counted is queued");
    Event event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

  UniqueFd wake_;  // counts what is queued
  std::mutex mutex_;
  std::deque<Event> events_;
  bool cancel_taken_ = false;
};

}  // namespace drover::job
