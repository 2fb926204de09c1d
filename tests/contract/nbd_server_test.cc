// SPDX-License-Identifier: Apache-2.0
//
// The NBD server as its clients see it: libnbd, nbdinfo, qemu-io, and sockets that say what no
// honest client would. What the server was asked for is applied to a byte model; what the client
// asked for to another; they must be equal.
#include "mirror/nbd_server.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libnbd.h>
#include <sys/stat.h>

#include <cerrno>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <thread>

#include "base/subprocess.h"
#include "tests/contract/nbd_fixture.h"

namespace drover::mirror {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Kind = NbdRequest::Kind;

ProcessResult run(const std::vector<std::string>& argv) {
  auto result = run_process(argv, {.timeout = kPatience});
  EXPECT_TRUE(result.has_value()) << result.error().to_string();
  return result ? *result : ProcessResult{.exit_code = -1};
}

ProcessResult qemu_io(const TestServer& server, const std::vector<std::string>& commands) {
  std::vector<std::string> argv{"qemu-io", "-f", "raw"};
  for (const std::string& command : commands) {
    argv.emplace_back("-c");
    argv.push_back(command);
  }
  argv.push_back(server.uri());
  return run(argv);
}

void fill(Bytes& model, std::size_t offset, std::size_t length, unsigned char value) {
  std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(offset), length, std::byte{value});
}

struct Answer {
  int count = 0;
  int error = 0;
};

int record_answer(void* user, int* error) {
  auto& answer = *static_cast<Answer*>(user);
  ++answer.count;
  answer.error = *error;
  return 1;
}

// --- the tools users have ---

TEST(NbdServerTest, NbdinfoShowsWhatTheExportCanDo) {
  TestServer server;
  const ProcessResult result = run({"nbdinfo", "--json", server.uri()});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto info = nlohmann::json::parse(result.out);
  const auto& shown = info.at("exports").at(0);
  EXPECT_EQ(info.at("protocol"), "newstyle-fixed");
  EXPECT_EQ(shown.at("export-name"), "vda");
  EXPECT_EQ(shown.at("export-size"), (16_MiB).bytes());
  EXPECT_EQ(shown.at("block_size_minimum"), 1);
  EXPECT_EQ(shown.at("block_size_preferred"), 4096);
  EXPECT_EQ(shown.at("block_size_maximum"), (1_MiB).bytes());
  for (const char* yes : {"can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero"}) {
    EXPECT_EQ(shown.at(yes), true) << yes;
  }
  for (const char* no :
       {"is_read_only", "can_multi_conn", "can_cache", "can_df", "is_rotational"}) {
    EXPECT_EQ(shown.at(no), false) << no;
  }
}

TEST(NbdServerTest, NbdinfoListsTheOneExport) {
  TestServer server;
  const ProcessResult result =
      run({"nbdinfo", "--list", "--json", "nbd+unix:///?socket=" + server.socket_path()});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto exports = nlohmann::json::parse(result.out).at("exports");
  ASSERT_EQ(exports.size(), 1U);
  EXPECT_EQ(exports.at(0).at("export-name"), "vda");
}

TEST(NbdServerTest, QemuIoWritesWhatTheModelSays) {
  TestServer server;
  const ProcessResult result =
      qemu_io(server, {"write -P 0xa1 0 64k", "write -P 0xa2 4095 3", "write -f -P 0xa3 8192 512",
                       "write -z 16k 4k", "write -z -u 20k 4k", "discard 24k 4k", "flush",
                       "write -P 0xa4 16777215 1"});
  EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
  Bytes model((16_MiB).bytes());
  fill(model, 0, 65536, 0xa1);
  fill(model, 4095, 3, 0xa2);
  fill(model, 8192, 512, 0xa3);
  fill(model, 16384, 12288, 0);
  fill(model, 16777215, 1, 0xa4);
  EXPECT_TRUE(server.model() == model);
}

// What nbd_server.h says about QEMU and the maximum block size.
TEST(NbdServerTest, QemuSplitsWritesAtTheMaximum) {
  TestServer server({.buffer_size = 64_KiB, .buffers = 8});
  const ProcessResult result = qemu_io(server, {"write -P 7 100 1000000"});
  EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
  std::uint64_t expected = 100;
  for (const Seen& seen : server.seen()) {
    if (seen.kind != Kind::Write) continue;
    EXPECT_LE(seen.extent.length, 64_KiB);
    EXPECT_EQ(seen.extent.offset.bytes(), expected);
    expected = seen.extent.end().bytes();
  }
  EXPECT_EQ(expected, 1000100U);
}

TEST(NbdServerTest, QemuIoIsToldThatReadingIsNotPermitted) {
  TestServer server;
  const ProcessResult result = qemu_io(server, {"read 0 4k", "write -P 5 0 4k"});
  EXPECT_THAT(result.out + result.err, HasSubstr("read failed: Operation not permitted"));
  Bytes model((16_MiB).bytes());
  fill(model, 0, 4096, 5);
  EXPECT_TRUE(server.model() == model) << "the connection goes on after a refused read";
}

// --- libnbd: every command, flag and error ---

class NbdCommandTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(client_.connect(server_)); }

  // The command's errno, 0 for success. libnbd sets it from the server's answer.
  static int outcome(int rc) { return rc == 0 ? 0 : nbd_get_errno(); }
  int write(std::uint64_t offset, std::size_t length, std::uint32_t flags = 0) {
    const Bytes bytes(length + 1, std::byte{0x5a});  // libnbd wants a pointer also to nothing
    return outcome(nbd_pwrite(client_, bytes.data(), length, offset, flags));
  }
  int zero(std::uint64_t offset, std::uint64_t length, std::uint32_t flags = 0) {
    return outcome(nbd_zero(client_, length, offset, flags));
  }
  int trim(std::uint64_t offset, std::uint64_t length, std::uint32_t flags = 0) {
    return outcome(nbd_trim(client_, length, offset, flags));
  }
  int read(std::uint64_t offset, std::size_t length) {
    Bytes bytes(length);
    return outcome(nbd_pread(client_, bytes.data(), length, offset, 0));
  }
  void TearDown() override {
    // Whatever was refused: the connection is as good as before.
    EXPECT_EQ(write(0, 1), 0);
    EXPECT_TRUE(server_.disconnects().empty());
  }

  static constexpr std::uint64_t kSize = std::uint64_t{16} << 20;
  TestServer server_;
  NbdClient client_;
};

