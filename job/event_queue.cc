// SPDX-License-Identifier: Apache-2.0
#include "job/event_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <utility>

#include "base/check.h"
#include "job/inbox.h"

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
  void push(Event event) override { inbox_.push(std::move(event)); }
  std::optional<Event> wait(Cancel& cancel, std::chrono::milliseconds timeout) override {
    return inbox_.wait(cancel, timeout, CancelWished{});
  }

 private:
  Inbox<Event> inbox_;
};

}  // namespace

std::unique_ptr<EventQueue> EventQueue::create() { return std::make_unique<RealQueue>(); }

}  // namespace drover::job
