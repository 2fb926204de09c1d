// SPDX-License-Identifier: Apache-2.0
//
// The process's log: a file in the job's directory (or standard error). Any thread. Lines carry
// UTC time, level and text. Keys and payloads are never logged.
//
//   log_info("disk {}: {} chunks to copy", disk, count);
#pragma once

#include <fmt/format.h>

#include <functional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace drover {

enum class LogLevel { Debug, Info, Warning, Error };

// Sends all further lines to `path` (appended, created with mode 0600): those of this thread, and
// of all that have opened none themselves. Without it, lines at Warning and above go to standard
// error.
Status log_to_file(const std::string& path);
// Sends this thread's further lines to standard error again, whatever log another has opened.
void log_to_stderr();
// Hands all further lines, of any level, to `sink` instead; it is called on any thread. For
// simulations.
void log_to(std::function<void(LogLevel, std::string_view)> sink);
void set_log_level(LogLevel level);
void log_line(LogLevel level, std::string_view text);

template <class... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::Debug, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::Info, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::Warning, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::Error, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace drover