TEST_F(NbdCommandTest, EveryCommandArrivesAsWhatItIs) {
  EXPECT_EQ(write(4096, 512), 0);
  EXPECT_EQ(write(4608, 7, LIBNBD_CMD_FLAG_FUA), 0);
  EXPECT_EQ(zero(8192, 100), 0);
  EXPECT_EQ(zero(8292, 100, LIBNBD_CMD_FLAG_FUA | LIBNBD_CMD_FLAG_NO_HOLE), 0);
  EXPECT_EQ(zero(0, kSize, LIBNBD_CMD_FLAG_FAST_ZERO), 0);
  EXPECT_EQ(trim(1, 2), 0);
  EXPECT_EQ(trim(0, kSize, LIBNBD_CMD_FLAG_FUA), 0);
  EXPECT_EQ(outcome(nbd_flush(client_, 0)), 0);
  const auto seen = server_.seen();
  ASSERT_EQ(seen.size(), 8U);
  const auto is = [&](std::size_t at, Kind kind, std::uint64_t offset, std::uint64_t length) {
    EXPECT_EQ(seen.at(at).kind, kind) << at;
    EXPECT_EQ(seen.at(at).extent, (Extent{Offset(offset), Length(length)})) << at;
  };
  is(0, Kind::Write, 4096, 512);
  is(1, Kind::Write, 4608, 7);
  is(2, Kind::Zero, 8192, 100);
  is(3, Kind::Zero, 8292, 100);
  is(4, Kind::Zero, 0, kSize);
  is(5, Kind::Discard, 1, 2);
  is(6, Kind::Discard, 0, kSize);
  is(7, Kind::Flush, 0, 0);
}

TEST_F(NbdCommandTest, ReadingIsNotPermitted) {
  EXPECT_EQ(read(0, 4096), EPERM);
  EXPECT_EQ(read(kSize, 1), EPERM);
  EXPECT_EQ(read(0, 0), EPERM);
}

TEST_F(NbdCommandTest, CommandsThatWereNotOfferedAreInvalid) {
  EXPECT_EQ(outcome(nbd_cache(client_, 4096, 0, 0)), EINVAL);
}

TEST_F(NbdCommandTest, WritesBeyondTheEndHaveNoSpace) {
  EXPECT_EQ(write(kSize, 1), ENOSPC);
  EXPECT_EQ(write(kSize - 4096, 4097), ENOSPC);
  EXPECT_EQ(write(kSize + 1, 0), ENOSPC);
  EXPECT_EQ(zero(kSize, 1), ENOSPC);
  EXPECT_EQ(zero(kSize - 1, 2), ENOSPC);
  EXPECT_EQ(zero(0, 0xffffffffU), ENOSPC);
  EXPECT_TRUE(server_.seen().empty());
}

TEST_F(NbdCommandTest, TrimsBeyondTheEndAreInvalid) {
  EXPECT_EQ(trim(kSize, 1), EINVAL);
  EXPECT_EQ(trim(kSize - 1, 2), EINVAL);
  EXPECT_TRUE(server_.seen().empty());
}

TEST_F(NbdCommandTest, OffsetsThatOverflowAreBeyondTheEnd) {
  const std::uint64_t last = ~std::uint64_t{0};
  EXPECT_EQ(write(last, 1), ENOSPC);
  EXPECT_EQ(write(last - 4095, 4096), ENOSPC);
  EXPECT_EQ(write(last - 10, 4096), ENOSPC);
  EXPECT_EQ(zero(last - 10, 4096), ENOSPC);
  EXPECT_EQ(zero(last, 0xffffffffU), ENOSPC);
  EXPECT_EQ(trim(last - 10, 4096), EINVAL);
  EXPECT_TRUE(server_.seen().empty());
}

TEST_F(NbdCommandTest, NothingToDoIsDone) {
  EXPECT_EQ(write(0, 0), 0);
  EXPECT_EQ(write(kSize, 0), 0);
  EXPECT_EQ(zero(0, 0), 0);
  EXPECT_EQ(trim(0, 0), 0);
  EXPECT_TRUE(server_.seen().empty());
}

TEST_F(NbdCommandTest, UnknownFlagsAreInvalid) {
  EXPECT_EQ(write(0, 4096, LIBNBD_CMD_FLAG_NO_HOLE), EINVAL);
  EXPECT_EQ(write(0, 4096, LIBNBD_CMD_FLAG_FAST_ZERO), EINVAL);
  EXPECT_EQ(write(0, 4096, 1U << 15), EINVAL);
  EXPECT_EQ(zero(0, 4096, LIBNBD_CMD_FLAG_DF), EINVAL);
  EXPECT_EQ(trim(0, 4096, LIBNBD_CMD_FLAG_NO_HOLE), EINVAL);
  EXPECT_EQ(outcome(nbd_flush(client_, LIBNBD_CMD_FLAG_NO_HOLE)), EINVAL);
  EXPECT_TRUE(server_.seen().empty());
}

TEST_F(NbdCommandTest, TheLargestWriteIsTheMaximum) {
  EXPECT_EQ(write(1, (1_MiB).bytes()), 0);
  EXPECT_EQ(write(1, (1_MiB).bytes() + 1), EINVAL);
  EXPECT_EQ(write(0, (9_MiB).bytes()), EINVAL);
  EXPECT_EQ(server_.seen().size(), 1U);
}

TEST_F(NbdCommandTest, ErrorsOfTheEngineArriveAsNbdKnowsThem) {
  const std::vector<std::pair<int, int>> answers{
      {EIO, EIO},         {ENOSPC, ENOSPC},       {EDQUOT, ENOSPC},       {EFBIG, ENOSPC},
      {EPERM, EPERM},     {EROFS, EPERM},         {ENOMEM, ENOMEM},       {EINVAL, EINVAL},
      {ENOTSUP, ENOTSUP}, {EOVERFLOW, EOVERFLOW}, {ESHUTDOWN, ESHUTDOWN}, {ENODEV, EIO}};
  for (const auto& [given, expected] : answers) {
    server_.hold(true);
    Answer answer;
    ASSERT_GE(nbd_aio_flush(client_, {record_answer, &answer, nullptr}, 0), 0);
    ASSERT_TRUE(server_.wait_for_held(1));
    server_.answer(0, given);
    client_.finish();
    EXPECT_EQ(answer.error, expected) << given;
    server_.hold(false);
  }
}

