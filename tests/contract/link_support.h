// SPDX-License-Identifier: Apache-2.0
//
// What the tests of the link share: images in memory whose writes complete in any order, or not
// until a test lets them; a receiver in this process; the source's end with its engine thread; a
// relay on the network path that can stall and cut connections. Everything ends with its object.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/loop.h"
#include "base/random.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"
#include "mirror/connect.h"
#include "mirror/link.h"
#include "mirror/receiver.h"
#include "mirror/session.h"
#include "mirror/socket.h"

namespace drover::mirror::test {

using namespace std::chrono_literals;
using Bytes = std::vector<std::byte>;

// For what must happen; a test that waits so long has failed.
inline constexpr std::chrono::seconds kPatience{60};

inline Bytes random_bytes(Random& random, std::size_t count) {
  Bytes bytes(count + 8);
  for (std::size_t i = 0; i < count; i += 8) {
    const std::uint64_t value = random.next();
    std::memcpy(bytes.data() + i, &value, sizeof value);
  }
  bytes.resize(count);
  return bytes;
}

inline std::span<const std::byte> part(const Bytes& bytes, const Extent& extent) {
  return std::span(bytes).subspan(extent.offset.bytes(), extent.length.bytes());
}

class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "drover-link.XXXXXX").string();
    if (::mkdtemp(name.data()) != nullptr) path_ = name;
    EXPECT_FALSE(path_.empty());
  }
  ~TempDir() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// A disk in memory. Its writers apply a write when they complete it: later, in a random order.
class ModelDisk {
 public:
  ModelDisk(Length size, std::uint64_t seed) : bytes_(size.bytes()), seed_(seed) {}

