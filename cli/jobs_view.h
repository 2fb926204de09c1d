// SPDX-License-Identifier: Apache-2.0
//
// Jobs on disk, for people and for programs. Pure functions; what comes from files is made
// printable. Times are this machine's; a block of text ends with a new line, JSON has none.
#pragma once

#include <string>
#include <vector>

#include "cli/text.h"
#include "job/job_store.h"

namespace drover::cli {

// What a person can do about it now; empty: nothing has to be done.
std::string advice(const job::JobView& view);

std::string render_jobs(const std::vector<job::JobView>& jobs, const Style& style);
std::string render_job(const job::JobView& job, const Style& style);
std::string render_history(const job::History& history, const Style& style);

// docs/drover-jobs.1 lists the members.
std::string json_job(const job::JobView& job);
std::string json_history(const job::HistoryEntry& entry);

}  // namespace drover::cli
