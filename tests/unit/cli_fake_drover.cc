// SPDX-License-Identifier: Apache-2.0
//
// drover with a job that waits to be interrupted: for cli_signals_test, which sends it signals.
//
//   move, until it is cancelled:  plan, one progress
//   then:                         progress (undoing), a note that says whether the helper is alive
//   until a byte comes on $DROVER_FAKE_RELEASE: the undo
//   then:                         error: cancelled
//
// The helper stands for the ssh that libvirt starts: a child of ours, with default signal actions.
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <memory>

#include "base/check.h"
#include "base/subprocess.h"
#include "cli/app.h"
#include "tests/unit/cli_fake_job.h"

namespace {

using namespace drover;

class Helper {
 public:
  Helper() {
    std::array<int, 2> to{};
    std::array<int, 2> from{};
    CHECK(::pipe2(to.data(), O_CLOEXEC) == 0 && ::pipe2(from.data(), O_CLOEXEC) == 0, "pipes");
    input_ = UniqueFd(to[1]);
    output_ = UniqueFd(from[0]);
    const UniqueFd its_input(to[0]);
    const UniqueFd its_output(from[1]);
    auto started =
        ChildProcess::start({"cat"}, {.input = its_input.get(), .output = its_output.get()});
    CHECK(started.has_value(), "cat can be started");
    child_ = std::make_unique<ChildProcess>(std::move(*started));
  }
  // Answers as long as it lives.
  [[nodiscard]] bool alive() const {
    char byte = 'x';
    return ::write(input_.get(), &byte, 1) == 1 && ::read(output_.get(), &byte, 1) == 1;
  }

 private:
  UniqueFd input_;
  UniqueFd output_;
  std::unique_ptr<ChildProcess> child_;
};

Result<job::Summary> move(const job::MoveOptions&, job::Observer& observer, job::Cancel& cancel) {
  const Helper helper;
  observer.planned(cli::testing::sample_plan());
  job::Progress progress = cli::testing::sample_progress();
  observer.progress(progress);
  pollfd ready{cancel.fd(), POLLIN, 0};
  while (::poll(&ready, 1, -1) != 1) {
  }
  progress.phase = job::Phase::Undo;
  progress.waiting_for = "the test";
  observer.progress(progress);
  observer.note(helper.alive() ? "the helper is alive" : "the helper is dead");
  char byte = 0;
  CHECK(::read(std::atoi(std::getenv("DROVER_FAKE_RELEASE")), &byte, 1) >= 0, "a pipe is read");
  return fail(Code::Cancelled, "cancelled; everything was undone");
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  cli::Surroundings surroundings;
  surroundings.config_path = "/nonexistent/drover.toml";
  return cli::run({argv + 1, argv + argc},
                  {move,
                   [](const job::MoveOptions&, job::Cancel&) -> Result<job::Plan> {
                     return cli::testing::sample_plan();
                   },
                   [](const cli::ReceiveCommand&) { return 0; }},
                  surroundings);
}
