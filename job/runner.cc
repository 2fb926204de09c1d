// SPDX-License-Identifier: Apache-2.0
//
// job::move(), resume() and cancel(): the job on disk, who listens to it, and run_move() in their middle.
#include <atomic>
#include <functional>
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
#include "job/prepare_relocation.h"
#include "job/relocate.h"
#include "job/run_move.h"
#include "job/run_relocation.h"
#include "mirror/receiver_record.h"

namespace drover::job {
namespace {

using Body = std::function<MoveEnd(Observer&, const JobFiles&)>;

Result<Summary> run_job(Job& job, bool resumed, Observer& observer, Cancel& cancel, const Body& body) {
  if (const Status logged = log_to_file(job.log_path()); !logged) return fail(logged.error());
  StatusWriter status(job.status_path());
  const JobRecord& record = job.record();
  const Length limit = record.relocation ? record.relocation->bandwidth : record.options.bandwidth;
  auto bandwidth = std::make_shared<std::atomic<std::uint64_t>>(limit.bytes());
  const bool is_move = !record.relocation;
  auto compression = std::make_shared<std::atomic<mirror::Compression>>(record.options.compression);
  DROVER_ASSIGN(auto control, ControlServer::start(job.control_socket(), {
                                  .status = [&] { return status.current().to_json(); },
                                  .cancel = [&] { cancel.request(); },
                                  .set_bandwidth = [bandwidth](Length rate) -> Status {
                                    bandwidth->store(rate.bytes());
                                    return {};
                                  },
                                  .set_compression = [compression, is_move](mirror::Compression wanted) -> Status {
                                    if (!is_move) {
                                      return fail(Code::Incompatible, "a relocation sends nothing over a link");
                                    }
                                    compression->store(wanted);
                                    return {};
                                  }}));
  Broadcast broadcast(observer, status, *control);
  broadcast.started(job.id());
  broadcast.planned(record.plan);
  const JobFiles files{.id = job.id(),
                       .directory = job.directory(),
                       .journal = job.journal_directory(),
                       .resumed = resumed,
                       .state = [&](std::string_view name) { status.state(name); },
                       .bandwidth = bandwidth,
                       .compression = compression};
  MoveEnd end = body(broadcast, files);
  if (!end.result) status.error(end.result.error());
  status.flush();
  if (end.over) {
    Ending ending;
    if (end.result) {
      ending.summary = *end.result;
    } else {
      ending.outcome = end.partly ? Outcome::Partly : Outcome::Undone;
      ending.reason = end.result.error();
    }
    if (const Status finished = job.finish(ending); !finished) log_error("{}", finished.error().to_string());
  }
  broadcast.ended(end.result);
  control->stop();
  return std::move(end.result);
}

Result<Summary> run_move_job(Platform& platform, Job& job, bool resumed, Observer& observer, Cancel& cancel,
                             Prepared prepared, std::optional<Error> undo_because) {
  return run_job(job, resumed, observer, cancel, [&](Observer& listeners, const JobFiles& files) {
    return run_move(platform, job.record().options, listeners, cancel, std::move(prepared), files,
                    std::move(undo_because));
  });
}

Result<Summary> run_relocation_job(Job& job, bool resumed, Observer& observer, Cancel& cancel,
                                   PreparedRelocation prepared, std::optional<Error> undo_because) {
  return run_job(job, resumed, observer, cancel, [&](Observer& listeners, const JobFiles& files) {
    return run_relocation(*job.record().relocation, listeners, cancel, std::move(prepared), files,
                          std::move(undo_because));
  });
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
  return run_move_job(*platform, *job, false, observer, cancel, std::move(prepared), std::nullopt);
}

Result<Plan> plan_relocation(const RelocateOptions& options, Cancel& /*cancel*/) {
  DROVER_ASSIGN(PreparedRelocation prepared, prepare_relocation(options));
  DROVER_TRY(JobStore().check_no_job(prepared.plan));
  return std::move(prepared.plan);
}

Result<Summary> relocate(const RelocateOptions& options, Observer& observer, Cancel& cancel) {
  DROVER_ASSIGN(PreparedRelocation prepared, prepare_relocation(options));
  DROVER_TRY(JobStore().check_no_job(prepared.plan));
  if (prepared.plan.blocked()) {
    observer.planned(prepared.plan);
    return fail(Code::Blocked, "the disks of guest " + prepared.plan.guest + " can't be relocated to " +
                                   prepared.plan.host + " as things are; nothing was changed",
                "see what stops it above");
  }
  if (cancel.requested()) return fail(Code::Cancelled, "cancelled; nothing was changed");
  DROVER_ASSIGN(const auto job, JobStore().create({.relocation = options, .plan = prepared.plan}));
  return run_relocation_job(*job, false, observer, cancel, std::move(prepared), std::nullopt);
}

namespace {

// `undo_because`: a job that is undone, if that is still possible.
Result<Summary> take_up(const std::string& id, Observer& observer, Cancel& cancel, std::optional<Error> undo_because) {
  DROVER_ASSIGN(const auto job, JobStore().open(id));
  const JobRecord& record = job->record();
  if (record.relocation) {
    DROVER_ASSIGN(PreparedRelocation prepared, prepare_relocation_again(*record.relocation, record.plan));
    return run_relocation_job(*job, true, observer, cancel, std::move(prepared), std::move(undo_because));
  }
  const auto platform = real_platform();
  DROVER_ASSIGN(Prepared prepared, prepare_again(*platform, record.options, record.plan));
  remove_sockets(prepared, id);
  return run_move_job(*platform, *job, true, observer, cancel, std::move(prepared), std::move(undo_because));
}

}  // namespace

Result<Summary> resume(const std::string& id, Observer& observer, Cancel& cancel) {
  return take_up(id, observer, cancel, std::nullopt);
}

Status cancel(const std::string& id, Observer& observer, Cancel& cancel) {
  const Error wish{Code::Cancelled, "the job was cancelled; the guest runs on as it did before", "", false};
  const auto ended = take_up(id, observer, cancel, wish);
  if (ended) return fail(Code::Held, "it was too late to cancel: the job is finished");
  if (ended.error().code != Code::Cancelled) return fail(ended.error());
  // Not everything could be undone, then.
  if (JobStore().open(id)) return fail(Code::Held, ended.error().message, ended.error().hint);
  return {};
}

}  // namespace drover::job
