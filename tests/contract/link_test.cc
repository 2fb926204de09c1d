// SPDX-License-Identifier: Apache-2.0
//
// The link and the receiver together, over real TCP and TLS on loopback: what the source queues is
// what the target's disks hold; who does not belong is refused without harm; what breaks ends as
// docs/protocol.md says.
#include "mirror/link.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <fstream>
#include <numeric>

#include "tests/contract/link_support.h"

namespace drover::mirror::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr const char* kSession = "job-1";

class LinkTest : public testing::Test {
 protected:
  LinkTest() { key_ = *random_key(); }
  ~LinkTest() override {
    for (const auto& disk : disks_) disk->open_gate();
  }

  void add_disk(Length size) {
    disks_.push_back(std::make_unique<ModelDisk>(size, disks_.size() + 1));
  }
  [[nodiscard]] ReceiverOptions receiver_options() {
    ReceiverOptions options;
    options.session = kSession;
    options.key = key_;
    options.jobs_directory = dir_ / "jobs";
    options.create_image =
        [this](
            const blockcopy::TargetSpec& spec) -> Result<std::unique_ptr<blockcopy::TargetImage>> {
      return disks_.at(std::stoul(spec.path.substr(1)))->create(spec);
    };
    options.open_image =
        [this](const blockcopy::TargetSpec& spec,
               const blockcopy::ImageIdentity&) -> Result<std::unique_ptr<blockcopy::TargetImage>> {
      return disks_.at(std::stoul(spec.path.substr(1)))->open_again(spec);
    };
    return options;
  }
  void start_receiver() { receiver_ = std::make_unique<TestReceiver>(receiver_options()); }

  [[nodiscard]] LinkOptions link_options(unsigned lanes = 2) const {
    LinkOptions options;
    options.address = "127.0.0.1";
    options.port = receiver_->port();
    options.session = kSession;
    options.key = key_;
    options.lanes = lanes;
    for (const auto& disk : disks_) options.disk_sizes.push_back(disk->size());
    options.chunk_size = chunk_;
    options.retry = {10ms, 50ms};
    return options;
  }
  [[nodiscard]] nlohmann::json reserve_request() const {
    nlohmann::json disks = nlohmann::json::array();
    for (std::size_t i = 0; i < disks_.size(); ++i) {
      disks.push_back({{"path", "/" + std::to_string(i)},
                       {"format", "raw"},
                       {"block_device", true},
                       {"size", disks_[i]->size().bytes()}});
    }
    return {{"op", "reserve"}, {"disks", disks}};
  }
  // Receiver, link and images.
  void set_up(TestSource& source, const LinkOptions& options) {
    const Status connected = source.connect(options);
    ASSERT_TRUE(connected.has_value()) << connected.error().to_string();
    const auto reserved = source.link().call(reserve_request(), kPatience);
    ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
  }
  // The memory's, to be found at relay_path_. On one machine the two ends can't have the same path: the
  // source's socket is given another name, and the target's server may listen at memory_path_.
  void start_relay(TestSource& source, Link::RelayOptions options = {}) {
    options.unix_path = memory_path_;
    ASSERT_TRUE(source.link().start_relay(options).has_value());
    ASSERT_EQ(::rename(memory_path_.c_str(), relay_path_.c_str()), 0);
  }
  [[nodiscard]] Endpoint endpoint() const {
    return {.address = "127.0.0.1", .port = receiver_->port(), .key = key_};
  }
  [[nodiscard]] Hello hello(ConnectionKind kind, unsigned lane = 0) const {
    Hello made;
    made.kind = kind;
    made.session = kSession;
    made.lanes = 1;
    made.lane = lane;
    for (const auto& disk : disks_) made.limits.disk_sizes.push_back(disk->size());
    made.limits.chunk_size = chunk_;
    return made;
  }
  void expect_nothing_left() { EXPECT_FALSE(std::filesystem::exists(dir_ / "jobs/job-1")); }

  TempDir dir_;
  const std::string memory_path_ = dir_ / "memory.sock";
  const std::string relay_path_ = dir_ / "relay.sock";
  LinkKey key_{};
  Length chunk_ = 1_MiB;
  std::vector<std::unique_ptr<ModelDisk>> disks_;
  std::unique_ptr<TestReceiver> receiver_;
};

// A disk with data, runs of zeroes of all sizes, and an odd tail.
Bytes disk_with_holes(Random& random, std::size_t size) {
  Bytes bytes = random_bytes(random, size);
  for (std::size_t at = 0; at < size;) {
    const std::size_t run = 1 + random.below(random.one_in(4) ? 3U << 20 : 20000);
    if (random.one_in(2)) {
      std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), std::min(run, size - at),
                  std::byte{0});
    }
    at += run;
  }
  return bytes;
}

void copy_all(TestSource& source, const Bytes& disk, Length chunk, std::uint32_t lanes) {
  for (std::uint64_t at = 0, i = 0; at < disk.size(); at += chunk.bytes(), ++i) {
    const Extent extent{Offset(at), Length(std::min(chunk.bytes(), disk.size() - at))};
    source.copy(static_cast<std::uint32_t>(i % lanes), 0, disk, extent, true, i);
  }
}

struct CopyCase {
  unsigned lanes;
  Encoding encoding;
};
class LinkCopyTest : public LinkTest, public testing::WithParamInterface<CopyCase> {};

TEST_P(LinkCopyTest, TheTargetHoldsWhatTheSourceSent) {
  Random random(GetParam().lanes);
  const Bytes disk = disk_with_holes(random, (24U << 20) + 12345);
  add_disk(Length(disk.size()));
  start_receiver();
  TestSource source;
  LinkOptions options = link_options(GetParam().lanes);
  options.compression = {.automatic = false, .encoding = GetParam().encoding, .level = 1};
  set_up(source, options);
  copy_all(source, disk, chunk_, GetParam().lanes);
  ASSERT_TRUE(source.wait_answers());
  EXPECT_EQ(source.applied_tokens().size(), 25U);
  const auto barrier = source.link().barrier(kPatience);
  ASSERT_TRUE(barrier.has_value()) << barrier.error().to_string();
  EXPECT_TRUE(disks_[0]->bytes() == disk);
  EXPECT_TRUE(disks_[0]->flushed);
  EXPECT_TRUE(disks_[0]->released);
  const LinkCounters counters = source.link().counters();
  EXPECT_EQ(counters.frames_sent, 25U);
  EXPECT_LT(counters.bytes_sent, disk.size());
  ASSERT_TRUE(source.link().call({{"op", "finish"}}, kPatience).has_value());
  EXPECT_TRUE(receiver_->wait().has_value());
  EXPECT_FALSE(disks_[0]->removed);
  EXPECT_TRUE(source.downs().empty());
  expect_nothing_left();
}
INSTANTIATE_TEST_SUITE_P(LanesAndEncodings, LinkCopyTest,
                         testing::Values(CopyCase{1, Encoding::Plain}, CopyCase{2, Encoding::Lz4},
                                         CopyCase{3, Encoding::Zstd}, CopyCase{4, Encoding::Plain},
                                         CopyCase{16, Encoding::Plain}));

// Copies, writes and zeroes of the same chunks, as fast as they go out, on several lanes; the
// target completes its writes in any order. The last one queued wins everywhere.
TEST_F(LinkTest, OfFramesOfOneChunkTheLaterOneWins) {
  chunk_ = 64_KiB;
  constexpr std::uint32_t kLanes = 3;
  constexpr std::uint64_t kChunks = 24;
  add_disk(chunk_ * kChunks);
  start_receiver();
  TestSource source;
  set_up(source, link_options(kLanes));
  Bytes truth(disks_[0]->size().bytes());
  Random random(7);
  for (std::uint64_t i = 0; i < 6000; ++i) {
    const std::uint64_t chunk = random.below(kChunks);
    const auto lane = static_cast<std::uint32_t>(chunk % kLanes);
    const std::uint64_t within = random.below(chunk_.bytes());
    const Extent extent{Offset(chunk * chunk_.bytes() + within),
                        Length(1 + random.below(std::min<std::uint64_t>(
                                       chunk_.bytes() - within, random.one_in(8) ? 65536 : 9000)))};
    const auto bytes = std::span(truth).subspan(extent.offset.bytes(), extent.length.bytes());
    switch (random.below(4)) {
      case 0:
        source.copy(lane, 0, truth, {Offset(chunk * chunk_.bytes()), chunk_}, false, i);
        break;
      case 1:
        std::ranges::fill(bytes, std::byte{0});
        source.zero(lane, 0, extent, i);
        break;
      default:
        for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next());
        source.write(lane, 0, truth, extent, i);
    }
  }
  ASSERT_TRUE(source.wait_answers());
  const auto barrier = source.link().barrier(kPatience);
  ASSERT_TRUE(barrier.has_value()) << barrier.error().to_string();
  EXPECT_TRUE(disks_[0]->bytes() == truth);
  EXPECT_TRUE(source.refused_tokens().empty());
}

