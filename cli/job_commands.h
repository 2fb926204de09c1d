// SPDX-License-Identifier: Apache-2.0
//
// The commands about jobs that are on disk, and the ones that leave a job there on purpose. Each
// returns the exit code; what was to be said has been said.
//
// Threads: call them from a process's only thread.
#pragma once

#include "cli/app.h"
#include "cli/command_line.h"
#include "cli/run_job.h"

namespace drover::cli {

int list_jobs(const JobsCommand& command, const Surroundings& surroundings);
int show_status(const StatusCommand& command, const Surroundings& surroundings);
int watch_job(const WatchCommand& command, const Surroundings& surroundings);
int cancel_job(const CancelCommand& command, const Services& services,
               const Surroundings& surroundings);
int resume_job(const ResumeCommand& command, const Services& services,
               const Surroundings& surroundings);
int show_history(const HistoryCommand& command, const Surroundings& surroundings);
int set_job(const SetCommand& command, const Surroundings& surroundings);

// `work` in the background, followed until its end, a signal, or the terminal's end.
int run_in_background(const Request& request, const Surroundings& surroundings, const Work& work);
// `work` here, out of the keyboard's reach.
int run_in_front(const Request& request, const Surroundings& surroundings, const Work& work);

// For what fails before there is anything to report about.
int refuse(const Error& error, bool json, const Surroundings& surroundings);

}  // namespace drover::cli
