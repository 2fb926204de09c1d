// SPDX-License-Identifier: Apache-2.0
//
// What programs read with --json: one object per line, on standard output: the job's own events
// (job/events.h) with what the command line adds to them. docs/drover-move.1 lists the fields; a
// test compares. Fields may be added; none changes its meaning.
//
// Pure functions. Each returns one line of valid JSON without its new line, valid UTF-8 too: bytes
// of names that are not become U+FFFD.
#pragma once

#include <string>

#include "base/result.h"
#include "cli/progress_view.h"
#include "job/move.h"

namespace drover::cli {

std::string json_started(const std::string& id);
std::string json_plan(const job::Plan& plan);
std::string json_progress(const ProgressView& view);
std::string json_note(const std::string& text);
std::string json_summary(const job::Summary& summary);
std::string json_error(const Error& error);

}  // namespace drover::cli