TEST_F(LinkTest, RealImagesHoldWhatWasSentAndStayThin) {
  Random random(3);
  Bytes disk(64U << 20);
  const Bytes data = random_bytes(random, 5U << 20);
  std::ranges::copy(data, disk.begin() + (20 << 20));
  add_disk(Length(disk.size()));
  ReceiverOptions options = receiver_options();
  options.create_image = nullptr;
  receiver_ = std::make_unique<TestReceiver>(options);
  TestSource source;
  const std::string path = dir_ / "disk.raw";
  ASSERT_TRUE(source.connect(link_options()).has_value());
  const auto reserved = source.link().call(
      {{"op", "reserve"}, {"disks", {{{"path", path}, {"format", "raw"}, {"size", disk.size()}}}}},
      kPatience);
  ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
  EXPECT_EQ((*reserved)["disks"][0]["initially_zero"], true);
  copy_all(source, disk, chunk_, 2);
  ASSERT_TRUE(source.wait_answers());
  ASSERT_TRUE(source.link().call({{"op", "flush"}}, kPatience).has_value());
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  ASSERT_TRUE(source.link().call({{"op", "finish"}}, kPatience).has_value());
  EXPECT_TRUE(receiver_->wait().has_value());
  std::ifstream in(path, std::ios::binary);
  Bytes found(disk.size());
  in.read(reinterpret_cast<char*>(found.data()), static_cast<std::streamsize>(found.size()));
  EXPECT_EQ(in.gcount(), static_cast<std::streamsize>(disk.size()));
  EXPECT_TRUE(found == disk);
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_LE(info.st_blocks * 512, 6 << 20);
  expect_nothing_left();
}

// --- who does not belong ---

TEST_F(LinkTest, AWrongKeyIsDeniedAndTheRightOneStillWelcome) {
  add_disk(1_MiB);
  start_receiver();
  TestSource stranger;
  LinkOptions wrong = link_options();
  wrong.key[5] ^= std::byte{1};
  const Status denied = stranger.connect(wrong);
  ASSERT_FALSE(denied.has_value());
  EXPECT_EQ(denied.error().code, Code::Denied) << denied.error().to_string();
  LinkOptions other_job = link_options();
  other_job.session = "job-2";
  EXPECT_FALSE(stranger.connect(other_job).has_value());
  TestSource source;
  set_up(source, link_options());
}

std::string read_until_closed(int fd) {
  std::string all;
  std::array<char, 4096> piece{};
  while (true) {
    pollfd polled{fd, POLLIN, 0};
    if (::poll(&polled, 1, 60000) <= 0) return "it was not closed";
    const ssize_t count = ::recv(fd, piece.data(), piece.size(), 0);
    if (count <= 0) return all;
    all.append(piece.data(), static_cast<std::size_t>(count));
  }
}

TEST_F(LinkTest, StrangersAreClosedAndHarmNothing) {
  add_disk(1_MiB);
  start_receiver();
  const std::array<std::string, 4> greetings = {
      "GET / HTTP/1.1\r\nHost: x\r\n\r\n", std::string(100000, '\0'), std::string(70000, '\x16'),
      // Handshake records that promise 16 MiB.
      std::string("\x16\x03\x01\x40\x00\x01\xff\xff\xff", 9) + std::string(16380, 'x')};
  for (std::string greeting : greetings) {
    if (greeting[0] == '\x16' && greeting[1] == '\x03')
      greeting = greeting + greeting + greeting + greeting;
    auto fd = connect_tcp("127.0.0.1", receiver_->port(), now() + kPatience);
    ASSERT_TRUE(fd.has_value());
    (void)!::send(fd->get(), greeting.data(), greeting.size(), MSG_NOSIGNAL);
    EXPECT_NE(read_until_closed(fd->get()), "it was not closed");
  }
  TestSource source;
  set_up(source, link_options());
}

TEST_F(LinkTest, WhoSaysNothingIsClosedInTime) {
  add_disk(1_MiB);
  ReceiverOptions options = receiver_options();
  options.handshake = 50ms;
  receiver_ = std::make_unique<TestReceiver>(options);
  auto fd = connect_tcp("127.0.0.1", receiver_->port(), now() + kPatience);
  ASSERT_TRUE(fd.has_value());
  EXPECT_EQ(read_until_closed(fd->get()), "");
}

TEST_F(LinkTest, ManyHalfOpenConnectionsKeepNobodyOut) {
  add_disk(1_MiB);
  start_receiver();  // which gives each of them 10 s
  std::vector<UniqueFd> crowd;
  for (int i = 0; i < 200; ++i) {
    auto fd = connect_tcp("127.0.0.1", receiver_->port(), now() + kPatience);
    ASSERT_TRUE(fd.has_value());
    crowd.push_back(std::move(*fd));
  }
  TestSource source;
  set_up(source, link_options());
  // The oldest have been closed.
  EXPECT_EQ(read_until_closed(crowd.front().get()), "");
}

// --- peers with the key that break the rules ---

class LinkHostileTest : public LinkTest {
 protected:
  void SetUp() override {
    add_disk(4_MiB);
    start_receiver();
    auto control = open_connection(endpoint(), hello(ConnectionKind::Control), now() + kPatience);
    ASSERT_TRUE(control.has_value()) << control.error().to_string();
    control_ = std::make_unique<TlsSocket>(std::move(*control));
    auto lane = open_connection(endpoint(), hello(ConnectionKind::Lane), now() + kPatience);
    ASSERT_TRUE(lane.has_value()) << lane.error().to_string();
    lane_ = std::make_unique<TlsSocket>(std::move(*lane));
  }
  // The answer to a control message, with its id.
  nlohmann::json ask(nlohmann::json request) {
    request["id"] = ++id_;
    say(*control_, *encode_message(request));
    return hear();
  }
  nlohmann::json hear() {
    auto text = control_->read_message(kMaxMessage, now() + kPatience);
    EXPECT_TRUE(text.has_value());
    return text ? nlohmann::json::parse(*text) : nlohmann::json();
  }
  static void say(TlsSocket& to, std::string_view bytes) {
    const Status said = to.write_all(bytes, now() + kPatience);
    EXPECT_TRUE(said.has_value()) << said.error().to_string();
  }
  void expect_closed(TlsSocket& socket) {
    // Whatever it still says (beats, answers), then the end.
    Bytes sink(65536);
    while (true) {
      auto count = socket.tls().read(sink);
      if (!count || socket.tls().closed()) return;
      if (*count > 0) continue;
      ASSERT_TRUE(wait_for(socket.fd(), POLLIN, now() + kPatience, -1, "the end").has_value());
      auto received = socket.receive();
      if (!received) return;
    }
  }
  [[nodiscard]] static std::string frame(FrameHeader header, std::string_view payload) {
    std::array<std::byte, kHeaderSize> head{};
    encode_header(header, head);
    return std::string(reinterpret_cast<const char*>(head.data()), head.size()) +
           std::string(payload);
  }
  [[nodiscard]] static std::string write_frame(std::uint64_t sequence, std::uint64_t offset,
                                               const std::string& payload) {
    FrameHeader header;
    header.type = FrameType::Write;
    header.sequence = sequence;
    header.extent = {Offset(offset), Length(payload.size())};
    encode_write(header, std::as_bytes(std::span(payload)));
    return frame(header, payload);
  }

  std::unique_ptr<TlsSocket> control_;
  std::unique_ptr<TlsSocket> lane_;
  std::uint64_t id_ = 0;
};

struct BadFrame {
  const char* name;
  std::function<std::string()> bytes;
};

