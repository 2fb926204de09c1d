// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/log.h"
#include "base/priority.h"
#include "base/unique_fd.h"
#include "mirror/content_index.h"
#include "mirror/receiver.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

constexpr std::size_t kMaxDocument = 65536;
constexpr std::chrono::seconds kDocumentTimeout{30};
constexpr std::uint64_t kMaxMilliseconds = 7ULL * 24 * 3600 * 1000;

// One line, or all up to the end.
Result<std::string> read_document(int fd) {
  const Instant deadline = now() + kDocumentTimeout;
  std::string text;
  std::array<char, 4096> piece{};
  while (text.find('\n') == std::string::npos) {
    DROVER_TRY(wait_for(fd, POLLIN, deadline, -1, "reading the job from standard input"));
    const ssize_t count = ::read(fd, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail_errno(errno, "reading the job from standard input");
    if (count == 0) break;
    text.append(piece.data(), static_cast<std::size_t>(count));
    if (text.size() > kMaxDocument) {
      return fail(Code::Protocol, "what came on standard input is no job: it is too long");
    }
  }
  return text.substr(0, text.find('\n'));
}

void write_line(int fd, const nlohmann::json& json) {
  const std::string line =
      json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  std::string_view left = line;
  while (!left.empty()) {
    const ssize_t count = ::write(fd, left.data(), left.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return;
    left.remove_prefix(static_cast<std::size_t>(count));
  }
}

Result<std::chrono::milliseconds> get_ms(const nlohmann::json& json, const char* name,
                                         std::chrono::milliseconds otherwise) {
  if (!json.contains(name)) return otherwise;
  DROVER_ASSIGN(const std::uint64_t ms, get_unsigned(json, name, kMaxMilliseconds));
  return std::chrono::milliseconds(ms);
}

sigset_t ending_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int one : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, one);
  return signals;
}

Result<int> block_signals() {
  const sigset_t signals = ending_signals();
  if (::pthread_sigmask(SIG_BLOCK, &signals, nullptr) != 0) {
    return fail_errno(errno, "blocking signals");
  }
  const int fd = ::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  if (fd < 0) return fail_errno(errno, "watching for signals");
  return fd;
}

std::string index_of(const std::string& jobs_directory) {
  return (std::filesystem::path(jobs_directory).parent_path() / "index").string();
}

// The guest runs and nobody waits: reads its images when the disks have nothing else to do.
void note_what_came(const std::string& index, const std::vector<std::string>& images) {
  if (images.empty()) return;
  constexpr std::chrono::minutes kPatience{10};
  // Ends as any process does, also in the middle: an index survives that.
  const sigset_t signals = ending_signals();
  (void)::pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  stay_behind();
  if (const auto noted = note_images(index, images, kPatience); !noted) {
    log_warning("{}", noted.error().to_string());
  }
}

// Serves until the end. Says on `output` how it went with starting, then closes it.
int serve(ReceiverOptions options, UniqueFd output, bool detached) {
  auto signals = block_signals();
  if (!signals) {
    write_line(output.get(), {{"error", error_to_json(signals.error())}});
    return 1;
  }
  const UniqueFd signal_fd(*signals);
  options.signal_fd = signal_fd.get();
  const std::string jobs = options.jobs_directory;
  const std::string session = options.session;
  const std::string index = index_of(jobs);
  options.index_directory = index;
  auto receiver = Receiver::create(std::move(options));
  if (receiver && detached) {
    if (auto status = log_to_file((*receiver)->record().directory() + "/log"); !status) {
      receiver = fail(std::move(status).error());
    }
  }
  if (!receiver) {
    nlohmann::json answer = {{"error", error_to_json(receiver.error())}};
    // Where the one is that is alive: the source may want just that.
    if (const auto running = running_receiver(jobs, session); running && running->port != 0) {
      answer["running"] = {{"port", running->port}, {"pid", running->pid}};
    }
    write_line(output.get(), answer);
    return 1;
  }
  write_line(output.get(), {{"protocol", kProtocolVersion},
                            {"version", DROVER_VERSION},
                            {"port", (*receiver)->port()},
                            {"pid", ::getpid()}});
  output.reset();
  const Status ended = (*receiver)->run();
  std::vector<std::string> images;
  for (const ReceiverRecord::Image& image : (*receiver)->record().images()) {
    if (!image.spec.block_device) images.push_back(image.spec.path);
  }
  receiver->reset();
  if (!ended) return 1;
  note_what_came(index, images);
  return 0;
}