  [[nodiscard]] Length size() const { return Length(bytes_.size()); }
  // A copy, for the lock shows a thread sanitizer what orders it after the lanes' writes (sockets
  // and the kernel do, which it does not see).
  [[nodiscard]] Bytes bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }
  std::atomic<bool> flushed{false};
  std::atomic<bool> released{false};
  std::atomic<bool> removed{false};
  std::atomic<unsigned> writers{0};
  std::atomic<bool> alive{true};  // its process
  std::atomic<unsigned> lives{1};
  [[nodiscard]] std::string holder() const { return std::to_string(lives.load()); }
  // Writes that touch this offset fail with NoSpace.
  std::atomic<std::uint64_t> full_from{UINT64_MAX};

  // Closed: no write completes.
  void close_gate() {
    const std::lock_guard lock(mutex_);
    open_ = false;
  }
  void open_gate() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    for (const auto& one : wake_) one();
    wake_.clear();
  }

  Result<std::unique_ptr<blockcopy::TargetImage>> open_again(const blockcopy::TargetSpec& spec) {
    ++lives;
    alive = true;
    return create(spec);
  }
  Result<std::unique_ptr<blockcopy::TargetImage>> create(const blockcopy::TargetSpec& spec) {
    return std::unique_ptr<blockcopy::TargetImage>(new Image(*this, spec));
  }

 private:
  class Writer final : public blockcopy::ImageWriter {
   public:
    Writer(ModelDisk& disk, Loop& loop, std::uint64_t seed)
        : disk_(disk), loop_(loop), random_(seed) {
      ++disk_.writers;
    }
    ~Writer() override {
      const std::lock_guard lock(disk_.mutex_);
      EXPECT_TRUE(waiting_.empty());
      --disk_.writers;
    }
    [[nodiscard]] Length size() const override { return Length(disk_.bytes_.size()); }
    [[nodiscard]] Length alignment() const override { return Length(512); }
    void write(Offset offset, std::span<const std::byte> buffer, blockcopy::Done done) override {
      add(offset.bytes(), buffer.size(), buffer.data(), std::move(done));
    }
    void write_zeroes(Extent extent, blockcopy::Done done) override {
      add(extent.offset.bytes(), extent.length.bytes(), nullptr, std::move(done));
    }

   private:
    struct Request {
      std::uint64_t offset;
      std::uint64_t length;
      const std::byte* from;
      blockcopy::Done done;
    };
    void add(std::uint64_t offset, std::uint64_t length, const std::byte* from,
             blockcopy::Done done) {
      waiting_.push_back({offset, length, from, std::move(done)});
      schedule();
    }
    void schedule() {
      if (scheduled_) return;
      scheduled_ = true;
      const std::lock_guard lock(disk_.mutex_);
      if (disk_.open_) {
        loop_.at(Instant(), [this] { complete(); });
      } else {
        disk_.wake_.push_back([this] { loop_.post([this] { complete(); }); });
      }
    }
    // One of the waiting, any; the rest later.
    void complete() {
      scheduled_ = false;
      const std::size_t chosen = random_.below(waiting_.size());
      const Request request = std::move(waiting_[chosen]);
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(chosen));
      Status status;
      if (!disk_.alive) {
        status = fail(Code::Unreachable, "writing to the model: its process is gone");
      } else if (request.offset + request.length > disk_.full_from) {
        status = fail(Code::NoSpace, "writing to the model: no space left on device");
      } else if (const std::lock_guard lock(disk_.mutex_); request.from == nullptr) {
        std::memset(disk_.bytes_.data() + request.offset, 0, request.length);
      } else {
        std::memcpy(disk_.bytes_.data() + request.offset, request.from, request.length);
      }
      if (!waiting_.empty()) schedule();
      request.done(std::move(status));
    }

    ModelDisk& disk_;
    Loop& loop_;
    Random random_;
    std::vector<Request> waiting_;
    bool scheduled_ = false;
  };

  class Reader final : public blockcopy::ImageReader {
   public:
    Reader(ModelDisk& disk, Loop& loop) : disk_(disk), loop_(loop) {}
    [[nodiscard]] Length size() const override { return disk_.size(); }
    [[nodiscard]] Length alignment() const override { return Length(512); }
    void read(Offset offset, std::span<std::byte> buffer, blockcopy::Done done) override {
      loop_.at(Instant(), [this, offset, buffer, done = std::move(done)] {
        {
          const std::lock_guard lock(disk_.mutex_);
          std::memcpy(buffer.data(), disk_.bytes_.data() + offset.bytes(), buffer.size());
        }
        done({});
      });
    }
    void extents(Extent range, blockcopy::ExtentsDone done) override {
      loop_.at(Instant(), [range, done = std::move(done)] { done(std::vector{blockcopy::MappedExtent{range, true}}); });
    }

   private:
    ModelDisk& disk_;
    Loop& loop_;
  };

  class Image final : public blockcopy::TargetImage {
   public:
    Image(ModelDisk& disk, blockcopy::TargetSpec spec) : disk_(disk), spec_(std::move(spec)) {}
    [[nodiscard]] const blockcopy::TargetSpec& spec() const override { return spec_; }
    [[nodiscard]] bool initially_zero() const override { return true; }
    [[nodiscard]] blockcopy::ImageIdentity identity() const override { return {}; }
    [[nodiscard]] std::string holder() const override { return disk_.holder(); }
    [[nodiscard]] bool alive() override { return disk_.alive; }
    Result<std::unique_ptr<blockcopy::ImageReader>> open_reader(Loop& loop) override {
      return std::unique_ptr<blockcopy::ImageReader>(new Reader(disk_, loop));
    }
    Result<std::unique_ptr<blockcopy::ImageWriter>> open_writer(Loop& loop) override {
      return std::unique_ptr<blockcopy::ImageWriter>(new Writer(disk_, loop, ++disk_.seed_));
    }
    Status flush() override {
      disk_.flushed = true;
      return {};
    }
    Status release() override {
      EXPECT_EQ(disk_.writers, 0U);
      disk_.flushed = true;
      disk_.released = true;
      return {};
    }
    Status remove() override {
      EXPECT_EQ(disk_.writers, 0U);
      disk_.removed = true;
      return {};
    }

   private:
    ModelDisk& disk_;
    blockcopy::TargetSpec spec_;
  };

  Bytes bytes_;
  std::atomic<std::uint64_t> seed_;
  mutable std::mutex mutex_;
  bool open_ = true;
  std::vector<std::function<void()>> wake_;
};