TEST_F(LinkHostileTest, FramesThatBreakTheRulesEndTheLaneAndTouchNoDisk) {
  FrameHeader good;
  good.type = FrameType::Write;
  good.sequence = 1;
  good.extent = {Offset(0), Length(512)};
  const std::string payload(512, 'x');
  encode_write(good, std::as_bytes(std::span(payload)));
  const auto changed = [&](const std::function<void(FrameHeader&)>& change) {
    FrameHeader header = good;
    change(header);
    return frame(header, payload);
  };
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"garbage", std::string(kHeaderSize, '\xa5')},
      {"a payload that does not match its checksum",
       changed([](FrameHeader& h) { h.checksum ^= 1; })},
      {"a sequence that skips", changed([](FrameHeader& h) { h.sequence = 2; })},
      {"a disk that does not exist", changed([](FrameHeader& h) { h.disk = 1; })},
      {"an extent beyond the disk",
       changed([](FrameHeader& h) { h.extent.offset = Offset(4U << 20); })},
      {"an oversized payload", changed([](FrameHeader& h) { h.payload_length = 1U << 30; })},
      {"an answer",
       changed([](FrameHeader& h) { h = FrameHeader{.type = FrameType::Ack, .sequence = 1}; })},
      {"a truncated frame", frame(good, payload.substr(0, 100))},
  };
  ASSERT_TRUE(ask(reserve_request()).contains("ok"));
  std::uint64_t epoch = 1;
  for (const auto& [name, bytes] : bad) {
    SCOPED_TRACE(name);
    say(*lane_, bytes);
    if (name == "a truncated frame") {
      ASSERT_TRUE(lane_->tls().close().has_value());
      ASSERT_TRUE(lane_->send().has_value());
    }
    expect_closed(*lane_);
    // The session goes on: a new epoch, a new lane, which works.
    ++epoch;
    Hello again = hello(ConnectionKind::Control);
    again.epoch = epoch;
    auto control = open_connection(endpoint(), again, now() + kPatience);
    ASSERT_TRUE(control.has_value()) << control.error().to_string();
    control_ = std::make_unique<TlsSocket>(std::move(*control));
    again.kind = ConnectionKind::Lane;
    auto lane = open_connection(endpoint(), again, now() + kPatience);
    ASSERT_TRUE(lane.has_value()) << lane.error().to_string();
    lane_ = std::make_unique<TlsSocket>(std::move(*lane));
  }
  EXPECT_TRUE(
      std::ranges::all_of(disks_[0]->bytes(), [](std::byte b) { return b == std::byte{}; }));
  say(*lane_, write_frame(1, 512, "drover"));
  std::array<std::byte, kHeaderSize> answer{};
  std::size_t have = 0;
  while (have < answer.size()) {
    auto count = lane_->tls().read(std::span(answer).subspan(have));
    ASSERT_TRUE(count.has_value());
    have += *count;
    if (have == answer.size() || *count > 0) continue;
    ASSERT_TRUE(wait_for(lane_->fd(), POLLIN, now() + kPatience, -1, "an answer").has_value());
    ASSERT_TRUE(lane_->receive().has_value());
  }
  EXPECT_EQ(std::memcmp(disks_[0]->bytes().data() + 512, "drover", 6), 0);
}

TEST_F(LinkHostileTest, AFrameBeforeAnyImageEndsTheLane) {
  say(*lane_, write_frame(1, 0, "x"));
  expect_closed(*lane_);
  EXPECT_TRUE(ask({{"op", "stats"}}).contains("result"));
}

TEST_F(LinkHostileTest, ASecondControlConnectionIsRefused) {
  const auto second =
      open_connection(endpoint(), hello(ConnectionKind::Control), now() + kPatience);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().code, Code::Busy);
  EXPECT_TRUE(ask({{"op", "stats"}}).contains("result"));
}

TEST_F(LinkHostileTest, ATakenLaneOneTooManyAndOneOfAnotherEpochAreRefused) {
  for (const unsigned index : {0U, 1U}) {
    const auto lane =
        open_connection(endpoint(), hello(ConnectionKind::Lane, index), now() + kPatience);
    EXPECT_FALSE(lane.has_value());
  }
  Hello old = hello(ConnectionKind::Lane);
  old.epoch = 2;
  EXPECT_FALSE(open_connection(endpoint(), old, now() + kPatience).has_value());
}

TEST_F(LinkHostileTest, ANewEpochReplacesTheOldOneWhichIsNotTakenBack) {
  ASSERT_TRUE(ask(reserve_request()).contains("ok"));
  Hello newer = hello(ConnectionKind::Control);
  newer.epoch = 5;
  auto control = open_connection(endpoint(), newer, now() + kPatience);
  ASSERT_TRUE(control.has_value()) << control.error().to_string();
  expect_closed(*control_);
  expect_closed(*lane_);
  for (const std::uint64_t epoch : {1U, 4U, 5U}) {
    Hello older = hello(ConnectionKind::Control);
    older.epoch = epoch;
    EXPECT_FALSE(open_connection(endpoint(), older, now() + kPatience).has_value()) << epoch;
  }
  EXPECT_FALSE(disks_[0]->removed);
  control_ = std::make_unique<TlsSocket>(std::move(*control));
  EXPECT_TRUE(ask({{"op", "remove"}}).contains("ok"));
  EXPECT_TRUE(disks_[0]->removed);
}

TEST_F(LinkHostileTest, AProtocolOfAnotherVersionIsRefused) {
  nlohmann::json json = hello_to_json(hello(ConnectionKind::Control));
  json["protocol"] = kProtocolVersion + 1U;
  const auto parsed = hello_from_json(json);
  ASSERT_FALSE(parsed.has_value());
  EXPECT_EQ(parsed.error().code, Code::Incompatible);
}

TEST_F(LinkHostileTest, UnknownAndUntimelyOperationsAreAnsweredWithErrors) {
  EXPECT_EQ(ask({{"op", "explode"}})["error"]["code"], "invalid-argument");
  EXPECT_EQ(ask({{"op", "barrier"}, {"lanes", nlohmann::json::array()}})["error"]["code"],
            "protocol");
  EXPECT_EQ(ask({{"op", "reserve"}})["error"]["code"], "protocol");
  nlohmann::json relative = reserve_request();
  relative["disks"][0]["path"] = "disk.raw";
  EXPECT_EQ(ask(relative)["error"]["code"], "invalid-argument");
  nlohmann::json other_size = reserve_request();
  other_size["disks"][0]["size"] = 5;
  EXPECT_EQ(ask(other_size)["error"]["code"], "protocol");
  nlohmann::json format = reserve_request();
  format["disks"][0]["format"] = "vmdk";
  EXPECT_EQ(ask(format)["error"]["code"], "incompatible");
  ASSERT_TRUE(ask(reserve_request()).contains("ok"));
  EXPECT_EQ(ask(reserve_request())["error"]["code"], "already-exists");
  EXPECT_EQ(ask({{"op", "finish"}})["error"]["code"], "protocol");
}

TEST_F(LinkHostileTest, AControlConnectionThatTalksNonsenseEndsTheSession) {
  ASSERT_TRUE(ask(reserve_request()).contains("ok"));
  say(*control_, std::string("\xff\xff\xff\x7f", 4));
  expect_closed(*control_);
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_TRUE(disks_[0]->removed);
  expect_nothing_left();
}

TEST_F(LinkHostileTest, JsonThatNestsIsRefused) {
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  const auto length = static_cast<std::uint32_t>(deep.size());
  std::string message(4, '\0');
  std::memcpy(message.data(), &length, 4);
  say(*control_, message + deep);
  expect_closed(*control_);
}

// A source whose frames are not what it says at the barrier.
TEST_F(LinkHostileTest, ABarrierThatDoesNotMatchNamesTheLaneAndKeepsTheImages) {
  ASSERT_TRUE(ask(reserve_request()).contains("ok"));
  say(*lane_, write_frame(1, 0, "drover"));
  LaneDigest digest;
  const nlohmann::json answer = ask({{"op", "barrier"}, {"lanes", {digest.to_json()}}});
  EXPECT_EQ(answer["error"]["code"], "protocol");
  EXPECT_THAT(answer["error"]["message"].get<std::string>(), HasSubstr("data connection 0"));
  EXPECT_EQ(ask({{"op", "remove"}})["error"]["code"], "denied");
  control_.reset();
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_FALSE(disks_[0]->removed);
  EXPECT_TRUE(disks_[0]->released);
  const auto cleaned = cleanup_receiver(dir_ / "jobs", kSession, KeptImages::Refuse, 0ms);
  ASSERT_FALSE(cleaned.has_value());
  EXPECT_EQ(cleaned.error().code, Code::Busy) << "the receiver object still holds its lock";
}

// --- what breaks ---

TEST_F(LinkTest, ALostControlConnectionEndsASessionThatDoesNotLinger) {
  add_disk(1_MiB);
  start_receiver();
  Network network(receiver_->port());
  TestSource source;
  LinkOptions options = link_options(2);
  options.port = network.port();
  set_up(source, options);
  network.cut_all();
  EXPECT_TRUE(source.wait_down());
  EXPECT_EQ(source.downs()[0].code, Code::Unreachable);
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_TRUE(disks_[0]->removed);
  expect_nothing_left();
}

