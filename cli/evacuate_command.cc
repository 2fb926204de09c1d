// SPDX-License-Identifier: Apache-2.0
#include "cli/evacuate_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "cli/text.h"
#include "cli/option_values.h"
#include "cli/values.h"

namespace drover::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  drover evacuate --from /mnt/old --to /mnt/a /mnt/b --dry-run
  drover evacuate --from /mnt/old --to /mnt/a /mnt/b
  drover evacuate --from old-pool --to fast-pool --parallel 4 --bandwidth 200M

It takes the disks of all guests, running or not, CD-ROM images and NVRAM files off the storage;
other files stay. Ctrl-C undoes what is under way and keeps what is done; the same command again
goes on with the rest, also after a crash.
Manual page: drover-evacuate(1).)";


}  // namespace

CLI::App* add_evacuate(CLI::App& app, WrittenEvacuation& written) {
  CLI::App* const evacuate = app.add_subcommand(
      "evacuate", "Empty a storage of this host of all that its guests have there.");
  const job::EvacuateOptions defaults;
  const auto value = [&](const char* name, auto& into, const char* placeholder,
                         const std::string& help) {
    return evacuate->add_option(name, into, help)
        ->option_text(placeholder)
        ->allow_extra_args(false);
  };
  const auto flag = [&](const char* name, bool& into, const char* help) {
    evacuate->add_flag(name, into, help)->disable_flag_override();
  };
  evacuate->group("Commands");
  evacuate->footer(kExamples);
  value("--from", written.from, "STORAGE",
        "what is emptied: a filesystem or a directory of one (with a\nslash in it), or a storage "
        "pool")
      ->required();
  value("--to", written.to, "STORAGE", "where to, named alike; several, or repeated")
      ->required()
      ->allow_extra_args();
  value("--parallel", written.parallel, "N",
        fmt::format("files that are copied at once [default: {}]", defaults.parallel));
  value("--bandwidth", written.bandwidth, "RATE",
        fmt::format("limit for all together, per second: 100M (MiB), none\n[default: {}]",
                    format_rate_setting(defaults.bandwidth)));
  value("--source-uri", written.uri, "URI",
        fmt::format("libvirt on this host [default: {}]", defaults.uri));
  flag("--dry-run", written.dry_run, "print the plan and what stays; change nothing");
  flag("--json", written.json, "print one JSON object per line, for programs");
  flag("--verbose", written.verbose, "log in detail; progress as lines");
  return evacuate;
}

Result<EvacuateCommand> evacuate_command(const WrittenEvacuation& written) {
  EvacuateCommand command{{}, written.dry_run, written.json, written.verbose};
  job::EvacuateOptions& options = command.options;
  options.from = written.from;
  options.to = written.to;
  if (options.from.empty()) return fail(Code::InvalidArgument, "--from: the value is empty");
  if (std::ranges::count(options.to, std::string()) > 0) {
    return fail(Code::InvalidArgument, "--to: the value is empty");
  }
  DROVER_TRY(take_parallel(written.parallel, options.parallel));
  DROVER_TRY(take_bandwidth(written.bandwidth, options.bandwidth));
  DROVER_TRY(take_source_uri(written.uri, options.uri));
  return command;
}

}  // namespace drover::cli
