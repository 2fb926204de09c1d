// SPDX-License-Identifier: Apache-2.0
#include "job/control.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "mirror/session.h"

namespace drover::job {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;

constexpr int kBacklog = 16;

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail(Code::InvalidArgument, "the path of a socket is too long: " + path);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

const sockaddr* generic(const sockaddr_un& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

std::string line_of(const json& object) {
  return object.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

std::string refusal(const Error& error) {
  return line_of({{"ok", false}, {"error", mirror::error_to_json(error)}});
}

// How long poll() may take; -1: for ever.
int poll_time(std::optional<Instant> until) {
  if (!until) return -1;
  const auto left = std::chrono::ceil<milliseconds>(*until - now()).count();
  return static_cast<int>(std::clamp<long long>(left, 0, 1'000'000));
}

// What a watcher that comes later has to know.
class Recent {
 public:
  void add(const std::string& kind, const std::string& line) {
    if (kind == "started") started_ = line;
    if (kind == "plan") plan_ = line;
    if (kind == "progress") progress_ = line;
    if (kind == "summary" || kind == "error") end_ = line;
    if (kind != "note") return;
    notes_.push_back(line);
    if (notes_.size() > ControlServer::kMostNotes) notes_.pop_front();
  }
  [[nodiscard]] std::string all() const {
    std::string out = started_ + plan_;
    for (const std::string& note : notes_) out += note;
    return out + progress_ + end_;
  }

 private:
  std::string started_;
  std::string plan_;
  std::deque<std::string> notes_;
  std::string progress_;
  std::string end_;
};

struct Client {
  UniqueFd fd;
  std::string in;
  std::string out;
  bool watching = false;
  bool wants_recent = false;  // it has just begun to watch
  bool asks_no_more = false;  // it has closed its half of the connection
  bool gone = false;
  Instant last_heard = now();
};

class Server final : public ControlServer {
 public:
  Server(std::string path, Callbacks callbacks, UniqueFd listener)
      : path_(std::move(path)),
        callbacks_(std::move(callbacks)),
        listener_(std::move(listener)),
        wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    CHECK(wake_, "a process has a descriptor left");
    thread_ = std::thread([this] { run(); });
  }
  ~Server() override { stop(); }

  void publish(OrderedJson event) override {
    Published item{event.value("event", ""), to_line(event) + "\n"};
    {
      const std::lock_guard lock(mutex_);
      // The thread takes them at once; only one that does not run leaves them here.
      if (published_.size() >= kMostPublished && item.kind == "progress") return;
      published_.push_back(std::move(item));
    }
    wake();
  }

  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake();
    if (thread_.joinable()) thread_.join();
  }

 private:
  static constexpr std::size_t kMostPublished = 64;
  struct Published {
    std::string kind;
    std::string line;
  };

  void wake() {
    const std::uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);  // one that is full wakes as well
  }

  void run() {
    std::optional<Instant> end;  // stopping: when the last client is let go
    for (;;) {
      const bool stopping = hand_out();
      if (stopping && !end) {
        end = now() + kLinger;
        ::unlink(path_.c_str());
        listener_.reset();
      }
      drop_the_gone(stopping);
      if (end && (clients_.empty() || now() >= *end)) return;
      wait(end);
    }
  }

  // What was published goes to the clients. Whether it is time to stop.
  bool hand_out() {
    std::vector<Published> items;
    bool stopping = false;
    {
      const std::lock_guard lock(mutex_);
      items.swap(published_);
      stopping = stopping_;
    }
    for (const Published& item : items) {
      recent_.add(item.kind, item.line);
      for (Client& client : clients_) {
        if (!client.watching) continue;
        if (item.kind == "progress" && client.out.size() > kProgressQueued) continue;
        queue(client, item.line);
      }
    }
    return stopping;
  }

  void queue(Client& client, const std::string& text) {
    client.out += text;
    if (client.out.size() > kMostQueued) client.gone = true;
  }

  void drop_the_gone(bool stopping) {
    std::erase_if(clients_, [&](const Client& client) {
      if (client.gone) return true;
      if (stopping) return client.out.empty();
      if (client.asks_no_more && !client.watching && client.out.empty()) return true;
      return !client.watching && client.out.empty() && now() >= client.last_heard + kIdle;
    });
  }

