// SPDX-License-Identifier: Apache-2.0
//
// What can be done with a job whose process has ended.
#include <fmt/format.h>

#include "job/job_store.h"
#include "job/move.h"

namespace drover::job {
namespace {

Error not_yet(const Job& job) {
  return {Code::Incompatible,
          fmt::format("this drover {} can't go on with jobs of kind {}", DROVER_VERSION,
                      job.record().kind),
          "nothing was changed; its files are in " + job.directory(), false};
}

}  // namespace

Result<Summary> resume(const std::string& id, Observer& /*observer*/, Cancel& /*cancel*/) {
  DROVER_ASSIGN(const auto job, JobStore().open(id));
  return fail(not_yet(*job));
}

Status cancel(const std::string& id, Observer& /*observer*/, Cancel& /*cancel*/) {
  DROVER_ASSIGN(const auto job, JobStore().open(id));
  return fail(not_yet(*job));
}

}  // namespace drover::job
