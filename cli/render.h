// SPDX-License-Identifier: Apache-2.0
//
// What people read: plan, progress, summary and errors as text. Pure functions: same input, same
// text. Whatever comes from outside (names, paths, messages) is made printable first.
//
// A block of text ends with a new line; a progress line has none.
#pragma once

#include <cstddef>
#include <string>

#include "base/result.h"
#include "cli/progress_view.h"
#include "cli/text.h"
#include "job/move.h"

namespace drover::cli {

enum class Purpose { Move, Examine };  // Examine: `drover check` and --dry-run

// Which disks move, from where to where, and what stands in the way.
std::string render_plan(const job::Plan& plan, Purpose purpose, const Style& style);

// For a line that is redrawn: at most `width` columns. What matters least is left out first.
std::string render_progress_line(const ProgressView& view, std::size_t width);
// For a log: all of it, with the time since the beginning.
std::string render_progress_text(const ProgressView& view);

std::string render_note(const std::string& text, const Style& style);
std::string render_summary(const job::Summary& summary, const Style& style);
std::string render_error(const Error& error, const Style& style);

// What a signal gets for an answer: a sentence without its new line. `again` is for the second and
// later ones.
struct Interruption {
  job::Progress progress;
  std::string guest;
  std::string host;
  bool again = false;
  job::Kind kind = job::Kind::Move;
};
std::string render_interruption(const Interruption& interruption, Purpose purpose);

}  // namespace drover::cli
