// SPDX-License-Identifier: Apache-2.0
//
// /etc/drover.toml: this machine's defaults for the options of a move. A key is a long option's
// name; the command line goes before the file, the file before what is built in.
//
//   bandwidth = "400M"
//   max-downtime = "300ms"
//   connections = 4
//
//   job::MoveOptions options;
//   DROVER_TRY(load_config({.path = "/etc/drover.toml", .required = false}, options));
//
// Errors: InvalidArgument naming the file, the line and the key; NotFound for a required file.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "job/move.h"

namespace drover::cli {

inline constexpr std::string_view kConfigPath = "/etc/drover.toml";

struct ConfigFile {
  std::string path;
  bool required = false;  // false: when it isn't there, nothing is read
};

// Puts what the file says into `options`; unchanged on error. Blocks on the file.
Status load_config(const ConfigFile& file, job::MoveOptions& options);

// The same with the file's text; `name` is for the messages.
struct ConfigText {
  std::string name;
  std::string text;
};
Status read_config(const ConfigText& config, job::MoveOptions& options);

// All keys that a file may have, for the documentation's test.
std::vector<std::string_view> config_keys();

// The limits of options that are numbers and times, for the command line and the file.
inline constexpr unsigned kMostConnections = 16;  // as the link (mirror/link.h)
inline constexpr unsigned kMostPort = 65535;
Result<std::chrono::milliseconds> parse_max_downtime(std::string_view text);
// "none" is no limit: zero.
Result<std::chrono::milliseconds> parse_link_timeout(std::string_view text);
Result<std::chrono::milliseconds> parse_max_slowdown(std::string_view text);
std::string format_link_timeout(std::chrono::milliseconds time);

}  // namespace drover::cli
