// SPDX-License-Identifier: Apache-2.0
//
// drover with a job that waits to be interrupted: for cli_signals_test, which sends it signals.
//
//   move, until it is cancelled:  plan, one progress
//   then:                         progress (undoing), a note that says whether the helper is alive
//   until a byte comes on $DROVER_FAKE_RELEASE: the undo
//   then:                         error: cancelled
//
// With $DROVER_FAKE_STATE, a directory, it is a job on disk, as a real one: until it is cancelled,
// or a byte comes on $DROVER_FAKE_RELEASE: then it is done.
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
#include "job/broadcast.h"
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

job::JobPlaces places() {
  const char* const state = std::getenv("DROVER_FAKE_STATE");
  if (state == nullptr) return {.state = "/nonexistent/state", .logs = "/nonexistent/log"};
  return {.state = state, .logs = std::string(state) + "-log"};
}

Result<job::Summary> work_on(job::Job& job, job::Observer& user, job::Cancel& cancel) {
  job::StatusWriter status(job.status_path());
  DROVER_ASSIGN(const auto control,
                job::ControlServer::start(job.control_socket(),
                                          {.status = [&] { return status.current().to_json(); },
                                           .cancel = [&] { cancel.request(); },
                                           .set_bandwidth = [](Length) { return Status(); },
                                           .set_compression = [](mirror::Compression) { return Status(); }}));
  job::Broadcast broadcast(user, status, *control);
  broadcast.started(job.id());
  broadcast.planned(job.record().plan);
  broadcast.progress(cli::testing::sample_progress());
  std::array<pollfd, 2> ready = {
      {{cancel.fd(), POLLIN, 0}, {std::atoi(std::getenv("DROVER_FAKE_RELEASE")), POLLIN, 0}}};
  while (::poll(ready.data(), ready.size(), -1) < 1) {
  }
  const bool cancelled = ready[0].revents != 0;
  job::Progress last = cli::testing::sample_progress();
  last.phase = cancelled ? job::Phase::Undo : job::Phase::Done;
  broadcast.progress(last);
  Result<job::Summary> result = cli::testing::sample_summary();
  if (cancelled) result = fail(Code::Cancelled, "cancelled; everything was undone");
  DROVER_TRY(cancelled ? job.finish({job::Outcome::Undone, result.error(), {}})
                       : job.finish({job::Outcome::Moved, {}, *result}));
  broadcast.ended(result);
  control->stop();
  return result;
}

Result<job::Summary> resume(const std::string& id, job::Observer& observer, job::Cancel& cancel) {
  DROVER_ASSIGN(const auto job, job::JobStore(places()).open(id));
  return work_on(*job, observer, cancel);
}

Result<job::Summary> move(const job::MoveOptions&, job::Observer& observer, job::Cancel& cancel) {
  if (std::getenv("DROVER_FAKE_STATE") != nullptr) {
    DROVER_ASSIGN(const auto job, job::JobStore(places()).create(job::testing::sample_record()));
    return work_on(*job, observer, cancel);
  }
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
  surroundings.places = places();
  surroundings.config_path = "/nonexistent/drover.toml";
  return cli::run({argv + 1, argv + argc},
                  {move,
                   [](const job::MoveOptions&, job::Cancel&) -> Result<job::Plan> {
                     return cli::testing::sample_plan();
                   },
                   [](const cli::ReceiveCommand&) { return 0; }, resume,
                   [](const std::string&, job::Observer&, job::Cancel&) { return Status(); }},
                  surroundings);
}
