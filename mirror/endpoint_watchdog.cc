// SPDX-License-Identifier: Apache-2.0
#include "mirror/endpoint_watchdog.h"

#include <fmt/format.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>

#include "base/check.h"
#include "base/log.h"

namespace drover::mirror {
namespace {

// One message, of a SOCK_SEQPACKET socket between two processes of the same program.
struct Message {
  char kind = 0;
  std::int32_t number =
      0;  // Watch, Forget: drover's descriptor; Ended: the silence in milliseconds
};
constexpr char kBeatMessage = 'b';
constexpr char kWatchMessage = 'w';  // with the descriptor
constexpr char kForgetMessage = 'f';
constexpr char kEndedMessage = 'e';  // from the watchdog: it has shut the connections down

// Above the engine's thread, which could otherwise keep it from the only CPU.
constexpr int kRealTimePriority = 2;
// Connections of one job: as many as it has disks. More can't be meant.
constexpr std::size_t kMaxWatched = 1024;

union DescriptorSpace {
  cmsghdr alignment;
  std::array<char, CMSG_SPACE(sizeof(int))> bytes;
};

bool send_message(int channel, const Message& message, int descriptor) {
  Message copy = message;
  iovec part{&copy, sizeof copy};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  DescriptorSpace space{};
  if (descriptor >= 0) {
    header.msg_control = space.bytes.data();
    header.msg_controllen = space.bytes.size();
    cmsghdr* control = CMSG_FIRSTHDR(&header);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof descriptor);
    std::memcpy(CMSG_DATA(control), &descriptor, sizeof descriptor);
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(channel, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == sizeof copy;
}

struct Received {
  enum class What { Message, Nothing, End };
  What what = What::Nothing;
  Message message;
  UniqueFd descriptor;
};

Received receive_message(int channel) {
  Received received;
  iovec part{&received.message, sizeof received.message};
  DescriptorSpace space{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = space.bytes.data();
  header.msg_controllen = space.bytes.size();
  const ssize_t got = ::recvmsg(channel, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return received;
  if (got <= 0) {
    received.what = Received::What::End;
    return received;
  }
  received.what = Received::What::Message;
  if (const cmsghdr* control = CMSG_FIRSTHDR(&header);
      control != nullptr && control->cmsg_type == SCM_RIGHTS) {
    int descriptor = -1;
    std::memcpy(&descriptor, CMSG_DATA(control), sizeof descriptor);
    received.descriptor = UniqueFd(descriptor);
  }
  return received;
}

}  // namespace

bool Liveness::look(Instant time) {
  silence_ += std::min<Duration>(time - looked_, kMaxCounted);
  looked_ = time;
  if (silence_ <= limit_ || told_) return false;
  told_ = true;
  return true;
}

// --- drover's side ---

Result<std::unique_ptr<EndpointWatchdog>> EndpointWatchdog::start(Loop& loop, Options options) {
  CHECK(!options.command.empty(), "the watchdog is a program");
  options.command.push_back(std::to_string(options.limit.count()));
  std::unique_ptr<EndpointWatchdog> watchdog(new EndpointWatchdog(loop, std::move(options)));
  DROVER_TRY(watchdog->launch());
  watchdog->beat();
  return watchdog;
}

EndpointWatchdog::~EndpointWatchdog() {
  loop_.cancel(timer_);
  end_child();
}

Status EndpointWatchdog::launch() {
  ++starts_;
  std::array<int, 2> pair{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair.data()) != 0) {
    return fail_errno(errno, "making the watchdog's socket");
  }
  auto channel = std::make_shared<Channel>();
  channel->socket = UniqueFd(pair[0]);
  const UniqueFd theirs(pair[1]);
  DROVER_ASSIGN(ChildProcess child, ChildProcess::start(options_.command, {.input = theirs.get()}));
  channel_ = std::move(channel);
  child_.emplace(std::move(child));
  receive();
  return {};
}

void EndpointWatchdog::end_child() {
  if (channel_) {
    channel_->current = false;
    ::shutdown(channel_->socket.get(), SHUT_RDWR);
    loop_.cancel(std::exchange(receive_, 0));
  }
  channel_.reset();
  child_.reset();
}

void EndpointWatchdog::replace(const std::string& why) {
  end_child();
  while (starts_ < kMaxStarts) {
    log_warning("the watchdog of the guest's writes {}; starting another", why);
    if (auto launched = launch(); !launched) {
      log_warning("{}", launched.error().message);
      continue;
    }
    const bool told = std::ranges::all_of(
        watched_, [&](int socket) { return send(kWatchMessage, socket, true); });
    if (told) return;
    end_child();
  }
  log_error(
      "the watchdog of the guest's writes {}, for the last time: from now on the guest waits if "
      "this "
      "process is stopped",
      why);
}

void EndpointWatchdog::receive() {
  receive_ = loop_.receive(
      channel_->socket.get(), channel_->buffer, [this, channel = channel_](int result) {
        if (!channel->current) return;
        receive_ = 0;
        if (result == -EINTR || result == -EAGAIN) return receive();
        if (result <= 0) return replace("has ended");
        Message message;
        if (static_cast<std::size_t>(result) == sizeof message) {
          std::memcpy(&message, channel->buffer.data(), sizeof message);
          log_warning(
              "this process stood still for {} ms: QEMU's mirrors were ended, so "
              "that the guest does not wait for it",
              message.number);
        }
        receive();
      });
}

void EndpointWatchdog::beat() {
  timer_ = loop_.at(now() + kBeat, [this] { beat(); });
  if (channel_ && !send(kBeatMessage, 0, false)) replace("does not listen");
}

bool EndpointWatchdog::send(char kind, int socket, bool with_descriptor) {
  return send_message(channel_->socket.get(), {kind, socket}, with_descriptor ? socket : -1);
}

void EndpointWatchdog::watch(int socket) {
  watched_.push_back(socket);
  if (channel_ && !send(kWatchMessage, socket, true)) replace("does not listen");
}

void EndpointWatchdog::forget(int socket) {
  std::erase(watched_, socket);
  if (channel_ && !send(kForgetMessage, socket, false)) replace("does not listen");
}

// --- the second process ---

int run_endpoint_watchdog(int channel, std::chrono::milliseconds limit) {
  // Signals meant for drover's group or service are not for this process: it ends when drover does.
  ::setsid();
  for (const int one : {SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGTTOU, SIGTTIN, SIGPIPE}) {
    std::signal(one, SIG_IGN);
  }
  ::prctl(PR_SET_NAME, "drover-guard");
  sched_param wanted{};
  wanted.sched_priority = kRealTimePriority;
  if (::sched_setscheduler(0, SCHED_RR, &wanted) != 0) {
    limit *= EndpointWatchdog::kLimitFactorWithoutRealTime;
  }
  // On fault: the program that this is a small part of need not be in memory as a whole.
  (void)::mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);

  Liveness liveness(limit, now());
  std::map<std::int32_t, UniqueFd> watched;
  for (;;) {
    pollfd entry{channel, POLLIN, 0};
    (void)::poll(&entry, 1, static_cast<int>(Liveness::kLook.count()));
    for (;;) {
      Received received = receive_message(channel);
      if (received.what == Received::What::End) return 0;
      if (received.what == Received::What::Nothing) break;
      liveness.beat(now());  // whatever it says, somebody has said it
      if (received.message.kind == kWatchMessage && received.descriptor &&
          watched.size() < kMaxWatched) {
        watched.insert_or_assign(received.message.number, std::move(received.descriptor));
      } else if (received.message.kind == kForgetMessage) {
        watched.erase(received.message.number);
      }
    }
    if (!liveness.look(now()) || watched.empty()) continue;
    for (const auto& each : watched) ::shutdown(each.second.get(), SHUT_RDWR);
    watched.clear();
    const auto silence =
        std::chrono::duration_cast<std::chrono::milliseconds>(liveness.silence()).count();
    send_message(channel, {kEndedMessage, static_cast<std::int32_t>(silence)}, -1);
  }
}

int run_endpoint_watchdog(const std::vector<std::string>& arguments) {
  unsigned limit = 0;
  if (arguments.size() != 1) return 2;
  const std::string& text = arguments.front();
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), limit);
  if (error != std::errc() || end != text.data() + text.size() || limit == 0) return 2;
  return run_endpoint_watchdog(STDIN_FILENO, std::chrono::milliseconds(limit));
}

}  // namespace drover::mirror
