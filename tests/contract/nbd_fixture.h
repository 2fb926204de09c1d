// SPDX-License-Identifier: Apache-2.0
//
// What the NBD server's tests share: a server on a thread of its own that applies every request to
// a byte model, and clients: libnbd's handle and a bare socket for what no honest client sends.
#pragma once

#include <gtest/gtest.h>
#include <libnbd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/loop.h"
#include "base/random.h"
#include "base/unique_fd.h"
#include "mirror/nbd_server.h"

namespace drover::mirror {

// Nothing waits longer than this; it only bounds a test that has failed already.
constexpr std::chrono::seconds kPatience{60};

using Bytes = std::vector<std::byte>;

inline Bytes random_bytes(Random& random, std::size_t count) {
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next());
  return bytes;
}

// A directory that goes with the test, also when it fails.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = "/tmp/drover-nbd-XXXXXX";
    CHECK(::mkdtemp(name.data()) != nullptr, "a temporary directory can be made");
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

struct Seen {
  NbdRequest::Kind kind;
  Extent extent;
  std::uint64_t id;
};

class TestServer {
 public:
  struct Config {
    Length size = 16_MiB;
    Length buffer_size = 1_MiB;
    std::size_t buffers = 40;
    unsigned max_in_flight = 32;
    std::string export_name = "vda";
    std::chrono::milliseconds handshake_timeout{60000};
    // Called on the loop's thread for each request, before it is answered or held.
    std::function<void(const NbdRequest&)> on_request;
  };

  TestServer() : TestServer(Config{}) {}
  explicit TestServer(Config config)
      : config_(std::move(config)),
        pool_(config_.buffer_size, config_.buffers),
        model_(config_.size.bytes()) {
    auto loop = Loop::create();
    CHECK(loop.has_value(), "a loop can be made");
    loop_ = std::move(*loop);
    pool_.on_available([this] {
      loop_->post([this] {
        if (server_) server_->buffers_available();
      });
    });
    start();
    thread_ = std::thread([this] { loop_->run(); });
  }
  TestServer(const TestServer&) = delete;
  TestServer& operator=(const TestServer&) = delete;
  ~TestServer() {
    stop();
    loop_->stop();
    thread_.join();
    held_.clear();
    loop_.reset();
  }

  [[nodiscard]] std::string socket_path() const { return directory_ / "nbd.sock"; }
  [[nodiscard]] std::string uri() const {
    return "nbd+unix:///" + config_.export_name + "?socket=" + socket_path();
  }

  // Runs on the server's thread; returns when it is done.
  template <class Function>
  auto on_loop(Function function) {
    std::packaged_task<decltype(function())()> task(std::move(function));
    auto result = task.get_future();
    loop_->post([&task] { task(); });
    return result.get();
  }

  // Destroys the server: its client sees the connection go.
  void stop() {
    if (!thread_.joinable()) return server_.reset();
    on_loop([this] { server_.reset(); });
  }

