// SPDX-License-Identifier: Apache-2.0
#include "cli/rebalance_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <string_view>
#include <utility>

#include "cli/text.h"
#include "cli/option_values.h"
#include "cli/values.h"

namespace drover::cli {

namespace {

using By = job::RebalanceProblem::By;

constexpr const char* kExamples = R"(Examples:
  drover rebalance /mnt/a /mnt/b /mnt/c
  drover rebalance /mnt/a /mnt/b --apart db1,db2 --pin web1:vda
  drover rebalance /mnt/a fast-pool --by io --window 1min
  drover rebalance /mnt/a /mnt/b --apply

It prints the moves and changes nothing, unless --apply is given. STORAGE is a directory on the
storage (with a slash in it) or a storage pool of libvirt's.
Manual page: drover-rebalance(1).)";

constexpr std::uint64_t kMostMoves = 1'000'000;
constexpr std::chrono::milliseconds kShortestWindow{1000};

Result<By> parse_by(const std::string& text) {
  if (text == "space") return By::Space;
  if (text == "io") return By::Io;
  return fail(Code::InvalidArgument, "'" + printable(text) + "' is neither space nor io");
}

Result<std::chrono::milliseconds> parse_window(const std::string& text) {
  DROVER_ASSIGN(const std::chrono::milliseconds window, parse_time(text));
  if (window < kShortestWindow) {
    return fail(Code::InvalidArgument, "'" + printable(text) + "' is too short to say anything",
                "write 1s or more");
  }
  return window;
}

Result<std::vector<std::string>> parse_apart(const std::string& text) {
  static constexpr const char* kHint = "write the guests with commas: db1,db2";
  std::vector<std::string> guests;
  std::size_t begin = 0;
  for (;;) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    guests.push_back(text.substr(begin, comma - begin));
    if (comma == text.size()) break;
    begin = comma + 1;
  }
  const std::string quoted = "'" + printable(text) + "'";
  if (guests.size() < 2) {
    return fail(Code::InvalidArgument, quoted + " names one guest: apart from which?", kHint);
  }
  std::vector<std::string> sorted = guests;
  std::ranges::sort(sorted);
  if (sorted.front().empty()) {
    return fail(Code::InvalidArgument, quoted + " has a guest without a name", kHint);
  }
  if (std::ranges::adjacent_find(sorted) != sorted.end()) {
    return fail(Code::InvalidArgument, quoted + " names a guest twice", kHint);
  }
  return guests;
}

Result<std::pair<std::string, std::string>> parse_pin(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == text.size()) {
    return fail(Code::InvalidArgument, "'" + printable(text) + "' is not VM:TARGET",
                "write the guest and its disk: web1:vda");
  }
  return std::pair(text.substr(0, colon), text.substr(colon + 1));
}

}  // namespace

CLI::App* add_rebalance(CLI::App& app, WrittenRebalance& written) {
  CLI::App* const rebalance = app.add_subcommand(
      "rebalance", "Keep this host's storages evenly used: propose moves of disks.");
  const job::RebalanceOptions defaults;
  const auto value = [&](const char* name, auto& into, const char* placeholder,
                         const std::string& help) {
    rebalance->add_option(name, into, help)->option_text(placeholder)->allow_extra_args(false);
  };
  const auto flag = [&](const char* name, bool& into, const char* help) {
    rebalance->add_flag(name, into, help)->disable_flag_override();
  };
  rebalance->group("Commands");
  rebalance->footer(kExamples);
  rebalance
      ->add_option("STORAGE", written.storages,
                   "a directory on the storage, or a storage pool; two or more")
      ->required()
      ->option_text(" ");
  value("--by", written.by, "WHAT", "what is to be even: space or io [default: space]");
  value("--window", written.window, "T",
        fmt::format("with --by io: how long the disks' load is measured\n[default: {}]",
                    format_time(defaults.window)));
  value("--tolerance", written.tolerance, "N%",
        fmt::format("how far from the mean a storage may be [default: {}]",
                    format_percent(defaults.tolerance)));
  value("--max-moves", written.max_moves, "N", "move no more than N disks [default: no limit]");
  value("--apart", written.apart, "VM,VM",
        "keep the disks of these guests on different storages;\nmay be repeated");
  value("--pin", written.pins, "VM:TARGET",
        "leave the guest's disk TARGET (as vda) where it is;\nmay be repeated");
  value("--source-uri", written.uri, "URI",
        fmt::format("libvirt on this host [default: {}]", defaults.uri));
  flag("--apply", written.apply, "carry out the moves, one after the other");
  flag("--json", written.json, "print one JSON object per line, for programs");
  flag("--verbose", written.verbose, "log in detail; progress as lines");
  return rebalance;
}

Result<RebalanceCommand> rebalance_command(const WrittenRebalance& written) {
  RebalanceCommand command{{}, written.apply, written.json, written.verbose};
  job::RebalanceOptions& options = command.options;
  options.storages = written.storages;
  if (std::ranges::count(options.storages, std::string()) > 0) {
    return fail(Code::InvalidArgument, "STORAGE is empty");
  }
  if (options.storages.size() < 2) {
    return fail(Code::InvalidArgument, "one STORAGE can't be balanced: name two or more");
  }
  if (written.by) DROVER_TRY(take("--by", *written.by, parse_by, options.by));
  if (written.window) {
    if (options.by != By::Io) {
      return fail(Code::InvalidArgument, "--window is of no use without --by io");
    }
    DROVER_TRY(take("--window", *written.window, parse_window, options.window));
  }
  if (written.tolerance) {
    DROVER_TRY(take("--tolerance", *written.tolerance, parse_percent, options.tolerance));
  }
  if (written.max_moves) {
    DROVER_TRY(take(
        "--max-moves", *written.max_moves,
        [](const auto& text) {
          return parse_count(text, {1, kMostMoves});
        },
        options.most_moves));
  }
  for (const std::string& text : written.apart) {
    DROVER_TRY(take("--apart", text, parse_apart, options.apart.emplace_back()));
  }
  for (const std::string& text : written.pins) {
    DROVER_TRY(take("--pin", text, parse_pin, options.pins.emplace_back()));
  }
  DROVER_TRY(take_source_uri(written.uri, options.uri));
  return command;
}

}  // namespace drover::cli