TEST_F(LinkTest, AfterTheBarrierALostLinkKeepsTheImages) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  const std::string directory = receiver_->directory();
  source.disconnect();
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_FALSE(disks_[0]->removed);
  receiver_.reset();
  std::ifstream in(directory + "/record.json");
  EXPECT_EQ(nlohmann::json::parse(in)["keep"], true);
  const auto cleaned = cleanup_receiver(dir_ / "jobs", kSession);
  ASSERT_FALSE(cleaned.has_value());
  EXPECT_EQ(cleaned.error().code, Code::Denied);
  // A source that knows that the guest runs on the target.
  const auto left = cleanup_receiver(dir_ / "jobs", kSession, KeptImages::Leave);
  ASSERT_TRUE(left.has_value());
  EXPECT_TRUE(left->removed.empty());
  expect_nothing_left();
}

TEST_F(LinkTest, ImagesThatAreToBeKeptSurviveALostLinkUntilTheSourceInsists) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  ASSERT_TRUE(source.link().call({{"op", "keep"}}, kPatience).has_value());
  source.disconnect();
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_FALSE(disks_[0]->removed);
  EXPECT_TRUE(disks_[0]->released);
  receiver_.reset();
  EXPECT_EQ(cleanup_receiver(dir_ / "jobs", kSession).error().code, Code::Denied);
  EXPECT_TRUE(cleanup_receiver(dir_ / "jobs", kSession, KeptImages::Remove).has_value());
  expect_nothing_left();
}

TEST_F(LinkTest, RemoveTakesTheImagesBackAndAfterTheBarrierOnlyByForce) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  EXPECT_EQ(source.link().call({{"op", "remove"}}, kPatience).error().code, Code::Denied);
  EXPECT_FALSE(disks_[0]->removed);
  EXPECT_TRUE(source.link().call({{"op", "remove"}, {"force", true}}, kPatience).has_value());
  EXPECT_TRUE(disks_[0]->removed);
  source.disconnect();
  EXPECT_TRUE(receiver_->wait().has_value());
  expect_nothing_left();
}

TEST_F(LinkTest, ToldToEndItRemovesItsImages) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  receiver_->stop();
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_TRUE(disks_[0]->removed);
  EXPECT_TRUE(source.wait_down());
  expect_nothing_left();
}

TEST_F(LinkTest, WhenNobodyComesItEnds) {
  ReceiverOptions options = receiver_options();
  options.first_contact = 20ms;
  receiver_ = std::make_unique<TestReceiver>(options);
  const Status ended = receiver_->wait();
  ASSERT_FALSE(ended.has_value());
  EXPECT_EQ(ended.error().code, Code::Unreachable);
  expect_nothing_left();
}

TEST_F(LinkTest, ASilentLaneIsNoticedByBothEnds) {
  add_disk(1_MiB);
  start_receiver();
  Network network(receiver_->port());
  TestSource source;
  LinkOptions options = link_options(2);
  options.port = network.port();
  options.silence_timeout = 300ms;
  set_up(source, options);
  network.stall_all();
  ASSERT_TRUE(source.wait_down());
  EXPECT_THAT(source.downs()[0].message, HasSubstr("nothing was heard"));
  EXPECT_FALSE(receiver_->wait().has_value());
  EXPECT_TRUE(disks_[0]->removed);
}

// Disks that stall for much longer than the silence, with more on its way than all buffers hold:
// the kernel's window is closed, and still the lane lives.
TEST_F(LinkTest, SlowDisksAreNoSilence) {
  constexpr std::uint64_t kFrames = 120;
  add_disk(1_MiB * kFrames);
  start_receiver();
  TestSource source(kFrames);
  LinkOptions options = link_options(1);
  options.silence_timeout = 400ms;
  set_up(source, options);
  disks_[0]->close_gate();
  Random random(1);
  const Bytes chunk = random_bytes(random, 1U << 20);
  for (std::uint64_t i = 0; i < kFrames; ++i) {
    source.send(0, {.type = FrameType::Copy, .extent = {Offset(i << 20), 1_MiB}, .token = i},
                chunk);
  }
  // Nothing is awaited but that time passes.
  for (const Instant later = now() + 2s; now() < later;) {
    ASSERT_TRUE(source.link().call({{"op", "stats"}}, kPatience).has_value());
    std::this_thread::sleep_for(50ms);
  }
  EXPECT_TRUE(source.abandon(0, kFrames - 1)) << "this test needs more frames";
  EXPECT_TRUE(source.downs().empty());
  disks_[0]->open_gate();
  EXPECT_TRUE(source.wait_answers());
}

TEST_F(LinkTest, NoSpaceOnTheTargetComesBackAsNoSpace) {
  add_disk(8_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options(1));
  disks_[0]->full_from = 5U << 20;
  Random random(1);
  copy_all(source, random_bytes(random, 8U << 20), chunk_, 1);
  ASSERT_TRUE(source.wait_answers());
  const auto refused = source.refused_tokens();
  EXPECT_EQ(refused.size(), 3U);
  for (const auto& [token, error] : refused) {
    EXPECT_GE(token, 5U);
    EXPECT_EQ(error.code, Code::NoSpace);
    EXPECT_THAT(error.message, HasSubstr("no space left"));
  }
  EXPECT_TRUE(source.downs().empty());
}

TEST_F(LinkTest, AFrameThatWaitsCanBeAbandonedOneUnderWayNot) {
  add_disk(256_MiB);
  start_receiver();
  TestSource source(256);
  set_up(source, link_options(1));
  disks_[0]->close_gate();
  // More than the receiver's buffers and the network hold: the last one waits at the source.
  Random random(1);
  const Bytes chunk = random_bytes(random, 1U << 20);
  constexpr std::uint64_t kFrames = 200;
  for (std::uint64_t i = 0; i < kFrames; ++i) {
    source.send(0, {.type = FrameType::Copy, .extent = {Offset(i << 20), 1_MiB}, .token = i},
                chunk);
  }
  EXPECT_TRUE(source.abandon(0, kFrames - 1));
  EXPECT_FALSE(source.abandon(0, kFrames - 1));
  EXPECT_FALSE(source.abandon(0, 12345));
  EXPECT_TRUE(source.downs().empty());
  disks_[0]->open_gate();
  ASSERT_TRUE(source.wait_answers());
  const auto applied = source.applied_tokens();
  EXPECT_EQ(applied.size(), kFrames - 1);
  EXPECT_EQ(std::ranges::count(applied, kFrames - 1), 0);
  EXPECT_FALSE(source.abandon(0, 0));
  EXPECT_TRUE(source.link().barrier(kPatience).has_value());
}

TEST_F(LinkTest, TheBarrierWaitsForAnswersButNotForEver) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options(1));
  disks_[0]->close_gate();
  source.write(0, 0, Bytes(512, std::byte{1}), {Offset(0), Length(512)});
  source.on_engine([] {});
  EXPECT_EQ(source.link().barrier(50ms).error().code, Code::Busy);
  disks_[0]->open_gate();
  EXPECT_TRUE(source.link().barrier(kPatience).has_value());
}

// --- memory ---

class UnixServer {
 public:
  explicit UnixServer(const std::string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::ranges::copy(path, name.sun_path);
    fd_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::bind(fd_.get(), reinterpret_cast<sockaddr*>(&name), sizeof name), 0);
    EXPECT_EQ(::listen(fd_.get(), 8), 0);
  }
  UniqueFd accept() {
    pollfd polled{fd_.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&polled, 1, 60000), 1);
    return UniqueFd(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  }

 private:
  UniqueFd fd_;
};

UniqueFd connect_to(const std::string& path) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::ranges::copy(path, name.sun_path);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof name), 0);
  return fd;
}

void send_all(int fd, const Bytes& bytes) {
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t sent = ::send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (sent <= 0) break;
    at += static_cast<std::size_t>(sent);
  }
  ::shutdown(fd, SHUT_WR);
}

Bytes receive_all(int fd) {
  Bytes all;
  Bytes piece(1U << 20);
  while (true) {
    const ssize_t count = ::recv(fd, piece.data(), piece.size(), 0);
    if (count <= 0) return all;
    all.insert(all.end(), piece.begin(), piece.begin() + count);
  }
}

