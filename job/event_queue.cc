// SPDX-License-Identifier: Apache-2.0
#include "job/event_queue.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <deque>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "base/unique_fd.h"

namespace drover::job {

Cancel::Cancel() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(fd_ >= 0, "an eventfd can be made");
}

Cancel::~Cancel() { ::close(fd_); }

void Cancel::request() {
  requested_.store(true);
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(fd_, &one, sizeof one);  // full: asked before
}

namespace {

class RealQueue final : public EventQueue {
 public:
  RealQueue() : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE)) {
    CHECK(wake_.get() >= 0, "an eventfd can be made");
  }

  void push(Event event) override {
    {
      const std::lock_guard lock(mutex_);
      events_.push_back(std::move(event));
    }
    const std::uint64_t one = 1;
    const ssize_t written = ::write(wake_.get(), &one, sizeof one);
    CHECK(written == sizeof one, "an eventfd counts every event");
  }

  std::optional<Event> wait(Cancel& cancel, std::chrono::milliseconds timeout) override {
    std::array<pollfd, 2> polls = {
        {{wake_.get(), POLLIN, 0}, {cancel_taken_ ? -1 : cancel.fd(), POLLIN, 0}}};
    ::poll(polls.data(), polls.size(), static_cast<int>(timeout.count()));
    if (!cancel_taken_ && cancel.requested()) {
      cancel_taken_ = true;
      return CancelWished{};
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

}  // namespace

std::unique_ptr<EventQueue> EventQueue::create() { return std::make_unique<RealQueue>(); }

}  // namespace drover::job
