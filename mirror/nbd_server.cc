// SPDX-License-Identifier: Apache-2.0
#include "mirror/nbd_server.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "mirror/nbd_session.h"

namespace drover::mirror {
namespace {

// How much is received beyond what is known to come: requests that arrived in the meantime. What
// does not fit behind them is moved to a new buffer, so this bounds what is copied.
constexpr std::size_t kReadAhead = std::size_t{64} << 10;
// A request's payload begins at a multiple of this (a cache line) when its header is the first of a
// receive.
constexpr std::size_t kPayloadAlignment = 64;
constexpr std::size_t kRequestHeader = 28;
// Descriptors run out for a moment, not for good.
constexpr std::chrono::milliseconds kAcceptRetry{100};

// --- the socket's place in the file system ---

struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const FileIdentity&) const = default;
};

Result<sockaddr_un> unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return fail(Code::InvalidArgument,
                fmt::format("the socket path {} has {} bytes; a unix socket takes 1 to {}", path,
                            path.size(), sizeof address.sun_path - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

// Whether somebody listens on the socket file. Connecting with the wrong type tells a live socket
// (EPROTOTYPE) from one whose process is gone (ECONNREFUSED) without being a client of it.
bool somebody_listens(const sockaddr_un& address) {
  const UniqueFd probe(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const int rc =
      ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  return rc == 0 || errno != ECONNREFUSED;
}

Status remove_stale_socket(const NbdServerOptions& options, const sockaddr_un& address) {
  struct stat status {};
  if (::lstat(options.socket_path.c_str(), &status) != 0) {
    if (errno == ENOENT) return {};
    return fail_errno(errno, "looking at " + options.socket_path);
  }
  const bool ours = status.st_uid == ::geteuid() ||
                    (options.socket_uid >= 0 && status.st_uid == uid_t(options.socket_uid));
  if (!S_ISSOCK(status.st_mode) || !ours) {
    return fail(Code::AlreadyExists,
                fmt::format("{} exists and is not drover's", options.socket_path),
                "remove it, or choose another path");
  }
  if (somebody_listens(address)) {
    return fail(Code::Busy, fmt::format("another process listens on {}", options.socket_path));
  }
  if (::unlink(options.socket_path.c_str()) != 0 && errno != ENOENT) {
    return fail_errno(errno, "removing the stale socket " + options.socket_path);
  }
  return {};
}

// The new socket's file. The directory may belong to QEMU's user, who could have put something else
// there: nothing is changed by name, only through this descriptor of what was looked at.
struct SocketFile {
  UniqueFd file;
  FileIdentity identity;
};

Result<SocketFile> find_new_socket(const NbdServerOptions& options) {
  SocketFile found{
      .file = UniqueFd(::open(options.socket_path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC))};
  struct stat status {};
  if (found.file.get() < 0 || ::fstat(found.file.get(), &status) != 0) {
    return fail_errno(errno, "looking at the new socket " + options.socket_path);
  }
  if (!S_ISSOCK(status.st_mode) || status.st_uid != ::geteuid() || status.st_nlink != 1) {
    return fail(Code::Denied,
                fmt::format("{} was replaced while it was created", options.socket_path));
  }
  found.identity = FileIdentity{.device = status.st_dev, .inode = status.st_ino};
  return found;
}

Status set_owner_and_mode(const UniqueFd& file, const NbdServerOptions& options) {
  const std::string doing = "setting the owner and mode of " + options.socket_path;
  if (options.socket_uid >= 0 || options.socket_gid >= 0) {
    if (::fchownat(file.get(), "", uid_t(options.socket_uid), gid_t(options.socket_gid),
                   AT_EMPTY_PATH) != 0) {
      return fail_errno(errno, doing);
    }
  }
  // fchmod(2) does not take an O_PATH descriptor; its name under /proc does.
  if (::chmod(fmt::format("/proc/self/fd/{}", file.get()).c_str(), options.socket_mode) != 0) {
    return fail_errno(errno, doing);
  }
  return {};
}

void remove_if_ours(const std::string& path, const FileIdentity& identity) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) return;
  if (FileIdentity{.device = status.st_dev, .inode = status.st_ino} != identity) return;
  ::unlink(path.c_str());
}

bool peer_is_gone(int socket) {
  pollfd poll{.fd = socket, .events = POLLRDHUP, .revents = 0};
  return ::poll(&poll, 1, 0) == 1 && (poll.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

// --- one client ---

// Stays until its last operation has been called back, also when the client was dropped long
// before.
struct Connection {
  Connection(UniqueFd descriptor, NbdSession::Options options)
      : socket(std::move(descriptor)), session(std::move(options)) {}

  [[nodiscard]] std::span<std::byte> unread() const {
    if (!buffer) return {};
    return buffer.bytes().subspan(begin, end - begin);
  }

  UniqueFd socket;
  NbdSession session;

  // Where the socket is received into: [0, kept) belongs to requests handed on, [begin, end) is
  // received and not yet taken by the session.
  Buffer buffer;
  std::size_t kept = 0;
  std::size_t begin = 0;
  std::size_t end = 0;

  std::vector<std::byte> sending;
  std::size_t sent = 0;

  Loop::Handle receive = 0;  // 0: none under way
  Loop::Handle send = 0;
  Loop::Handle handshake_timer = 0;
  unsigned users = 0;  // operations under way, and calls that are working with it
  bool pumping = false;
  bool wants_buffer = false;
  bool leaving = false;  // closes once everything is answered
  bool dropped = false;
};

// --- the server ---

// Outlives NbdServer while operations are under way: the last one's callback frees it.
class Core : public std::enable_shared_from_this<Core> {
 public:
  Core(Loop& loop, BufferPool& pool, NbdServerOptions options, NbdServer::Events events)
      : loop_(loop), pool_(pool), options_(std::move(options)), events_(std::move(events)) {}
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;
  ~Core() = default;

  Status open();
  void close();
  void complete(std::uint64_t id, int errno_value);
  void buffers_available();
  [[nodiscard]] bool client_is_there() const {
    return current_ && !peer_is_gone(current_->socket.get());
  }

 private:
  // Keeps the core and a connection from being freed while one of their functions is on the stack
  // or an operation is under way.
  void hold(Connection* connection) {
    ++users_;
    if (connection != nullptr) ++connection->users;
  }
  void release(Connection* connection);

  void accept();
  void accepted(int result);
  void pump(Connection& connection);
  bool make_room(Connection& connection, std::size_t need);
  void start_receive(Connection& connection, std::size_t need);
  void received(Connection& connection, int result);
  void flush(Connection& connection);
  void start_send(Connection& connection);
  void was_sent(Connection& connection, int result);
  void drop(Connection& connection, const Error& why);

  Loop& loop_;
  BufferPool& pool_;
  const NbdServerOptions options_;
  NbdServer::Events events_;
  UniqueFd listener_;
  FileIdentity identity_;
  bool bound_ = false;
  bool closed_ = false;
  Loop::Handle accept_ = 0;
  Loop::Handle retry_ = 0;
  std::unique_ptr<Connection> current_;
  std::vector<std::unique_ptr<Connection>> dropped_;  // their operations are not called back yet
  std::uint64_t next_serial_ = 1;
  unsigned users_ = 0;
  // After close(): a timer that never fires and owns this. If the loop goes before the last
  // callback, it frees the timer, and that this.
  Loop::Handle keeper_ = 0;
};

Status Core::open() {
  DROVER_ASSIGN(const sockaddr_un address, unix_address(options_.socket_path));
  DROVER_TRY(remove_stale_socket(options_, address));
  listener_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const std::string doing = "creating the socket " + options_.socket_path;
  if (listener_.get() < 0) return fail_errno(errno, doing);
  // Linux gives the file the socket's own mode. Besides, nobody can connect before listen().
  if (::fchmod(listener_.get(), 0) != 0) return fail_errno(errno, doing);
  if (::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return fail_errno(errno, doing);
  }
  DROVER_ASSIGN(const SocketFile socket, find_new_socket(options_));
  identity_ = socket.identity;
  bound_ = true;
  DROVER_TRY(set_owner_and_mode(socket.file, options_));
  if (::listen(listener_.get(), 4) != 0) return fail_errno(errno, doing);
  accept();
  return {};
}

void Core::close() {
  if (bound_) remove_if_ours(options_.socket_path, identity_);
  closed_ = true;
  if (users_ == 0) return;
  keeper_ = loop_.at(Instant::max(), [self = shared_from_this()] {});
  // Whoever waits in the listen queue learns at once.
  ::shutdown(listener_.get(), SHUT_RDWR);
  if (accept_ != 0) loop_.cancel(accept_);
  if (retry_ != 0) {
    loop_.cancel(retry_);
    retry_ = 0;
    release(nullptr);
  }
  if (current_) drop(*current_, Error{});
}

void Core::release(Connection* connection) {
  if (connection != nullptr && --connection->users == 0 && connection->dropped) {
    std::erase_if(dropped_, [&](const auto& each) { return each.get() == connection; });
  }
  CHECK(users_ > 0, "every release has its hold");
  if (--users_ == 0 && keeper_ != 0) loop_.cancel(keeper_);  // frees this
}

void Core::accept() {
  hold(nullptr);
  accept_ = loop_.accept(listener_.get(), [this](int result) {
    accept_ = 0;
    accepted(result);
    release(nullptr);
  });
}

void Core::accepted(int result) {
  UniqueFd socket(result < 0 ? -1 : result);
  if (closed_) return;
  if (result < 0) {
    log_warning("{}: accepting a connection failed: {}", options_.socket_path,
                std::strerror(-result));
    hold(nullptr);
    retry_ = loop_.at(now() + kAcceptRetry, [this] {
      retry_ = 0;
      accept();
      release(nullptr);
    });
    return;
  }
  accept();
  // The old client may have gone without our having read that yet.
  if (current_ && peer_is_gone(current_->socket.get())) {
    drop(*current_, Error{Code::Unreachable, "the NBD client closed its connection", {}, false});
    if (closed_) return;
  }
  if (current_) {
    log_info("{}: refused a second client", options_.socket_path);
    return;
  }
  current_ = std::make_unique<Connection>(
      std::move(socket), NbdSession::Options{.export_name = options_.export_name,
                                             .size = options_.size,
                                             .max_payload = pool_.buffer_size(),
                                             .max_in_flight = options_.max_in_flight,
                                             .first_serial = next_serial_});
  Connection& connection = *current_;
  if (events_.accepted) events_.accepted(connection.socket.get());
  // Cancelled before the connection goes, so it needs no hold.
  connection.handshake_timer =
      loop_.at(now() + options_.handshake_timeout, [this, connection = &connection] {
        connection->handshake_timer = 0;
        drop(*connection,
             Error{Code::Protocol, "the NBD client did not finish its handshake", {}, false});
      });
  pump(connection);
}

void Core::complete(std::uint64_t id, int errno_value) {
  if (!current_) return;
  Connection& connection = *current_;
  if (!connection.session.complete(id, errno_value)) return;
  // From inside a request's handler: pump() goes on with what this made possible, and answers in a
  // batch.
  if (connection.pumping) return;
  // One that waits for input has nothing to go on with.
  if (connection.receive != 0 || connection.wants_buffer) {
    hold(&connection);
    flush(connection);
    release(&connection);
    return;
  }
  pump(connection);
}

void Core::buffers_available() {
  if (current_ && current_->wants_buffer) pump(*current_);
}

// Takes the session as far as it gets.
void Core::pump(Connection& connection) {
  if (connection.pumping) return;
  hold(&connection);
  connection.pumping = true;
  bool more = true;
  while (more && !connection.dropped) {
    const std::span<const std::byte> unread = connection.unread();
    NbdSession::Step step = connection.session.step(unread);
    connection.begin += step.consumed;
    switch (step.kind) {
      case NbdSession::Step::Kind::NeedInput: {
        if (connection.receive == 0) {
          flush(connection);
          if (!connection.dropped) start_receive(connection, step.need);
        }
        more = false;
        break;
      }
      case NbdSession::Step::Kind::NeedOutput:
        // With a send under way its callback comes back here; else flush() below has made room.
        more = connection.send == 0;
        flush(connection);
        break;
      case NbdSession::Step::Kind::NeedSlot: more = false; break;
      case NbdSession::Step::Kind::Ready: {
        loop_.cancel(std::exchange(connection.handshake_timer, 0));
        if (events_.connected) events_.connected();
        break;
      }
      case NbdSession::Step::Kind::Request: {
        if (!step.request.payload.empty()) {
          connection.kept = connection.begin;
          step.request.buffer = connection.buffer;
        }
        events_.request(std::move(step.request));
        break;
      }
      case NbdSession::Step::Kind::Leaving: {
        connection.leaving = true;
        more = false;
        break;
      }
      case NbdSession::Step::Kind::Broken: {
        drop(connection, Error{Code::Protocol,
                               "the NBD client broke the protocol: " + connection.session.why(),
                               {},
                               false});
        break;
      }
    }
  }
  connection.pumping = false;
  flush(connection);
  release(&connection);
}

// Makes `need` bytes, from the first unread one on, contiguous in a buffer. False: there is none.
bool Core::make_room(Connection& connection, std::size_t need) {
  const std::size_t unread = connection.end - connection.begin;
  const std::size_t capacity = connection.buffer ? connection.buffer.bytes().size() : 0;
  if (unread == 0 && need <= kRequestHeader) {
    // Between requests: back to right behind what is in use.
    const std::size_t payload =
        (connection.kept + kRequestHeader + kPayloadAlignment - 1) & ~(kPayloadAlignment - 1);
    connection.begin = connection.end = payload - kRequestHeader;
  }
  if (connection.begin + need <= capacity) return true;

  // To the beginning of a buffer: this one, if nobody was given a part of it, else a new one.
  // Giving this one back first may return the same one, which the processor's cache still knows.
  const std::size_t begin = need <= kRequestHeader ? kPayloadAlignment - kRequestHeader : 0;
  if (unread == 0) connection.buffer.reset();
  Buffer target = connection.buffer;
  if (!target || connection.kept > 0) target = pool_.try_take();
  if (!target) return false;
  if (unread > 0) {
    std::memmove(target.bytes().data() + begin, connection.buffer.bytes().data() + connection.begin,
                 unread);
  }
  connection.buffer = std::move(target);
  connection.kept = 0;
  connection.begin = begin;
  connection.end = begin + unread;
  return true;
}

void Core::start_receive(Connection& connection, std::size_t need) {
  connection.wants_buffer = !make_room(connection, need);
  if (connection.wants_buffer) return;
  const std::span<std::byte> bytes = connection.buffer.bytes();
  const std::size_t until = std::min(bytes.size(), connection.begin + need + kReadAhead);
  hold(&connection);
  connection.receive =
      loop_.receive(connection.socket.get(), bytes.subspan(connection.end, until - connection.end),
                    [this, connection = &connection](int result) {
                      connection->receive = 0;
                      received(*connection, result);
                      release(connection);
                    });
}

void Core::received(Connection& connection, int result) {
  if (connection.dropped) return;
  if (result <= 0) {
    if (result == -EINTR || result == -EAGAIN) return pump(connection);
    drop(connection,
         result == 0 ? Error{Code::Unreachable, "the NBD client closed its connection", {}, false}
                     : error_from_errno(-result, "receiving from the NBD client"));
    return;
  }
  connection.end += static_cast<std::size_t>(result);
  pump(connection);
}

// Sends what there is to send, if nothing is being sent.
void Core::flush(Connection& connection) {
  if (connection.dropped || connection.send != 0) return;
  if (connection.session.unsent() > 0) {
    connection.session.take_output(connection.sending);
    connection.sent = 0;
    start_send(connection);
    return;
  }
  if (connection.leaving && connection.session.in_flight() == 0) {
    drop(connection, Error{Code::Unreachable, "the NBD client disconnected", {}, false});
  }
}

void Core::start_send(Connection& connection) {
  hold(&connection);
  connection.send =
      loop_.send(connection.socket.get(),
                 std::span<const std::byte>(connection.sending).subspan(connection.sent),
                 [this, connection = &connection](int result) {
                   connection->send = 0;
                   was_sent(*connection, result);
                   release(connection);
                 });
}

void Core::was_sent(Connection& connection, int result) {
  if (connection.dropped) return;
  if (result <= 0 && result != -EINTR && result != -EAGAIN) {
    drop(connection, error_from_errno(-result, "answering the NBD client"));
    return;
  }
  connection.sent += static_cast<std::size_t>(std::max(result, 0));
  if (connection.sent < connection.sending.size()) return start_send(connection);
  // The session may have waited for room for its output.
  if (connection.receive == 0 && !connection.wants_buffer && !connection.leaving) {
    pump(connection);
  } else {
    flush(connection);
  }
}

void Core::drop(Connection& connection, const Error& why) {
  CHECK(&connection == current_.get(), "only the current client can be dropped");
  connection.dropped = true;
  // The client sees the end now; the descriptor is closed when its operations are called back.
  ::shutdown(connection.socket.get(), SHUT_RDWR);
  if (events_.closing) events_.closing(connection.socket.get());
  if (connection.receive != 0) loop_.cancel(connection.receive);
  if (connection.send != 0) loop_.cancel(connection.send);
  if (connection.handshake_timer != 0) loop_.cancel(connection.handshake_timer);
  next_serial_ = connection.session.next_serial();
  const bool was_ready = connection.session.ready();
  if (connection.receive == 0) connection.buffer.reset();
  if (connection.users > 0) {
    dropped_.push_back(std::move(current_));
  } else {
    current_.reset();
  }
  if (closed_) return;
  log_info("{}: {}", options_.socket_path, why.message);
  if (was_ready && events_.disconnected) {
    hold(nullptr);
    events_.disconnected(why);
    release(nullptr);
  }
}

class Server final : public NbdServer {
 public:
  explicit Server(std::shared_ptr<Core> core) : core_(std::move(core)) {}
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server() override { core_->close(); }
  void complete(std::uint64_t id, int errno_value) override { core_->complete(id, errno_value); }
  [[nodiscard]] bool client_is_there() const override { return core_->client_is_there(); }
  void buffers_available() override { core_->buffers_available(); }

 private:
  std::shared_ptr<Core> core_;
};

}  // namespace

Result<std::unique_ptr<NbdServer>> NbdServer::listen(Loop& loop, BufferPool& pool,
                                                     const NbdServerOptions& options,
                                                     Events events) {
  CHECK(events.request != nullptr, "somebody must handle the requests");
  CHECK(options.max_in_flight >= 1 && options.max_in_flight <= NbdSession::kMaxSlots,
        "a client has 1 to 1024 requests in flight");
  auto core = std::make_shared<Core>(loop, pool, options, std::move(events));
  auto server = std::make_unique<Server>(core);
  DROVER_TRY(core->open());
  return server;
}

}  // namespace drover::mirror