// A receiver on a thread of this process.
class TestReceiver {
 public:
  explicit TestReceiver(ReceiverOptions options) {
    options.listen.address = "127.0.0.1";
    auto made = Receiver::create(std::move(options));
    EXPECT_TRUE(made.has_value()) << made.error().to_string();
    if (!made) return;
    receiver_ = std::move(*made);
    port_ = receiver_->port();
    std::promise<Status> ended;
    ended_ = ended.get_future();
    thread_ = std::thread(
        [this, promise = std::move(ended)]() mutable { promise.set_value(receiver_->run()); });
  }
  ~TestReceiver() {
    if (!thread_.joinable()) return;
    receiver_->stop();
    thread_.join();
  }
  TestReceiver(const TestReceiver&) = delete;
  TestReceiver& operator=(const TestReceiver&) = delete;

  [[nodiscard]] std::uint16_t port() const { return port_; }
  [[nodiscard]] std::string directory() const { return receiver_->record().directory(); }
  void stop() { receiver_->stop(); }
  // Why the session ended.
  Status wait() {
    if (ended_.wait_for(kPatience) != std::future_status::ready) {
      ADD_FAILURE() << "the receiver does not end";
      return fail(Code::Internal, "the receiver does not end");
    }
    return ended_.get();
  }
  [[nodiscard]] bool running() const { return ended_.wait_for(0s) != std::future_status::ready; }

 private:
  std::unique_ptr<Receiver> receiver_;
  std::uint16_t port_ = 0;
  std::future<Status> ended_;
  std::thread thread_;
};

// The source: an engine thread, a link, and what was answered.
class TestSource final : public Answers {
 public:
  explicit TestSource(std::size_t buffers = 64) : pool_(1_MiB, buffers) {
    auto made = Loop::create();
    EXPECT_TRUE(made.has_value());
    loop_ = std::move(*made);
    pool_.on_available([this] {
      const std::lock_guard lock(mutex_);
      changed_.notify_all();
    });
    thread_ = std::thread([this] { loop_->run(); });
  }
  ~TestSource() override {
    disconnect();
    loop_->stop();
    thread_.join();
  }
  TestSource(const TestSource&) = delete;
  TestSource& operator=(const TestSource&) = delete;

  Status connect(const LinkOptions& options) {
    auto made = Link::connect(*loop_, options, *this);
    if (!made) return fail(std::move(made).error());
    link_ = std::move(*made);
    return {};
  }
  void disconnect() {
    on_engine([this] { link_.reset(); });
  }
  [[nodiscard]] Link& link() { return *link_; }

  void on_engine(const std::function<void()>& task) {
    std::promise<void> done;
    loop_->post([&] {
      task();
      done.set_value();
    });
    done.get_future().wait();
  }

  // Waits for a free buffer, copies `content` to it, queues the frame. `token` may be any number.
  void send(std::uint32_t lane, OutFrame frame, std::span<const std::byte> content) {
    if (!content.empty()) {
      frame.buffer = take_buffer();
      std::ranges::copy(content, frame.buffer.bytes().begin());
      frame.content = frame.buffer.bytes().first(content.size());
    }
    {
      const std::lock_guard lock(mutex_);
      ++sent_;
    }
    auto shared = std::make_shared<OutFrame>(std::move(frame));
    loop_->post([this, lane, shared] { link_->send(lane, std::move(*shared)); });
  }
  void copy(std::uint32_t lane, std::uint16_t disk, const Bytes& disk_bytes, Extent extent,
            bool fresh, std::uint64_t token = 0) {
    send(lane,
         {.type = FrameType::Copy, .disk = disk, .extent = extent, .fresh = fresh, .token = token},
         part(disk_bytes, extent));
  }
  void write(std::uint32_t lane, std::uint16_t disk, const Bytes& disk_bytes, Extent extent,
             std::uint64_t token = 0) {
    send(lane, {.type = FrameType::Write, .disk = disk, .extent = extent, .token = token},
         part(disk_bytes, extent));
  }
  void zero(std::uint32_t lane, std::uint16_t disk, Extent extent, std::uint64_t token = 0) {
    send(lane, {.type = FrameType::Zero, .disk = disk, .extent = extent, .token = token}, {});
  }
  void compare(std::uint32_t lane, std::uint16_t disk, const Bytes& disk_bytes, Extent extent,
               std::uint64_t token = 0) {
    send(lane, {.type = FrameType::Compare, .disk = disk, .extent = extent, .token = token},
         part(disk_bytes, extent));
  }
  bool abandon(std::uint32_t lane, std::uint64_t token) {
    bool dropped = false;
    on_engine([&] { dropped = link_->abandon(lane, 0, token); });
    if (dropped) {
      const std::lock_guard lock(mutex_);
      --sent_;
    }
    return dropped;
  }