  // From now on requests are kept until answer().
  void hold(bool held) {
    const std::lock_guard lock(mutex_);
    hold_ = held;
  }
  // The request that was seen `nth` (from 0, among those held).
  void answer(std::size_t nth, int errno_value) {
    on_loop([&] {
      NbdRequest request;
      {
        const std::lock_guard lock(mutex_);
        request = std::move(held_.at(nth));
        held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(nth));
      }
      check_payload(request);
      const std::uint64_t id = request.id;
      request = {};
      if (server_) server_->complete(id, errno_value);
    });
  }
  [[nodiscard]] std::size_t held() {
    const std::lock_guard lock(mutex_);
    return held_.size();
  }
  [[nodiscard]] std::vector<Seen> seen() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }
  [[nodiscard]] unsigned connects() {
    const std::lock_guard lock(mutex_);
    return connects_;
  }
  [[nodiscard]] std::vector<Error> disconnects() {
    const std::lock_guard lock(mutex_);
    return disconnects_;
  }
  [[nodiscard]] Bytes model() {
    const std::lock_guard lock(mutex_);
    return model_;
  }
  [[nodiscard]] BufferPool& pool() { return pool_; }
  [[nodiscard]] NbdServer& server() { return *server_; }

  bool wait_for_held(std::size_t count) {
    return wait([&] { return held_.size() >= count; });
  }
  bool wait_for_seen(std::size_t count) {
    return wait([&] { return seen_.size() >= count; });
  }
  bool wait_for_connects(unsigned count) {
    return wait([&] { return connects_ >= count; });
  }
  bool wait_for_disconnects(std::size_t count) {
    return wait([&] { return disconnects_.size() >= count; });
  }

 private:
  template <class Condition>
  bool wait(Condition condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, condition);
  }

  void start() {
    NbdServer::Events events;
    events.request = [this](NbdRequest request) { take(std::move(request)); };
    events.connected = [this] {
      const std::lock_guard lock(mutex_);
      ++connects_;
      changed_.notify_all();
    };
    events.disconnected = [this](const Error& why) {
      const std::lock_guard lock(mutex_);
      disconnects_.push_back(why);
      changed_.notify_all();
    };
    auto server = NbdServer::listen(*loop_, pool_,
                                    {.socket_path = socket_path(),
                                     .export_name = config_.export_name,
                                     .size = config_.size,
                                     .max_in_flight = config_.max_in_flight,
                                     .handshake_timeout = config_.handshake_timeout},
                                    std::move(events));
    CHECK(server.has_value(), server ? "" : server.error().message.c_str());
    server_ = std::move(*server);
  }

  void take(NbdRequest request) {
    if (config_.on_request) config_.on_request(request);
    const std::uint64_t id = request.id;
    {
      const std::lock_guard lock(mutex_);
      const std::size_t offset = request.extent.offset.bytes();
      const std::size_t length = request.extent.length.bytes();
      EXPECT_LE(offset, model_.size()) << "requests lie within the export";
      EXPECT_LE(length, model_.size() - std::min(offset, model_.size()));
      EXPECT_EQ(length == 0, request.kind == NbdRequest::Kind::Flush) << "only a flush is empty";
      if (request.kind == NbdRequest::Kind::Write) {
        EXPECT_EQ(request.payload.size(), length) << "a write brings its bytes";
      } else {
        EXPECT_TRUE(request.payload.empty() && !request.buffer) << "only writes have bytes";
      }
      if (!testing::Test::HasFailure()) apply(request, offset, length);
      seen_.push_back({request.kind, request.extent, id});
      changed_.notify_all();
      if (hold_) {
        arrived_as_.emplace_back(id, Bytes(request.payload.begin(), request.payload.end()));
        held_.push_back(std::move(request));
        return;
      }
    }
    request = {};
    server_->complete(id, 0);
  }

  void apply(const NbdRequest& request, std::size_t offset, std::size_t length) {
    const auto at = model_.begin() + static_cast<std::ptrdiff_t>(offset);
    if (request.kind == NbdRequest::Kind::Write) {
      std::copy(request.payload.begin(), request.payload.end(), at);
    } else {
      std::fill_n(at, length, std::byte{0});
    }
  }

  // What was received later must not have touched a payload that somebody still holds.
  void check_payload(const NbdRequest& request) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(arrived_as_.begin(), arrived_as_.end(),
                                    [&](const auto& each) { return each.first == request.id; });
    CHECK(found != arrived_as_.end(), "a held request was recorded");
    EXPECT_TRUE(std::equal(request.payload.begin(), request.payload.end(), found->second.begin(),
                           found->second.end()))
        << "the payload changed while it was held";
    arrived_as_.erase(found);
  }

  const Config config_;
  TemporaryDirectory directory_;
  BufferPool pool_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<NbdServer> server_;  // the loop's thread

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  Bytes model_;
  bool hold_ = false;
  std::vector<NbdRequest> held_;
  std::vector<std::pair<std::uint64_t, Bytes>> arrived_as_;
  std::vector<Seen> seen_;
  unsigned connects_ = 0;
  std::vector<Error> disconnects_;

  std::thread thread_;
};

// libnbd's handle. Checks of its own that would keep a bad request from the server are off.
class NbdClient {
 public:
  NbdClient() : handle_(nbd_create()) {
    CHECK(handle_ != nullptr, "libnbd works");
    nbd_set_strict_mode(handle_, 0);
  }
  NbdClient(const NbdClient&) = delete;
  NbdClient& operator=(const NbdClient&) = delete;
  ~NbdClient() { nbd_close(handle_); }
  operator nbd_handle*() { return handle_; }  // NOLINT: to call libnbd with

  testing::AssertionResult connect(const TestServer& server) { return connect(server.uri()); }
  testing::AssertionResult connect(const std::string& uri) {
    if (nbd_connect_uri(handle_, uri.c_str()) == 0) return testing::AssertionSuccess();
    return testing::AssertionFailure() << nbd_get_error();
  }
  // Calls poll until every command in flight is answered.
  void finish() {
    while (nbd_aio_in_flight(handle_) > 0) {
      if (nbd_poll(handle_, static_cast<int>(std::chrono::milliseconds(kPatience).count())) <= 0) {
        ADD_FAILURE() << "no answer: " << (nbd_get_error() != nullptr ? nbd_get_error() : "");
        return;
      }
    }
  }

 private:
  nbd_handle* handle_;
};

// A client that says whatever the test wants.
class RawClient {
 public:
  explicit RawClient(const std::string& path)
      : socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    CHECK(
        ::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
        "the server listens");
    const timeval patience{.tv_sec = kPatience.count(), .tv_usec = 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  }
  explicit RawClient(const TestServer& server) : RawClient(server.socket_path()) {}

