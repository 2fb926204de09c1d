// SPDX-License-Identifier: Apache-2.0
//
// The command line as a value: what the user asked for, checked, with the configuration file's
// defaults in it. Nothing is done here but reading that file.
//
//   Result<Command> command = parse_command_line({"move", "web1", "hostb", "--dry-run"},
//   kConfigPath);
//
// Errors: InvalidArgument for everything a user can get wrong here, whatever it was.
//
// Threads: any.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/result.h"
#include "cli/evacuate_command.h"
#include "cli/index_command.h"
#include "cli/rebalance_command.h"
#include "cli/relocate_command.h"
#include "job/move.h"
#include "mirror/compression.h"
#include "mirror/receiver_record.h"

namespace drover::cli {

struct MoveCommand {
  job::MoveOptions options;
  bool dry_run = false;
  bool json = false;
  bool verbose = false;
  bool detach = false;
};

struct CheckCommand {
  job::MoveOptions options;
  bool json = false;
  bool verbose = false;
};

struct JobsCommand {
  bool json = false;
};

struct StatusCommand {
  std::string job;  // an id, or a guest's name; as in the following
  bool json = false;
};

struct WatchCommand {
  std::string job;
  bool json = false;
};

struct CancelCommand {
  std::string job;
  bool json = false;
};

struct ResumeCommand {
  std::string job;  // empty: all that have no process
  bool json = false;
  bool verbose = false;
  bool detach = false;
};

struct HistoryCommand {
  bool json = false;
};

struct SetCommand {
  std::string job;
  // At least one of them.
  std::optional<Length> bandwidth;  // per second; zero: no limit
  std::optional<mirror::Compression> compression;
  bool json = false;
};

// The target's side; drover starts it itself.
struct ReceiveCommand {
  enum class Mode { Serve, Probe, Cleanup, Stop };
  Mode mode = Mode::Serve;
  std::string job;     // Cleanup, Stop
  // Cleanup: of a job whose handover had begun
  mirror::KeptImages kept = mirror::KeptImages::Refuse;
};

// --help and --version: to be printed on standard output.
struct ShowCommand {
  std::string text;
};

using Command = std::variant<MoveCommand, CheckCommand, RelocateCommand, RebalanceCommand, EvacuateCommand, IndexCommand, JobsCommand,
                             StatusCommand, WatchCommand, CancelCommand, ResumeCommand, HistoryCommand,
                             SetCommand, ReceiveCommand, ShowCommand>;

// `arguments` without the program's name.
Result<Command> parse_command_line(const std::vector<std::string>& arguments,
                                   const std::string& config_path);

}  // namespace drover::cli