  // Until every frame that was sent is answered.
  [[nodiscard]] bool wait_answers() {
    return wait([this] { return applied_.size() + differing_.size() + refused_.size() >= sent_; });
  }
  [[nodiscard]] bool wait_down(std::size_t times = 1) {
    return wait([this, times] { return downs_.size() >= times; });
  }
  [[nodiscard]] bool wait_up(std::size_t times = 1) {
    return wait([this, times] { return ups_.size() >= times; });
  }
  [[nodiscard]] bool wait_failed() {
    return wait([this] { return failed_.has_value(); });
  }
  // Sends the whole of `disk` in chunks, and what was lost with the link again, until all is
  // applied.
  [[nodiscard]] bool deliver(const Bytes& disk, Length chunk, std::uint32_t lanes) {
    const std::uint64_t count = (disk.size() + chunk.bytes() - 1) / chunk.bytes();
    std::size_t ups = 0;
    while (true) {
      std::vector<std::uint64_t> missing;
      {
        const std::lock_guard lock(mutex_);
        ups = ups_.size();
        for (std::uint64_t i = 0; i < count; ++i) {
          if (std::ranges::count(applied_, i) == 0) missing.push_back(i);
        }
      }
      if (missing.empty()) return true;
      for (const std::uint64_t i : missing) {
        const std::uint64_t at = i * chunk.bytes();
        const Extent extent{Offset(at), Length(std::min(chunk.bytes(), disk.size() - at))};
        copy(static_cast<std::uint32_t>(i % lanes), 0, disk, extent, false, i);
      }
      const bool moved = wait([&] {
        return ups_.size() > ups || std::ranges::all_of(missing, [&](std::uint64_t i) {
                 return std::ranges::count(applied_, i) > 0;
               });
      });
      if (!moved) return false;
    }
  }
  [[nodiscard]] bool wait_applied(std::size_t count) {
    return wait([this, count] { return applied_.size() >= count; });
  }
  [[nodiscard]] std::vector<std::uint64_t> applied_tokens() {
    const std::lock_guard lock(mutex_);
    return applied_;
  }
  // How many of these were answered before the link came up again, the last time.
  [[nodiscard]] std::size_t answered_before_up() {
    const std::lock_guard lock(mutex_);
    return answered_before_up_;
  }
  [[nodiscard]] std::vector<std::uint64_t> differing_tokens() {
    const std::lock_guard lock(mutex_);
    return differing_;
  }
  // Compares all of disk 0 with `disk`, block by block of `length`; where it differs.
  [[nodiscard]] std::vector<std::uint64_t> differences(const Bytes& disk, Length length) {
    constexpr std::uint64_t kFirstToken = std::uint64_t{1} << 40;
    const std::size_t before = differing_tokens().size();
    for (std::uint64_t at = 0; at < disk.size(); at += length.bytes()) {
      compare(0, 0, disk, {Offset(at), Length(std::min(length.bytes(), disk.size() - at))},
              kFirstToken + at);
    }
    EXPECT_TRUE(wait_answers());
    std::vector<std::uint64_t> found = differing_tokens();
    found.erase(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(before));
    for (std::uint64_t& token : found) token -= kFirstToken;
    std::ranges::sort(found);
    return found;
  }
  [[nodiscard]] std::map<std::uint64_t, Error> refused_tokens() {
    const std::lock_guard lock(mutex_);
    return refused_;
  }
  [[nodiscard]] std::vector<Error> downs() {
    const std::lock_guard lock(mutex_);
    return downs_;
  }
  [[nodiscard]] std::vector<std::vector<TargetDisk>> ups() {
    const std::lock_guard lock(mutex_);
    return ups_;
  }
  [[nodiscard]] std::optional<Error> failed() {
    const std::lock_guard lock(mutex_);
    return failed_;
  }