TEST_F(LinkTest, MemoryTravelsBothWaysAtOnceAndEndsWithBoth) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  start_relay(source, {.gated = true, .mode = 0660});
  struct stat info {};
  ASSERT_EQ(::stat(relay_path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777U, 0660U);
  UnixServer server(memory_path_);
  Random random(1);
  const Bytes there = random_bytes(random, 100U << 20);
  const Bytes back = random_bytes(random, 100U << 20);
  const UniqueFd qemu = connect_to(relay_path_);
  const std::byte early{1};
  ASSERT_EQ(::send(qemu.get(), &early, 1, MSG_NOSIGNAL), 1);
  const UniqueFd incoming = server.accept();
  EXPECT_EQ(source.link().counters().memory_bytes, 0U) << "the gate is closed";
  source.link().let_memory_pass(true);
  std::byte first{};
  ASSERT_EQ(::recv(incoming.get(), &first, 1, MSG_WAITALL), 1);
  Bytes arrived;
  Bytes returned;
  std::thread sends([&] { send_all(qemu.get(), there); });
  std::thread answers([&] { send_all(incoming.get(), back); });
  std::thread receives([&] { arrived = receive_all(incoming.get()); });
  returned = receive_all(qemu.get());
  for (std::thread* thread : {&sends, &answers, &receives}) thread->join();
  EXPECT_TRUE(arrived == there);
  EXPECT_TRUE(returned == back);
  EXPECT_GE(source.link().counters().memory_bytes, there.size() + back.size());

  // One direction ends, the other goes on.
  const UniqueFd second = connect_to(relay_path_);
  const UniqueFd second_incoming = server.accept();
  send_all(second.get(), Bytes(1000, std::byte{7}));
  EXPECT_EQ(receive_all(second_incoming.get()).size(), 1000U);
  send_all(second_incoming.get(), Bytes(2000, std::byte{8}));
  EXPECT_EQ(receive_all(second.get()).size(), 2000U);

  // stop_relay() breaks what is left.
  const UniqueFd third = connect_to(relay_path_);
  const UniqueFd third_incoming = server.accept();
  source.link().stop_relay();
  EXPECT_TRUE(receive_all(third.get()).empty());
  EXPECT_TRUE(receive_all(third_incoming.get()).empty());
}

// Between what the source's QEMU has given and what the target's has taken lie the buffers.
TEST_F(LinkTest, WhatTheTargetsQemuHasNotTakenOfTheMemoryIsKnown) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  start_relay(source);
  UnixServer server(memory_path_);
  const UniqueFd qemu = connect_to(relay_path_);
  UniqueFd incoming = server.accept();
  Random random(1);
  const Bytes memory = random_bytes(random, 100'000);  // the target's socket takes that much unread
  send_all(qemu.get(), memory);
  std::uint64_t passed = 0;
  std::uint64_t loaded = 0;
  const auto asked_until = [&](const std::function<bool()>& reached) {
    const Instant deadline = now() + kPatience;
    do {
      const auto stats = source.link().call({{"op", "stats"}}, kPatience);
      if (!stats) return false;
      passed = stats->at("memory_bytes").get<std::uint64_t>();
      loaded = stats->at("memory_loaded").get<std::uint64_t>();
    } while (!reached() && now() < deadline);
    return reached();
  };
  EXPECT_TRUE(asked_until([&] { return passed == memory.size() && loaded == 0; })) << passed << " " << loaded;
  EXPECT_EQ(source.link().counters().memory_given, memory.size());
  Bytes taken(memory.size());
  ASSERT_EQ(::recv(incoming.get(), taken.data(), taken.size(), MSG_WAITALL), static_cast<ssize_t>(taken.size()));
  EXPECT_TRUE(taken == memory);
  EXPECT_TRUE(asked_until([&] { return loaded == memory.size(); })) << loaded;

  // What a gate holds back has been given all the same. Relays that have ended do not count.
  incoming.reset();
  ::unlink(memory_path_.c_str());
  start_relay(source, {.gated = true});
  EXPECT_EQ(source.link().counters().memory_given, 0U);
  UnixServer again(memory_path_);
  const UniqueFd second = connect_to(relay_path_);
  const UniqueFd second_incoming = again.accept();
  send_all(second.get(), memory);
  EXPECT_TRUE(asked_until([&] { return source.link().counters().memory_given == memory.size() && loaded == 0; }))
      << source.link().counters().memory_given << " " << loaded;
}

class MemoryCompressionTest : public LinkTest,
                              public testing::WithParamInterface<const char*> {};
INSTANTIATE_TEST_SUITE_P(Methods, MemoryCompressionTest,
                         testing::Values("none", "lz4", "zstd:1"));

TEST_P(MemoryCompressionTest, ItIsTheSameWhenItArrives) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  LinkOptions options = link_options();
  options.compression = *parse_compression(GetParam());
  set_up(source, options);
  start_relay(source);
  UnixServer server(memory_path_);
  const UniqueFd qemu = connect_to(relay_path_);
  const UniqueFd incoming = server.accept();
  Random random(3);
  Bytes there = random_bytes(random, 40U << 20);
  for (std::size_t i = 0; i < there.size(); ++i) {
    if (i / 4096 % 4 != 0) there[i] = std::byte{5};  // three pages of four shrink
  }
  const Bytes back = random_bytes(random, 1U << 20);
  Bytes arrived;
  std::thread sends([&] { send_all(qemu.get(), there); });
  std::thread answers([&] { send_all(incoming.get(), back); });
  std::thread receives([&] { arrived = receive_all(incoming.get()); });
  EXPECT_TRUE(receive_all(qemu.get()) == back);
  for (std::thread* thread : {&sends, &answers, &receives}) thread->join();
  EXPECT_TRUE(arrived == there);
  const std::uint64_t on_the_wire = source.link().counters().memory_bytes - back.size();
  if (std::string_view(GetParam()) == "none") {
    EXPECT_EQ(on_the_wire, there.size());
  } else {
    EXPECT_LT(on_the_wire, there.size() / 2);
  }
}

// QEMU before 8.0 takes the first connection that reaches it for the main one.
TEST_F(LinkTest, MemoryConnectionsReachTheTargetInTheirOrderAndAllWaitAtTheGate) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  start_relay(source, {.gated = true});
  UnixServer server(memory_path_);
  constexpr std::size_t kChannels = 6;
  std::vector<UniqueFd> channels;
  std::vector<UniqueFd> incoming;
  for (std::size_t i = 0; i < kChannels; ++i) {
    channels.push_back(connect_to(relay_path_));
    const auto mark = static_cast<std::byte>(i);
    ASSERT_EQ(::send(channels.back().get(), &mark, 1, MSG_NOSIGNAL), 1);
  }
  for (std::size_t i = 0; i < kChannels; ++i) incoming.push_back(server.accept());
  EXPECT_EQ(source.link().counters().memory_bytes, 0U) << "nothing passes on any of them";
  for (const UniqueFd& fd : incoming) {
    std::byte got{};
    EXPECT_LT(::recv(fd.get(), &got, 1, MSG_DONTWAIT), 0);
  }
  source.link().let_memory_pass(true);
  for (std::size_t i = 0; i < kChannels; ++i) {
    std::byte got{255};
    ASSERT_EQ(::recv(incoming[i].get(), &got, 1, MSG_WAITALL), 1);
    EXPECT_EQ(static_cast<std::size_t>(got), i);
  }
  // One that breaks on the target breaks here, and no other.
  incoming[3].reset();
  EXPECT_TRUE(receive_all(channels[3].get()).empty());
  send_all(channels[4].get(), Bytes(1000, std::byte{4}));
  EXPECT_EQ(receive_all(incoming[4].get()).size(), 1000U);
}

TEST_F(LinkTest, MemoryThatNobodyAwaitsOnTheTargetIsClosed) {
  add_disk(1_MiB);
  start_receiver();
  TestSource source;
  set_up(source, link_options());
  start_relay(source);
  const UniqueFd qemu = connect_to(relay_path_);
  EXPECT_TRUE(receive_all(qemu.get()).empty());
  EXPECT_EQ(source.link().start_relay({.unix_path = relay_path_}).error().code, Code::AlreadyExists);
}

