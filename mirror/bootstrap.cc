// SPDX-License-Identifier: Apache-2.0
#include "mirror/bootstrap.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string_view>
#include <utility>

#include "mirror/session.h"

namespace drover::mirror {

namespace {

constexpr int kNotFoundThere = 127;
constexpr int kSshFailed = 255;
constexpr std::size_t kMaxQuote = 600;

std::vector<std::string> ssh_program(const Ssh& ssh) {
  if (!ssh.command.empty()) return ssh.command;
  std::vector<std::string> words;
  if (const char* configured = std::getenv("DROVER_SSH")) {
    std::istringstream in(configured);
    for (std::string word; in >> word;) words.push_back(word);
  }
  if (words.empty()) words.emplace_back("ssh");
  return words;
}

// For the shell on the other side: SSH joins its arguments with blanks and hands them to it.
std::string quote(const std::string& word) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view("@%+=:,./_-").find(c) != std::string_view::npos;
  };
  if (!word.empty() && std::ranges::all_of(word, plain)) return word;
  std::string out = "'";
  for (const char c : word) {
    if (c == '\'') {
      out += "'\\''";
    } else {
      out += c;
    }
  }
  return out + "'";
}

// What a program said, as one line, not too long, without control characters.
std::string said(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\r') continue;
    if (c == '\n') {
      if (!out.empty() && out.back() != ' ') out += "; ";
    } else if (byte >= 0x20 && byte != 0x7f) {
      out += c;
    }
    if (out.size() >= kMaxQuote) {
      out += "...";
      break;
    }
  }
  while (out.ends_with("; ")) out.resize(out.size() - 2);
  return out;
}

bool contains_any(std::string_view text, std::initializer_list<std::string_view> words) {
  return std::ranges::any_of(
      words, [&](std::string_view word) { return text.find(word) != std::string_view::npos; });
}

// ssh's exit code 255: what its own words mean.
Error ssh_error(const Ssh& ssh, const std::string& words) {
  Error error;
  error.code = Code::Unreachable;
  error.message = fmt::format("ssh to {} failed: {}", ssh.host,
                              words.empty() ? "it did not say why" : said(words));
  if (contains_any(words, {"Permission denied", "Too many authentication failures"})) {
    error.code = Code::Denied;
    error.hint = fmt::format("`ssh {} true` must work without a question: set up a key", ssh.host);
  } else if (contains_any(words, {"Host key verification failed", "IDENTIFICATION HAS CHANGED"})) {
    error.code = Code::Denied;
    error.hint = fmt::format("connect once with `ssh {}` and check the host's key", ssh.host);
  } else if (contains_any(words, {"Could not resolve hostname", "Name or service not known"})) {
    error.code = Code::NotFound;
    error.hint = "is the host's name right?";
  } else {
    error.hint = fmt::format("does `ssh {} true` work?", ssh.host);
    error.retryable = true;
  }
  return error;
}

Result<ProcessResult> run_ssh(const Ssh& ssh, std::vector<std::string> argv,
                              const std::string& input) {
  const std::string program = argv.front();
  ProcessOptions options;
  options.input = input;
  options.timeout = ssh.timeout;
  options.cancel_fd = ssh.cancel_fd;
  auto result = run_process(argv, options);
  if (result) return result;
  Error error = std::move(result).error();
  if (error.code == Code::NotFound) {
    error.message = fmt::format("the program {} is not on this host", program);
    error.hint = "install openssh-client";
  } else if (error.code == Code::Unreachable) {
    error.message =
        fmt::format("ssh to {} did not end within {} s", ssh.host,
                    std::chrono::duration_cast<std::chrono::seconds>(ssh.timeout).count());
    error.hint = fmt::format("does `ssh {} true` work?", ssh.host);
    error.retryable = true;
  }
  return fail(std::move(error));
}

Status check_host(const Ssh& ssh) {
  // A name that begins with a dash would be an option.
  if (ssh.host.empty() || ssh.host.front() == '-' ||
      ssh.host.find_first_of(" \t\r\n") != std::string::npos) {
    return fail(Code::InvalidArgument, fmt::format("\"{}\" is not an SSH destination", ssh.host));
  }
  return {};
}

// What came on the receiver's standard output: its line, after anything that login scripts print.
Result<nlohmann::json> find_answer(const Ssh& ssh, const ProcessResult& result) {
  std::istringstream lines(result.out);
  std::string last;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    last = line;
    if (line.front() != '{') continue;
    auto json = parse_object(line, "the line");
    if (json && (json->contains("port") || json->contains("error"))) return json;
  }
  std::string words = said(last.empty() ? result.err : last);
  return fail(
      Code::Protocol,
      fmt::format(
          "what answered on {} is not drover: {}", ssh.host,
          words.empty() ? fmt::format("nothing came, exit code {}", result.exit_code) : words),
      fmt::format("try `ssh {} drover --version`", ssh.host));
}