 private:
  void applied(std::uint32_t, std::uint16_t, std::uint64_t token) override {
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(downs_.size(), ups_.size()) << "an answer came while the link was down";
    applied_.push_back(token);
    changed_.notify_all();
  }
  void differs(std::uint32_t, std::uint16_t, std::uint64_t token, const BlockMask& blocks) override {
    EXPECT_FALSE(blocks.empty());
    const std::lock_guard lock(mutex_);
    differing_.push_back(token);
    changed_.notify_all();
  }
  void refused(std::uint32_t, std::uint16_t, std::uint64_t token, const Error& error) override {
    const std::lock_guard lock(mutex_);
    refused_.emplace(token, error);
    changed_.notify_all();
  }
  void link_down(const Error& error) override {
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(downs_.size(), ups_.size()) << "a link that is down went down";
    downs_.push_back(error);
    changed_.notify_all();
  }
  void link_up(const std::vector<TargetDisk>& disks) override {
    const std::lock_guard lock(mutex_);
    ups_.push_back(disks);
    answered_before_up_ = applied_.size();
    EXPECT_EQ(downs_.size(), ups_.size()) << "a link that is up came up";
    changed_.notify_all();
  }
  void link_failed(const Error& error) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(failed_.has_value());
    failed_ = error;
    changed_.notify_all();
  }

  Buffer take_buffer() {
    Buffer buffer;
    EXPECT_TRUE(wait([&] {
      buffer = pool_.try_take();
      return static_cast<bool>(buffer);
    }));
    return buffer;
  }
  template <class Condition>
  bool wait(Condition condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, condition);
  }

  BufferPool pool_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<Link> link_;
  std::thread thread_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t sent_ = 0;
  std::vector<std::uint64_t> applied_;
  std::size_t answered_before_up_ = 0;
  std::vector<std::uint64_t> differing_;
  std::map<std::uint64_t, Error> refused_;
  std::vector<Error> downs_;
  std::vector<std::vector<TargetDisk>> ups_;
  std::optional<Error> failed_;
};