// --- how a client may come in ---

TEST(NbdServerTest, ReadsAreRefusedWithAndWithoutStructuredReplies) {
  for (const bool structured : {false, true}) {
    TestServer server;
    NbdClient client;
    nbd_set_request_structured_replies(client, structured);
    ASSERT_TRUE(client.connect(server));
    EXPECT_EQ(nbd_get_structured_replies_negotiated(client), structured ? 1 : 0);
    Bytes bytes(512);
    EXPECT_EQ(nbd_pread(client, bytes.data(), bytes.size(), 0, 0), -1);
    EXPECT_EQ(nbd_get_errno(), EPERM);
    EXPECT_EQ(nbd_pwrite(client, bytes.data(), bytes.size(), 0, 0), 0);
  }
}

TEST(NbdServerTest, OldClientsComeInByExportName) {
  for (const std::uint32_t flags : {0U, std::uint32_t{LIBNBD_HANDSHAKE_FLAG_NO_ZEROES},
                                    std::uint32_t{LIBNBD_HANDSHAKE_FLAG_FIXED_NEWSTYLE}}) {
    TestServer server;
    NbdClient client;
    nbd_set_handshake_flags(client, flags);
    ASSERT_TRUE(client.connect(server)) << flags;
    EXPECT_EQ(nbd_get_size(client), (16_MiB).bytes());
    EXPECT_EQ(nbd_pwrite(client, "drover", 6, 10, 0), 0);
    EXPECT_EQ(server.seen().size(), 1U);
  }
}

TEST(NbdServerTest, ExportsThatDoNotExistAreRefused) {
  TestServer server;
  for (const std::uint32_t flags : {0U, std::uint32_t{LIBNBD_HANDSHAKE_FLAG_MASK}}) {
    NbdClient client;
    nbd_set_handshake_flags(client, flags);
    EXPECT_FALSE(client.connect("nbd+unix:///vdb?socket=" + server.socket_path()));
    NbdClient nameless;
    nbd_set_handshake_flags(nameless, flags);
    EXPECT_FALSE(nameless.connect("nbd+unix:///?socket=" + server.socket_path()));
  }
  EXPECT_EQ(server.connects(), 0U);
  NbdClient client;
  EXPECT_TRUE(client.connect(server));
}

TEST(NbdServerTest, InfoDoesNotConnectAndGoDoes) {
  TestServer server;
  NbdClient client;
  nbd_set_opt_mode(client, true);
  ASSERT_TRUE(client.connect(server));
  EXPECT_EQ(nbd_opt_info(client), 0) << nbd_get_error();
  EXPECT_EQ(nbd_get_size(client), (16_MiB).bytes());
  EXPECT_EQ(nbd_get_block_size(client, LIBNBD_SIZE_MAXIMUM), (1_MiB).bytes());
  nbd_set_export_name(client, "other");
  EXPECT_EQ(nbd_opt_info(client), -1);
  EXPECT_EQ(server.connects(), 0U);
  nbd_set_export_name(client, "vda");
  EXPECT_EQ(nbd_opt_go(client), 0) << nbd_get_error();
  EXPECT_EQ(nbd_pwrite(client, "x", 1, 0, 0), 0);
  EXPECT_EQ(server.connects(), 1U);
}

TEST(NbdServerTest, AbortLeavesInOrder) {
  TestServer server;
  NbdClient client;
  nbd_set_opt_mode(client, true);
  ASSERT_TRUE(client.connect(server));
  EXPECT_EQ(nbd_opt_abort(client), 0) << nbd_get_error();
  EXPECT_EQ(server.connects(), 0U);
}

// --- many requests, any order ---

class NbdOrderTest : public testing::TestWithParam<std::uint64_t> {};

// Requests of every kind and size, overlapping at will, held back and answered in random order:
// what arrives is what was sent, in the order it was sent, and every answer reaches its request.
TEST_P(NbdOrderTest, RequestsAreAnsweredInAnyOrder) {
  Random random(GetParam());
  // With few or small buffers the server now and then has to wait for one.
  const Length buffer_size = random.one_in(2) ? 64_KiB : 1_MiB;
  TestServer server({.size = 4_MiB, .buffer_size = buffer_size, .buffers = 3 + random.below(40)});
  NbdClient client;
  ASSERT_TRUE(client.connect(server));
  server.hold(true);

  constexpr std::size_t kRequests = 400;
  Bytes model((4_MiB).bytes());
  std::vector<Answer> answers(kRequests);
  std::vector<int> expected(kRequests);
  std::vector<Bytes> payloads;
  std::vector<std::size_t> sent;  // the numbers of the requests held, in the order of arrival
  std::size_t next = 0;
  std::size_t done = 0;

  const auto answer_one = [&] {
    ASSERT_TRUE(server.wait_for_held(1));
    const std::size_t count = server.held();
    const std::size_t nth = random.below(count);
    const std::size_t number = sent.at(nth);
    sent.erase(sent.begin() + static_cast<std::ptrdiff_t>(nth));
    expected.at(number) = random.one_in(5) ? (random.one_in(2) ? EIO : ENOSPC) : 0;
    server.answer(nth, expected.at(number));
    ++done;
  };

  while (done < kRequests) {
    if (next < kRequests && sent.size() < 30 && !random.one_in(3)) {
      const std::uint64_t max = random.one_in(4) ? buffer_size.bytes() : 9000;
      const std::uint64_t length = 1 + random.below(max);
      const std::uint64_t offset = random.below(model.size() - length + 1);
      const nbd_completion_callback callback{
          .callback = record_answer, .user_data = &answers.at(next), .free = nullptr};
      std::int64_t cookie = -1;
      const std::uint32_t fua = random.one_in(2) ? LIBNBD_CMD_FLAG_FUA : 0;
      switch (random.below(6)) {
        case 0:
          cookie = nbd_aio_zero(client, length, offset, callback, fua);
          fill(model, offset, length, 0);
          break;
        case 1:
          cookie = nbd_aio_trim(client, length, offset, callback, fua);
          fill(model, offset, length, 0);
          break;
        case 2: cookie = nbd_aio_flush(client, callback, 0); break;
        default: {
          payloads.push_back(random_bytes(random, length));
          cookie = nbd_aio_pwrite(client, payloads.back().data(), length, offset, callback, fua);
          std::copy(payloads.back().begin(), payloads.back().end(),
                    model.begin() + static_cast<std::ptrdiff_t>(offset));
          break;
        }
      }
      ASSERT_GE(cookie, 0) << nbd_get_error();
      sent.push_back(next++);
    } else if (!sent.empty()) {
      // libnbd sends what did not fit into the socket at once only while it is polled.
      while (server.held() == 0 &&
             (nbd_aio_get_direction(client) & LIBNBD_AIO_DIRECTION_WRITE) != 0) {
        ASSERT_EQ(nbd_poll(client, 60000), 1) << nbd_get_error();
      }
      answer_one();
    }
  }
  client.finish();
  for (std::size_t number = 0; number < kRequests; ++number) {
    EXPECT_EQ(answers.at(number).count, 1) << number;
    EXPECT_EQ(answers.at(number).error, expected.at(number)) << number;
  }
  EXPECT_TRUE(server.model() == model);
  EXPECT_EQ(server.seen().size(), kRequests);
}

