// SPDX-License-Identifier: Apache-2.0
#include "base/loop.h"

#include <cerrno>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/check.h"

namespace drover {
namespace {

constexpr unsigned kQueueEntries = 256;
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;
// Two kinds of completion carry no operation: the wake-up of post(), and a cancel's own.
constexpr std::uint64_t kWakeTag = 1;
constexpr std::uint64_t kCancelTag = 2;
constexpr std::uint64_t kFirstSlotTag = 3;

class UringLoop final : public Loop {
 public:
  UringLoop() = default;

  Status open() {
    const int rc = io_uring_queue_init(kQueueEntries, &ring_, 0);
    if (rc < 0) {
      return fail(Error{Code::Incompatible,
                        error_from_errno(-rc, "setting up io_uring").message,
                        "drover needs a kernel with io_uring enabled: see the sysctl "
                        "kernel.io_uring_disabled",
                        false});
    }
    ring_open_ = true;
    wake_fd_ = ::eventfd(0, EFD_CLOEXEC);
    if (wake_fd_ < 0) return fail_errno(errno, "creating an eventfd");
    arm_wake();
    return {};
  }

  ~UringLoop() override {
    if (ring_open_) {
      drain();
      io_uring_queue_exit(&ring_);
    }
    if (wake_fd_ >= 0) ::close(wake_fd_);
  }

  void run() override {
    while (!take_stop()) {
      run_posted();
      run_timers();
      if (stop_requested()) continue;
      wait();
      run_completions();
    }
  }

  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake();
  }

  void post(Task task) override {
    bool first = false;
    {
      const std::lock_guard lock(mutex_);
      first = posted_.empty();
      posted_.push_back(std::move(task));
    }
    if (first) wake();
  }

  Handle read(int fd, std::span<std::byte> buffer, Offset offset, Completion done) override {
    CHECK(buffer.size() <= kMaxTransfer, "one transfer is at most 1 GiB");
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_read(sqe, fd, buffer.data(), static_cast<unsigned>(buffer.size()),
                       offset.bytes());
    return issue(sqe, std::move(done));
  }

  Handle write(int fd, std::span<const std::byte> buffer, Offset offset,
               Completion done) override {
    CHECK(buffer.size() <= kMaxTransfer, "one transfer is at most 1 GiB");
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_write(sqe, fd, buffer.data(), static_cast<unsigned>(buffer.size()),
                        offset.bytes());
    return issue(sqe, std::move(done));
  }

  Handle fdatasync(int fd, Completion done) override {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    return issue(sqe, std::move(done));
  }

  Handle fallocate(int fd, int mode, Extent extent, Completion done) override {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_fallocate(sqe, fd, mode, static_cast<off_t>(extent.offset.bytes()),
                            static_cast<off_t>(extent.length.bytes()));
    return issue(sqe, std::move(done));
  }

  Handle receive(int socket, std::span<std::byte> buffer, Completion done) override {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_recv(sqe, socket, buffer.data(), buffer.size(), 0);
    return issue(sqe, std::move(done));
  }

  Handle send(int socket, std::span<const std::byte> buffer, Completion done) override {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_send(sqe, socket, buffer.data(), buffer.size(), MSG_NOSIGNAL);
    return issue(sqe, std::move(done));
  }

  Handle accept(int socket, Completion done) override {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_accept(sqe, socket, nullptr, nullptr, SOCK_CLOEXEC);
    return issue(sqe, std::move(done));
  }

  Handle poll(int fd, short events, Completion done) override {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_poll_add(sqe, fd, static_cast<unsigned>(events));
    return issue(sqe, std::move(done));
  }

  Handle at(Instant when, Task task) override {
    const Handle handle = next_handle_++ | kTimerBit;
    timers_.emplace(std::pair(when, handle), std::move(task));
    timer_when_.emplace(handle, when);
    return handle;
  }

  void cancel(Handle handle) override {
    if ((handle & kTimerBit) != 0) {
      const auto found = timer_when_.find(handle);
      if (found == timer_when_.end()) return;
      timers_.erase(std::pair(found->second, handle));
      timer_when_.erase(found);
      return;
    }
    const std::size_t slot = (handle & 0xffffffffU) - kFirstSlotTag;
    if (handle == 0 || slot >= slots_.size() || slots_[slot].handle != handle) return;
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_cancel64(sqe, handle, 0);
    io_uring_sqe_set_data64(sqe, kCancelTag);
    ++outstanding_;
  }

 private:
  // Handles of operations: low 32 bits the slot + kFirstSlotTag, above it a generation, so that a
  // late cancel never hits the slot's next user.
  static constexpr Handle kTimerBit = Handle{1} << 63;
  struct Slot {
    Completion done;
    Handle handle = 0;  // 0: free
  };

  io_uring_sqe* next_sqe() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    while (sqe == nullptr) {
      const int rc = io_uring_submit(&ring_);
      CHECK(rc >= 0 || rc == -EBUSY || rc == -EAGAIN || rc == -EINTR, "io_uring_submit failed");
      if (rc == -EBUSY) collect();  // the completion queue is full: make room
      sqe = io_uring_get_sqe(&ring_);
    }
    return sqe;
  }

