// SPDX-License-Identifier: Apache-2.0
#include "base/subprocess.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "base/check.h"

namespace drover {
namespace {

constexpr std::size_t kErrorOutputLimit = std::size_t{64} << 10;
constexpr Duration kKillGrace = std::chrono::seconds(2);

struct Pipe {
  UniqueFd read_end;
  UniqueFd write_end;
};

Result<Pipe> make_pipe() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return fail_errno(errno, "creating a pipe");
  return Pipe{UniqueFd(ends[0]), UniqueFd(ends[1])};
}

// A descriptor above standard error, so that the child's dup2 to 0, 1 and 2 overwrites none.
Result<UniqueFd> above_standard(UniqueFd fd) {
  if (fd.get() > STDERR_FILENO) return fd;
  UniqueFd moved(::fcntl(fd.get(), F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  if (!moved) return fail_errno(errno, "duplicating a descriptor");
  return moved;
}

// What the child needs, laid out before the fork: there it may neither allocate nor lock.
struct Launch {
  const char* program = nullptr;
  char* const* argv = nullptr;
  char* const* environment = nullptr;
  int input = -1;
  int output = -1;
  int errors = -1;
  int report = -1;            // where the child writes errno when it can't run the program
  const int* kept = nullptr;  // further descriptors for the program
  std::size_t kept_count = 0;
  pid_t parent = -1;
  bool die_with_parent = false;
};

// Runs in the child, in the parent's memory: system calls only.
[[noreturn]] void exec_child(const Launch& launch) {
  for (int number = 1; number < NSIG; ++number) {
    struct sigaction action {};
    if (::sigaction(number, nullptr, &action) == 0 && action.sa_handler != SIG_DFL) {
      action = {};
      action.sa_handler = SIG_DFL;
      ::sigaction(number, &action, nullptr);
    }
  }
  bool ready = true;
  if (launch.die_with_parent) {
    ready = ::prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && ::getppid() == launch.parent;
  }
  ready = ready && ::dup2(launch.input, STDIN_FILENO) >= 0;
  ready = ready && ::dup2(launch.output, STDOUT_FILENO) >= 0;
  ready = ready && ::dup2(launch.errors, STDERR_FILENO) >= 0;
  // A library may have forgotten CLOEXEC.
  ready = ready && ::close_range(STDERR_FILENO + 1, ~0U, CLOSE_RANGE_CLOEXEC) == 0;
  for (std::size_t i = 0; i < launch.kept_count; ++i) {
    ready = ready && ::fcntl(launch.kept[i], F_SETFD, 0) == 0;
  }
  if (ready) {
    sigset_t none;
    ::sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::execve(launch.program, launch.argv, launch.environment);
  }
  const int error = errno;
  [[maybe_unused]] const ssize_t written = ::write(launch.report, &error, sizeof error);
  ::_exit(127);
}

// vfork: the child borrows this thread until it calls exec. fork would copy the page tables, slow
// with a large buffer pool, and on kernels before 6.4 could lose what O_DIRECT reads into pages
// that become copy-on-write at that moment.
//
// The linter would have posix_spawn, which has no parent-death signal, and only exec after vfork.
[[gnu::noinline]] pid_t fork_and_exec(const Launch& launch) {
  // NOLINTBEGIN(clang-analyzer-security.insecureAPI.vfork,clang-analyzer-unix.Vfork)
  const pid_t pid = ::vfork();
  if (pid == 0) exec_child(launch);
  return pid;
  // NOLINTEND(clang-analyzer-security.insecureAPI.vfork,clang-analyzer-unix.Vfork)
}

Result<std::string> find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const char* const path = std::getenv("PATH");
  std::string_view left = path != nullptr ? path
                                          : "/usr/local/sbin:/usr/local/bin:/usr/sbin:"
                                            "/usr/bin:/sbin:/bin";
  while (!left.empty()) {
    const std::size_t colon = left.find(':');
    std::string candidate(left.substr(0, colon));
    left = colon == std::string_view::npos ? std::string_view{} : left.substr(colon + 1);
    if (candidate.empty()) continue;
    candidate += '/';
    candidate += name;
    if (::access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return fail(Code::NotFound, "the program " + name + " is not installed");
}

std::vector<std::string> merged_environment(const std::vector<std::string>& changes) {
  const auto variable = [](std::string_view entry) { return entry.substr(0, entry.find('=')); };
  std::vector<std::string> merged;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const bool replaced = std::any_of(changes.begin(), changes.end(), [&](const std::string& c) {
      return variable(c) == variable(*entry);
    });
    if (!replaced) merged.emplace_back(*entry);
  }
  merged.insert(merged.end(), changes.begin(), changes.end());
  return merged;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  result.reserve(strings.size() + 1);
  for (std::string& s : strings) result.push_back(s.data());
  result.push_back(nullptr);
  return result;
}

// What the program finds open.
struct Descriptors {
  int input;
  int output;
  int errors;
  const std::vector<int>& kept;
};

struct Started {
  pid_t pid;
  UniqueFd pidfd;
};

int reap(pid_t pid) {
  int status = 0;
  pid_t rc = 0;
  do {
    rc = ::waitpid(pid, &status, 0);
  } while (rc < 0 && errno == EINTR);
  CHECK(rc == pid, "nobody else may wait for this process's children");
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

Result<Started> spawn(const std::vector<std::string>& argv, const Descriptors& descriptors,
                      const std::vector<std::string>& environment, bool die_with_parent) {
  CHECK(!argv.empty() && !argv.front().empty(), "a program needs a name");
  for (const int fd : descriptors.kept) {
    CHECK(fd > STDERR_FILENO, "the first three descriptors are the program's own");
  }
  DROVER_ASSIGN(const std::string program, find_program(argv.front()));
  DROVER_ASSIGN(Pipe report, make_pipe());
  DROVER_ASSIGN(report.write_end, above_standard(std::move(report.write_end)));
  std::vector<std::string> argv_copy = argv;
  std::vector<std::string> environment_copy = merged_environment(environment);
  const std::vector<char*> argv_pointers = pointers(argv_copy);
  const std::vector<char*> environment_pointers = pointers(environment_copy);
  Launch launch;
  launch.program = program.c_str();
  launch.argv = argv_pointers.data();
  launch.environment = environment_pointers.data();
  launch.input = descriptors.input;
  launch.output = descriptors.output;
  launch.errors = descriptors.errors;
  launch.report = report.write_end.get();
  launch.kept = descriptors.kept.data();
  launch.kept_count = descriptors.kept.size();
  launch.parent = ::getpid();
  launch.die_with_parent = die_with_parent;

  // No handler of ours may run in the child, which shares our memory.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t pid = fork_and_exec(launch);
  const int fork_error = errno;
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (pid < 0) return fail_errno(fork_error, "starting " + argv.front());

  report.write_end.reset();
  int exec_error = 0;
  ssize_t got = 0;
  do {
    got = ::read(report.read_end.get(), &exec_error, sizeof exec_error);
  } while (got < 0 && errno == EINTR);
  if (got == sizeof exec_error) {
    reap(pid);
    return fail_errno(exec_error, "starting " + program);
  }
  UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!pidfd) {
    const int error = errno;
    ::kill(pid, SIGKILL);
    reap(pid);
    return fail_errno(error, "watching " + program);
  }
  return Started{pid, std::move(pidfd)};
}

int milliseconds_until(Instant deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, 1'000'000'000));
}

// True when the process has ended before `deadline`.
bool wait_for_end(int pidfd, Instant deadline) {
  while (true) {
    pollfd entry{pidfd, POLLIN, 0};
    const int rc = ::poll(&entry, 1, milliseconds_until(deadline));
    if (rc > 0) return true;
    CHECK(rc == 0 || errno == EINTR, "poll takes a pidfd");
    if (rc == 0 && now() >= deadline) return false;
  }
}

// Input for a program, all there from the start: nothing to pump, and no SIGPIPE when it reads
// none.
Result<UniqueFd> input_file(const std::string& text) {
  UniqueFd file;
  if (text.empty()) {
    file = UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    if (!file) return fail_errno(errno, "opening /dev/null");
    return above_standard(std::move(file));
  }
  file = UniqueFd(::memfd_create("drover-input", MFD_CLOEXEC));
  if (!file) return fail_errno(errno, "creating a program's input");
  std::string_view left = text;
  while (!left.empty()) {
    const ssize_t written = ::write(file.get(), left.data(), left.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return fail_errno(errno, "writing a program's input");
    left.remove_prefix(static_cast<std::size_t>(written));
  }
  ::lseek(file.get(), 0, SEEK_SET);
  return above_standard(std::move(file));
}

// One of a running program's outputs.
struct Capture {
  UniqueFd fd;
  std::string* text;
};

// Takes what is there; closes the capture at its end. At most `rounds` buffers in one go.
void drain(Capture& capture, std::size_t limit, bool& truncated, int rounds) {
  std::array<char, 16384> buffer;
  for (int i = 0; i < rounds && capture.fd; ++i) {
    const ssize_t got = ::read(capture.fd.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
      capture.fd.reset();
      return;
    }
    const std::size_t keep = std::min(static_cast<std::size_t>(got), limit - capture.text->size());
    capture.text->append(buffer.data(), keep);
    truncated = truncated || keep < static_cast<std::size_t>(got);
  }
}

}  // namespace

Result<ProcessResult> run_process(const std::vector<std::string>& argv,
                                  const ProcessOptions& options) {
  DROVER_ASSIGN(UniqueFd input, input_file(options.input));
  DROVER_ASSIGN(Pipe out, make_pipe());
  DROVER_ASSIGN(Pipe err, make_pipe());
  DROVER_ASSIGN(out.write_end, above_standard(std::move(out.write_end)));
  DROVER_ASSIGN(err.write_end, above_standard(std::move(err.write_end)));
  ::fcntl(out.read_end.get(), F_SETFL, O_NONBLOCK);
  ::fcntl(err.read_end.get(), F_SETFL, O_NONBLOCK);
  const Descriptors descriptors{input.get(), out.write_end.get(), err.write_end.get(),
                                options.descriptors};
  DROVER_ASSIGN(Started started, spawn(argv, descriptors, options.environment, false));
  out.write_end.reset();
  err.write_end.reset();

  ProcessResult result;
  std::array<Capture, 2> captures{Capture{std::move(out.read_end), &result.out},
                                  Capture{std::move(err.read_end), &result.err}};
  constexpr int kRounds = 64;
  const Instant deadline = now() + options.timeout;
  bool ended = false;
  bool late = false;
  bool cancelled = false;
  while (!ended && !late && !cancelled) {
    std::array<pollfd, 4> entries{pollfd{started.pidfd.get(), POLLIN, 0},
                                  pollfd{captures[0].fd.get(), POLLIN, 0},
                                  pollfd{captures[1].fd.get(), POLLIN, 0},
                                  pollfd{options.cancel_fd, POLLIN, 0}};
    const int rc = ::poll(entries.data(), entries.size(), milliseconds_until(deadline));
    CHECK(rc >= 0 || errno == EINTR, "poll takes pipes and a pidfd");
    ended = rc > 0 && entries[0].revents != 0;
    late = !ended && now() >= deadline;
    cancelled = !ended && rc > 0 && entries[3].revents != 0;
    for (Capture& capture : captures) {
      drain(capture, options.output_limit, result.truncated, kRounds);
    }
  }
  if (late || cancelled) {
    ::kill(started.pid, SIGTERM);
    if (!wait_for_end(started.pidfd.get(), now() + kKillGrace)) ::kill(started.pid, SIGKILL);
    reap(started.pid);
    if (cancelled) return fail(Code::Cancelled, argv.front() + " was stopped: cancelled");
    const auto seconds = std::chrono::ceil<std::chrono::seconds>(options.timeout).count();
    return fail(Error{
        Code::Unreachable,
        argv.front() + " did not end within " + std::to_string(seconds) + " s and was stopped",
        {},
        true});
  }
  result.exit_code = reap(started.pid);
  return result;
}

ChildProcess::ChildProcess(ChildProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      name_(std::move(other.name_)),
      pidfd_(std::move(other.pidfd_)),
      errors_(std::move(other.errors_)),
      ended_(std::exchange(other.ended_, true)),
      exit_code_(other.exit_code_) {}

ChildProcess::~ChildProcess() {
  if (!ended_) kill_now();
}

void ChildProcess::kill_now() {
  ::kill(pid_, SIGKILL);
  exit_code_ = reap(pid_);
  ended_ = true;
}

Result<ChildProcess> ChildProcess::start(const std::vector<std::string>& argv,
                                         const ChildOptions& options) {
  UniqueFd null_file(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null_file) return fail_errno(errno, "opening /dev/null");
  DROVER_ASSIGN(null_file, above_standard(std::move(null_file)));
  CHECK(options.input == -1 || options.input > STDERR_FILENO,
        "give a program a descriptor above 2");
  CHECK(options.output == -1 || options.output > STDERR_FILENO,
        "give a program a descriptor above 2");
  // A file that can't grow: nobody has to read it for the program to go on, and it stays small.
  UniqueFd errors(::memfd_create("drover-errors", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!errors) return fail_errno(errno, "creating a program's error output");
  DROVER_ASSIGN(errors, above_standard(std::move(errors)));
  if (::ftruncate(errors.get(), kErrorOutputLimit) != 0 ||
      ::fcntl(errors.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) != 0) {
    return fail_errno(errno, "creating a program's error output");
  }
  const Descriptors descriptors{options.input >= 0 ? options.input : null_file.get(),
                                options.output >= 0 ? options.output : null_file.get(),
                                errors.get(), options.descriptors};
  DROVER_ASSIGN(Started started, spawn(argv, descriptors, options.environment, true));
  return ChildProcess(started.pid, argv.front(), std::move(started.pidfd), std::move(errors));
}

bool ChildProcess::running() { return !ended_ && !wait(Duration::zero()).has_value(); }

Result<int> ChildProcess::wait(Duration timeout) {
  if (ended_) return exit_code_;
  if (!wait_for_end(pidfd_.get(), now() + timeout)) {
    return fail(Error{Code::Unreachable, name_ + " is still running", {}, true});
  }
  exit_code_ = reap(pid_);
  ended_ = true;
  return exit_code_;
}

Result<int> ChildProcess::terminate(Duration grace) {
  if (ended_) return exit_code_;
  ::kill(pid_, SIGTERM);
  if (auto code = wait(grace)) return code;
  kill_now();
  return fail(Code::Unreachable, name_ + " did not end when asked to and was killed");
}

std::string ChildProcess::error_output() const {
  std::string text(kErrorOutputLimit, '\0');
  const ssize_t got = ::pread(errors_.get(), text.data(), text.size(), 0);
  text.resize(got > 0 ? ::strnlen(text.data(), static_cast<std::size_t>(got)) : 0);
  return text;
}

}  // namespace drover