// Carries TCP connections to a port, and stalls or cuts them when told to: the network. Connections
// are numbered as they come: the link's control connection is 0, its lanes follow.
class Network {
 public:
  struct Options {
    std::string address = "127.0.0.1";
    std::uint16_t port = 0;
    std::uint64_t rate = 0;  // bytes per second, of all connections together; 0: no limit
  };
  explicit Network(std::uint16_t target) : Network(target, Options{}) {}
  Network(std::uint16_t target, const Options& options) : target_(target), rate_(options.rate) {
    auto made = listen_tcp({.address = options.address, .port = options.port});
    EXPECT_TRUE(made.has_value());
    listener_ = std::move(*made);
    // Little is on its way in a slow network.
    constexpr int kSlow = 128 << 10;
    if (rate_ > 0) ::setsockopt(listener_.fd.get(), SOL_SOCKET, SO_RCVBUF, &kSlow, sizeof kSlow);
    wake_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    thread_ = std::thread([this] { run(); });
  }
  ~Network() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake();
    thread_.join();
  }
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  [[nodiscard]] std::uint16_t port() const { return listener_.port; }
  // How many were made so far.
  [[nodiscard]] std::size_t connections() const { return next_; }
  // Nothing arrives any more, nothing is refused.
  void stall(std::size_t connection) { change(connection, Fate::Stalled); }
  void cut(std::size_t connection) { change(connection, Fate::Cut); }
  void cut_after(std::size_t connection, std::uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    cut_after_[connection] = bytes;
  }
  void stall_all() { change(SIZE_MAX, Fate::Stalled); }
  void cut_all() { change(SIZE_MAX, Fate::Cut); }
  // Carries again what stall_all() held back and new connections.
  void heal() { change(SIZE_MAX, Fate::Carried); }

 private:
  enum class Fate { Carried, Stalled, Cut };
  struct Pair {
    std::array<UniqueFd, 2> ends;  // source's, target's
    std::size_t number = 0;
    std::uint64_t carried = 0;  // from the source
    bool gone = false;
  };

  void change(std::size_t connection, Fate fate) {
    {
      const std::lock_guard lock(mutex_);
      if (connection == SIZE_MAX) {
        all_ = fate;
      } else {
        fates_[connection] = fate;
      }
    }
    wake();
  }
  void wake() const {
    const std::uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);
  }
  Fate fate_of(const Pair& pair) {
    if (all_ != Fate::Carried) return all_;
    if (const auto limit = cut_after_.find(pair.number);
        limit != cut_after_.end() && pair.carried >= limit->second) {
      return Fate::Cut;
    }
    const auto found = fates_.find(pair.number);
    return found == fates_.end() ? Fate::Carried : found->second;
  }

  void run() {
    while (true) {
      std::vector<pollfd> polled = {{wake_.get(), POLLIN, 0}, {listener_.fd.get(), POLLIN, 0}};
      {
        const std::lock_guard lock(mutex_);
        if (stop_) return;
        for (Pair& pair : pairs_) {
          if (fate_of(pair) == Fate::Cut) reset(pair);
        }
        std::erase_if(pairs_, [](const Pair& pair) { return pair.gone; });
        for (Pair& pair : pairs_) {
          const bool carried = fate_of(pair) == Fate::Carried;
          for (const UniqueFd& end : pair.ends) {
            polled.push_back({carried ? end.get() : -1, POLLIN, 0});
          }
        }
      }
      ::poll(polled.data(), polled.size(), -1);
      std::uint64_t count = 0;
      (void)!::read(wake_.get(), &count, sizeof count);
      std::size_t i = 2;
      for (Pair& pair : pairs_) {
        for (const std::size_t from : {0U, 1U}) {
          if (polled[i++].revents != 0 && !pair.gone) carry(pair, from);
        }
      }
      if (polled[1].revents != 0) accept_one();
    }
  }
  void accept_one() {
    Pair pair;
    pair.ends[0] = UniqueFd(::accept4(listener_.fd.get(), nullptr, nullptr, SOCK_CLOEXEC));
    auto out = connect_tcp("127.0.0.1", target_, now() + kPatience);
    if (!pair.ends[0] || !out) return;
    pair.ends[1] = std::move(*out);
    pair.number = next_++;
    pairs_.push_back(std::move(pair));
  }
  static void reset(Pair& pair) {
    for (UniqueFd& end : pair.ends) {
      const linger hard{1, 0};
      ::setsockopt(end.get(), SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
      end.reset();
    }
    pair.gone = true;
  }
  void carry(Pair& pair, std::size_t from) {
    const ssize_t count =
        ::recv(pair.ends.at(from).get(), buffer_.data(), buffer_.size(), MSG_DONTWAIT);
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) {
      pair.gone = true;
      for (UniqueFd& end : pair.ends) end.reset();
      return;
    }
    const auto size = static_cast<std::size_t>(count);
    if (from == 0) pair.carried += size;
    if (rate_ > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(size * 1'000'000'000 / rate_));
    for (std::size_t sent = 0; sent < size;) {
      // Blocks while the other end does not read; a stalled test must not wait for us.
      pollfd room{pair.ends.at(1 - from).get(), POLLOUT, 0};
      pollfd all[] = {room, {wake_.get(), POLLIN, 0}};
      ::poll(all, 2, -1);
      const ssize_t rc = ::send(pair.ends.at(1 - from).get(), buffer_.data() + sent, size - sent,
                                MSG_NOSIGNAL | MSG_DONTWAIT);
      if (rc > 0) sent += static_cast<std::size_t>(rc);
      if (rc < 0 && errno != EAGAIN) return;
      const std::lock_guard lock(mutex_);
      if (stop_ || fate_of(pair) != Fate::Carried) return;
    }
  }

  const std::uint16_t target_;
  const std::uint64_t rate_;
  Listener listener_;
  UniqueFd wake_;
  std::list<Pair> pairs_;  // the thread's
  std::atomic<std::size_t> next_ = 0;
  std::array<char, 65536> buffer_{};
  std::mutex mutex_;  // guards the following
  bool stop_ = false;
  Fate all_ = Fate::Carried;
  std::map<std::size_t, Fate> fates_;
  std::map<std::size_t, std::uint64_t> cut_after_;
  std::thread thread_;
};

}  // namespace drover::mirror::test