  void wait(std::optional<Instant> end) {
    std::vector<pollfd> ready = {{wake_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
    std::optional<Instant> until = end;
    for (const Client& client : clients_) {
      const int events = (client.asks_no_more ? 0 : POLLIN) | (client.out.empty() ? 0 : POLLOUT);
      ready.push_back({client.fd.get(), static_cast<short>(events), 0});
      if (end || client.watching) continue;
      const Instant idle = client.last_heard + kIdle;
      if (!until || idle < *until) until = idle;
    }
    if (::poll(ready.data(), ready.size(), poll_time(until)) < 0) {
      CHECK(errno == EINTR, "poll takes some descriptors");
      return;
    }
    std::uint64_t ignored = 0;
    if (ready[0].revents != 0) (void)!::read(wake_.get(), &ignored, sizeof ignored);
    std::size_t at = 2;
    for (Client& client : clients_) {
      const short events = ready[at++].revents;
      if ((events & POLLOUT) != 0) send(client);
      if ((events & POLLIN) != 0) {
        receive(client);
      } else if ((events & (POLLHUP | POLLERR)) != 0) {
        client.gone = true;
      }
    }
    if (ready[1].revents != 0) accept_one();
  }

  void accept_one() {
    UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) return;
    if (clients_.size() >= kMostClients) {
      const std::string text = refusal({Code::Busy, "too many look at this job", "", true});
      (void)!::send(fd.get(), text.data(), text.size(), MSG_NOSIGNAL);
      return;
    }
    clients_.emplace_back().fd = std::move(fd);
  }

  void send(Client& client) {
    while (!client.out.empty()) {
      const ssize_t sent =
          ::send(client.fd.get(), client.out.data(), client.out.size(), MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0) {
        client.gone = errno != EAGAIN;
        return;
      }
      client.out.erase(0, static_cast<std::size_t>(sent));
    }
  }

  // One piece at a time: who sends much must not keep the others waiting.
  void receive(Client& client) {
    std::array<char, kMostRequest> piece{};
    const ssize_t got = ::recv(client.fd.get(), piece.data(), piece.size(), 0);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (got < 0) client.gone = true;
    if (got == 0) client.asks_no_more = true;
    if (got <= 0) return;
    client.last_heard = now();
    client.in.append(piece.data(), static_cast<std::size_t>(got));
    for (std::size_t end = 0; (end = client.in.find('\n')) != std::string::npos;) {
      const std::string line = client.in.substr(0, end);
      client.in.erase(0, end + 1);
      answer(client, line);
      if (client.gone) return;
    }
    if (client.in.size() >= kMostRequest) {
      queue(client, refusal({Code::Protocol, "a request is too long", "", false}));
      send(client);
      client.gone = true;
    }
  }

  void answer(Client& client, const std::string& line) {
    const Result<json> answered = carry_out(client, line);
    if (!answered) {
      queue(client, refusal(answered.error()));
      return;
    }
    json out = *answered;
    out["ok"] = true;
    // Before what a "watch" brings.
    queue(client, line_of(out));
    if (std::exchange(client.wants_recent, false)) queue(client, recent_.all());
  }

  // Nothing is set if one of the values is wrong or can't be.
  Result<json> set(const json& request) {
    std::optional<std::uint64_t> rate;
    if (request.contains("compress")) {
      DROVER_ASSIGN(const std::string text, mirror::get_string(request, "compress", 64));
      DROVER_ASSIGN(const mirror::Compression wanted, mirror::parse_compression(text));
      if (request.contains("bandwidth")) {
        DROVER_ASSIGN(rate, mirror::get_unsigned(request, "bandwidth"));
      }
      DROVER_TRY(callbacks_.set_compression(wanted));
      log_info("compression set to {}", text);
    } else {
      DROVER_ASSIGN(rate, mirror::get_unsigned(request, "bandwidth"));
    }
    if (rate) {
      log_info("bandwidth set to {} bytes per second", *rate);
      DROVER_TRY(callbacks_.set_bandwidth(Length(*rate)));
    }
    return json::object();
  }

  Result<json> carry_out(Client& client, const std::string& line) {
    DROVER_ASSIGN(const json request, mirror::parse_object(line, "the request"));
    DROVER_ASSIGN(const std::string op, mirror::get_string(request, "op", 64));
    if (op == "status") return json{{"status", callbacks_.status()}};
    if (op == "cancel") {
      log_info("cancelled through the control socket");
      callbacks_.cancel();
      return json::object();
    }
    if (op == "watch") {
      if (!client.watching) client.wants_recent = true;
      client.watching = true;
      return json::object();
    }
    if (op == "set") return set(request);
    return fail(Code::Protocol, "there is no such request");
  }

  const std::string path_;
  const Callbacks callbacks_;
  UniqueFd listener_;  // the thread's own, as the next two
  std::list<Client> clients_;
  Recent recent_;
  const UniqueFd wake_;
  std::mutex mutex_;  // guards the next two
  std::vector<Published> published_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace

Result<std::unique_ptr<ControlServer>> ControlServer::start(const std::string& path,
                                                            Callbacks callbacks) {
  const std::string doing = "listening on " + path;
  DROVER_ASSIGN(const sockaddr_un address, address_of(path));
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener) return fail_errno(errno, doing);
  ::unlink(path.c_str());
  // Nobody can connect before it listens.
  if (::bind(listener.get(), generic(address), sizeof address) != 0 ||
      ::chmod(path.c_str(), S_IRUSR | S_IWUSR) != 0 || ::listen(listener.get(), kBacklog) != 0) {
    return fail_errno(errno, doing);
  }
  return std::make_unique<Server>(path, std::move(callbacks), std::move(listener));
}

// --- the other side ---

Result<std::optional<std::string>> LineReader::next(const Wait& wait) {
  std::optional<Instant> until;
  if (wait.timeout) until = now() + *wait.timeout;
  std::size_t looked_at = 0;
  for (;;) {
    if (const std::size_t end = buffer_.find('\n', looked_at); end != std::string::npos) {
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return std::optional<std::string>(std::move(line));
    }
    looked_at = buffer_.size();
    if (buffer_.size() > longest_) return fail(Code::Protocol, "a line is too long");
    std::array<pollfd, 2> ready = {{{fd_, POLLIN, 0}, {wait.stop_fd, POLLIN, 0}}};
    const int count = ::poll(ready.data(), ready.size(), poll_time(until));
    if (count < 0 && errno != EINTR) return fail_errno(errno, "waiting for a line");
    if (count < 0) continue;
    if (ready[1].revents != 0) return fail(Code::Cancelled, "stopped");
    if (count == 0) return fail(Code::Unreachable, "there was no answer in time");
    std::array<char, 65536> piece{};
    const ssize_t got = ::read(fd_, piece.data(), piece.size());
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got < 0 && errno != ECONNRESET) return fail_errno(errno, "reading a line");
    if (got <= 0) {
      if (buffer_.empty()) return std::optional<std::string>();
      return fail(Code::Protocol, "the last line has no end");
    }
    buffer_.append(piece.data(), static_cast<std::size_t>(got));
  }
}