// Reads one line from the background process; empty if it ended without.
std::string read_line(int fd) {
  std::string line;
  std::array<char, 4096> piece{};
  while (line.size() < kMaxDocument) {
    const ssize_t count = ::read(fd, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    line.append(piece.data(), static_cast<std::size_t>(count));
  }
  return line;
}

// In the child: leaves the SSH session behind. Standard descriptors point to nothing, all others
// but `keep` are closed, so that nobody waits for us.
void leave_session(UniqueFd& keep) {
  ::setsid();
  const int null = ::open("/dev/null", O_RDWR);
  for (const int standard : {0, 1, 2}) ::dup2(null, standard);
  if (null > 2) ::close(null);
  constexpr int kKept = 3;
  if (keep.get() != kKept) {
    ::dup2(keep.get(), kKept);
    keep = UniqueFd(kKept);
  }
  ::fcntl(kKept, F_SETFD, FD_CLOEXEC);
  ::close_range(kKept + 1, ~0U, 0);
  if (::chdir("/") != 0) return;  // it only kept a directory busy
}

}  // namespace

Result<ReceiverOptions> receiver_options_from_json(std::string_view text) {
  DROVER_ASSIGN(const nlohmann::json json, parse_object(text, "the job on standard input"));
  DROVER_ASSIGN(const std::uint64_t protocol, get_unsigned(json, "protocol"));
  if (protocol != kProtocolVersion) {
    return fail(Code::Incompatible,
                fmt::format("the source speaks protocol {}, drover {} here speaks {}", protocol,
                            DROVER_VERSION, kProtocolVersion),
                "install the same version of drover on both hosts");
  }
  ReceiverOptions options;
  DROVER_ASSIGN(options.session, get_string(json, "session", 64));
  DROVER_TRY(check_session_id(options.session));
  DROVER_ASSIGN(const std::string key, get_string(json, "key", 64));
  DROVER_ASSIGN(options.key, key_from_hex(key));
  if (json.contains("listen")) {
    DROVER_ASSIGN(options.listen.address, get_string(json, "listen", 255));
  }
  for (const auto& [name, port] : {std::pair("port", &options.listen.port),
                                   std::pair("last_port", &options.listen.last_port)}) {
    if (!json.contains(name)) continue;
    DROVER_ASSIGN(const std::uint64_t value, get_unsigned(json, name, 65535));
    *port = static_cast<std::uint16_t>(value);
  }
  if (json.contains("jobs_directory")) {
    DROVER_ASSIGN(options.jobs_directory, get_string(json, "jobs_directory"));
    if (options.jobs_directory.empty() || options.jobs_directory.front() != '/') {
      return fail(Code::InvalidArgument, "the directory of jobs is not an absolute path");
    }
  }
  DROVER_ASSIGN(options.first_contact, get_ms(json, "first_contact_ms", options.first_contact));
  DROVER_ASSIGN(options.handshake, get_ms(json, "handshake_ms", options.handshake));
  DROVER_ASSIGN(options.resumable, get_bool(json, "resumable", false));
  DROVER_ASSIGN(options.resume, get_bool(json, "resume", false));
  if (options.resumable || options.resume) options.linger = kResumableLinger;
  DROVER_ASSIGN(options.linger, get_ms(json, "linger_ms", options.linger));
  return options;
}

int run_receiver(const RunReceiverOptions& run) {
  const auto refuse = [&](const Error& error) {
    write_line(run.output, {{"error", error_to_json(error)}});
    return 1;
  };
  const auto document = read_document(run.input);
  if (!document) return refuse(document.error());
  auto options = receiver_options_from_json(*document);
  if (!options) return refuse(options.error());
  if (!run.jobs_directory.empty() && document->find("\"jobs_directory\"") == std::string::npos) {
    options->jobs_directory = run.jobs_directory;
  }
  if (!run.detach) return serve(std::move(*options), UniqueFd(::dup(run.output)), false);

  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
    return refuse(error_from_errno(errno, "creating a pipe"));
  }
  UniqueFd from_child(ends[0]);
  UniqueFd to_parent(ends[1]);
  const pid_t child = ::fork();
  if (child < 0) return refuse(error_from_errno(errno, "starting the receiver"));
  if (child == 0) {
    from_child.reset();
    leave_session(to_parent);
    return serve(std::move(*options), std::move(to_parent), true);
  }
  to_parent.reset();
  const std::string line = read_line(from_child.get());
  const auto said = parse_object(line, "the receiver's line");
  if (!said) {
    return refuse({Code::Internal, "the receiver ended before it was up", "", false});
  }
  write_line(run.output, *said);
  if (!said->contains("error")) return 0;
  ::waitpid(child, nullptr, 0);
  return 1;
}

}  // namespace drover::mirror