INSTANTIATE_TEST_SUITE_P(Seeds, NbdOrderTest, testing::Range<std::uint64_t>(1, 13));

TEST(NbdServerTest, NoMoreThanMaxInFlightAreRead) {
  TestServer server({.max_in_flight = 4});
  RawClient client(server);
  client.enter_transmission();
  server.hold(true);
  for (std::uint64_t cookie = 1; cookie <= 7; ++cookie) client.request(0, 3, cookie, 0, 0);
  ASSERT_TRUE(client.send());
  ASSERT_TRUE(server.wait_for_held(4));
  server.on_loop([] {});  // the turn in which they were read is over
  EXPECT_EQ(server.seen().size(), 4U);
  server.answer(2, 0);
  EXPECT_EQ(client.receive_simple_reply(), (RawClient::SimpleReply{0, 3}));
  ASSERT_TRUE(server.wait_for_held(4));
  EXPECT_EQ(server.seen().size(), 5U);
  server.hold(false);
  for (int i = 0; i < 4; ++i) server.answer(0, 0);
  std::vector<std::uint64_t> cookies;
  for (int i = 0; i < 6; ++i) cookies.push_back(client.receive_simple_reply()->cookie);
  EXPECT_THAT(cookies, testing::UnorderedElementsAre(1U, 2U, 4U, 5U, 6U, 7U));
}

TEST(NbdServerTest, WaitsForABufferAndGoesOnWhenOneIsBack) {
  TestServer server({.buffer_size = 64_KiB, .buffers = 2});
  NbdClient client;
  ASSERT_TRUE(client.connect(server));
  server.hold(true);
  const Bytes bytes((64_KiB).bytes(), std::byte{9});
  std::vector<Answer> answers(4);
  std::jthread writer([&] {
    for (std::size_t i = 0; i < answers.size(); ++i) {
      const nbd_completion_callback callback{record_answer, &answers.at(i), nullptr};
      EXPECT_GE(nbd_aio_pwrite(client, bytes.data(), bytes.size(), i * bytes.size(), callback, 0),
                0);
    }
    client.finish();
  });
  // Each write fills a buffer: two are held, and none is left for the third.
  ASSERT_TRUE(server.wait_for_held(2));
  server.on_loop([] {});
  EXPECT_EQ(server.seen().size(), 2U);
  EXPECT_EQ(server.pool().available(), 0U);
  for (std::size_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(server.wait_for_held(1));
    server.answer(0, 0);
  }
  writer.join();
  EXPECT_EQ(server.seen().size(), 4U);
  for (const Answer& answer : answers) EXPECT_EQ(answer.count, 1);
}

TEST(NbdServerTest, SmallWritesShareABuffer) {
  TestServer server({.buffer_size = 1_MiB, .buffers = 2});
  NbdClient client;
  ASSERT_TRUE(client.connect(server));
  server.hold(true);
  const Bytes bytes(4096, std::byte{9});
  std::vector<Answer> answers(32);
  std::jthread writer([&] {
    for (std::size_t i = 0; i < answers.size(); ++i) {
      const nbd_completion_callback callback{record_answer, &answers.at(i), nullptr};
      EXPECT_GE(nbd_aio_pwrite(client, bytes.data(), bytes.size(), i * bytes.size(), callback, 0),
                0);
    }
    client.finish();
  });
  ASSERT_TRUE(server.wait_for_held(32));
  EXPECT_GE(server.pool().available(), 1U);
  for (int i = 0; i < 32; ++i) server.answer(0, 0);
  writer.join();
}

// --- clients that go ---

TEST(NbdServerTest, AClientThatGoesLeavesNothingBehind) {
  TestServer server;
  auto client = std::make_unique<RawClient>(server);
  client->enter_transmission();
  server.hold(true);
  for (std::uint64_t cookie = 0; cookie < 5; ++cookie) {
    client->request(0, 1, cookie, cookie * 512, 512).fill(512);
  }
  ASSERT_TRUE(client->send());
  ASSERT_TRUE(server.wait_for_held(5));
  client.reset();
  ASSERT_TRUE(server.wait_for_disconnects(1));
  EXPECT_EQ(server.disconnects().at(0).code, Code::Unreachable);

  // Its requests are answered late: the next client must not get these answers.
  RawClient next(server);
  next.enter_transmission();
  for (std::uint64_t cookie = 100; cookie < 105; ++cookie) {
    next.request(0, 1, cookie, cookie * 512, 512).fill(512);
  }
  ASSERT_TRUE(next.send());
  ASSERT_TRUE(server.wait_for_held(10));
  std::vector<std::uint64_t> ids;
  for (const Seen& seen : server.seen()) ids.push_back(seen.id);
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end()) << "ids are never used twice";
  for (int i = 0; i < 5; ++i) server.answer(0, EIO);
  for (int i = 0; i < 5; ++i) server.answer(0, 0);
  for (std::uint64_t cookie = 100; cookie < 105; ++cookie) {
    EXPECT_EQ(next.receive_simple_reply(), (RawClient::SimpleReply{0, cookie}));
  }
}

