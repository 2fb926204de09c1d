// SPDX-License-Identifier: Apache-2.0
#include "cli/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>

namespace drover::cli {

namespace {
constexpr std::size_t kUsualWidth = 80;

std::string variable(const char* name) {
  const char* const value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): nobody sets any
  return value == nullptr ? "" : value;
}
}  // namespace

TerminalEnvironment TerminalEnvironment::of_process() {
  return {variable("TERM"), variable("NO_COLOR")};
}

Terminal terminal_of(int fd, const TerminalEnvironment& environment) {
  if (::isatty(fd) == 0 || environment.term.empty() || environment.term == "dumb") return {};
  return {true, environment.no_color.empty()};
}

std::size_t line_width(int fd) {
  winsize size{};
  const bool known = ::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return (known ? size.ws_col : kUsualWidth) - 1;
}

}  // namespace drover::cli
