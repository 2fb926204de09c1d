// SPDX-License-Identifier: Apache-2.0
//
// `drover relocate` on the command line: its options, and what they mean. Part of
// cli/command_line.h.
//
// Threads: any.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "job/relocate.h"

namespace CLI {
class App;
}

namespace drover::cli {

struct RelocateCommand {
  job::RelocateOptions options;
  bool dry_run = false;
  bool json = false;
  bool verbose = false;
  bool detach = false;
};

// What the user wrote.
struct WrittenRelocation {
  std::string guest;
  std::vector<std::string> places;
  std::vector<std::string> disks;
  std::optional<std::string> format;
  std::optional<std::string> bandwidth;
  std::optional<std::string> parallel;
  std::optional<std::string> uri;
  bool keep_source = false;
  bool dry_run = false;
  bool json = false;
  bool verbose = false;
  bool detach = false;
};

// Adds the subcommand, which fills in `written`.
CLI::App* add_relocate(CLI::App& app, WrittenRelocation& written);
// InvalidArgument for what makes no sense.
Result<RelocateCommand> relocate_command(const WrittenRelocation& written);

}  // namespace drover::cli
