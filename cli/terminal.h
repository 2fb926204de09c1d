// SPDX-License-Identifier: Apache-2.0
//
// What standard output is, and what may be written to it.
//
// Threads: any.
#pragma once

#include <cstddef>
#include <string>

namespace drover::cli {

// The environment's variables that matter; empty: not set.
struct TerminalEnvironment {
  std::string term;      // TERM
  std::string no_color;  // NO_COLOR (https://no-color.org)
  static TerminalEnvironment of_process();
};

struct Terminal {
  bool redraw = false;  // a line can be drawn again
  bool colours = false;
};
Terminal terminal_of(int fd, const TerminalEnvironment& environment);

// Columns a redrawn line may take: one less than there are, so that the terminal never wraps.
std::size_t line_width(int fd);

}  // namespace drover::cli
