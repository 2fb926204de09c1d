// SPDX-License-Identifier: Apache-2.0
//
// `drover index` on the command line: its options, and what they mean. Part of cli/command_line.h.
//
// Threads: any.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"

namespace CLI {
class App;
}

namespace drover::cli {

struct IndexCommand {
  std::vector<std::string> paths;   // files, and directories of files
  std::vector<std::string> remove;  // to be taken out
  bool list = false;
  bool json = false;
};

// What the user wrote.
using WrittenIndex = IndexCommand;

// Adds the subcommand, which fills in `written`.
CLI::App* add_index(CLI::App& app, WrittenIndex& written);
// InvalidArgument for what makes no sense.
Result<IndexCommand> index_command(const WrittenIndex& written);

}  // namespace drover::cli