nlohmann::json document(const ReceiverRequest& request) {
  nlohmann::json json = {{"protocol", kProtocolVersion},
                         {"version", DROVER_VERSION},
                         {"session", request.session},
                         {"key", key_to_hex(request.key)}};
  if (!request.listen.empty()) json["listen"] = request.listen;
  if (request.port != 0) json["port"] = request.port;
  if (request.last_port != 0) json["last_port"] = request.last_port;
  if (!request.jobs_directory.empty()) json["jobs_directory"] = request.jobs_directory;
  if (request.resumable) json["resumable"] = true;
  if (request.resume) json["resume"] = true;
  return json;
}

Error not_installed(const Ssh& ssh) {
  return {Code::NotFound, fmt::format("drover is not installed on {}", ssh.host),
          fmt::format("install drover {} there, in the PATH of `ssh {} drover`", DROVER_VERSION,
                      ssh.host),
          false};
}

Status read_place(const nlohmann::json& json, ReceiverInfo& info) {
  DROVER_ASSIGN(const std::uint64_t port, get_unsigned(json, "port", 65535));
  if (port == 0) return fail(Code::Protocol, "the receiver named port 0");
  info.port = static_cast<std::uint16_t>(port);
  DROVER_ASSIGN(const std::uint64_t pid, get_unsigned(json, "pid", INT32_MAX));
  info.pid = static_cast<std::int64_t>(pid);
  return {};
}

constexpr const char* kSharedParent = "/run";
constexpr const char* kSharedPrefix = "drover-ssh-";
constexpr const char* kSocketPrefix = "to-";  // of a socket of the target's; everything else is ssh's control socket

// Empty if another process has it, or it is gone.
UniqueFd lock_directory(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) return {};
  struct stat found {};
  if (::fstat(fd.get(), &found) != 0 || found.st_nlink == 0) return {};
  return fd;
}

bool is_open(const std::string& directory) {
  std::error_code ignored;
  return std::ranges::any_of(std::filesystem::directory_iterator(directory, ignored), [](const auto& entry) {
    return !entry.path().filename().string().starts_with(kSocketPrefix);
  });
}

// Ends the connections whose control sockets are in the directory, which goes.
void end_shared(const Ssh& ssh, const std::string& directory) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    if (!entry.path().filename().string().starts_with(kSocketPrefix)) {
      std::vector<std::string> command = ssh_program(ssh);
      command.insert(command.end(),
                     {"-o", "ControlPath=" + entry.path().string(), "-O", "exit", "--", ssh.host});
      (void)run_process(command);  // it may have ended
    }
    // Or is ending now, and unlinks this itself: remove_all() would give up then.
    ::unlink(entry.path().c_str());
  }
  ::rmdir(directory.c_str());
}

// What processes left that were killed.
void end_abandoned(const Ssh& ssh) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(kSharedParent, ignored)) {
    if (!entry.path().filename().string().starts_with(kSharedPrefix)) continue;
    if (const UniqueFd lock = lock_directory(entry.path())) end_shared(ssh, entry.path());
  }
}

}  // namespace

SharedSsh::SharedSsh(Ssh ssh, const std::vector<std::string>& sockets) : ssh_(std::move(ssh)) {
  end_abandoned(ssh_);
  std::string directory = std::string(kSharedParent) + "/" + kSharedPrefix + "XXXXXX";
  if (::mkdtemp(directory.data()) == nullptr) return;
  UniqueFd lock = lock_directory(directory);
  if (!lock) return;  // taken for one that was abandoned, and removed
  lock_ = std::move(lock);
  directory_ = directory;
  ssh_.control_path = directory_ + "/%C";
  ssh_.opening = std::make_shared<std::timed_mutex>();
  for (const std::string& there : sockets) {
    ssh_.sockets.push_back({fmt::format("{}/{}{}", directory_, kSocketPrefix, ssh_.sockets.size()), there});
  }
}

std::vector<std::string> SharedSsh::local_sockets() const {
  std::vector<std::string> paths;
  for (const Ssh::Socket& socket : ssh_.sockets) paths.push_back(socket.local);
  return paths;
}

SharedSsh::~SharedSsh() {
  if (!directory_.empty()) end_shared(ssh_, directory_);
}