TEST(NbdServerTest, UnknownAndRepeatedIdsAreIgnored) {
  TestServer server;
  RawClient client(server);
  client.enter_transmission();
  server.hold(true);
  ASSERT_TRUE(client.request(0, 3, 77, 0, 0).send());
  ASSERT_TRUE(server.wait_for_held(1));
  const std::uint64_t id = server.seen().at(0).id;
  server.on_loop([&] {
    for (const std::uint64_t unknown :
         {std::uint64_t{0}, id + 1, id - 1, id ^ (std::uint64_t{1} << 40), ~id}) {
      server.server().complete(unknown, EIO);
    }
    server.server().complete(id, 0);
    server.server().complete(id, EIO);
  });
  EXPECT_EQ(client.receive_simple_reply(), (RawClient::SimpleReply{0, 77}));
  ASSERT_TRUE(client.request(0, 3, 78, 0, 0).send());
  ASSERT_TRUE(server.wait_for_held(2));
  server.answer(1, 0);
  EXPECT_EQ(client.receive_simple_reply(), (RawClient::SimpleReply{0, 78}));
}

TEST(NbdServerTest, DisconnectWaitsForWhatIsOutstanding) {
  TestServer server;
  RawClient client(server);
  client.enter_transmission();
  server.hold(true);
  client.request(0, 1, 1, 0, 3).text("abc").request(0, 1, 2, 3, 3).text("def");
  client.request(0, 2, 0, 0, 0).request(0, 1, 3, 6, 3).text("ghi");
  ASSERT_TRUE(client.send());
  ASSERT_TRUE(server.wait_for_held(2));
  EXPECT_TRUE(server.disconnects().empty());
  server.answer(1, 0);
  EXPECT_EQ(client.receive_simple_reply(), (RawClient::SimpleReply{0, 2}));
  server.answer(0, 0);
  EXPECT_EQ(client.receive_simple_reply(), (RawClient::SimpleReply{0, 1}));
  EXPECT_TRUE(client.is_closed());
  ASSERT_TRUE(server.wait_for_disconnects(1));
  EXPECT_EQ(server.seen().size(), 2U) << "nothing is read after DISC";
}

TEST(NbdServerTest, ASecondClientIsRefused) {
  TestServer server;
  NbdClient first;
  ASSERT_TRUE(first.connect(server));
  NbdClient second;
  EXPECT_FALSE(second.connect(server));
  EXPECT_EQ(nbd_pwrite(first, "x", 1, 0, 0), 0) << "the first one does not notice";
  EXPECT_EQ(server.connects(), 1U);
}

TEST(NbdServerTest, AClientMayComeBackAtOnce) {
  TestServer server;
  for (int i = 0; i < 200; ++i) {
    NbdClient client;
    ASSERT_TRUE(client.connect(server)) << i;
    ASSERT_EQ(nbd_pwrite(client, "x", 1, 0, 0), 0);
    if (i % 2 == 0) {
      ASSERT_EQ(nbd_shutdown(client, 0), 0);
    }
  }
  EXPECT_TRUE(server.wait_for_disconnects(200));
  EXPECT_EQ(server.connects(), 200U);
}

// --- the server's own end ---

TEST(NbdServerTest, TheClientSeesTheServerGo) {
  TestServer server;
  RawClient client(server);
  client.enter_transmission();
  server.hold(true);
  ASSERT_TRUE(client.request(0, 1, 1, 0, 4096).fill(4096).send());
  ASSERT_TRUE(server.wait_for_held(1));
  server.stop();
  EXPECT_TRUE(client.is_closed());
  EXPECT_FALSE(std::filesystem::exists(server.socket_path()));
  EXPECT_TRUE(server.disconnects().empty()) << "who destroys the server need not be told";
}