Result<ControlClient> ControlClient::connect(const std::string& path) {
  DROVER_ASSIGN(const sockaddr_un address, address_of(path));
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) return fail_errno(errno, "making a socket");
  if (::connect(fd.get(), generic(address), sizeof address) != 0) {
    Error error = error_from_errno(errno, "connecting to " + path);
    if (errno == ENOENT) error.code = Code::Unreachable;
    return fail(error);
  }
  return ControlClient(std::move(fd));
}

Result<json> ControlClient::call(const json& request) {
  const std::string text = line_of(request);
  // A request is smaller than any socket's buffer.
  if (::send(fd_.get(), text.data(), text.size(), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(text.size())) {
    return fail_errno(errno, "asking the job's process");
  }
  for (;;) {
    DROVER_ASSIGN(const std::optional<std::string> line, reader_.next({.timeout = kPatience}));
    if (!line) return fail(Code::Unreachable, "the job's process has ended");
    DROVER_ASSIGN(json answer, mirror::parse_object(*line, "the answer of the job's process"));
    if (answer.contains("event")) {
      DROVER_ASSIGN(JobEvent event, parse_event(*line));
      early_.push_back(std::move(event));
      continue;
    }
    DROVER_ASSIGN(const bool ok, mirror::get_bool(answer, "ok", false));
    if (ok) return answer;
    const auto error = answer.find("error");
    return fail(mirror::error_from_json(error == answer.end() ? json() : *error));
  }
}

Result<std::optional<JobEvent>> ControlClient::next_event(int stop_fd) {
  if (!early_.empty()) {
    JobEvent first = std::move(early_.front());
    early_.erase(early_.begin());
    return std::optional<JobEvent>(std::move(first));
  }
  DROVER_ASSIGN(const std::optional<std::string> line, reader_.next({.stop_fd = stop_fd}));
  if (!line) return std::optional<JobEvent>();
  DROVER_ASSIGN(JobEvent event, parse_event(*line));
  return std::optional<JobEvent>(std::move(event));
}

}  // namespace drover::job
