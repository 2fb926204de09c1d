// SPDX-License-Identifier: Apache-2.0
//
// QEMU's mirror job writing into the NBD server, as in life except that a qemu-storage-daemon
// stands for the virtual machine: its NBD export is where the test, playing the guest, writes. What
// holds here is what the arbiter (mirror/arbiter.h) and the design build upon.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libnbd.h>
#include <sys/stat.h>

#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "base/subprocess.h"
#include "tests/contract/nbd_fixture.h"

namespace drover::mirror {
namespace {

using nlohmann::json;
using Kind = NbdRequest::Kind;

constexpr Length kSize = 16_MiB;

// A qemu-storage-daemon with a raw file as its node "source", exported writable, and its QMP
// monitor.
class StorageDaemon {
 public:
  explicit StorageDaemon(const TemporaryDirectory& directory)
      : image_(directory / "source.raw"), export_(directory / "export.sock") {
    const UniqueFd file(::open(image_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    CHECK(::ftruncate(file.get(), static_cast<off_t>(kSize.bytes())) == 0, "there is space");
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "a socket pair");
    monitor_ = UniqueFd(ends[0]);
    const UniqueFd theirs(ends[1]);
    const timeval patience{.tv_sec = kPatience.count(), .tv_usec = 0};
    ::setsockopt(monitor_.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    // Another QEMU than the installed one can be tried.
    const char* program = std::getenv("DROVER_TEST_QEMU_STORAGE_DAEMON");
    auto started =
        ChildProcess::start({program != nullptr ? program : "qemu-storage-daemon", "--chardev",
                             "stdio,id=qmp", "--monitor", "chardev=qmp", "--blockdev",
                             "driver=file,node-name=file,discard=unmap,filename=" + image_,
                             "--blockdev", "driver=raw,node-name=source,discard=unmap,file=file",
                             "--nbd-server", "addr.type=unix,addr.path=" + export_, "--export",
                             "type=nbd,id=guest,node-name=source,name=source,writable=on"},
                            {.input = theirs.get(), .output = theirs.get()});
    CHECK(started.has_value(), started ? "" : started.error().message.c_str());
    process_.emplace(std::move(*started));
    EXPECT_TRUE(receive().contains("QMP")) << process_->error_output();
    EXPECT_TRUE(call("qmp_capabilities").contains("return"));
  }

  [[nodiscard]] std::string export_uri() const { return "nbd+unix:///source?socket=" + export_; }

  json call(const std::string& command, const json& arguments = json::object()) {
    const std::string line = json{{"execute", command}, {"arguments", arguments}}.dump() + "\n";
    EXPECT_EQ(::send(monitor_.get(), line.data(), line.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(line.size()));
    for (;;) {
      json answer = receive();
      if (!answer.contains("event")) return answer;
      events_.push_back(std::move(answer));
    }
  }

  // The next such event, also one that came meanwhile.
  json wait_for_event(const std::string& name) {
    for (;;) {
      const auto found = std::find_if(events_.begin(), events_.end(),
                                      [&](const json& each) { return each.at("event") == name; });
      if (found != events_.end()) {
        json event = std::move(*found);
        events_.erase(found);
        return event;
      }
      json next = receive();
      if (!next.contains("event")) return next;  // the daemon is gone, or mute
      events_.push_back(std::move(next));
    }
  }

  void start_mirror(const TestServer& server) {
    json answer =
        call("blockdev-add", {{"driver", "nbd"},
                              {"node-name", "drover-target"},
                              {"server", {{"type", "unix"}, {"path", server.socket_path()}}},
                              {"export", "vda"}});
    ASSERT_TRUE(answer.contains("return")) << answer.dump();
    answer = call("blockdev-mirror", {{"job-id", "drover-mirror"},
                                      {"device", "source"},
                                      {"target", "drover-target"},
                                      {"sync", "none"},
                                      {"copy-mode", "write-blocking"}});
    ASSERT_TRUE(answer.contains("return")) << answer.dump();
    ASSERT_TRUE(wait_for_event("BLOCK_JOB_READY").contains("event"));
  }
  [[nodiscard]] std::size_t jobs() { return call("query-block-jobs").at("return").size(); }

  // What the source holds now, as the copier would read it.
  [[nodiscard]] Bytes source(Extent extent) const {
    const UniqueFd file(::open(image_.c_str(), O_RDONLY | O_CLOEXEC));
    Bytes bytes(extent.length.bytes());
    const ssize_t got =
        ::pread(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(extent.offset.bytes()));
    CHECK(got == static_cast<ssize_t>(bytes.size()), "the source can be read");
    return bytes;
  }
  [[nodiscard]] Bytes source() const { return source({Offset(0), kSize}); }

 private:
  json receive() {
    for (;;) {
      const std::size_t end = input_.find('\n');
      if (end != std::string::npos) {
        json message = json::parse(input_.substr(0, end), nullptr, false);
        input_.erase(0, end + 1);
        return message;
      }
      char bytes[4096];
      const ssize_t got = ::recv(monitor_.get(), bytes, sizeof bytes, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        ADD_FAILURE() << "qemu-storage-daemon says nothing: " << process_->error_output();
        return json::object();
      }
      input_.append(bytes, static_cast<std::size_t>(got));
    }
  }

  const std::string image_;
  const std::string export_;
  UniqueFd monitor_;
  std::optional<ChildProcess> process_;
  std::string input_;
  std::vector<json> events_;
};

class NbdMirrorTest : public testing::Test {
 protected:
  void SetUp() override {
    daemon_.emplace(directory_);
    server_.emplace(TestServer::Config{
        .size = kSize, .on_request = [this](const NbdRequest& request) { on_request(request); }});
    ASSERT_TRUE(guest_.connect(daemon_->export_uri()));
    daemon_->start_mirror(*server_);
  }

  // QEMU completes a write on the source before it sends it here.
  void on_request(const NbdRequest& request) {
    if (request.kind == Kind::Flush || request.kind == Kind::Discard) return;
    Bytes expected(request.payload.begin(), request.payload.end());
    if (request.kind == Kind::Zero) expected.resize(request.extent.length.bytes());
    EXPECT_TRUE(daemon_->source(request.extent) == expected)
        << "the source does not have the mirrored write at " << request.extent.offset.bytes();
  }

  [[nodiscard]] std::vector<Seen> seen_writes() {
    std::vector<Seen> writes;
    for (const Seen& seen : server_->seen()) {
      if (seen.kind == Kind::Write) writes.push_back(seen);
    }
    return writes;
  }
  testing::AssertionResult guest_writes(std::uint64_t offset, const Bytes& bytes) {
    if (nbd_pwrite(guest_, bytes.data(), bytes.size(), offset, 0) == 0) {
      return testing::AssertionSuccess();
    }
    return testing::AssertionFailure() << nbd_get_error();
  }

  TemporaryDirectory directory_;
  std::optional<StorageDaemon> daemon_;
  std::optional<TestServer> server_;
  NbdClient guest_;
  Random random_{11};
};

int count_done(void* user, int* error) {
  EXPECT_EQ(*error, 0);
  ++*static_cast<int*>(user);
  return 1;
}

TEST_F(NbdMirrorTest, EveryWriteShowsUpOnceTheSourceHasIt) {
  constexpr int kWrites = 500;
  std::vector<Bytes> payloads;
  int done = 0;
  const nbd_completion_callback callback{
      .callback = count_done, .user_data = &done, .free = nullptr};
  for (int i = 0; i < kWrites; ++i) {
    while (nbd_aio_in_flight(guest_) >= 16) ASSERT_EQ(nbd_poll(guest_, 60000), 1);
    const std::uint64_t max = random_.one_in(20) ? 300000 : 5000;
    const std::uint64_t length = 1 + random_.below(max);
    const std::uint64_t offset = random_.below(kSize.bytes() - length + 1);
    const std::uint32_t fua = random_.one_in(4) ? LIBNBD_CMD_FLAG_FUA : 0;
    if (random_.one_in(6)) {
      ASSERT_GE(nbd_aio_zero(guest_, length, offset, callback, fua), 0);
    } else if (random_.one_in(10)) {
      // Whole blocks, so that the file reads as zeroes afterwards.
      ASSERT_GE(nbd_aio_trim(guest_, 8192, offset / 4096 * 4096 / 2, callback, fua), 0);
    } else if (random_.one_in(20)) {
      ASSERT_GE(nbd_aio_flush(guest_, callback, 0), 0);
    } else {
      payloads.push_back(random_bytes(random_, length));
      ASSERT_GE(nbd_aio_pwrite(guest_, payloads.back().data(), length, offset, callback, fua), 0);
    }
  }
  guest_.finish();
  EXPECT_EQ(done, kWrites);
  EXPECT_EQ(daemon_->jobs(), 1U);
  EXPECT_TRUE(server_->model() == daemon_->source());
}

TEST_F(NbdMirrorTest, AGuestWriteIsDoneWhenTheServerSaysSo) {
  server_->hold(true);
  const Bytes bytes(4096, std::byte{0x77});
  int done = 0;
  ASSERT_GE(nbd_aio_pwrite(guest_, bytes.data(), bytes.size(), 8192,
                           {.callback = count_done, .user_data = &done, .free = nullptr}, 0),
            0);
  ASSERT_TRUE(server_->wait_for_held(1));
  EXPECT_TRUE(daemon_->source({Offset(8192), 4_KiB}) == bytes);
  EXPECT_EQ(nbd_poll(guest_, 0), 0) << "the write was answered before the mirror was";
  EXPECT_EQ(done, 0);
  server_->answer(0, 0);
  guest_.finish();
  EXPECT_EQ(done, 1);
}

TEST_F(NbdMirrorTest, LongWritesAreSplitAtTheMaximum) {
  ASSERT_TRUE(guest_writes(512, random_bytes(random_, (4_MiB).bytes())));
  std::uint64_t next = 512;
  for (const Seen& seen : seen_writes()) {
    EXPECT_LE(seen.extent.length, 1_MiB);
    EXPECT_EQ(seen.extent.offset.bytes(), next);
    next = seen.extent.end().bytes();
  }
  EXPECT_EQ(next, 512 + (4_MiB).bytes());
  EXPECT_TRUE(server_->model() == daemon_->source());
}

// Without SEND_FAST_ZERO QEMU would refuse to pass this on, and end the job.
TEST_F(NbdMirrorTest, FastZeroesAreMirrored) {
  ASSERT_TRUE(guest_writes(0, random_bytes(random_, 65536)));
  ASSERT_EQ(nbd_zero(guest_, 4096, 4096, LIBNBD_CMD_FLAG_FAST_ZERO), 0) << nbd_get_error();
  EXPECT_EQ(daemon_->jobs(), 1U);
  EXPECT_TRUE(server_->model() == daemon_->source());
}

// Why FUA and flushes may be answered at once: see nbd_server.h.
TEST_F(NbdMirrorTest, TheGuestsFlushesGoToTheSourceOnly) {
  const auto flushes = [&] {
    const std::vector<Seen> seen = server_->seen();
    return std::count_if(seen.begin(), seen.end(),
                         [](const Seen& each) { return each.kind == Kind::Flush; });
  };
  EXPECT_EQ(flushes(), 1) << "the job's own, before it is ready";
  ASSERT_TRUE(guest_writes(0, random_bytes(random_, 512)));
  ASSERT_EQ(nbd_flush(guest_, 0), 0);
  EXPECT_EQ(flushes(), 1);
}

TEST_F(NbdMirrorTest, KillingTheServerEndsTheJobAndNoWriteFails) {
  server_->hold(true);
  std::vector<Bytes> payloads;
  int done = 0;
  for (std::uint64_t i = 0; i < 5; ++i) {
    payloads.push_back(random_bytes(random_, 4096));
    ASSERT_GE(nbd_aio_pwrite(guest_, payloads.back().data(), 4096, i * 65536,
                             {.callback = count_done, .user_data = &done, .free = nullptr}, 0),
              0);
  }
  ASSERT_TRUE(server_->wait_for_held(5));
  server_->stop();
  guest_.finish();
  EXPECT_EQ(done, 5) << "each without an error";
  const json end = daemon_->wait_for_event("BLOCK_JOB_COMPLETED");
  ASSERT_TRUE(end.contains("data"));
  EXPECT_TRUE(end.at("data").contains("error")) << end.dump();
  EXPECT_EQ(daemon_->jobs(), 0U);
  ASSERT_TRUE(guest_writes(0, payloads.at(4)));
  EXPECT_TRUE(daemon_->source({Offset(0), 4_KiB}) == payloads.at(4));
  EXPECT_TRUE(daemon_->call("blockdev-del", {{"node-name", "drover-target"}}).contains("return"));
}

TEST_F(NbdMirrorTest, AnIdleMirrorsServerMayGoToo) {
  ASSERT_TRUE(guest_writes(0, random_bytes(random_, 512)));
  server_->stop();
  const Bytes bytes = random_bytes(random_, 512);
  ASSERT_TRUE(guest_writes(1024, bytes));
  EXPECT_TRUE(daemon_->wait_for_event("BLOCK_JOB_COMPLETED").contains("data"));
  EXPECT_EQ(daemon_->jobs(), 0U);
  EXPECT_TRUE(daemon_->source({Offset(1024), Length(512)}) == bytes);
}

TEST_F(NbdMirrorTest, AnErrorOfTheMirrorIsNotTheGuests) {
  server_->hold(true);
  const Bytes bytes = random_bytes(random_, 4096);
  int done = 0;
  ASSERT_GE(nbd_aio_pwrite(guest_, bytes.data(), bytes.size(), 0,
                           {.callback = count_done, .user_data = &done, .free = nullptr}, 0),
            0);
  ASSERT_TRUE(server_->wait_for_held(1));
  server_->answer(0, ENOSPC);
  guest_.finish();
  EXPECT_EQ(done, 1) << "without an error";
  EXPECT_TRUE(daemon_->wait_for_event("BLOCK_JOB_COMPLETED").contains("data"));
  EXPECT_EQ(daemon_->jobs(), 0U);
}

// The connection of a mirror job that ends is closed when its node goes, in order.
TEST_F(NbdMirrorTest, CancellingTheJobAndRemovingTheNodeDisconnects) {
  ASSERT_TRUE(guest_writes(0, random_bytes(random_, 512)));
  ASSERT_TRUE(daemon_->call("block-job-cancel", {{"device", "drover-mirror"}, {"force", true}})
                  .contains("return"));
  ASSERT_TRUE(daemon_->wait_for_event("BLOCK_JOB_CANCELLED").contains("event"));
  EXPECT_TRUE(server_->disconnects().empty());
  ASSERT_TRUE(daemon_->call("blockdev-del", {{"node-name", "drover-target"}}).contains("return"));
  ASSERT_TRUE(server_->wait_for_disconnects(1));
  EXPECT_EQ(server_->disconnects().at(0).message, "the NBD client disconnected");
  EXPECT_EQ(server_->connects(), 1U);
  // And the next mirror may come.
  daemon_->start_mirror(*server_);
  ASSERT_TRUE(guest_writes(0, random_bytes(random_, 512)));
  EXPECT_EQ(server_->connects(), 2U);
}

}  // namespace
}  // namespace drover::mirror
