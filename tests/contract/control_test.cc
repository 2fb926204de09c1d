// SPDX-License-Identifier: Apache-2.0
//
// The control socket: its requests, and that no client, however it behaves, holds up the job or
// another.
#include "job/control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "base/random.h"
#include "job/broadcast.h"
#include "tests/fakes/job_samples.h"

namespace drover::job {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using testing::sample_plan;
using testing::sample_progress;
using testing::sample_summary;

class Control : public ::testing::Test {
 protected:
  void SetUp() override {
    auto started = ControlServer::start(path, {.status =
                                                   [] {
                                                     return json{{"state", "copying"}};
                                                   },
                                               .cancel = [this] { ++cancels; },
                                               .set_bandwidth = [this](Length rate) -> Status {
                                                 if (rate == 7_MiB) return fail(Code::Io, "no");
                                                 bandwidth = rate.bytes();
                                                 return {};
                                               },
                                               .set_compression = [this](mirror::Compression wanted) -> Status {
                                                 if (wanted.encoding == mirror::Encoding::Lz4) return fail(Code::Io, "no");
                                                 compression = wanted;
                                                 return {};
                                               }});
    ASSERT_TRUE(started.has_value()) << started.error().to_string();
    server = std::move(*started);
  }
  ControlClient client() {
    auto connected = ControlClient::connect(path);
    EXPECT_TRUE(connected.has_value()) << connected.error().to_string();
    return std::move(*connected);
  }
  // A client that says what it likes.
  UniqueFd raw() {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path.c_str());
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    return fd;
  }
  static void send(const UniqueFd& fd, const std::string& text) {
    std::size_t sent = 0;
    while (sent < text.size()) {
      const ssize_t count = ::send(fd.get(), text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (count < 0) return;  // it has let us go
      sent += static_cast<std::size_t>(count);
    }
  }
  static std::string line(const UniqueFd& fd) {
    const auto got = LineReader(fd.get(), kMaxEventLine).next({});
    return got && *got ? **got : "";
  }
  static std::string all(const UniqueFd& fd) {
    std::string out;
    std::array<char, 65536> piece{};
    for (;;) {
      const ssize_t count = ::recv(fd.get(), piece.data(), piece.size(), 0);
      if (count <= 0) return out;
      out.append(piece.data(), static_cast<std::size_t>(count));
    }
  }

  testing::TemporaryPlaces temporary;
  const std::string path = temporary.directory() + "/control.sock";
  std::atomic<int> cancels{0};
  std::atomic<std::uint64_t> bandwidth{0};
  std::atomic<mirror::Compression> compression{};
  std::unique_ptr<ControlServer> server;
};

TEST_F(Control, AnswersItsRequests) {
  ControlClient one = client();
  EXPECT_EQ(one.call({{"op", "status"}})->at("status").at("state"), "copying");
  EXPECT_TRUE(one.call({{"op", "cancel"}}).has_value());
  EXPECT_EQ(cancels.load(), 1);
  EXPECT_TRUE(one.call({{"op", "set"}, {"bandwidth", 1000000}}).has_value());
  EXPECT_EQ(bandwidth.load(), 1'000'000U);
  const auto refused = one.call({{"op", "set"}, {"bandwidth", (7_MiB).bytes()}});
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code, Code::Io);
  EXPECT_EQ(refused.error().message, "no");
}

TEST_F(Control, IsForItsOwnerOnlyAndGoesWithTheServer) {
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600U);
  server->stop();
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_EQ(ControlClient::connect(path).error().code, Code::Unreachable);
}