TEST_F(LinkHostileTest, MemoryInBlocksThatMakeNoSenseEndsItsConnectionAlone) {
  const std::string path = dir_ / "memory.sock";
  UnixServer server(path);
  Hello memory = hello(ConnectionKind::Memory);
  memory.path = path;
  memory.blocks = true;
  for (const std::string& bad :
       {std::string("\xff\xff\xff\x01\x01\0\0\0", 8), std::string("\x64\0\0\x02\x04\0\0\0abcd", 12),
        std::string("\x64\0\0\x09\x04\0\0\0", 8)}) {
    nlohmann::json welcome;
    auto made = open_connection(endpoint(), memory, now() + kPatience, -1, &welcome);
    ASSERT_TRUE(made.has_value()) << made.error().to_string();
    EXPECT_EQ(welcome["blocks"], true);
    const UniqueFd qemu = server.accept();
    say(*made, std::string("\x03\0\0\0\x03\0\0\0abc", 11) + bad);
    EXPECT_EQ(receive_all(qemu.get()).size(), 3U) << "what came before";
    expect_closed(*made);
  }
  EXPECT_TRUE(ask({{"op", "stats"}}).contains("ok"));
}

// --- what heals ---

class HealTest : public LinkTest {
 protected:
  // A resumable receiver behind a network, and a source whose link goes through it.
  void start(Length size, unsigned lanes = 2) {
    add_disk(size);
    ReceiverOptions options = receiver_options();
    options.linger = kPatience;
    options.resumable = true;
    receiver_ = std::make_unique<TestReceiver>(options);
    network_ = std::make_unique<Network>(receiver_->port());
    options_ = link_options(lanes);
    options_.port = network_->port();
    Random random(1);
    content_ = random_bytes(random, size.bytes());
  }
  void connect() { ASSERT_NO_FATAL_FAILURE(set_up(source_, options_)); }
  // All that the source has is on the target, and the barrier proves it.
  void expect_delivered() {
    ASSERT_TRUE(source_.deliver(content_, chunk_, options_.lanes));
    const auto barrier = source_.link().barrier(kPatience);
    ASSERT_TRUE(barrier.has_value()) << barrier.error().to_string();
    EXPECT_TRUE(disks_[0]->bytes() == content_);
    EXPECT_FALSE(disks_[0]->removed);
    EXPECT_FALSE(source_.failed().has_value());
  }

  std::unique_ptr<Network> network_;
  LinkOptions options_;
  Bytes content_;
  TestSource source_;  // before what it is connected through goes
};

TEST_F(HealTest, ACutInTheMiddleHealsAndOnlyWhatWasNotAnsweredIsSentAgain) {
  start(64_MiB);
  network_->cut_after(1, 9U << 20);
  connect();
  expect_delivered();
  EXPECT_EQ(source_.downs().size(), 1U);
  const auto ups = source_.ups();
  ASSERT_EQ(ups.size(), 1U);
  ASSERT_EQ(ups[0].size(), 1U);
  EXPECT_EQ(ups[0][0].path, "/0");
  EXPECT_EQ(source_.link().counters().reconnects, 1U);
  // What was answered before the cut is not answered again.
  const auto applied = source_.applied_tokens();
  const std::size_t before = source_.answered_before_up();
  for (std::size_t i = 0; i < before; ++i) {
    EXPECT_EQ(std::ranges::count(applied, applied[i]), 1);
  }
}

TEST_F(HealTest, AHalfOpenLinkIsNoticedAndHeals) {
  start(8_MiB);
  options_.silence_timeout = 300ms;
  options_.connect_timeout = 300ms;
  connect();
  network_->stall_all();
  source_.write(0, 0, content_, {Offset(0), Length(4096)}, 1000);
  ASSERT_TRUE(source_.wait_down());
  EXPECT_THAT(source_.downs()[0].message, HasSubstr("nothing was heard"));
  network_->heal();  // with what the old connections still held
  ASSERT_TRUE(source_.wait_up());
  expect_delivered();
}

TEST_F(HealTest, OneLaneThatIsCutTakesTheLinkDownOnce) {
  start(8_MiB, 4);
  connect();
  network_->cut(3);
  ASSERT_TRUE(source_.wait_up());
  EXPECT_EQ(source_.downs().size(), 1U);
  EXPECT_THAT(source_.downs()[0].message, HasSubstr("data connection 2"));
  expect_delivered();
}

TEST_F(HealTest, TheControlConnectionAloneTakesTheLinkDown) {
  start(8_MiB);
  connect();
  network_->cut(0);
  ASSERT_TRUE(source_.wait_up());
  EXPECT_EQ(source_.downs().size(), 1U);
  expect_delivered();
}

TEST_F(HealTest, WhileItIsDownCallsWaitAndBarriersFailAtOnce) {
  start(1_MiB);
  connect();
  network_->cut_all();
  ASSERT_TRUE(source_.wait_down());
  EXPECT_EQ(source_.link().barrier(kPatience).error().code, Code::Unreachable);
  EXPECT_EQ(source_.link().start_relay({.unix_path = dir_ / "m.sock"}).error().code,
            Code::Unreachable);
  EXPECT_FALSE(std::filesystem::exists(dir_ / "m.sock"));
  const auto early = source_.link().call({{"op", "stats"}}, 20ms);
  ASSERT_FALSE(early.has_value());
  EXPECT_EQ(early.error().code, Code::Unreachable);
  EXPECT_TRUE(early.error().retryable);
  auto waits = std::async(std::launch::async, [&] {
    return source_.link().call({{"op", "stats"}}, kPatience);
  });
  network_->heal();
  EXPECT_TRUE(waits.get().has_value());
  expect_delivered();
}

TEST_F(HealTest, ABarrierAndACallUnderWayFailWhenItGoesDown) {
  start(1_MiB);
  connect();
  disks_[0]->close_gate();
  source_.write(0, 0, content_, {Offset(0), Length(512)}, 1000);
  source_.on_engine([] {});
  auto barrier = std::async(std::launch::async, [&] { return source_.link().barrier(kPatience); });
  network_->cut_all();
  EXPECT_EQ(barrier.get().error().code, Code::Unreachable);
  disks_[0]->open_gate();
  network_->heal();
  ASSERT_TRUE(source_.wait_up());
  expect_delivered();
}

TEST_F(HealTest, ABarrierWhoseAnswerWasLostIsAskedForAgain) {
  start(1_MiB);
  connect();
  ASSERT_TRUE(source_.deliver(content_, chunk_, options_.lanes));
  ASSERT_TRUE(source_.link().barrier(kPatience).has_value());
  network_->cut(0);
  ASSERT_TRUE(source_.wait_up());
  const auto again = source_.link().barrier(kPatience);
  EXPECT_TRUE(again.has_value()) << again.error().to_string();
  EXPECT_TRUE(disks_[0]->released);
  ASSERT_TRUE(source_.link().call({{"op", "finish"}}, kPatience).has_value());
  EXPECT_TRUE(receiver_->wait().has_value());
  expect_nothing_left();
}

TEST_F(HealTest, ItGivesUpWhenItMay) {
  start(1_MiB);
  options_.give_up_after = 60ms;
  connect();
  network_->cut_all();
  ASSERT_TRUE(source_.wait_failed());
  EXPECT_EQ(source_.failed()->code, Code::Unreachable);
  EXPECT_THAT(source_.failed()->message, HasSubstr("the link was down for 60 ms"));
  EXPECT_TRUE(source_.ups().empty());
  EXPECT_EQ(source_.link().call({{"op", "stats"}}, kPatience).error().code, Code::Unreachable);
}

TEST_F(HealTest, AReceiverThatDeniesTheKeyEndsIt) {
  start(1_MiB);
  connect();
  network_->cut_all();
  ASSERT_TRUE(source_.wait_down());
  const std::uint16_t port = receiver_->port();
  receiver_.reset();
  ReceiverOptions stranger = receiver_options();
  stranger.key[0] ^= std::byte{1};
  stranger.jobs_directory = dir_ / "other-jobs";
  stranger.listen.port = port;
  receiver_ = std::make_unique<TestReceiver>(stranger);
  network_->heal();
  ASSERT_TRUE(source_.wait_failed());
  EXPECT_EQ(source_.failed()->code, Code::Denied);
}

TEST_F(HealTest, StrangersWhileItIsDownHarmNothing) {
  start(4_MiB);
  connect();
  network_->cut_all();
  ASSERT_TRUE(source_.wait_down());
  TestSource stranger;
  LinkOptions wrong = link_options();
  wrong.epoch = 1000;
  wrong.key[5] ^= std::byte{1};
  EXPECT_EQ(stranger.connect(wrong).error().code, Code::Denied);
  auto garbage = connect_tcp("127.0.0.1", receiver_->port(), now() + kPatience);
  ASSERT_TRUE(garbage.has_value());
  const std::string greeting(70000, '\x16');
  (void)!::send(garbage->get(), greeting.data(), greeting.size(), MSG_NOSIGNAL);
  EXPECT_NE(read_until_closed(garbage->get()), "it was not closed");
  network_->heal();
  ASSERT_TRUE(source_.wait_up());
  expect_delivered();
}

