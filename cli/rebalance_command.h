// SPDX-License-Identifier: Apache-2.0
//
// `drover rebalance` on the command line: its options, and what they mean. Part of
// cli/command_line.h.
//
// Threads: any.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "job/rebalance.h"

namespace CLI {
class App;
}

namespace drover::cli {

struct RebalanceCommand {
  job::RebalanceOptions options;
  bool apply = false;
  bool json = false;
  bool verbose = false;
};

// What the user wrote.
struct WrittenRebalance {
  std::vector<std::string> storages;
  std::optional<std::string> by;
  std::optional<std::string> window;
  std::optional<std::string> tolerance;
  std::optional<std::string> max_moves;
  std::vector<std::string> apart;
  std::vector<std::string> pins;
  std::optional<std::string> uri;
  bool apply = false;
  bool json = false;
  bool verbose = false;
};

// Adds the subcommand, which fills in `written`.
CLI::App* add_rebalance(CLI::App& app, WrittenRebalance& written);
// InvalidArgument for what makes no sense.
Result<RebalanceCommand> rebalance_command(const WrittenRebalance& written);

}  // namespace drover::cli
