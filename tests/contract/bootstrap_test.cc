// SPDX-License-Identifier: Apache-2.0
//
// The receiver as a process of its own, started through a fake ssh that runs its command on this
// host: what starting it can fail with, what it leaves, how much memory it takes.
#include "mirror/bootstrap.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <csignal>
#include <fstream>

#include "tests/contract/link_support.h"

namespace drover::mirror::test {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr const char* kSession = "job-1";

class BootstrapTest : public testing::Test {
 protected:
  BootstrapTest() {
    key_ = *random_key();
    // Receivers become our children when their first parent ends, so that we see how they end.
    EXPECT_EQ(::prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    std::filesystem::create_directory(dir_ / "jobs");
    use_ssh("exec sh -c \"$*\"");
    ssh_.host = "target.example";
    request_.session = kSession;
    request_.key = key_;
    request_.jobs_directory = dir_ / "jobs";
    request_.listen = "127.0.0.1";
    request_.program = {DROVER_RECEIVE_HELPER};
  }
  ~BootstrapTest() override {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

  // A program that takes ssh's arguments and then does `body` with the command as "$*".
  void use_ssh(const std::string& body) {
    const std::string path = dir_ / "ssh";
    std::ofstream(path) << "#!/bin/sh\n"
                           "echo \"$@\" >>\""
                        << dir_ / "arguments"
                        << "\"\n"
                           "if [ \"$1\" = -G ]; then echo 'user root'; echo 'hostname 127.0.0.1'; "
                           "exit 0; fi\n"
                           "while [ \"$1\" != -- ]; do shift; done\n"
                           "shift 2\n"
                        << body << "\n";
    EXPECT_EQ(::chmod(path.c_str(), 0700), 0);
    ssh_.command = {path};
  }
  // What ssh was called with, a line each time.
  [[nodiscard]] std::string asked() const {
    std::ifstream in(dir_ / "arguments");
    return {std::istreambuf_iterator<char>(in), {}};
  }
  [[nodiscard]] Error start_error() {
    const auto started = start_receiver(ssh_, request_);
    EXPECT_FALSE(started.has_value());
    if (started) pid_ = static_cast<pid_t>(started->pid);
    return started ? Error() : started.error();
  }
  void start() {
    const auto started = start_receiver(ssh_, request_);
    ASSERT_TRUE(started.has_value()) << started.error().to_string();
    info_ = *started;
    pid_ = static_cast<pid_t>(started->pid);
  }
  // The receiver's exit code; 128 + N for a signal.
  int wait_end() {
    const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
    pollfd polled{pidfd.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&polled, 1, 60000), 1) << "the receiver does not end";
    int status = 0;
    EXPECT_EQ(::waitpid(pid_, &status, WNOHANG), pid_);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  [[nodiscard]] LinkOptions link_options(unsigned lanes, Length size) const {
    LinkOptions options;
    options.address = info_.address;
    options.port = info_.port;
    options.session = kSession;
    options.key = key_;
    options.lanes = lanes;
    options.disk_sizes = {size};
    return options;
  }
  void set_up(TestSource& source, unsigned lanes, Length size) {
    const Status connected = source.connect(link_options(lanes, size));
    ASSERT_TRUE(connected.has_value()) << connected.error().to_string();
    const auto reserved = source.link().call(
        {{"op", "reserve"},
         {"disks", {{{"path", image()}, {"format", "raw"}, {"size", size.bytes()}}}}},
        kPatience);
    ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
  }
  [[nodiscard]] std::string image() const { return dir_ / "disk.raw"; }
  [[nodiscard]] bool image_exists() const { return std::filesystem::exists(image()); }
  void expect_nothing_left() { EXPECT_TRUE(std::filesystem::is_empty(dir_ / "jobs")); }

  TempDir dir_;
  LinkKey key_{};
  Ssh ssh_;
  ReceiverRequest request_;
  ReceiverInfo info_;
  pid_t pid_ = 0;
};

TEST_F(BootstrapTest, StartsAReceiverThatOutlivesSsh) {
  ASSERT_NO_FATAL_FAILURE(start());
  EXPECT_EQ(info_.address, "127.0.0.1");
  EXPECT_EQ(info_.version, DROVER_VERSION);
  {
    TestSource source;
    ASSERT_NO_FATAL_FAILURE(set_up(source, 2, 1_MiB));
    EXPECT_TRUE(image_exists());
    EXPECT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
    EXPECT_FALSE(image_exists());
  }
  EXPECT_EQ(wait_end(), 0);
  expect_nothing_left();
}

TEST_F(BootstrapTest, TheKeyIsOnNoCommandLine) {
  ASSERT_NO_FATAL_FAILURE(start());
  EXPECT_THAT(asked(), HasSubstr("target.example"));
  EXPECT_THAT(asked(), Not(HasSubstr(key_to_hex(key_).substr(0, 16))));
}

TEST_F(BootstrapTest, AfterFinishTheImageStays) {
  ASSERT_NO_FATAL_FAILURE(start());
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(set_up(source, 2, 1_MiB));
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  ASSERT_TRUE(source.link().call({{"op", "finish"}}, kPatience).has_value());
  EXPECT_EQ(wait_end(), 0);
  EXPECT_TRUE(image_exists());
  expect_nothing_left();
}

TEST_F(BootstrapTest, OnSigtermBeforeTheBarrierTheImageGoes) {
  ASSERT_NO_FATAL_FAILURE(start());
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(set_up(source, 2, 1_MiB));
  ASSERT_EQ(::kill(pid_, SIGTERM), 0);
  EXPECT_EQ(wait_end(), 1);
  EXPECT_FALSE(image_exists());
  EXPECT_TRUE(source.wait_down());
  expect_nothing_left();
}

TEST_F(BootstrapTest, AfterKill9CleanupRemovesWhatItMade) {
  ASSERT_NO_FATAL_FAILURE(start());
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(set_up(source, 2, 1_MiB));
  const auto alive = cleanup_receiver(dir_ / "jobs", kSession, KeptImages::Refuse, 0ms);
  ASSERT_FALSE(alive.has_value());
  EXPECT_EQ(alive.error().code, Code::Busy);
  ASSERT_EQ(::kill(pid_, SIGKILL), 0);
  EXPECT_EQ(wait_end(), 128 + SIGKILL);
  EXPECT_TRUE(image_exists());
  const Error again = start_error();
  EXPECT_EQ(again.code, Code::AlreadyExists);
  EXPECT_THAT(again.hint, HasSubstr("--cleanup"));
  const auto cleaned = cleanup_receiver(dir_ / "jobs", kSession);
  ASSERT_TRUE(cleaned.has_value()) << cleaned.error().to_string();
  EXPECT_THAT(cleaned->removed, testing::ElementsAre(image()));
  EXPECT_FALSE(image_exists());
  expect_nothing_left();
  EXPECT_EQ(cleanup_receiver(dir_ / "jobs", kSession).error().code, Code::NotFound);
}

TEST_F(BootstrapTest, CleanupWaitsForAReceiverThatIsEnding) {
  ASSERT_NO_FATAL_FAILURE(start());
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(set_up(source, 2, 1_MiB));
  auto cleaned = std::async(
      std::launch::async, [this] { return cleanup_receiver(dir_ / "jobs", kSession, KeptImages::Refuse, kPatience); });
  ASSERT_EQ(::kill(pid_, SIGTERM), 0);
  const auto result = cleaned.get();
  EXPECT_TRUE(result || result.error().code == Code::NotFound) << result.error().to_string();
  EXPECT_EQ(wait_end(), 1);
  EXPECT_FALSE(image_exists());
  expect_nothing_left();
}

TEST_F(BootstrapTest, CleanupLeavesAFileThatTookTheImagesPlace) {
  ASSERT_NO_FATAL_FAILURE(start());
  {
    TestSource source;
    ASSERT_NO_FATAL_FAILURE(set_up(source, 1, 1_MiB));
    ASSERT_EQ(::kill(pid_, SIGKILL), 0);
    EXPECT_EQ(wait_end(), 128 + SIGKILL);
  }
  std::ofstream(dir_ / "other") << "somebody's";
  ASSERT_EQ(::rename((dir_ / "other").c_str(), image().c_str()), 0);
  const auto cleaned = cleanup_receiver(dir_ / "jobs", kSession);
  ASSERT_TRUE(cleaned.has_value());
  EXPECT_TRUE(cleaned->removed.empty());
  ASSERT_EQ(cleaned->kept.size(), 1U);
  EXPECT_THAT(cleaned->kept[0], HasSubstr("not the file that this job created"));
  EXPECT_TRUE(image_exists());
}

TEST_F(BootstrapTest, AnExistingFileIsNotOverwritten) {
  ASSERT_NO_FATAL_FAILURE(start());
  std::ofstream(image()) << "somebody's";
  TestSource source;
  ASSERT_TRUE(source.connect(link_options(1, 1_MiB)).has_value());
  const auto reserved = source.link().call(
      {{"op", "reserve"}, {"disks", {{{"path", image()}, {"format", "raw"}, {"size", 1U << 20}}}}},
      kPatience);
  ASSERT_FALSE(reserved.has_value());
  EXPECT_EQ(reserved.error().code, Code::AlreadyExists);
  source.disconnect();
  wait_end();
  EXPECT_TRUE(image_exists());
  expect_nothing_left();
}

TEST_F(BootstrapTest, AFastSenderAndHostilePeersDoNotGrowIt) {
  ASSERT_NO_FATAL_FAILURE(start());
  TestSource source(128);
  constexpr Length kSize = 512_MiB;
  ASSERT_NO_FATAL_FAILURE(set_up(source, kMaxLanes, kSize));
  Random random(1);
  const Bytes chunk = random_bytes(random, 1U << 20);
  std::vector<UniqueFd> crowd;
  for (int i = 0; i < 100; ++i) {
    auto fd = connect_tcp(info_.address, info_.port, now() + kPatience);
    ASSERT_TRUE(fd.has_value());
    crowd.push_back(std::move(*fd));
  }
  for (std::uint64_t i = 0; i < 512; ++i) {
    source.send(static_cast<std::uint32_t>(i % kMaxLanes),
                {.type = FrameType::Copy, .extent = {Offset(i << 20), 1_MiB}, .token = i}, chunk);
    // A flood of frames that carry no payload.
    for (std::uint64_t n = 0; n < 20; ++n) {
      source.zero(static_cast<std::uint32_t>(i % kMaxLanes), 0,
                  {Offset((i << 20) + n * 4096), 4_KiB});
    }
  }
  ASSERT_TRUE(source.wait_answers());
  EXPECT_TRUE(source.refused_tokens().empty());
  const auto stats = source.link().call({{"op", "stats"}}, kPatience);
  ASSERT_TRUE(stats.has_value());
  const auto peak = (*stats)["peak_memory"].get<std::uint64_t>();
  std::printf("peak memory: %llu KiB\n", static_cast<unsigned long long>(peak >> 10));
  EXPECT_GT(peak, 0U);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_LT(peak, (256_MiB).bytes());
#endif
  EXPECT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
  source.disconnect();
  EXPECT_EQ(wait_end(), 0);
}

// --- what is resumed ---

class ResumeBootstrapTest : public BootstrapTest {
 protected:
  ResumeBootstrapTest() {
    request_.resumable = true;
    EXPECT_EQ(::setenv("DROVER_TEST_JOBS", request_.jobs_directory.c_str(), 1), 0);
  }
  void reserve(TestSource& source, const LinkOptions& options, const std::string& format) {
    const Status connected = source.connect(options);
    ASSERT_TRUE(connected.has_value()) << connected.error().to_string();
    const auto reserved = source.link().call(
        {{"op", "reserve"},
         {"disks", {{{"path", image()}, {"format", format}, {"size", kSize.bytes()}}}}},
        kPatience);
    ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
    first_ = (*reserved)["disks"][0];
  }
  static constexpr Length kSize = 16_MiB;
  nlohmann::json first_;
};

TEST_F(ResumeBootstrapTest, AfterKill9TheLinkFindsANewOneThatGoesOn) {
  Random random(1);
  const Bytes content = random_bytes(random, kSize.bytes());
  for (const char* const format : {"raw", "qcow2"}) {
    SCOPED_TRACE(format);
    request_.resume = false;
    ASSERT_NO_FATAL_FAILURE(start());
    TestSource source;
    LinkOptions options = link_options(2, kSize);
    options.retry = {10ms, 50ms};
    options.locate = [&](unsigned, const Error&, int cancel_fd) -> Result<LinkAddress> {
      request_.resume = true;
      Ssh ssh = ssh_;
      ssh.cancel_fd = cancel_fd;
      auto found = start_receiver(ssh, request_);
      if (!found) {
        // The storage daemon of the one that was killed is ending.
        if (found.error().code == Code::Busy) found.error().retryable = true;
        return fail(found.error());
      }
      info_ = *found;
      if (!found->was_running) pid_ = static_cast<pid_t>(found->pid);
      return LinkAddress{found->address, found->port};
    };
    ASSERT_NO_FATAL_FAILURE(reserve(source, options, format));
    source.copy(0, 0, content, {Offset(0), 1_MiB}, false, 0);
    ASSERT_TRUE(source.wait_answers());
    ASSERT_TRUE(source.link().call({{"op", "flush"}}, kPatience).has_value());
    const pid_t killed = pid_;
    ASSERT_EQ(::kill(killed, SIGKILL), 0);
    ASSERT_TRUE(source.wait_up());
    EXPECT_EQ(::waitpid(killed, nullptr, 0), killed);
    const TargetDisk disk = source.ups()[0].at(0);
    EXPECT_EQ(disk.id, first_["id"]);
    EXPECT_EQ(disk.instance == first_["instance"], std::string(format) == "raw");
    source.compare(0, 0, content, {Offset(0), 1_MiB}, 1);
    ASSERT_TRUE(source.wait_answers());
    EXPECT_THAT(source.differing_tokens(), testing::IsEmpty());
    ASSERT_TRUE(source.deliver(content, 1_MiB, 2));
    EXPECT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
    source.disconnect();
    EXPECT_EQ(wait_end(), 0);
    EXPECT_FALSE(image_exists());
    expect_nothing_left();
  }
}

TEST_F(ResumeBootstrapTest, OneThatIsAliveSaysWhereItListens) {
  ASSERT_NO_FATAL_FAILURE(start());
  request_.resume = true;
  const auto found = start_receiver(ssh_, request_);
  ASSERT_TRUE(found.has_value()) << found.error().to_string();
  EXPECT_TRUE(found->was_running);
  EXPECT_EQ(found->port, info_.port);
  EXPECT_EQ(found->pid, info_.pid);
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(reserve(source, link_options(1, kSize), "raw"));
  EXPECT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
}

TEST_F(ResumeBootstrapTest, OneThatIsStoppedKeepsItsImagesForASourceWithANewKey) {
  ASSERT_NO_FATAL_FAILURE(start());
  {
    TestSource source;
    ASSERT_NO_FATAL_FAILURE(reserve(source, link_options(1, kSize), "raw"));
  }
  ASSERT_TRUE(stop_receiver_there(ssh_, kSession, request_.program).has_value());
  EXPECT_EQ(wait_end(), 1);
  EXPECT_TRUE(image_exists());
  EXPECT_TRUE(stop_receiver_there(ssh_, kSession, request_.program).has_value()) << "none is alive";
  request_.resume = true;
  key_ = *random_key();
  request_.key = key_;
  ASSERT_NO_FATAL_FAILURE(start());
  TestSource source;
  ASSERT_TRUE(source.connect(link_options(1, kSize)).has_value());
  const auto images = source.link().call({{"op", "images"}}, kPatience);
  ASSERT_TRUE(images.has_value());
  EXPECT_EQ((*images)["disks"][0]["id"], first_["id"]);
  EXPECT_TRUE(source.link().call({{"op", "remove"}}, kPatience).has_value());
  source.disconnect();
  EXPECT_EQ(wait_end(), 0);
  expect_nothing_left();
}

// --- what starting it can fail with ---

std::size_t times(const std::string& word, const std::string& text) {
  std::size_t count = 0;
  for (std::size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++count;
  return count;
}

TEST_F(BootstrapTest, ASharedConnectionLeadsToSocketsAndLeavesNothing) {
  std::string directory;
  {
    const SharedSsh shared(ssh_, {"/run/there", "/run/or/there"});
    const std::vector<std::string> sockets = shared.local_sockets();
    ASSERT_EQ(sockets.size(), 2);
    directory = std::filesystem::path(sockets[0]).parent_path();
    // As ssh does it: the first command makes its control socket, and those of what it leads to.
    std::ofstream(directory + "/control") << "";
    for (const std::string& socket : sockets) std::ofstream(socket) << "";
    ASSERT_TRUE(run_on_target(shared.ssh(), {"true"}).has_value());
    const std::string words = asked();
    EXPECT_THAT(words, HasSubstr("-L " + sockets[0] + ":/run/there -L " + sockets[1] + ":/run/or/there"));
    EXPECT_THAT(words, HasSubstr("StreamLocalBindUnlink=yes"));
    EXPECT_EQ(times("-O exit", words), 0);
  }
  EXPECT_EQ(times("-O exit", asked()), 1) << "only the control socket is ssh's";
  EXPECT_FALSE(std::filesystem::exists(directory));
}

TEST_F(BootstrapTest, ACommandThatGoesAloneLeadsNowhere) {
  use_ssh("exit 255");
  const SharedSsh shared(ssh_, {"/run/there"});
  EXPECT_FALSE(run_on_target(shared.ssh(), {"true"}).has_value());
  const std::string words = asked();
  EXPECT_EQ(times("-- target.example ", words), 2) << "shared, then alone: " << words;
  EXPECT_EQ(times("-L ", words), 1);
}

TEST_F(BootstrapTest, NoSshHere) {
  ssh_.command = {dir_ / "no-such-ssh"};
  const Error error = start_error();
  EXPECT_EQ(error.code, Code::NotFound);
  EXPECT_THAT(error.message, HasSubstr("no-such-ssh"));
}

TEST_F(BootstrapTest, SshsOwnWordsAreQuoted) {
  struct Case {
    const char* words;
    Code code;
  };
  for (const Case& one :
       {Case{"ssh: connect to host hostb port 22: Connection refused", Code::Unreachable},
        Case{"root@hostb: Permission denied (publickey).", Code::Denied},
        Case{"Host key verification failed.", Code::Denied},
        Case{"ssh: Could not resolve hostname hostb: Name or service not known", Code::NotFound},
        Case{"ssh: connect to host hostb port 22: Connection timed out", Code::Unreachable}}) {
    use_ssh(std::string("echo '") + one.words + "' >&2; exit 255");
    const Error error = start_error();
    EXPECT_EQ(error.code, one.code) << one.words;
    EXPECT_THAT(error.message, HasSubstr(one.words));
    EXPECT_FALSE(error.hint.empty());
  }
}

TEST_F(BootstrapTest, NoDroverThere) {
  request_.program = {dir_ / "no such drover's"};
  const Error error = start_error();
  EXPECT_EQ(error.code, Code::NotFound);
  EXPECT_THAT(error.message, HasSubstr("drover is not installed on target.example"));
  EXPECT_THAT(error.hint, HasSubstr("install"));
}

TEST_F(BootstrapTest, SomethingElseAnswers) {
  for (const char* body : {"echo 'Welcome to hostb!'", "echo '{\"port\": '", "exit 0",
                           "echo 'This account is not available.' >&2; exit 1",
                           "head -c 3000000 /dev/zero", "echo '{\"port\":true,\"protocol\":2}'",
                           "echo '{\"port\":70000,\"protocol\":2,\"version\":\"1\",\"pid\":1}'"}) {
    use_ssh(body);
    EXPECT_EQ(start_error().code, Code::Protocol) << body;
  }
}

TEST_F(BootstrapTest, WhatALoginScriptPrintsIsSkipped) {
  use_ssh("echo 'Welcome to hostb!'; exec sh -c \"$*\"");
  ASSERT_NO_FATAL_FAILURE(start());
}

TEST_F(BootstrapTest, AnotherVersionThere) {
  use_ssh("cat >/dev/null; echo '{\"protocol\":7,\"version\":\"9.1\",\"port\":5,\"pid\":5}'");
  const Error error = start_error();
  EXPECT_EQ(error.code, Code::Incompatible);
  EXPECT_THAT(error.message, HasSubstr("9.1"));
  EXPECT_THAT(error.hint, HasSubstr("same version"));
}

TEST_F(BootstrapTest, TheReceiversOwnErrorComesBack) {
  request_.jobs_directory = "/proc/no";
  const Error error = start_error();
  EXPECT_THAT(error.message, HasSubstr("the receiver on target.example"));
  EXPECT_THAT(error.message, HasSubstr("/proc/no"));
}

TEST_F(BootstrapTest, AnAnswerThatNeverComesTimesOut) {
  use_ssh("exec sleep 60");
  ssh_.timeout = 200ms;
  const Error error = start_error();
  EXPECT_EQ(error.code, Code::Unreachable);
  EXPECT_THAT(error.message, HasSubstr("did not end"));
}

TEST_F(BootstrapTest, AHostThatLooksLikeAnOptionIsRefused) {
  for (const char* host : {"", "-oProxyCommand=x", "host b"}) {
    ssh_.host = host;
    EXPECT_EQ(start_error().code, Code::InvalidArgument) << host;
  }
}

TEST_F(BootstrapTest, CommandsArriveWordByWord) {
  const auto result = run_on_target(
      ssh_, {"printf", "%s|", "plain", "two words", "it's", "$HOME;`x`", "", "*"}, "ignored");
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->out, "plain|two words|it's|$HOME;`x`||*|");
  const auto input = run_on_target(ssh_, {"cat"}, "what goes in");
  ASSERT_TRUE(input.has_value());
  EXPECT_EQ(input->out, "what goes in");
  const auto failing = run_on_target(ssh_, {"sh", "-c", "exit 3"});
  ASSERT_TRUE(failing.has_value());
  EXPECT_EQ(failing->exit_code, 3);
}

TEST_F(BootstrapTest, WhatIsNoJobOnItsInputIsRefused) {
  for (const char* input :
       {"", "hello", "{}", R"({"protocol":2,"session":"../x","key":""})",
        R"({"protocol":2,"session":"x","key":"00"})", R"({"protocol":1,"session":"x"})"}) {
    const auto result = run_process({DROVER_RECEIVE_HELPER}, {.input = input});
    ASSERT_TRUE(result.has_value());
    EXPECT_EQ(result->exit_code, 1) << input;
    EXPECT_TRUE(nlohmann::json::parse(result->out).contains("error")) << input;
  }
}

}  // namespace
}  // namespace drover::mirror::test