TEST_F(HealTest, MemoryConnectionsEndWithTheLinkAndNewOnesWorkOnTheNext) {
  start(1_MiB);
  connect();
  const std::string path = dir_ / "memory.sock";
  const std::string relay_path = dir_ / "relay.sock";
  ASSERT_TRUE(source_.link().start_relay({.unix_path = path}).has_value());
  ASSERT_EQ(::rename(path.c_str(), relay_path.c_str()), 0);
  UnixServer server(path);
  {
    const UniqueFd qemu = connect_to(relay_path);
    const UniqueFd incoming = server.accept();
    network_->cut_all();
    EXPECT_TRUE(receive_all(qemu.get()).empty());
    EXPECT_TRUE(receive_all(incoming.get()).empty());
  }
  network_->heal();
  ASSERT_TRUE(source_.wait_up());
  ASSERT_EQ(::unlink(relay_path.c_str()), 0);
  ASSERT_TRUE(source_.link().start_relay({.unix_path = path}).has_value());
  ASSERT_EQ(::rename(path.c_str(), relay_path.c_str()), 0);
  UnixServer next_server(
      path);  // the old relay has removed the name, which was the server's by then
  const UniqueFd qemu = connect_to(relay_path);
  const UniqueFd incoming = next_server.accept();
  send_all(qemu.get(), Bytes(1000, std::byte{7}));
  EXPECT_EQ(receive_all(incoming.get()).size(), 1000U);
}

TEST_F(HealTest, AnImageWhoseProcessDiesIsOpenedAgainAndSaysSo) {
  start(4_MiB);
  connect();
  const auto before = source_.link().call({{"op", "images"}}, kPatience);
  ASSERT_TRUE(before.has_value());
  disks_[0]->alive = false;
  source_.write(0, 0, content_, {Offset(0), Length(512)}, 1000);
  ASSERT_TRUE(source_.wait_up());
  const TargetDisk after = source_.ups()[0].at(0);
  EXPECT_NE(after.instance, (*before)["disks"][0]["instance"]);
  EXPECT_EQ(after.id, (*before)["disks"][0]["id"]);
  expect_delivered();
}

TEST_F(HealTest, AFlushIsAnsweredWhileWritesAreUnderWay) {
  start(1_MiB);
  connect();
  disks_[0]->close_gate();
  source_.write(0, 0, content_, {Offset(0), Length(512)}, 1000);
  EXPECT_TRUE(source_.link().call({{"op", "flush"}}, kPatience).has_value());
  EXPECT_TRUE(disks_[0]->flushed);
  disks_[0]->open_gate();
  EXPECT_TRUE(source_.wait_answers());
}

TEST_F(HealTest, PausesGrowAndAreBounded) {
  const RetryDelays delays;
  EXPECT_EQ(reconnect_delay(0, delays, 7), 0ms);
  Random random(1);
  for (unsigned attempt = 1; attempt < 1000; ++attempt) {
    const auto full = std::min(delays.longest,
                               attempt < 10 ? delays.first * (1 << (attempt - 1)) : delays.longest);
    const auto pause = reconnect_delay(attempt, delays, random.next());
    EXPECT_LE(pause, full) << attempt;
    EXPECT_GE(pause, full * 3 / 4) << attempt;
  }
}

TEST_F(LinkHostileTest, FramesOfAnOldEpochAreAppliedBeforeTheNewWelcomeOrNever) {
  ASSERT_TRUE(ask(reserve_request()).contains("ok"));
  disks_[0]->close_gate();
  say(*lane_, write_frame(1, 0, "old"));
  const std::string half = write_frame(2, 512, "never");
  say(*lane_, half.substr(0, half.size() - 2));
  // The first is taken: its answer is all that is missing.
  while (ask({{"op", "stats"}})["result"]["frames"] != 1) {
  }
  Hello newer = hello(ConnectionKind::Control);
  newer.epoch = 2;
  auto welcome = std::async(std::launch::async,
                            [&] { return open_connection(endpoint(), newer, now() + kPatience); });
  EXPECT_EQ(welcome.wait_for(50ms), std::future_status::timeout) << "an old frame is under way";
  disks_[0]->open_gate();
  auto control = welcome.get();
  ASSERT_TRUE(control.has_value()) << control.error().to_string();
  EXPECT_EQ(std::memcmp(disks_[0]->bytes().data(), "old", 3), 0);
  (void)lane_->write_all(half.substr(half.size() - 2), now() + kPatience);
  control_ = std::make_unique<TlsSocket>(std::move(*control));
  newer.kind = ConnectionKind::Lane;
  auto lane = open_connection(endpoint(), newer, now() + kPatience);
  ASSERT_TRUE(lane.has_value());
  EXPECT_TRUE(ask({{"op", "flush"}}).contains("ok"));
  EXPECT_EQ(disks_[0]->bytes()[512], std::byte{0});
}

// --- what can be resumed ---

class ResumeTest : public LinkTest {
 protected:
  static constexpr Length kSize = 4_MiB;

  void SetUp() override {
    Random random(5);
    content_ = random_bytes(random, kSize.bytes());
    disks_.push_back(std::make_unique<ModelDisk>(kSize, 1));  // for its size
  }
  [[nodiscard]] ReceiverOptions real_options(bool resume) {
    ReceiverOptions options = receiver_options();
    options.create_image = nullptr;
    options.open_image = nullptr;
    options.resumable = true;
    options.resume = resume;
    options.linger = 20ms;
    return options;
  }
  void reserve(TestSource& source, const std::string& format) {
    receiver_ = std::make_unique<TestReceiver>(real_options(false));
    ASSERT_TRUE(source.connect(link_options()).has_value());
    const auto reserved = source.link().call(
        {{"op", "reserve"},
         {"disks", {{{"path", path()}, {"format", format}, {"size", kSize.bytes()}}}}},
        kPatience);
    ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
    first_ = (*reserved)["disks"][0];
  }
  // One that waited in vain.
  void leave_resumable(const std::string& format = "raw") {
    TestSource source;
    ASSERT_NO_FATAL_FAILURE(reserve(source, format));
    ASSERT_TRUE(source.deliver(content_, chunk_, 2));
    source.disconnect();
    EXPECT_EQ(receiver_->wait().error().code, Code::Unreachable);
    receiver_.reset();
  }
  [[nodiscard]] Error resume_error() {
    const auto made = Receiver::create(real_options(true));
    EXPECT_FALSE(made.has_value());
    return made ? Error() : made.error();
  }
  // Read back from the image.
  void expect_content(TestSource& source) {
    EXPECT_THAT(source.differences(content_, 64_KiB), testing::IsEmpty());
  }
  [[nodiscard]] std::string path() const { return dir_ / "image"; }
  [[nodiscard]] std::string record() const { return dir_ / "jobs/job-1/receiver/record.json"; }
  void edit_record(const std::function<void(nlohmann::json&)>& edit) {
    nlohmann::json json = nlohmann::json::parse(std::ifstream(record()));
    edit(json);
    std::ofstream(record()) << json;
  }

  Bytes content_;
  nlohmann::json first_;  // the image as it was reserved
};