  // Big-endian integers and texts, appended to what send() will send.
  RawClient& u16(std::uint16_t value) { return integer(value, 2); }
  RawClient& u32(std::uint32_t value) { return integer(value, 4); }
  RawClient& u64(std::uint64_t value) { return integer(value, 8); }
  RawClient& text(std::string_view text) {
    for (const char c : text) pending_.push_back(static_cast<std::byte>(c));
    return *this;
  }
  RawClient& fill(std::size_t count, std::byte value = std::byte{0}) {
    pending_.insert(pending_.end(), count, value);
    return *this;
  }
  RawClient& option(std::uint32_t option, std::uint32_t length) {
    return text("IHAVEOPT").u32(option).u32(length);
  }
  RawClient& go(const std::string& name) {
    return option(7, static_cast<std::uint32_t>(6 + name.size()))
        .u32(static_cast<std::uint32_t>(name.size()))
        .text(name)
        .u16(0);
  }
  RawClient& request(std::uint16_t flags, std::uint16_t type, std::uint64_t cookie,
                     std::uint64_t offset, std::uint32_t length) {
    return u32(0x25609513).u16(flags).u16(type).u64(cookie).u64(offset).u32(length);
  }

  [[nodiscard]] Bytes take_pending() { return std::exchange(pending_, {}); }

  // False: the server has closed the connection.
  bool send() {
    const Bytes bytes = take_pending();
    return send(bytes);
  }
  bool send(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent <= 0) return false;
      bytes = bytes.subspan(static_cast<std::size_t>(sent));
    }
    return true;
  }

  // Fewer bytes: the server closed.
  Bytes receive(std::size_t count) {
    Bytes bytes(count);
    std::size_t have = 0;
    while (have < count) {
      const ssize_t got = ::recv(socket_.get(), bytes.data() + have, count - have, 0);
      // The kernel takes an io_uring apart in the background, and interrupts the thread that used
      // it.
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && errno == ECONNRESET) break;  // closed with something of ours unread
      EXPECT_GE(got, 0) << "the server neither answers nor closes: " << std::strerror(errno);
      if (got <= 0) break;
      have += static_cast<std::size_t>(got);
    }
    bytes.resize(have);
    return bytes;
  }
  std::optional<std::uint64_t> receive_integer(std::size_t size) {
    const Bytes bytes = receive(size);
    if (bytes.size() < size) return std::nullopt;
    std::uint64_t value = 0;
    for (const std::byte byte : bytes) value = value << 8 | std::to_integer<std::uint64_t>(byte);
    return value;
  }
  // Everything until the server closes.
  Bytes receive_rest() {
    Bytes all;
    for (;;) {
      const Bytes more = receive(1);
      if (more.empty()) return all;
      all.insert(all.end(), more.begin(), more.end());
    }
  }
  bool is_closed() { return receive(1).empty(); }

  struct OptionReply {
    std::uint32_t option = 0;
    std::uint32_t type = 0;
    Bytes data;
  };
  std::optional<OptionReply> receive_option_reply() {
    const auto magic = receive_integer(8);
    const auto option = receive_integer(4);
    const auto type = receive_integer(4);
    const auto length = receive_integer(4);
    if (!length) return std::nullopt;
    EXPECT_EQ(magic.value(), 0x3e889045565a9U);
    return OptionReply{static_cast<std::uint32_t>(option.value()),
                       static_cast<std::uint32_t>(type.value()), receive(length.value())};
  }
  struct SimpleReply {
    std::uint32_t error = 0;
    std::uint64_t cookie = 0;
    bool operator==(const SimpleReply&) const = default;
  };
  std::optional<SimpleReply> receive_simple_reply() {
    const auto magic = receive_integer(4);
    const auto error = receive_integer(4);
    const auto cookie = receive_integer(8);
    if (!cookie) return std::nullopt;
    EXPECT_EQ(magic.value(), 0x67446698U);
    return SimpleReply{static_cast<std::uint32_t>(error.value()), cookie.value()};
  }

  // From the greeting to the transmission phase.
  void enter_transmission(const std::string& name = "vda") {
    ASSERT_EQ(receive(18).size(), 18U);
    ASSERT_TRUE(u32(3).go(name).send());
    for (;;) {
      const auto reply = receive_option_reply();
      ASSERT_TRUE(reply.has_value());
      if (reply->type == 1) return;
      ASSERT_EQ(reply->type, 3U);
    }
  }

  void close() { socket_.reset(); }

 private:
  RawClient& integer(std::uint64_t value, unsigned size) {
    for (unsigned byte = size; byte > 0; --byte) {
      pending_.push_back(static_cast<std::byte>(value >> (8 * (byte - 1))));
    }
    return *this;
  }

  UniqueFd socket_;
  Bytes pending_;
};

}  // namespace drover::mirror