class NbdServerEndTest : public testing::Test {
 protected:
  void SetUp() override {
    auto loop = Loop::create();
    ASSERT_TRUE(loop.has_value());
    loop_ = std::move(*loop);
  }
  void listen(NbdServer::Events events) {
    auto server = NbdServer::listen(*loop_, pool_,
                                    {.socket_path = path_, .export_name = "vda", .size = 1_MiB},
                                    std::move(events));
    ASSERT_TRUE(server.has_value()) << server.error().to_string();
    server_ = std::move(*server);
  }
  // A client that goes through the handshake and writes twice, without reading.
  void write_blindly() {
    client_.emplace(path_);
    ASSERT_TRUE(client_->u32(3).go("vda").request(0, 1, 1, 0, 4).text("abcd").send());
    ASSERT_TRUE(client_->request(0, 1, 2, 0, 4).text("efgh").send());
  }
  // Enough turns of the loop for what was cancelled to come back.
  void run_until_idle() {
    loop_->at(now() + std::chrono::milliseconds(1), [this] { loop_->stop(); });
    loop_->run();
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_ / "nbd.sock";
  BufferPool pool_{64_KiB, 4};
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<NbdServer> server_;
  std::optional<RawClient> client_;
};

TEST_F(NbdServerEndTest, MayBeDestroyedInsideARequest) {
  int requests = 0;
  listen({.request = [&](const NbdRequest&) {
    ++requests;
    server_.reset();
    loop_->stop();
  }});
  write_blindly();
  loop_->run();
  EXPECT_EQ(requests, 1) << "nothing is handed on by a server that is gone";
  run_until_idle();
}

TEST_F(NbdServerEndTest, MayBeDestroyedInsideConnected) {
  listen({.request = [&](const NbdRequest&) { ADD_FAILURE() << "the server is gone"; },
          .connected =
              [&] {
                server_.reset();
                loop_->stop();
              }});
  write_blindly();
  loop_->run();
  run_until_idle();
}

TEST_F(NbdServerEndTest, MayBeDestroyedInsideDisconnected) {
  listen({.request =
              [&](const NbdRequest& request) {
                server_->complete(request.id, 0);
                client_.reset();
              },
          .disconnected =
              [&](const Error&) {
                server_.reset();
                loop_->stop();
              }});
  write_blindly();
  loop_->run();
  run_until_idle();
}

TEST_F(NbdServerEndTest, MayBeDestroyedInsideItsOwnComplete) {
  std::vector<std::uint64_t> ids;
  auto server = NbdServer::listen(
      *loop_, pool_,
      {.socket_path = path_, .export_name = "vda", .size = 1_MiB, .max_in_flight = 1},
      {.request = [&](const NbdRequest& request) {
        ids.push_back(request.id);
        if (ids.size() == 1) {
          loop_->post([&] { server_->complete(ids.front(), 0); });
        } else {
          server_.reset();  // complete() handed this on
          loop_->stop();
        }
      }});
  ASSERT_TRUE(server.has_value());
  server_ = std::move(*server);
  write_blindly();
  loop_->run();
  EXPECT_EQ(ids.size(), 2U);
  run_until_idle();
}

// The loop goes before it could call back what the server had under way. The buffer of the receive
// must be back in the pool (whose destructor checks), and nothing may leak (asan checks).
TEST_F(NbdServerEndTest, TheLoopMayGoRightAfterIt) {
  listen({.request = [&](const NbdRequest&) { loop_->stop(); }});
  write_blindly();
  loop_->run();
  server_.reset();
  loop_.reset();
  EXPECT_EQ(pool_.available(), 4U);
}

TEST_F(NbdServerEndTest, MayBeDestroyedBeforeAnybodyCame) {
  listen({.request = [](const NbdRequest&) {}});
  server_.reset();
  EXPECT_FALSE(std::filesystem::exists(path_));
  run_until_idle();
}

// --- the socket ---

class NbdSocketTest : public testing::Test {
 protected:
  void SetUp() override {
    auto loop = Loop::create();
    ASSERT_TRUE(loop.has_value());
    loop_ = std::move(*loop);
  }
  Result<std::unique_ptr<NbdServer>> listen(NbdServerOptions options) {
    options.socket_path = path_;
    options.size = 1_MiB;
    return NbdServer::listen(*loop_, pool_, options, {.request = [](const NbdRequest&) {}});
  }
  struct stat status() {
    struct stat found {};
    EXPECT_EQ(::lstat(path_.c_str(), &found), 0);
    return found;
  }
  // A socket that is bound to the path; listening or not.
  UniqueFd bind_socket(bool listening) {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    if (listening) {
      EXPECT_EQ(::listen(fd.get(), 1), 0);
    }
    return fd;
  }

  TemporaryDirectory directory_;
  std::string path_ = directory_ / "nbd.sock";
  BufferPool pool_{64_KiB, 4};
  std::unique_ptr<Loop> loop_;
};

TEST_F(NbdSocketTest, HasTheModeAskedForWhateverTheUmask) {
  const mode_t old = ::umask(0);
  {
    const auto server = listen({.socket_mode = 0600});
    ASSERT_TRUE(server.has_value());
    EXPECT_EQ(status().st_mode, S_IFSOCK | 0600U);
  }
  ::umask(0777);
  {
    const auto server = listen({.socket_mode = 0660});
    ASSERT_TRUE(server.has_value());
    EXPECT_EQ(status().st_mode, S_IFSOCK | 0660U);
  }
  ::umask(old);
}

TEST_F(NbdSocketTest, HasTheOwnerAskedFor) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  const auto server = listen({.socket_uid = 12345, .socket_gid = 54321});
  ASSERT_TRUE(server.has_value());
  EXPECT_EQ(status().st_uid, 12345U);
  EXPECT_EQ(status().st_gid, 54321U);
}

TEST_F(NbdSocketTest, AnOwnerThatCannotBeSetLeavesNoSocket) {
  const uid_t before = ::geteuid();
  std::filesystem::permissions(directory_ / ".", std::filesystem::perms::all);
  if (before == 0) {
    ASSERT_EQ(::seteuid(65534), 0);  // root could set any owner
  }
  const auto server = listen({.socket_uid = 0});
  ASSERT_EQ(::seteuid(before), 0);
  ASSERT_FALSE(server.has_value());
  EXPECT_EQ(server.error().code, Code::Denied) << server.error().to_string();
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(NbdSocketTest, AStaleSocketOfOursIsReplaced) {
  bind_socket(true).reset();
  ASSERT_TRUE(std::filesystem::exists(path_));
  EXPECT_TRUE(listen({}).has_value());
}

TEST_F(NbdSocketTest, AStaleSocketGivenToTheSameUserIsReplaced) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  bind_socket(true).reset();
  ASSERT_EQ(::chown(path_.c_str(), 12345, 12345), 0);
  EXPECT_TRUE(listen({.socket_uid = 12345}).has_value());
}

TEST_F(NbdSocketTest, AStaleSocketOfStrangersIsLeftAlone) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  bind_socket(true).reset();
  ASSERT_EQ(::chown(path_.c_str(), 12345, 12345), 0);
  const auto server = listen({.socket_uid = 12346});
  ASSERT_FALSE(server.has_value());
  EXPECT_EQ(server.error().code, Code::AlreadyExists);
  EXPECT_TRUE(std::filesystem::exists(path_));
}

TEST_F(NbdSocketTest, ASocketInUseIsBusyAndItsOwnerDoesNotNotice) {
  const UniqueFd other = bind_socket(true);
  const auto server = listen({});
  ASSERT_FALSE(server.has_value());
  EXPECT_EQ(server.error().code, Code::Busy);
  EXPECT_TRUE(std::filesystem::exists(path_));
  EXPECT_EQ(::fcntl(other.get(), F_SETFL, O_NONBLOCK), 0);
  EXPECT_EQ(::accept(other.get(), nullptr, nullptr), -1);
  EXPECT_EQ(errno, EAGAIN) << "nobody tried to connect";
}

TEST_F(NbdSocketTest, OtherFilesAreLeftAlone) {
  std::ofstream(path_) << "precious";
  const auto server = listen({});
  ASSERT_FALSE(server.has_value());
  EXPECT_EQ(server.error().code, Code::AlreadyExists);
  std::stringstream content;
  content << std::ifstream(path_).rdbuf();
  EXPECT_EQ(content.str(), "precious");
}

