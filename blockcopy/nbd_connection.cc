// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/nbd_connection.h"

#include <fcntl.h>
#include <libnbd.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "blockcopy/raw_file.h"

namespace drover::blockcopy {
namespace {

// What QEMU takes in one request, and no server less (NBD protocol, "Block size constraints").
constexpr std::uint64_t kUsualMaxTransfer = std::uint64_t{32} << 20;
// Ranges without data are 32 bits wide in the protocol; QEMU also gathers a status answer under a
// lock.
constexpr std::uint64_t kMaxRange = std::uint64_t{1} << 30;

short events_of(unsigned direction) {
  int events = 0;
  if ((direction & LIBNBD_AIO_DIRECTION_READ) != 0) events |= POLLIN;
  if ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0) events |= POLLOUT;
  return static_cast<short>(events);
}

std::string nbd_reason() {
  const char* const text = nbd_get_error();
  return text != nullptr ? text : "unknown error";
}

}  // namespace

Status nbd_status(int error, std::string_view doing, const std::string& image,
                  const Extent& extent) {
  if (error == 0) return {};
  return tl::unexpected(transfer_error(error, {doing, image, extent}));
}

Result<std::shared_ptr<NbdConnection>> NbdConnection::open(const NbdAddress& address,
                                                           const NbdOpenOptions& options) {
  std::shared_ptr<NbdConnection> connection(new NbdConnection);
  DROVER_TRY(connection->connect(address, options));
  return connection;
}

NbdConnection::~NbdConnection() {
  if (nbd_ != nullptr) nbd_close(nbd_);
}

