// SPDX-License-Identifier: Apache-2.0
//
// job::move(), resume() and cancel(): the job on disk, who listens to it, and run_move() in their middle.
#include <atomic>
#include <memory>
#include <utility>

#include <fmt/format.h>
#include <unistd.h>

#include "base/log.h"
#include "job/broadcast.h"
#include "job/control.h"
#include "job/job_store.h"
#include "job/move.h"
#include "job/platform.h"
#include "job/prepare.h"
#include "job/run_move.h"
#include "mirror/receiver_record.h"

namespace drover::job {
namespace {

Result<Summary> run_job(Platform& platform, Job& job, bool resumed, Observer& observer, Cancel& cancel,
                        Prepared prepared, std::optional<Error> undo_because) {
  if (const Status logged = log_to_file(job.log_path()); !logged) return fail(logged.error());
  StatusWriter status(job.status_path());
  auto bandwidth = std::make_shared<std::atomic<std::uint64_t>>(job.record().options.bandwidth.bytes());
  DROVER_ASSIGN(auto control, ControlServer::start(job.control_socket(), {
                                  .status = [&] { return status.current().to_json(); },
                                  .cancel = [&] { cancel.request(); },
                                  .set_bandwidth = [bandwidth](Length rate) -> Status {
                                    bandwidth->store(rate.bytes());
                                    return {};
                                  }}));
  Broadcast broadcast(observer, status, *control);
  broadcast.started(job.id());
  broadcast.planned(prepared.plan);
  const JobFiles files{.id = job.id(),
                       .directory = job.directory(),
                       .journal = job.journal_directory(),
                       .resumed = resumed,
                       .state = [&](std::string_view name) { status.state(name); },
                       .bandwidth = bandwidth};
  MoveEnd end = run_move(platform, job.record().options, broadcast, cancel, std::move(prepared), files,
                         std::move(undo_because));
  if (!end.result) status.error(end.result.error());
  status.flush();
  if (end.over) {
    Ending ending;
    if (end.result) {
      ending.summary = *end.result;
    } else {
      ending.outcome = Outcome::Undone;
      ending.reason = end.result.error();
    }
    if (const Status finished = job.finish(ending); !finished) log_error("{}", finished.error().to_string());
  }
  broadcast.ended(end.result);
  control->stop();
  return std::move(end.result);
}

// What a process that was killed has left. Nobody listens there: the job's lock is ours.
void remove_sockets(const Prepared& prepared, const std::string& id) {
  mirror::remove_memory_socket(id);
  if (prepared.guest.private_directory.empty()) return;
  for (const DiskPlan& disk : prepared.plan.disks) {
    ::unlink(endpoint_socket(prepared.guest, disk.disk).c_str());
  }
}

}  // namespace

bool Plan::blocked() const {
  for (const memmig::Finding& finding : findings) {
    if (finding.severity == memmig::Severity::Blocker) return true;
  }
  return false;
}

Result<Plan> plan_move(const MoveOptions& options, Cancel& cancel) {
  const auto platform = real_platform();
  DROVER_ASSIGN(Prepared prepared, prepare(*platform, options, cancel));
  return std::move(prepared.plan);
}

Result<Summary> move(const MoveOptions& options, Observer& observer, Cancel& cancel) {
  const auto platform = real_platform();
  DROVER_ASSIGN(Prepared prepared, prepare(*platform, options, cancel));
  // First: what that job has made is what else would stop this one.
  DROVER_TRY(JobStore().check_no_job(prepared.plan));
  if (prepared.plan.blocked()) {
    observer.planned(prepared.plan);
    return fail(Code::Blocked, "guest " + prepared.plan.guest + " can't be moved to " + options.host +
                                   " as things are; nothing was changed",
                "see what stops it above");
  }
  if (cancel.requested()) return fail(Code::Cancelled, "cancelled; nothing was changed");
  DROVER_ASSIGN(const auto job, JobStore().create({.options = options, .plan = prepared.plan}));
  return run_job(*platform, *job, false, observer, cancel, std::move(prepared), std::nullopt);
}

Result<Summary> resume(const std::string& id, Observer& observer, Cancel& cancel) {
  const auto platform = real_platform();
  DROVER_ASSIGN(const auto job, JobStore().open(id));
  DROVER_ASSIGN(Prepared prepared, prepare_again(*platform, job->record().options, job->record().plan));
  remove_sockets(prepared, id);
  return run_job(*platform, *job, true, observer, cancel, std::move(prepared), std::nullopt);
}

Status cancel(const std::string& id, Observer& observer, Cancel& cancel) {
  const auto platform = real_platform();
  DROVER_ASSIGN(const auto job, JobStore().open(id));
  DROVER_ASSIGN(Prepared prepared, prepare_again(*platform, job->record().options, job->record().plan));
  remove_sockets(prepared, id);
  const Error wish{Code::Cancelled, "the move was cancelled; the guest runs on where it was", "", false};
  const auto ended = run_job(*platform, *job, true, observer, cancel, std::move(prepared), wish);
  if (ended) return fail(Code::Held, "it was too late to cancel: the move is finished");
  if (ended.error().code != Code::Cancelled) return fail(ended.error());
  return {};
}

}  // namespace drover::job