Result<ProcessResult> run_on_target(const Ssh& ssh, const std::vector<std::string>& argv,
                                    const std::string& input) {
  DROVER_TRY(check_host(ssh));
  std::vector<std::string> command = ssh_program(ssh);
  if (::isatty(STDIN_FILENO) == 0) {
    command.insert(command.end(), {"-o", "BatchMode=yes"});
  }
  if (!ssh.control_path.empty()) {
    command.insert(command.end(), {"-o", "ControlMaster=auto", "-o", "ControlPersist=2", "-o",
                                   "ControlPath=" + ssh.control_path, "-o", "ServerAliveInterval=2",
                                   "-o", "ServerAliveCountMax=3"});
    // The first command's, and that of one which follows on a connection that died and left its sockets behind; no
    // other's do anything.
    if (!ssh.sockets.empty()) {
      command.insert(command.end(), {"-o", "StreamLocalBindUnlink=yes", "-o", "ExitOnForwardFailure=no"});
    }
    for (const Ssh::Socket& socket : ssh.sockets) {
      command.insert(command.end(), {"-L", socket.local + ":" + socket.there});
    }
  }
  command.insert(command.end(), {"-o",
                                 fmt::format("ConnectTimeout={}",
                                             std::max<std::int64_t>(1, ssh.timeout.count() / 1500)),
                                 "-T", "--", ssh.host});
  // A shared connection may have died meanwhile.
  const auto alone = [&] {
    Ssh other = ssh;
    other.control_path.clear();
    other.opening.reset();
    return run_on_target(other, argv, input);
  };
  std::unique_lock<std::timed_mutex> opens;
  if (ssh.opening) {
    opens = std::unique_lock(*ssh.opening, ssh.timeout);
    if (opens && is_open(std::filesystem::path(ssh.control_path).parent_path())) opens.unlock();
  }
  std::string words;
  for (const std::string& argument : argv) words += (words.empty() ? "" : " ") + quote(argument);
  command.push_back(std::move(words));
  DROVER_ASSIGN(ProcessResult result, run_ssh(ssh, std::move(command), input));
  if (result.exit_code == kSshFailed && !ssh.control_path.empty()) return alone();
  if (result.exit_code == kSshFailed) return fail(ssh_error(ssh, result.err));
  return result;
}

Result<std::string> target_address(const Ssh& ssh) {
  DROVER_TRY(check_host(ssh));
  std::vector<std::string> command = ssh_program(ssh);
  command.insert(command.end(), {"-G", "--", ssh.host});
  DROVER_ASSIGN(const ProcessResult result, run_ssh(ssh, std::move(command), {}));
  if (result.exit_code != 0) return fail(ssh_error(ssh, result.err));
  std::istringstream lines(result.out);
  for (std::string line; std::getline(lines, line);) {
    constexpr std::string_view kName = "hostname ";
    if (line.starts_with(kName) && line.size() > kName.size()) return line.substr(kName.size());
  }
  return fail(Code::Protocol, fmt::format("ssh -G {} named no host", ssh.host),
              "say the target's address with an option");
}

Result<ReceiverInfo> start_receiver(const Ssh& ssh, const ReceiverRequest& request) {
  DROVER_TRY(check_session_id(request.session));
  ReceiverInfo info;
  info.address = request.address;
  if (info.address.empty()) {
    DROVER_ASSIGN(info.address, target_address(ssh));
  }
  std::vector<std::string> argv = request.program;
  argv.emplace_back("receive");
  DROVER_ASSIGN(const ProcessResult result,
                run_on_target(ssh, argv, document(request).dump() + "\n"));
  if (result.exit_code == kNotFoundThere) {
    return fail(not_installed(ssh));
  }
  DROVER_ASSIGN(const nlohmann::json answer, find_answer(ssh, result));
  if (const auto error = answer.find("error"); error != answer.end()) {
    Error there = error_from_json(*error);
    const auto running = answer.find("running");
    if (request.resume && there.code == Code::Busy && running != answer.end() &&
        running->is_object()) {
      DROVER_TRY(read_place(*running, info));
      info.was_running = true;
      return info;
    }
    there.message = fmt::format("the receiver on {}: {}", ssh.host, there.message);
    return fail(std::move(there));
  }
  DROVER_ASSIGN(const std::uint64_t protocol, get_unsigned(answer, "protocol"));
  DROVER_ASSIGN(info.version, get_string(answer, "version", 64));
  if (protocol != kProtocolVersion) {
    return fail(Code::Incompatible,
                fmt::format("drover {} on {} speaks protocol {}, drover {} here speaks {}",
                            info.version, ssh.host, protocol, DROVER_VERSION, kProtocolVersion),
                "install the same version of drover on both hosts");
  }
  DROVER_TRY(read_place(answer, info));
  return info;
}

Status stop_receiver_there(const Ssh& ssh, const std::string& session,
                           const std::vector<std::string>& program) {
  DROVER_TRY(check_session_id(session));
  std::vector<std::string> argv = program;
  argv.insert(argv.end(), {"receive", "--stop", session});
  DROVER_ASSIGN(const ProcessResult result, run_on_target(ssh, argv));
  if (result.exit_code == 0) return {};
  if (result.exit_code == kNotFoundThere) return fail(not_installed(ssh));
  return fail(Error{Code::Busy,
                    fmt::format("the receiver of job {} on {} does not end: {}", session, ssh.host,
                                said(result.err)),
                    "", true});
}

}  // namespace drover::mirror
