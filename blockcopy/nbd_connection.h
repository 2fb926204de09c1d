// SPDX-License-Identifier: Apache-2.0
//
// NbdConnection: one connection to a QEMU process's NBD export over a Unix socket, driven by a Loop
// through libnbd's asynchronous calls. Internal to blockcopy.
//
//   DROVER_ASSIGN(auto connection, NbdConnection::open(address, {}));   // blocks
//   connection->attach(loop);
//   connection->read(offset, buffer, [](int error) { ... });
//
// libnbd's rules, which this class keeps (libnbd(3), nbd_aio_command_completed(3)):
// - a completion callback runs with the handle's lock held: it may not call libnbd. It only notes
// the
//   request; callers are called later, from the loop.
// - it returns 1, which retires the command, and is called exactly once for every command that got
// a
//   cookie; for one that got none, never.
// - when the connection dies, it is called with an error for every command in flight.
// - one of nbd_aio_notify_read and _write per event, as the direction says at that moment.
//
// Threads: open() and flush_and_wait() on any one thread before attach(); afterwards the Loop's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/loop.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"

struct nbd_handle;

namespace drover::blockcopy {

struct NbdAddress {
  std::string unix_socket;
  std::string export_name;
};

struct NbdOpenOptions {
  std::string image;     // for messages
  bool extents = false;  // asks for base:allocation
  Duration timeout = std::chrono::seconds(10);
};

class NbdConnection : public std::enable_shared_from_this<NbdConnection> {
 public:
  // 0, or an errno; ENOTCONN when the connection broke.
  using NbdDone = std::function<void(int error)>;

  // Unreachable when nothing answers in time, NotFound when there is no such export.
  static Result<std::shared_ptr<NbdConnection>> open(const NbdAddress& address,
                                                     const NbdOpenOptions& options);
  ~NbdConnection();
  NbdConnection(const NbdConnection&) = delete;
  NbdConnection& operator=(const NbdConnection&) = delete;

  [[nodiscard]] Length size() const { return size_; }
  // A power of two: what the server works best with.
  [[nodiscard]] Length alignment() const { return alignment_; }
  // No request may carry more data.
  [[nodiscard]] Length max_transfer() const { return max_transfer_; }

  // From here on on `loop`, which must outlive this object's use.
  void attach(Loop& loop) { loop_ = &loop; }
  [[nodiscard]] std::size_t in_flight() const { return in_flight_.size(); }
  [[nodiscard]] bool alive() const;

  // Buffers and `found` stay valid until the callback has run, which is always from the loop.
  void read(Offset offset, std::span<std::byte> buffer, NbdDone done);
  void write(Offset offset, std::span<const std::byte> buffer, NbdDone done);
  void write_zeroes(Extent extent, NbdDone done);
  // The first runs of `range`, not empty when there is no error.
  void extents(Extent range, std::vector<MappedExtent>& found, NbdDone done);
  // Says good-bye. No request may be in flight (checked).
  void close();

  // Blocks until the server has flushed the image.
  Status flush_and_wait();

 private:
  struct Request {
    NbdConnection* connection = nullptr;
    NbdDone done;
    int error = 0;
    bool completed = false;
    bool abandoned = false;  // libnbd may still know it
    // For extents() only.
    Extent range;
    std::vector<MappedExtent>* found = nullptr;
    std::list<Request>::iterator self;
  };
  using Submit = std::function<std::int64_t(Request&)>;

  NbdConnection() = default;
  Status connect(const NbdAddress& address, const NbdOpenOptions& options);
  // -1 with libnbd's error set, or 0.
  int notify(short revents);

  Request& new_request(NbdDone done);
  void submitted(Request& request, std::int64_t cookie);
  static int request_completed(void* user, int* error);
  static int extents_arrived(void* user, const char* context, std::uint64_t offset,
                             std::uint32_t* entries, std::size_t count, int* error);
  void fail_the_rest();
  void update_poll();
  void polled(std::uint64_t generation, int result);
  void dispatch();

  nbd_handle* nbd_ = nullptr;
  UniqueFd socket_;  // our own descriptor of libnbd's socket: it stays valid as long as a poll may
                     // use it
  Loop* loop_ = nullptr;
  std::string image_;
  Length size_;
  Length alignment_ = Length(4096);
  Length max_transfer_;
  bool has_extents_ = false;

  std::list<Request> in_flight_;
  std::list<Request> abandoned_;
  std::vector<Request*>
      completed_;  // in flight no more for libnbd, but their callers don't know yet
  bool dispatch_posted_ = false;
  short polled_events_ = 0;  // what the armed poll waits for; 0: none is armed
  std::uint64_t poll_generation_ = 0;
  Loop::Handle poll_ = 0;
};

// What both the reader and the writer answer.
Status nbd_status(int error, std::string_view doing, const std::string& image,
                  const Extent& extent);

}  // namespace drover::blockcopy
