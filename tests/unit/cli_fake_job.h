// SPDX-License-Identifier: Apache-2.0
//
// What the command line's tests move: a made-up guest, and a job that says what it is told to.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/unique_fd.h"
#include "cli/app.h"
#include "job/move.h"
#include "tests/fakes/job_samples.h"

namespace drover::cli::testing {

using job::testing::sample_blocker;
using job::testing::sample_plan;
using job::testing::sample_progress;
using job::testing::sample_summary;
using job::testing::sample_warning;

// A job that fails, or does what is asked for here.
struct FakeJob {
  using Act = std::function<Result<job::Summary>(job::Observer&, job::Cancel&)>;
  Act act = [](job::Observer& observer, job::Cancel&) -> Result<job::Summary> {
    observer.planned(sample_plan());
    observer.progress(sample_progress());
    job::Progress done = sample_progress();
    done.phase = job::Phase::Done;
    observer.progress(done);
    return sample_summary();
  };
  Result<job::Plan> plan = sample_plan();

  // What came in.
  std::vector<job::MoveOptions> moves;
  std::vector<job::MoveOptions> plans;
  std::vector<ReceiveCommand> receives;
  std::vector<std::string> resumed;
  std::vector<std::string> cancelled;
  Status cancel_result;

  Services services() {
    return {[this](const job::MoveOptions& options, job::Observer& observer, job::Cancel& cancel) {
              moves.push_back(options);
              return act(observer, cancel);
            },
            [this](const job::MoveOptions& options, job::Cancel&) {
              plans.push_back(options);
              return plan;
            },
            [this](const ReceiveCommand& command) {
              receives.push_back(command);
              return 7;
            },
            [this](const std::string& id, job::Observer& observer, job::Cancel& cancel) {
              resumed.push_back(id);
              return act(observer, cancel);
            },
            [this](const std::string& id, job::Observer&, job::Cancel&) {
              cancelled.push_back(id);
              return cancel_result;
            }};
  }
};

// A file without a name that takes what a program prints.
class Captured {
 public:
  Captured() : fd_(::memfd_create("captured", MFD_CLOEXEC)) {}
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::string text() const {
    std::string out(static_cast<std::size_t>(::lseek(fd_.get(), 0, SEEK_END)), '\0');
    const ssize_t got = ::pread(fd_.get(), out.data(), out.size(), 0);
    out.resize(got < 0 ? 0 : static_cast<std::size_t>(got));
    return out;
  }

 private:
  UniqueFd fd_;
};

struct RunResult {
  int code = -1;
  std::string out;
  std::string err;
};

// run() in this process, with no terminal and no configuration file.
inline RunResult run_cli(const std::vector<std::string>& arguments, const Services& services,
                         const std::string& config_path = "/nonexistent/drover.toml",
                         const job::JobPlaces& places = {.state = "/nonexistent/state",
                                                         .logs = "/nonexistent/logs"}) {
  const Captured out;
  const Captured err;
  RunResult result;
  result.code = run(arguments, services,
                    {.out = out.fd(),
                     .err = err.fd(),
                     .config_path = config_path,
                     .environment = {.term = "xterm", .no_color = ""},
                     .away_from_keyboard = false,
                     .places = places});
  result.out = out.text();
  result.err = err.text();
  return result;
}

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> out;
  std::size_t start = 0;
  while (start < text.size()) {
    const std::size_t end = std::min(text.find('\n', start), text.size());
    out.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return out;
}

}  // namespace drover::cli::testing