TEST_F(ResumeTest, OneThatWaitedInVainKeepsItsImagesAndAnotherGoesOn) {
  for (const char* const format : {"raw", "qcow2"}) {
    SCOPED_TRACE(format);
    ASSERT_NO_FATAL_FAILURE(leave_resumable(format));
    EXPECT_TRUE(std::filesystem::exists(path()));
    EXPECT_EQ(nlohmann::json::parse(std::ifstream(record()))["resumable"], true);
    receiver_ = std::make_unique<TestReceiver>(real_options(true));
    TestSource source;
    ASSERT_TRUE(source.connect(link_options()).has_value());
    const auto images = source.link().call({{"op", "images"}}, kPatience);
    ASSERT_TRUE(images.has_value());
    const nlohmann::json& image = (*images)["disks"][0];
    EXPECT_EQ(image["path"], path());
    EXPECT_EQ(image["id"], first_["id"]);
    EXPECT_EQ(image["initially_zero"], true);
    // What a raw file holds survives its writer, what a daemon holds may not.
    EXPECT_EQ(image["instance"] == first_["instance"], std::string(format) == "raw");
    expect_content(source);
    const auto map = source.link().call({{"op", "map"}, {"disk", 0}, {"offset", 0}}, kPatience);
    ASSERT_TRUE(map.has_value());
    EXPECT_GT((*map)["end"].get<std::uint64_t>(), 0U);
    for (const nlohmann::json& hole : (*map)["holes"]) {
      const std::uint64_t at = hole[0];
      const std::uint64_t end = at + hole[1].get<std::uint64_t>();
      for (std::uint64_t i = at; i < end; ++i) ASSERT_EQ(content_[i], std::byte{0}) << i;
    }
    EXPECT_FALSE(
        source.link().call({{"op", "map"}, {"disk", 0}, {"offset", content_.size()}}, kPatience));
    EXPECT_FALSE(source.link().call({{"op", "map"}, {"disk", 1}, {"offset", 0}}, kPatience));
    content_[0] ^= std::byte{1};
    source.write(0, 0, content_, {Offset(0), Length(512)}, 1000);
    ASSERT_TRUE(source.wait_answers());
    expect_content(source);
    ASSERT_TRUE(source.link().barrier(kPatience).has_value());
    ASSERT_TRUE(source.link().call({{"op", "finish"}}, kPatience).has_value());
    EXPECT_TRUE(receiver_->wait().has_value());
    EXPECT_TRUE(std::filesystem::remove(path()));
    receiver_.reset();
    expect_nothing_left();
  }
}

TEST_F(ResumeTest, ToldToEndItKeepsWhatCanBeResumedAndTheLinkFindsTheNextOne) {
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(reserve(source, "raw"));
  source.disconnect();
  receiver_->stop();
  (void)receiver_->wait();
  receiver_.reset();
  receiver_ = std::make_unique<TestReceiver>(real_options(true));
  LinkOptions options = link_options();
  unsigned asked = 0;
  options.locate = [&](unsigned attempt, const Error& last, int) -> Result<LinkAddress> {
    EXPECT_EQ(last.code, Code::Unreachable);
    ++asked;
    if (attempt == 0) return fail(Error{Code::Unreachable, "the host does not answer", "", true});
    receiver_.reset();
    receiver_ = std::make_unique<TestReceiver>(real_options(true));
    return LinkAddress{"127.0.0.1", receiver_->port()};
  };
  ASSERT_TRUE(source.connect(options).has_value());
  receiver_->stop();
  ASSERT_TRUE(source.wait_up());
  EXPECT_EQ(asked, 2U);
  EXPECT_EQ(source.ups()[0].at(0).id, first_["id"]);
  EXPECT_EQ(source.ups()[0].at(0).instance, first_["instance"]);
  ASSERT_TRUE(source.deliver(content_, chunk_, 2));
  expect_content(source);
  ASSERT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
  source.disconnect();
  EXPECT_TRUE(receiver_->wait().has_value());
  EXPECT_FALSE(std::filesystem::exists(path()));
  expect_nothing_left();
}

TEST_F(ResumeTest, WhoeverSearchesMayEndTheLink) {
  TestSource source;
  receiver_ = std::make_unique<TestReceiver>(real_options(false));
  LinkOptions options = link_options();
  options.locate = [](unsigned, const Error&, int) -> Result<LinkAddress> {
    return fail(Code::NotFound, "nothing is left there");
  };
  ASSERT_TRUE(source.connect(options).has_value());
  receiver_.reset();
  ASSERT_TRUE(source.wait_failed());
  EXPECT_EQ(source.failed()->code, Code::NotFound);
}

TEST_F(ResumeTest, AFileThatTookAnImagesPlaceIsNotWrittenTo) {
  ASSERT_NO_FATAL_FAILURE(leave_resumable());
  const std::string other = dir_ / "other";
  std::filesystem::copy_file(path(), other);
  ASSERT_EQ(::rename(other.c_str(), path().c_str()), 0);
  EXPECT_EQ(resume_error().code, Code::Busy);
  ASSERT_EQ(::rename(path().c_str(), other.c_str()), 0);
  ASSERT_EQ(::symlink(other.c_str(), path().c_str()), 0);
  EXPECT_EQ(resume_error().code, Code::Busy);
  ASSERT_TRUE(std::filesystem::remove(path()));
  EXPECT_EQ(resume_error().code, Code::NotFound);
  EXPECT_TRUE(std::filesystem::exists(record())) << "what was refused is not touched";
}

TEST_F(ResumeTest, AnImageOfAnotherSizeIsRefused) {
  ASSERT_NO_FATAL_FAILURE(leave_resumable());
  std::filesystem::resize_file(path(), 4096);
  EXPECT_EQ(resume_error().code, Code::Incompatible);
}

TEST_F(ResumeTest, ADamagedImageIsMadeAnewAndSaysSo) {
  ASSERT_NO_FATAL_FAILURE(leave_resumable("qcow2"));
  {
    std::fstream file(path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(65536);  // the refcounts
    file << std::string(65536, '\xff');
  }
  receiver_ = std::make_unique<TestReceiver>(real_options(true));
  TestSource source;
  ASSERT_TRUE(source.connect(link_options()).has_value());
  const auto images = source.link().call({{"op", "images"}}, kPatience);
  ASSERT_TRUE(images.has_value());
  EXPECT_NE((*images)["disks"][0]["id"], first_["id"]);
  content_.assign(content_.size(), std::byte{0});
  expect_content(source);
}

TEST_F(ResumeTest, WhatIsNotResumableOrNotReadableIsRefused) {
  EXPECT_EQ(resume_error().code, Code::NotFound);
  ASSERT_NO_FATAL_FAILURE(leave_resumable());
  edit_record([](nlohmann::json& json) { json["proved"] = true; });
  EXPECT_EQ(resume_error().code, Code::Denied);
  edit_record([](nlohmann::json& json) { json["proved"] = json["resumable"] = false; });
  EXPECT_EQ(resume_error().code, Code::Denied);
  edit_record([](nlohmann::json& json) { json["version"] = 99U; });
  const Error version = resume_error();
  EXPECT_EQ(version.code, Code::Incompatible);
  EXPECT_THAT(version.message, HasSubstr("99"));
  EXPECT_EQ(cleanup_receiver(dir_ / "jobs", kSession).error().code, Code::Incompatible);
  EXPECT_TRUE(std::filesystem::exists(path()));
  std::ofstream(record()) << "{";
  EXPECT_EQ(resume_error().code, Code::Protocol);
}

TEST_F(ResumeTest, AfterABarrierNobodyResumes) {
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(reserve(source, "raw"));
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  source.disconnect();
  (void)receiver_->wait();
  receiver_.reset();
  EXPECT_EQ(resume_error().code, Code::Denied);
  EXPECT_TRUE(std::filesystem::exists(path()));
}

TEST_F(ResumeTest, CleanupRemovesWhatNobodyResumed) {
  ASSERT_NO_FATAL_FAILURE(leave_resumable());
  const auto cleaned = cleanup_receiver(dir_ / "jobs", kSession);
  ASSERT_TRUE(cleaned.has_value()) << cleaned.error().to_string();
  EXPECT_THAT(cleaned->removed, ElementsAre(path()));
  EXPECT_FALSE(std::filesystem::exists(path()));
  expect_nothing_left();
}

TEST_F(ResumeTest, AComparisonTellsWhatIsThereHolesIncluded) {
  for (const char* const format : {"raw", "qcow2"}) {
    SCOPED_TRACE(format);
    TestSource source;
    ASSERT_NO_FATAL_FAILURE(reserve(source, format));
    std::fill_n(content_.begin() + (1 << 20), 2 << 20, std::byte{0});
    ASSERT_TRUE(source.deliver(content_, chunk_, 2));
    expect_content(source);
    content_[70000] ^= std::byte{1};
    content_[content_.size() - 1] ^= std::byte{1};
    EXPECT_THAT(source.differences(content_, 64_KiB), ElementsAre(65536, kSize.bytes() - 65536));
    // In order: what was sent before is seen, what comes after is not.
    source.write(0, 0, content_, {Offset(65536), 64_KiB}, 7);
    source.compare(0, 0, content_, {Offset(65536), 64_KiB}, 8);
    source.zero(0, 0, {Offset(65536), 64_KiB}, 9);
    ASSERT_TRUE(source.wait_answers());
    EXPECT_THAT(source.differing_tokens(), testing::Not(testing::Contains(8U)));
    ASSERT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
    source.disconnect();
    EXPECT_TRUE(receiver_->wait().has_value());
    receiver_.reset();
  }
}

}  // namespace
}  // namespace drover::mirror::test
