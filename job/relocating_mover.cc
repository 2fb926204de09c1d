// SPDX-License-Identifier: Apache-2.0
#include <sys/stat.h>

#include "job/rebalance.h"
#include "job/relocate.h"
#include "memmig/preflight.h"

namespace drover::job {

namespace {

bool taken(const std::string& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0;
}

RelocateOptions options_of(const RebalanceMove& move, const std::string& uri) {
  const std::string name = move.path.substr(move.path.rfind('/') + 1);
  std::string path = move.directory + "/" + name;
  if (taken(path)) {
    const std::size_t dot = name.rfind('.');
    path = move.directory + "/" + move.guest + "-" + move.disk +
           (dot == std::string::npos ? "" : name.substr(dot));
  }
  return {.guest = move.uuid, .places = {{move.disk, path}}, .uri = uri};
}

Status check(const RelocateOptions& options, Cancel& cancel) {
  DROVER_ASSIGN(const Plan plan, plan_relocation(options, cancel));
  if (plan.blocked()) return fail(memmig::blocked_error(plan.findings));
  return {};
}

}  // namespace

RebalanceMover relocating_mover(const std::string& uri) {
  return {
      .check = [uri](const RebalanceMove& move,
                     Cancel& cancel) { return check(options_of(move, uri), cancel); },
      .carry_out = [uri](const RebalanceMove& move, Observer& observer, Cancel& cancel) -> Status {
        DROVER_TRY(relocate(options_of(move, uri), observer, cancel));
        return {};
      }};
}

}  // namespace drover::job