  Handle issue(io_uring_sqe* sqe, Completion done) {
    std::size_t slot = 0;
    if (free_.empty()) {
      slot = slots_.size();
      slots_.emplace_back();
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    const Handle generation = (next_handle_++ & 0x7fffffffU) << 32;
    const Handle handle = generation | (slot + kFirstSlotTag);
    slots_[slot].done = std::move(done);
    slots_[slot].handle = handle;
    io_uring_sqe_set_data64(sqe, handle);
    ++outstanding_;
    return handle;
  }

  void arm_wake() {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_read(sqe, wake_fd_, &wake_value_, sizeof wake_value_, 0);
    io_uring_sqe_set_data64(sqe, kWakeTag);
    ++outstanding_;
  }

  void wake() {
    const std::uint64_t one = 1;
    const ssize_t rc = ::write(wake_fd_, &one, sizeof one);
    CHECK(rc == sizeof one, "an eventfd takes every wake-up");
  }

  bool stop_requested() {
    const std::lock_guard lock(mutex_);
    return stop_;
  }

  bool take_stop() {
    const std::lock_guard lock(mutex_);
    const bool was = stop_;
    stop_ = false;
    return was;
  }

  void run_posted() {
    {
      const std::lock_guard lock(mutex_);
      running_.swap(posted_);
    }
    for (Task& task : running_) task();
    running_.clear();
  }

  void run_timers() {
    if (timers_.empty()) return;
    const Instant time = now();
    while (!timers_.empty() && timers_.begin()->first.first <= time) {
      auto node = timers_.extract(timers_.begin());
      timer_when_.erase(node.key().second);
      node.mapped()();
    }
  }

  void wait() {
    {
      const std::lock_guard lock(mutex_);
      if (!posted_.empty() || stop_) {
        io_uring_submit(&ring_);
        return;
      }
    }
    io_uring_cqe* cqe = nullptr;
    if (timers_.empty()) {
      const int rc = io_uring_submit_and_wait(&ring_, 1);
      CHECK(rc >= 0 || rc == -EINTR || rc == -EBUSY || rc == -EAGAIN, "io_uring wait failed");
      return;
    }
    const auto left = std::max(timers_.begin()->first.first - now(), Duration::zero());
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(left);
    __kernel_timespec timeout{};
    timeout.tv_sec = seconds.count();
    timeout.tv_nsec = std::chrono::nanoseconds(left - seconds).count();
    const int rc = io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &timeout, nullptr);
    CHECK(rc >= 0 || rc == -ETIME || rc == -EINTR || rc == -EBUSY || rc == -EAGAIN,
          "io_uring wait failed");
  }

  // Moves what the kernel has finished into done_, without running callbacks.
  void collect() {
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      done_.emplace_back(io_uring_cqe_get_data64(cqe), cqe->res);
      io_uring_cqe_seen(&ring_, cqe);
    }
  }

  void run_completions() {
    collect();
    // Callbacks may issue operations and thereby collect(): index, don't iterate.
    for (std::size_t i = 0; i < done_.size(); ++i) {
      const auto [tag, result] = done_[i];
      --outstanding_;
      if (tag == kWakeTag) {
        arm_wake();
      } else if (tag != kCancelTag) {
        Completion done = release(tag);
        done(result);
      }
    }
    done_.clear();
  }

  Completion release(std::uint64_t tag) {
    const std::size_t slot = (tag & 0xffffffffU) - kFirstSlotTag;
    CHECK(slot < slots_.size() && slots_[slot].handle == tag, "a completion nobody waits for");
    Completion done = std::move(slots_[slot].done);
    slots_[slot].done = nullptr;
    slots_[slot].handle = 0;
    free_.push_back(slot);
    return done;
  }

  void drain() {
    wake();  // completes the read of the eventfd
    for (const Slot& slot : slots_) {
      if (slot.handle == 0) continue;
      io_uring_sqe* sqe = next_sqe();
      io_uring_prep_cancel64(sqe, slot.handle, 0);
      io_uring_sqe_set_data64(sqe, kCancelTag);
      ++outstanding_;
    }
    while (true) {
      collect();
      outstanding_ -= done_.size();
      done_.clear();
      if (outstanding_ == 0) break;
      io_uring_submit_and_wait(&ring_, 1);
    }
  }

  io_uring ring_{};
  bool ring_open_ = false;
  int wake_fd_ = -1;
  std::uint64_t wake_value_ = 0;
  std::size_t outstanding_ = 0;  // submissions whose completion has not been taken yet
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_;
  std::vector<std::pair<std::uint64_t, int>> done_;
  std::map<std::pair<Instant, Handle>, Task> timers_;
  std::unordered_map<Handle, Instant> timer_when_;
  Handle next_handle_ = 1;
  std::vector<Task> running_;

  std::mutex mutex_;  // guards posted_ and stop_
  std::vector<Task> posted_;
  bool stop_ = false;
};

}  // namespace

Result<std::unique_ptr<Loop>> Loop::create() {
  auto loop = std::make_unique<UringLoop>();
  DROVER_TRY(loop->open());
  return loop;
}

}  // namespace drover
