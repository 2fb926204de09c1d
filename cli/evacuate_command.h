// SPDX-License-Identifier: Apache-2.0
//
// `drover evacuate` on the command line: its options, and what they mean. Part of
// cli/command_line.h.
//
// Threads: any.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "job/evacuate.h"

namespace CLI {
class App;
}

namespace drover::cli {

struct EvacuateCommand {
  job::EvacuateOptions options;
  bool dry_run = false;
  bool json = false;
  bool verbose = false;
};

// What the user wrote.
struct WrittenEvacuation {
  std::string from;
  std::vector<std::string> to;
  std::optional<std::string> parallel;
  std::optional<std::string> bandwidth;
  std::optional<std::string> uri;
  bool dry_run = false;
  bool json = false;
  bool verbose = false;
};

// Adds the subcommand, which fills in `written`.
CLI::App* add_evacuate(CLI::App& app, WrittenEvacuation& written);
// InvalidArgument for what makes no sense.
Result<EvacuateCommand> evacuate_command(const WrittenEvacuation& written);

}  // namespace drover::cli
