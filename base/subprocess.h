// SPDX-License-Identifier: Apache-2.0
//
// Other programs: run one to its end (qemu-img, ssh), or keep one running (qemu-storage-daemon).
//
//   DROVER_ASSIGN(auto made, run_process({"qemu-img", "create", "-f", "qcow2", path, "1G"}));
//   if (made.exit_code != 0) return fail(Code::Io, "qemu-img: " + made.err);
//
// Threads: run_process() may be called on any thread. A ChildProcess belongs to one thread.
//
// What a program inherits: standard input, output and error as said below, no other descriptor but
// those in `descriptors`, default signal actions, no blocked signal, the environment and the
// working directory. No shell is involved. Between fork and exec only system calls are made, and
// memory is never copied (vfork), so that it is safe beside other threads and beside O_DIRECT
// transfers in flight.
//
// Errors: NotFound or Denied when the program can't be started, Unreachable when it took longer
// than allowed. A program that ran and failed is no Error here: see exit_code.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/unique_fd.h"

namespace drover {

struct ProcessResult {
  int exit_code = 0;  // 128 + N when signal N ended it, as shells say it
  std::string out;
  std::string err;
  bool truncated =
      false;  // it printed more than ProcessOptions::output_limit; the rest was dropped
};

struct ProcessOptions {
  std::string input;  // its standard input; empty: it reads the end of file at once
  Duration timeout = std::chrono::seconds(60);
  std::vector<std::string> environment;  // "NAME=value", added to (or replacing) this process's own
  std::size_t output_limit = std::size_t{1} << 20;  // of each of out and err, in bytes
  std::vector<int> descriptors;  // the program has these too, under the same numbers (above 2)
  int cancel_fd = -1;  // readable: the program is stopped as on timeout, the error is Cancelled
};

// Runs argv[0] (looked up in PATH unless it has a slash) and waits for it. It ends when the program
// ends, even if something that it left in the background still holds its output open. On timeout it
// gets SIGTERM, two seconds later SIGKILL.
Result<ProcessResult> run_process(const std::vector<std::string>& argv,
                                  const ProcessOptions& options = {});

struct ChildOptions {
  int input = -1;   // given to the program as standard input; -1: /dev/null. Stays the caller's.
  int output = -1;  // as standard output; -1: /dev/null. Stays the caller's.
  std::vector<std::string> environment;  // as above
  std::vector<int> descriptors;          // as above
};

// A program that runs beside us. It is killed when this object goes, and (by the kernel) when the
// thread that started it ends, so start it from a thread that lives as long as it is needed.
class ChildProcess {
 public:
  static Result<ChildProcess> start(const std::vector<std::string>& argv,
                                    const ChildOptions& options = {});
  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&&) = delete;
  ~ChildProcess();  // SIGKILL, if it still runs, and waits for it

  // Until wait() or terminate() has returned an exit code, or running() has said false, no other
  // process can have this id.
  [[nodiscard]] pid_t pid() const { return pid_; }
  // Readable (poll) when the program has ended.
  [[nodiscard]] int pidfd() const { return pidfd_.get(); }

  [[nodiscard]] bool running();
  // The exit code (as ProcessResult::exit_code), or Unreachable when it still runs after `timeout`.
  Result<int> wait(Duration timeout);
  // SIGTERM, and waits. When it still runs after `grace` it is killed, which is an Error
  // (Unreachable); in any case it is gone afterwards.
  Result<int> terminate(Duration grace);

  // The first 64 KiB that it wrote to standard error. Not emptied by reading.
  [[nodiscard]] std::string error_output() const;

 private:
  ChildProcess(pid_t pid, std::string name, UniqueFd pidfd, UniqueFd errors)
      : pid_(pid), name_(std::move(name)), pidfd_(std::move(pidfd)), errors_(std::move(errors)) {}
  void kill_now();

  pid_t pid_ = -1;
  std::string name_;
  UniqueFd pidfd_;
  UniqueFd errors_;
  bool ended_ = false;
  int exit_code_ = 0;
};

}  // namespace drover