TEST_F(NbdSocketTest, ASymbolicLinkIsNotFollowed) {
  const std::string elsewhere = directory_ / "elsewhere";
  ASSERT_EQ(::symlink(elsewhere.c_str(), path_.c_str()), 0);
  EXPECT_FALSE(listen({}).has_value());
  EXPECT_FALSE(std::filesystem::exists(elsewhere));
  EXPECT_TRUE(std::filesystem::is_symlink(path_));
}

TEST_F(NbdSocketTest, OnlyItsOwnSocketIsRemoved) {
  auto server = listen({});
  ASSERT_TRUE(server.has_value());
  ASSERT_EQ(::unlink(path_.c_str()), 0);
  std::ofstream(path_) << "somebody else's";
  server->reset();
  EXPECT_TRUE(std::filesystem::exists(path_));
}

TEST_F(NbdSocketTest, PathsTooLongForASocketAreInvalid) {
  path_ = directory_ / std::string(108, 'x');
  const auto server = listen({});
  ASSERT_FALSE(server.has_value());
  EXPECT_EQ(server.error().code, Code::InvalidArgument);
}

// --- hostile clients: each is thrown out or refused, and the next one is served ---

class HostileClientTest : public testing::Test {
 protected:
  void TearDown() override {
    client_.reset();
    NbdClient next;
    EXPECT_TRUE(next.connect(server_)) << "the next client is served";
    EXPECT_EQ(nbd_pwrite(next, "fine", 4, 0, 0), 0);
  }
  RawClient& client() {
    if (!client_) client_.emplace(server_);
    return *client_;
  }
  void greet() {
    ASSERT_EQ(client().receive(18).size(), 18U);
    ASSERT_TRUE(client().u32(3).send());
  }
  std::string thrown_out_because() {
    EXPECT_TRUE(server_.wait_for_disconnects(1));
    const auto errors = server_.disconnects();
    if (errors.empty()) return {};
    EXPECT_EQ(errors.at(0).code, Code::Protocol);
    return errors.at(0).message;
  }

  TestServer server_;
  std::optional<RawClient> client_;
};

TEST_F(HostileClientTest, GarbageInsteadOfAHandshake) {
  Random random(1);
  // The greeting comes first; what follows it is not our business any more.
  ASSERT_TRUE(client().send(random_bytes(random, 4096)));
  client().receive_rest();
  EXPECT_EQ(server_.connects(), 0U);
}

TEST_F(HostileClientTest, HandshakeFlagsNobodyKnows) {
  ASSERT_TRUE(client().u32(0x80000003).send());
  EXPECT_EQ(client().receive_rest().size(), 18U);
}

TEST_F(HostileClientTest, AnOptionWithoutItsMagic) {
  greet();
  ASSERT_TRUE(client().text("IHAVEOPS").u32(7).u32(0).send());
  EXPECT_TRUE(client().is_closed());
}

TEST_F(HostileClientTest, UnknownOptionsAreUnsupported) {
  greet();
  for (const std::uint32_t option : {5U, 9U, 10U, 11U, 0U, 12345U, 0xffffffffU}) {
    ASSERT_TRUE(client().option(option, 3).text("abc").send());
    const auto reply = client().receive_option_reply();
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->option, option);
    EXPECT_EQ(reply->type, 0x80000001U);
  }
}

TEST_F(HostileClientTest, AnUnknownOptionOfAnOldClientEndsIt) {
  ASSERT_EQ(client().receive(18).size(), 18U);
  ASSERT_TRUE(client().u32(0).option(12345, 0).send());
  EXPECT_TRUE(client().is_closed());
}

TEST_F(HostileClientTest, OptionsThatContradictThemselvesAreInvalid) {
  greet();
  client().option(7, 0);                                       // no data at all
  client().option(7, 5).u32(0).text("x");                      // cut off
  client().option(7, 6).u32(0xffffffff).u16(0);                // the name is longer
  client().option(7, 9).u32(4).text("vda").u16(0);             // by one
  client().option(7, 9).u32(3).text("vda").u16(1);             // an information type is missing
  client().option(6, 10).u32(3).text("vda").u16(0).text("x");  // something is left
  client().option(3, 1).text("x");                             // LIST takes nothing
  client().option(8, 1).text("x");                             // nor does STRUCTURED_REPLY
  ASSERT_TRUE(client().send());
  for (int i = 0; i < 8; ++i) {
    const auto reply = client().receive_option_reply();
    ASSERT_TRUE(reply.has_value()) << i;
    EXPECT_EQ(reply->type, 0x80000003U) << i;
  }
}

TEST_F(HostileClientTest, AnOversizedOptionIsTooBig) {
  greet();
  ASSERT_TRUE(client().option(7, 1 << 20).fill(1 << 20).option(3, 0).send());
  const auto reply = client().receive_option_reply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->type, 0x80000009U);
  EXPECT_EQ(client().receive_option_reply()->type, 2U) << "and the next one is answered";
}

TEST_F(HostileClientTest, AnOptionWithoutEndIsNotReadToTheEnd) {
  greet();
  ASSERT_TRUE(client().option(7, 0xffffffff).send());
  EXPECT_TRUE(client().is_closed());
}

TEST_F(HostileClientTest, AnExportNameWithoutEndEndsTheConnection) {
  greet();
  ASSERT_TRUE(client().option(1, 100000).fill(100000).send());
  EXPECT_TRUE(client().is_closed());
}

TEST_F(HostileClientTest, OptionsWithoutEndEndTheConnection) {
  greet();
  for (int i = 0; i < 300; ++i) client().option(8, 0);
  client().send();
  EXPECT_LT(client().receive_rest().size(), 300U * 20);
}

TEST_F(HostileClientTest, HandshakesThatEndAnywhere) {
  RawClient whole(server_);
  const Bytes handshake = whole.u32(3).option(8, 0).go("vda").take_pending();
  whole.close();
  for (std::size_t length = 0; length < handshake.size(); ++length) {
    RawClient cut(server_);
    ASSERT_EQ(cut.receive(18).size(), 18U) << length;
    ASSERT_TRUE(cut.send(std::span(handshake).first(length)));
  }
  EXPECT_EQ(server_.connects(), 0U);
}

