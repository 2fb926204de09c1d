// SPDX-License-Identifier: Apache-2.0
//
// Loop: one thread's event loop over io_uring: disk reads and writes, sockets, timers, and tasks
// posted by other threads.
//
//   DROVER_ASSIGN(auto loop, Loop::create());
//   loop->read(fd, buffer, Offset(0), [&](int result) { ...; loop->stop(); });
//   loop->run();
//
// Threads: every call but post() and stop() belongs on the thread that runs run() (or, before
// run(), on the one that sets things up). Callbacks run on that thread, from run(), never from
// inside the call that issued the operation.
//
// Lifetime: buffers and file descriptors must stay valid until the operation's callback has run.
// The destructor cancels what is outstanding and waits for the kernel to let go of every buffer;
// callbacks of such operations are dropped, not called. So destroy (or drain) the Loop before
// the buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/clock.h"
#include "base/result.h"
#include "base/units.h"

namespace drover {

class Loop {
 public:
  // `result` is what the system call would have returned: a count of bytes, or -errno. A capture
  // of up to two pointers does not allocate.
  using Completion = std::function<void(int result)>;
  using Task = std::function<void()>;
  // Names an outstanding operation or timer; 0 is never used.
  using Handle = std::uint64_t;

  static Result<std::unique_ptr<Loop>> create();
  virtual ~Loop() = default;
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  // Runs callbacks until stop(). May be called again afterwards.
  virtual void run() = 0;
  virtual void stop() = 0;           // any thread
  virtual void post(Task task) = 0;  // any thread; tasks run in the order they were posted

  // pread(2)/pwrite(2): may transfer less than asked. At most 1 GiB in one call.
  virtual Handle read(int fd, std::span<std::byte> buffer, Offset offset, Completion done) = 0;
  virtual Handle write(int fd, std::span<const std::byte> buffer, Offset offset,
                       Completion done) = 0;
  virtual Handle fdatasync(int fd, Completion done) = 0;
  virtual Handle fallocate(int fd, int mode, Extent extent, Completion done) = 0;

  // recv(2)/send(2) (MSG_NOSIGNAL): complete when at least one byte moved; 0 from recv is the end.
  virtual Handle receive(int socket, std::span<std::byte> buffer, Completion done) = 0;
  virtual Handle send(int socket, std::span<const std::byte> buffer, Completion done) = 0;
  virtual Handle accept(int socket, Completion done) = 0;  // result: the new descriptor, CLOEXEC
  // Once, when one of `events` (POLLIN, POLLOUT) is there: result is poll's revents.
  virtual Handle poll(int fd, short events, Completion done) = 0;

  // The clock that at() goes by.
  [[nodiscard]] virtual Instant now() const { return drover::now(); }
  // Runs `task` once, at or after `when`.
  virtual Handle at(Instant when, Task task) = 0;
  // The callback of a cancelled timer never runs; that of a cancelled operation runs with
  // -ECANCELED, or with its result if it was already done. Unknown handles are ignored.
  virtual void cancel(Handle handle) = 0;

 protected:
  Loop() = default;
};

}  // namespace drover