TEST_F(Control, WhatAKilledRunnerLeftIsReplaced) {
  server.reset();
  {
    const UniqueFd left(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path.c_str());
    ASSERT_EQ(::bind(left.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  EXPECT_EQ(ControlClient::connect(path).error().code, Code::Unreachable);
  SetUp();
  EXPECT_TRUE(client().call({{"op", "status"}}).has_value());
}

TEST_F(Control, AWatcherHearsWhatWasSaidLastAndThenTheRest) {
  server->publish(event_of(Started{"web1-0a"}));
  server->publish(event_of(sample_plan()));
  server->publish(event_of(Note{"one"}));
  Progress progress = sample_progress();
  server->publish(event_of(progress));
  progress.copied = 2_GiB;
  server->publish(event_of(progress));
  ControlClient watcher = client();
  ASSERT_TRUE(watcher.call({{"op", "watch"}}).has_value());
  EXPECT_EQ(std::get<Started>(**watcher.next_event()).id, "web1-0a");
  EXPECT_EQ(std::get<Plan>(**watcher.next_event()).guest, "web1");
  EXPECT_EQ(std::get<Note>(**watcher.next_event()).text, "one");
  EXPECT_EQ(std::get<Progress>(**watcher.next_event()).copied, 2_GiB);
  server->publish(event_of(Note{"two"}));
  EXPECT_EQ(std::get<Note>(**watcher.next_event()).text, "two");
  // Answers and events share the connection.
  server->publish(event_of(Note{"three"}));
  EXPECT_TRUE(watcher.call({{"op", "cancel"}}).has_value());
  EXPECT_EQ(std::get<Note>(**watcher.next_event()).text, "three");
  server->publish(event_of(sample_summary()));
  server->stop();
  EXPECT_EQ(std::get<Summary>(**watcher.next_event()).guest, "web1");
  EXPECT_FALSE(watcher.next_event()->has_value());
}

TEST_F(Control, WhoWaitsForAnEventCanStopWaiting) {
  ControlClient watcher = client();
  ASSERT_TRUE(watcher.call({{"op", "watch"}}).has_value());
  const UniqueFd stop(::eventfd(1, EFD_CLOEXEC));
  EXPECT_EQ(watcher.next_event(stop.get()).error().code, Code::Cancelled);
}

TEST_F(Control, GarbageIsRefusedAndTheNextRequestAnswered) {
  const UniqueFd fd = raw();
  for (const std::string& garbage :
       {std::string("garbage"), std::string("[]"), std::string("{}"), std::string(1000, '{'),
        std::string("{\"op\":3}"), std::string("{\"op\":\"dance\"}"), std::string("\0\xff", 2),
        std::string("{\"op\":\"set\"}"), std::string("{\"op\":\"set\",\"bandwidth\":-1}"),
        std::string("{\"op\":\"set\",\"bandwidth\":1e3}"), std::string("{\"op\":\"set\",\"compress\":\"gzip\"}"),
        std::string("{\"op\":\"set\",\"compress\":3}"),
        std::string("{\"op\":\"set\",\"compress\":\"none\",\"bandwidth\":-1}"),
        std::string("{\"op\":\"set\",\"compress\":\"lz4\",\"bandwidth\":100000}")}) {
    send(fd, garbage + "\n");
    const json answer = json::parse(line(fd));
    EXPECT_EQ(answer.at("ok"), false) << garbage;
    EXPECT_TRUE(answer.at("error").contains("message"));
  }
  send(fd, "{\"op\":\"status\"}\n");
  EXPECT_THAT(line(fd), HasSubstr("copying"));
  EXPECT_EQ(cancels.load(), 0);
  EXPECT_EQ(bandwidth.load(), 0U) << "nothing is set of a request that is refused";
  EXPECT_EQ(compression.load(), mirror::Compression{});
}

TEST_F(Control, CompressionIsSetAloneOrWithTheBandwidth) {
  ControlClient one = client();
  EXPECT_TRUE(one.call({{"op", "set"}, {"compress", "zstd:3"}}).has_value());
  EXPECT_EQ(mirror::compression_name(compression.load()), "zstd:3");
  EXPECT_TRUE(one.call({{"op", "set"}, {"compress", "auto"}, {"bandwidth", 1000000}}).has_value());
  EXPECT_EQ(mirror::compression_name(compression.load()), "auto");
  EXPECT_EQ(bandwidth.load(), 1'000'000U);
}

TEST_F(Control, AnOversizedLineEndsItsConnection) {
  const UniqueFd fd = raw();
  send(fd, std::string(ControlServer::kMostRequest * 4, 'x'));
  EXPECT_THAT(all(fd), HasSubstr("a request is too long"));
  EXPECT_TRUE(client().call({{"op", "status"}}).has_value());
}

TEST_F(Control, RandomBytesDoNoHarm) {
  Random random(11);
  for (int i = 0; i < 200; ++i) {
    const UniqueFd fd = raw();
    std::string text;
    for (std::uint64_t n = random.below(2000); n > 0; --n) {
      text += static_cast<char>(random.below(256));
    }
    send(fd, text);
  }
  EXPECT_TRUE(client().call({{"op", "status"}}).has_value());
  EXPECT_EQ(cancels.load(), 0);
}

TEST_F(Control, SoManyClientsAndNoMore) {
  std::vector<UniqueFd> clients;
  for (std::size_t i = 0; i < ControlServer::kMostClients; ++i) {
    clients.push_back(raw());
    send(clients.back(), "{\"op\":\"watch\"}\n");
    EXPECT_EQ(line(clients.back()), "{\"ok\":true}");
  }
  EXPECT_THAT(line(raw()), HasSubstr("too many look at this job"));
  clients.pop_back();
  // Whoever comes when one has gone is served.
  bool served = false;
  while (!served) {
    const UniqueFd fd = raw();
    send(fd, "{\"op\":\"status\"}\n");
    served = line(fd).find("copying") != std::string::npos;
  }
}

TEST_F(Control, AWatcherThatDoesNotReadLosesProgressThenItsConnectionAndHoldsUpNobody) {
  const UniqueFd deaf = raw();
  send(deaf, "{\"op\":\"watch\"}\n");
  ControlClient reader = client();
  ASSERT_TRUE(reader.call({{"op", "watch"}}).has_value());
  static constexpr int kProgress = 5'000;  // 3 MB: more than a socket's buffers
  for (int i = 0; i < kProgress; ++i) server->publish(event_of(sample_progress()));
  server->publish(event_of(Note{"still here"}));
  for (bool seen = false; !seen;) {
    const auto event = reader.next_event();
    ASSERT_TRUE(event.has_value() && event->has_value());
    seen = std::holds_alternative<Note>(**event);
  }
  // Notes are not dropped: at some point the connection is.
  const std::string text(60'000, 'x');
  for (std::size_t i = 0; i < 2 * ControlServer::kMostQueued / text.size(); ++i) {
    server->publish(event_of(Note{text}));
    const auto event = reader.next_event();
    ASSERT_TRUE(event.has_value() && event->has_value());
  }
  const std::string got = all(deaf);  // to the end: it was let go
  EXPECT_LT(got.size(), ControlServer::kMostQueued);
}

TEST_F(Control, StoppingDoesNotWaitForEverForOneWhoDoesNotRead) {
  const UniqueFd deaf = raw();
  send(deaf, "{\"op\":\"watch\"}\n");
  EXPECT_EQ(line(deaf), "{\"ok\":true}");
  const std::string text(60'000, 'x');
  for (int i = 0; i < 40; ++i) server->publish(event_of(Note{text}));
  server->stop();
}

TEST_F(Control, WhoHasNothingMoreToAskIsStillAnswered) {
  const UniqueFd asks = raw();
  const UniqueFd watches = raw();
  send(asks, "{\"op\":\"status\"}\n");
  send(watches, "{\"op\":\"watch\"}\n");
  ASSERT_EQ(::shutdown(asks.get(), SHUT_WR), 0);
  ASSERT_EQ(::shutdown(watches.get(), SHUT_WR), 0);
  EXPECT_THAT(all(asks), HasSubstr("copying"));
  EXPECT_EQ(line(watches), "{\"ok\":true}");
  server->publish(event_of(Note{"later"}));
  EXPECT_THAT(line(watches), HasSubstr("later"));
}

TEST_F(Control, ALineWithoutAnEndIsNoRequest) {
  {
    const UniqueFd fd = raw();
    send(fd, "{\"op\":\"cancel\"}");
  }
  EXPECT_TRUE(client().call({{"op", "status"}}).has_value());
  EXPECT_EQ(cancels.load(), 0);
}

TEST_F(Control, TheClientTrustsTheServerNoMore) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  const UniqueFd here(ends[0]);
  UniqueFd there(ends[1]);
  std::thread writer([&] {
    send(there, std::string(3 * kMaxEventLine, 'x'));
    there.reset();
  });
  LineReader reader(here.get(), kMaxEventLine);
  EXPECT_EQ(reader.next({}).error().code, Code::Protocol);
  (void)all(here);
  writer.join();

  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  const UniqueFd quiet(ends[0]);
  const UniqueFd says_nothing(ends[1]);
  EXPECT_EQ(
      LineReader(quiet.get(), 10).next({.timeout = std::chrono::milliseconds(1)}).error().code,
      Code::Unreachable);
}

// ---- to all who listen --------------------------------------------------------------------------

class Listener final : public Observer {
 public:
  void started(const std::string& id) override { ids.push_back(id); }
  void planned(const Plan& plan) override { guests.push_back(plan.guest); }
  void progress(const Progress& said) override { last = said; }
  void note(const std::string& text) override { notes.push_back(text); }
  std::vector<std::string> ids;
  std::vector<std::string> guests;
  std::vector<std::string> notes;
  Progress last;
};

TEST_F(Control, WhatAJobSaysReachesItsUserItsWatchersAndItsStatus) {
  StatusWriter status(temporary.directory() + "/status.json");
  Listener user;
  Broadcast broadcast(user, status, *server);
  ControlClient watcher = client();
  ASSERT_TRUE(watcher.call({{"op", "watch"}}).has_value());
  broadcast.started("web1-0a");
  broadcast.planned(sample_plan());
  Progress progress = sample_progress();
  progress.waiting_for = "the link";
  broadcast.progress(progress);
  progress.elapsed += std::chrono::seconds(45);
  broadcast.progress(progress);
  EXPECT_EQ(user.last.waiting, std::chrono::seconds(45));
  EXPECT_EQ(status.current().progress.waiting, std::chrono::seconds(45));
  progress.waiting_for.clear();
  broadcast.progress(progress);
  EXPECT_EQ(user.last.waiting, std::chrono::seconds(0));
  broadcast.note("here");
  broadcast.ended(fail(Code::Cancelled, "undone"));
  server->stop();
  EXPECT_EQ(std::get<Started>(**watcher.next_event()).id, "web1-0a");
  EXPECT_EQ(std::get<Plan>(**watcher.next_event()).host, "hostb");
  EXPECT_EQ(std::get<Progress>(**watcher.next_event()).waiting, std::chrono::seconds(0));
  EXPECT_EQ(std::get<Progress>(**watcher.next_event()).waiting, std::chrono::seconds(45));
  EXPECT_EQ(std::get<Progress>(**watcher.next_event()).waiting_for, "");
  EXPECT_EQ(std::get<Note>(**watcher.next_event()).text, "here");
  EXPECT_EQ(std::get<Error>(**watcher.next_event()).code, Code::Cancelled);
  EXPECT_EQ(user.notes, std::vector<std::string>{"here"});
  EXPECT_EQ(status.current().last_error->message, "undone");
}

}  // namespace
}  // namespace drover::job