Status NbdConnection::connect(const NbdAddress& address, const NbdOpenOptions& options) {
  image_ = options.image;
  const Instant deadline = now() + options.timeout;
  const auto failed = [&](std::string why) {
    const bool no_export = nbd_ != nullptr && nbd_get_errno() == ENOENT && socket_;
    return fail(Error{no_export ? Code::NotFound : Code::Unreachable,
                      "connecting to the NBD export of " + image_ + ": " + std::move(why),
                      {},
                      !no_export});
  };
  nbd_ = nbd_create();
  if (nbd_ == nullptr) return failed(nbd_reason());
  // Our bounds are our own to check; QEMU serves any alignment. A reader's buffers are not read
  // before they are filled.
  const std::uint32_t strict = nbd_get_strict_mode(nbd_) & ~std::uint32_t{LIBNBD_STRICT_ALIGN};
  if (nbd_set_export_name(nbd_, address.export_name.c_str()) == -1 ||
      nbd_set_strict_mode(nbd_, strict) == -1 || nbd_set_pread_initialize(nbd_, false) == -1 ||
      (options.extents && nbd_add_meta_context(nbd_, LIBNBD_CONTEXT_BASE_ALLOCATION) == -1) ||
      nbd_aio_connect_unix(nbd_, address.unix_socket.c_str()) == -1) {
    return failed(nbd_reason());
  }
  while (nbd_aio_is_ready(nbd_) == 0) {
    if (nbd_aio_is_dead(nbd_) != 0 || nbd_aio_is_closed(nbd_) != 0) return failed(nbd_reason());
    const int fd = nbd_aio_get_fd(nbd_);
    if (fd < 0) return failed(nbd_reason());
    if (!socket_) socket_ = UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now()).count();
    if (left <= 0) {
      return fail(Error{
          Code::Unreachable, "the NBD export of " + image_ + " did not answer in time", {}, true});
    }
    pollfd entry{fd, events_of(nbd_aio_get_direction(nbd_)), 0};
    const int rc = ::poll(&entry, 1, static_cast<int>(std::min<std::int64_t>(left, 60'000)));
    if (rc > 0 && notify(entry.revents) == -1) return failed(nbd_reason());
  }
  const int fd = nbd_aio_get_fd(nbd_);
  if (!socket_ && fd >= 0) socket_ = UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  const std::int64_t size = nbd_get_size(nbd_);
  if (!socket_ || size < 0) return failed(nbd_reason());
  if (size == 0) return fail(Code::InvalidArgument, image_ + " has no bytes");
  size_ = Length(static_cast<std::uint64_t>(size));
  const auto constraint = [&](int which, std::uint64_t usual) {
    const std::int64_t value = nbd_get_block_size(nbd_, which);
    return value > 0 ? static_cast<std::uint64_t>(value) : usual;
  };
  const std::uint64_t preferred = constraint(LIBNBD_SIZE_PREFERRED, 4096);
  if (std::has_single_bit(preferred)) {
    alignment_ = Length(std::clamp<std::uint64_t>(preferred, 512, std::uint64_t{64} << 10));
  }
  max_transfer_ =
      Length(std::clamp<std::uint64_t>(constraint(LIBNBD_SIZE_MAXIMUM, kUsualMaxTransfer),
                                       std::uint64_t{64} << 10, kUsualMaxTransfer));
  has_extents_ = options.extents && nbd_can_meta_context(nbd_, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1;
  return {};
}

int NbdConnection::notify(short revents) {
  // The direction may have changed since the poll was armed. A hang-up or an error must be noticed
  // by whichever side libnbd is on.
  const unsigned direction = nbd_aio_get_direction(nbd_);
  const bool broken = (revents & (POLLHUP | POLLERR | POLLNVAL)) != 0;
  if ((direction & LIBNBD_AIO_DIRECTION_READ) != 0 && ((revents & POLLIN) != 0 || broken)) {
    return nbd_aio_notify_read(nbd_);
  }
  if ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0 && ((revents & POLLOUT) != 0 || broken)) {
    return nbd_aio_notify_write(nbd_);
  }
  return 0;
}

bool NbdConnection::alive() const {
  return nbd_ != nullptr && nbd_aio_is_dead(nbd_) == 0 && nbd_aio_is_closed(nbd_) == 0;
}

NbdConnection::Request& NbdConnection::new_request(NbdDone done) {
  CHECK(loop_ != nullptr, "attach() comes first");
  Request& request = in_flight_.emplace_back();
  request.connection = this;
  request.done = std::move(done);
  request.self = std::prev(in_flight_.end());
  return request;
}

int NbdConnection::request_completed(void* user, int* error) {
  auto& request = *static_cast<Request*>(user);
  if (!request.completed) {
    request.completed = true;
    request.error = *error;
    request.connection->completed_.push_back(&request);
  }
  return 1;  // retire the command
}

int NbdConnection::extents_arrived(void* user, const char* context, std::uint64_t offset,
                                   std::uint32_t* entries, std::size_t count, int* /*error*/) {
  auto& request = *static_cast<Request*>(user);
  if (request.completed || std::strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0) return 0;
  std::vector<MappedExtent>& found = *request.found;
  Offset position = found.empty() ? request.range.offset : found.back().extent.end();
  if (Offset(offset) != position) return 0;  // not where the answer goes on: not believed
  for (std::size_t i = 0; i + 1 < count && position < request.range.end(); i += 2) {
    // The last run may reach beyond what was asked for.
    const Length length = std::min(Length(entries[i]), request.range.end() - position);
    if (length == Length()) continue;
    const bool data = (entries[i + 1] & LIBNBD_STATE_ZERO) == 0;
    if (!found.empty() && found.back().data == data) {
      found.back().extent.length += length;
    } else {
      found.push_back({Extent{position, length}, data});
    }
    position += length;
  }
  return 0;
}

void NbdConnection::submitted(Request& request, std::int64_t cookie) {
  if (cookie == -1 && !request.completed) {
    request.completed = true;
    request.error = alive() ? nbd_get_errno() : ENOTCONN;
    if (request.error == 0) request.error = EIO;
    completed_.push_back(&request);
  }
  fail_the_rest();
  update_poll();
  if (!completed_.empty() && !dispatch_posted_) {
    dispatch_posted_ = true;
    loop_->post([self = shared_from_this()] {
      self->dispatch_posted_ = false;
      self->dispatch();
    });
  }
}

void NbdConnection::read(Offset offset, std::span<std::byte> buffer, NbdDone done) {
  Request& request = new_request(std::move(done));
  submitted(
      request,
      nbd_aio_pread(nbd_, buffer.data(), buffer.size(), offset.bytes(),
                    {.callback = request_completed, .user_data = &request, .free = nullptr}, 0));
}

void NbdConnection::write(Offset offset, std::span<const std::byte> buffer, NbdDone done) {
  Request& request = new_request(std::move(done));
  submitted(
      request,
      nbd_aio_pwrite(nbd_, buffer.data(), buffer.size(), offset.bytes(),
                     {.callback = request_completed, .user_data = &request, .free = nullptr}, 0));
}

void NbdConnection::write_zeroes(Extent extent, NbdDone done) {
  CHECK(extent.length.bytes() <= kMaxRange, "zeroes come in pieces");
  Request& request = new_request(std::move(done));
  submitted(
      request,
      nbd_aio_zero(nbd_, extent.length.bytes(), extent.offset.bytes(),
                   {.callback = request_completed, .user_data = &request, .free = nullptr}, 0));
}

void NbdConnection::extents(Extent range, std::vector<MappedExtent>& found, NbdDone done) {
  range.length = std::min(range.length, Length(kMaxRange));
  found.clear();
  // A server that does not say, or answers with nothing usable: all is data.
  Request& request = new_request([range, &found, done = std::move(done)](int error) {
    if (error == 0 && found.empty()) found.push_back({range, true});
    done(error);
  });
  if (!has_extents_) {
    request.completed = true;
    completed_.push_back(&request);
    submitted(request, 0);
    return;
  }
  request.range = range;
  request.found = &found;
  submitted(request,
            nbd_aio_block_status(
                nbd_, range.length.bytes(), range.offset.bytes(),
                {.callback = extents_arrived, .user_data = &request, .free = nullptr},
                {.callback = request_completed, .user_data = &request, .free = nullptr}, 0));
}

// After the connection died libnbd has completed every command; should it have missed one, nobody
// waits for it forever.
void NbdConnection::fail_the_rest() {
  if (alive()) return;
  for (Request& request : in_flight_) {
    if (request.completed) continue;
    request.completed = true;
    request.abandoned = true;
    request.error = ENOTCONN;
    completed_.push_back(&request);
  }
}

void NbdConnection::update_poll() {
  const bool waiting = in_flight_.size() > completed_.size() && alive();
  const short wanted = waiting ? events_of(nbd_aio_get_direction(nbd_)) : short{0};
  if ((wanted & ~polled_events_) == 0) return;  // an armed poll for more does no harm
  if (polled_events_ != 0) loop_->cancel(poll_);
  polled_events_ = wanted;
  const std::uint64_t generation = ++poll_generation_;
  // The loop keeps this object, and so the descriptor, until the poll is over.
  poll_ = loop_->poll(socket_.get(), wanted, [self = shared_from_this(), generation](int result) {
    self->polled(generation, result);
  });
}

void NbdConnection::polled(std::uint64_t generation, int result) {
  if (generation != poll_generation_ || polled_events_ == 0) return;  // one that was replaced
  polled_events_ = 0;
  // An error shows in libnbd's state.
  notify(result >= 0 ? static_cast<short>(result) : short{POLLERR});
  fail_the_rest();
  dispatch();
}

// Calls those whose requests are done. They may issue new ones, and the last may drop this
// connection.
void NbdConnection::dispatch() {
  const std::shared_ptr<NbdConnection> self = shared_from_this();
  std::vector<Request*> completed;
  completed.swap(completed_);
  std::vector<std::pair<NbdDone, int>> calls;
  calls.reserve(completed.size());
  for (Request* request : completed) {
    calls.emplace_back(std::move(request->done), request->error);
    if (request->abandoned) {
      abandoned_.splice(abandoned_.end(), in_flight_, request->self);
    } else {
      in_flight_.erase(request->self);
    }
  }
  update_poll();
  for (auto& [done, error] : calls) {
    // What libnbd says of a connection that broke has several numbers; what matters is that it
    // broke.
    done(error != 0 && !alive() ? ENOTCONN : error);
  }
}

void NbdConnection::close() {
  CHECK(in_flight_.empty(), "a connection is closed when its requests are done");
  if (nbd_ == nullptr) return;
  if (alive()) nbd_aio_disconnect(nbd_, 0);
  nbd_close(nbd_);
  nbd_ = nullptr;
  if (polled_events_ != 0) {
    loop_->cancel(poll_);
    polled_events_ = 0;
  }
  // Ends the connection although a poll may still hold the socket.
  ::shutdown(socket_.get(), SHUT_RDWR);
}

Status NbdConnection::flush_and_wait() {
  CHECK(loop_ == nullptr && nbd_ != nullptr, "this blocks: not on a loop");
  if (nbd_flush(nbd_, 0) == -1) {
    Error error = error_from_errno(alive() ? nbd_get_errno() : ENOTCONN, "flushing " + image_);
    if (!alive()) error.code = Code::Unreachable;
    if (error.code != Code::Unreachable && error.code != Code::NoSpace) error.code = Code::Io;
    error.retryable = false;
    return fail(std::move(error));
  }
  return {};
}

}  // namespace drover::blockcopy