TEST_F(HostileClientTest, RequestsThatEndAnywhere) {
  RawClient maker(server_);
  const Bytes request = maker.request(0, 1, 1, 0, 40).fill(40).take_pending();
  maker.close();
  for (std::size_t length = 0; length < request.size(); ++length) {
    RawClient cut(server_);
    cut.enter_transmission();
    ASSERT_TRUE(cut.send(std::span(request).first(length)));
    cut.close();
    ASSERT_TRUE(server_.wait_for_disconnects(length + 1));
  }
  EXPECT_TRUE(server_.seen().empty()) << "half a write is no write";
}

// Also the other way round: the bytes may come one by one.
TEST_F(HostileClientTest, EverythingByteByByte) {
  RawClient maker(server_);
  const Bytes bytes = maker.u32(3)
                          .option(8, 0)
                          .go("vda")
                          .request(0, 1, 1, 100, 40)
                          .fill(40, std::byte{1})
                          .request(0, 6, 2, 120, 10)
                          .request(0, 0, 3, 0, 512)
                          .request(0, 2, 4, 0, 0)
                          .take_pending();
  maker.close();
  for (const std::byte& byte : bytes) {
    ASSERT_TRUE(client().send(std::span(&byte, 1)));
    server_.on_loop([] {});
  }
  client().receive_rest();
  ASSERT_TRUE(server_.wait_for_disconnects(1));
  Bytes model((16_MiB).bytes());
  fill(model, 100, 40, 1);
  fill(model, 120, 10, 0);
  EXPECT_TRUE(server_.model() == model);
  client_.reset();
}

TEST_F(HostileClientTest, ARequestWithoutItsMagic) {
  client().enter_transmission();
  ASSERT_TRUE(client().u32(0x25609514).fill(24).send());
  EXPECT_TRUE(client().is_closed());
  EXPECT_THAT(thrown_out_because(), HasSubstr("magic"));
}

TEST_F(HostileClientTest, AWriteOfFourGigabytesIsNotRead) {
  client().enter_transmission();
  ASSERT_TRUE(client().request(0, 1, 1, 0, 0xffffffff).send());
  EXPECT_TRUE(client().is_closed());
  EXPECT_THAT(thrown_out_because(), HasSubstr("4294967295"));
}

TEST_F(HostileClientTest, CommandsNobodyKnowsAreInvalid) {
  client().enter_transmission();
  for (const unsigned number : {5U, 7U, 8U, 9U, 255U, 65535U}) {
    const auto command = static_cast<std::uint16_t>(number);
    ASSERT_TRUE(client().request(0, command, command, 0, 4096).send());
    EXPECT_EQ(client().receive_simple_reply(), (RawClient::SimpleReply{EINVAL, command}));
  }
}

TEST_F(HostileClientTest, AFlushOfSomethingIsInvalid) {
  client().enter_transmission();
  ASSERT_TRUE(client().request(0, 3, 1, 0, 4096).request(0, 3, 2, 512, 0).send());
  EXPECT_EQ(client().receive_simple_reply(), (RawClient::SimpleReply{EINVAL, 1}));
  EXPECT_EQ(client().receive_simple_reply(), (RawClient::SimpleReply{EINVAL, 2}));
}

// With structured replies a refused BLOCK_STATUS, like a refused READ, must be a structured error.
TEST_F(HostileClientTest, StructuredErrorsWhereTheProtocolAsksForThem) {
  greet();
  ASSERT_TRUE(client().option(8, 0).go("vda").send());
  while (client().receive_option_reply()->option != 7) {
  }
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(client().receive_option_reply().has_value());
  for (const auto& [command, error] : {std::pair<std::uint16_t, unsigned>{0, EPERM}, {7, EINVAL}}) {
    ASSERT_TRUE(client().request(0, command, 99, 0, 512).send());
    EXPECT_EQ(client().receive_integer(4), 0x668e33efU);
    EXPECT_EQ(client().receive_integer(2), 1U) << "done";
    EXPECT_EQ(client().receive_integer(2), 0x8001U) << "error";
    EXPECT_EQ(client().receive_integer(8), 99U);
    const auto length = client().receive_integer(4);
    EXPECT_EQ(client().receive_integer(4), error);
    const auto text = client().receive_integer(2);
    EXPECT_EQ(length.value(), text.value() + 6);
    client().receive(text.value());
  }
}

// Its replies would fill our memory: the server stops reading it instead.
TEST_F(HostileClientTest, AClientThatNeverReadsIsNotReadEither) {
  client().enter_transmission();
  for (int i = 0; i < 5000; ++i) client().request(0, 0, 1, 0, 512);
  const Bytes bytes = client().take_pending();
  // Its own socket takes what the server does not read, up to a limit; then it would block.
  std::size_t sent = 0;
  std::jthread flood([&] {
    for (int i = 0; i < 20; ++i) {
      if (!client().send(bytes)) return;
      sent += bytes.size();
    }
  });
  // Once it reads, everything that was sent is answered.
  std::size_t replies = 0;
  while (replies < 20U * 5000 && client().receive_simple_reply()) ++replies;
  flood.join();
  EXPECT_EQ(replies, 20U * 5000);
}

TEST_F(HostileClientTest, GarbageInTheMiddleOfTheConversation) {
  Random random(7);
  for (int round = 0; round < 100; ++round) {
    RawClient garbler(server_);
    garbler.enter_transmission();
    garbler.request(0, 1, 1, 0, 100).fill(100);
    Bytes bytes = garbler.take_pending();
    const Bytes garbage = random_bytes(random, random.below(2000));
    bytes.insert(bytes.end(), garbage.begin(), garbage.end());
    garbler.send(bytes);
    garbler.close();
    ASSERT_TRUE(server_.wait_for_disconnects(static_cast<std::size_t>(round) + 1));
  }
}

TEST(NbdServerTest, AClientThatDoesNotShakeHandsMakesRoom) {
  TestServer server({.handshake_timeout = std::chrono::milliseconds(1)});
  RawClient silent(server);
  EXPECT_EQ(silent.receive_rest().size(), 18U) << "the greeting, and then the end";
}

}  // namespace
}  // namespace drover::mirror
