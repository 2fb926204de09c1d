// SPDX-License-Identifier: Apache-2.0
#include "cli/relocate_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "cli/text.h"
#include "cli/option_values.h"
#include "cli/values.h"

namespace drover::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  drover relocate web1 /mnt/array2
  drover relocate web1 /mnt/array2 --dry-run
  drover relocate web1 fast-pool --disk vda --bandwidth 200M
  drover relocate web1 vda=/mnt/array2/web1.qcow2 vdb=/mnt/array3 --format qcow2

DEST is a directory, a storage pool of libvirt's, or TARGET=PATH, which may be repeated. The guest
may run, stand still or be off. Ctrl-C undoes it: the guest goes on with its old disks.
Manual page: drover-relocate(1).)";


bool is_place(const std::string& text) {
  const std::size_t equals = text.find('=');
  return equals != std::string::npos && text.find('/') > equals;
}

Status add_place(const std::string& text, job::RelocateOptions& options) {
  static constexpr const char* kHint =
      "write the disk's name in the guest and an absolute path, as in vda=/mnt/array2/web1.raw";
  const std::size_t equals = text.find('=');
  const std::string disk = text.substr(0, equals);
  const std::string path = text.substr(equals + 1);
  if (disk.empty() || path.empty() || path.front() != '/') {
    return fail(Code::InvalidArgument, "'" + printable(text) + "' is not TARGET=PATH", kHint);
  }
  if (!options.places.emplace(disk, path).second) {
    return fail(Code::InvalidArgument,
                "'" + printable(text) + "' names a disk that was named before");
  }
  return {};
}

// One directory or pool, or places.
Status add_destinations(const WrittenRelocation& written, job::RelocateOptions& options) {
  for (const std::string& text : written.places) {
    if (is_place(text)) {
      DROVER_TRY(add_place(text, options));
      continue;
    }
    if (text.empty()) return fail(Code::InvalidArgument, "DEST is empty");
    if (!options.directory.empty() || !options.pool.empty()) {
      return fail(Code::InvalidArgument, "more than one DEST: '" + printable(text) + "'",
                  "for different places write TARGET=PATH for each disk");
    }
    (text.front() == '/' ? options.directory : options.pool) = text;
  }
  const bool one = !options.directory.empty() || !options.pool.empty();
  if (one && !options.places.empty()) {
    return fail(Code::InvalidArgument, "a DEST for all disks and TARGET=PATH exclude each other",
                "write TARGET=PATH for each disk");
  }
  if (!options.places.empty() && !written.disks.empty()) {
    return fail(Code::InvalidArgument, "--disk and TARGET=PATH exclude each other",
                "TARGET=PATH already says which disks go");
  }
  return {};
}

}  // namespace

CLI::App* add_relocate(CLI::App& app, WrittenRelocation& written) {
  CLI::App* const relocate =
      app.add_subcommand("relocate", "Put a guest's disks elsewhere on this host, while it runs.");
  const job::RelocateOptions defaults;
  const auto value = [&](const char* name, auto& into, const char* placeholder,
                         const std::string& help) {
    relocate->add_option(name, into, help)->option_text(placeholder)->allow_extra_args(false);
  };
  const auto flag = [&](const char* name, bool& into, const char* help) {
    relocate->add_flag(name, into, help)->disable_flag_override();
  };
  relocate->group("Commands");
  relocate->footer(kExamples);
  relocate->add_option("VM", written.guest, "the guest: its name or UUID")
      ->required()
      ->option_text(" ");
  relocate
      ->add_option("DEST", written.places,
                   "where to: a directory, a storage pool, or TARGET=PATH for\neach disk")
      ->required()
      ->option_text(" ");
  value("--disk", written.disks, "TARGET",
        "only this disk (as vda); may be repeated [default: all]");
  value("--format", written.format, "FORMAT",
        "raw or qcow2, for the new images [default: as they are]");
  value("--bandwidth", written.bandwidth, "RATE",
        fmt::format("limit for all disks together, per second: 100M (MiB), none\n[default: {}]",
                    format_rate_setting(defaults.bandwidth)));
  value("--parallel", written.parallel, "N",
        fmt::format("disks that are copied at once [default: {}]", defaults.parallel));
  value("--source-uri", written.uri, "URI",
        fmt::format("libvirt on this host [default: {}]", defaults.uri));
  flag("--keep-source", written.keep_source, "leave the old files where they are");
  flag("--dry-run", written.dry_run, "print the plan and what would stop it; change nothing");
  flag("--detach", written.detach,
       "run in the background: closing the terminal and Ctrl-C leave it\nrunning");
  flag("--json", written.json, "print one JSON object per line, for programs");
  flag("--verbose", written.verbose, "log in detail; progress as lines");
  return relocate;
}

Result<RelocateCommand> relocate_command(const WrittenRelocation& written) {
  RelocateCommand command{{}, written.dry_run, written.json, written.verbose, written.detach};
  job::RelocateOptions& options = command.options;
  if (written.guest.empty()) return fail(Code::InvalidArgument, "VM is empty");
  options.guest = written.guest;
  DROVER_TRY(add_destinations(written, options));
  options.disks = written.disks;
  std::ranges::sort(options.disks);
  if (std::ranges::adjacent_find(options.disks) != options.disks.end()) {
    return fail(Code::InvalidArgument, "--disk names a disk twice");
  }
  if (written.format) {
    if (*written.format != "raw" && *written.format != "qcow2") {
      return fail(Code::InvalidArgument,
                  "--format: '" + printable(*written.format) + "' is neither raw nor qcow2");
    }
    options.format = *written.format;
  }
  DROVER_TRY(take_bandwidth(written.bandwidth, options.bandwidth));
  DROVER_TRY(take_parallel(written.parallel, options.parallel));
  DROVER_TRY(take_source_uri(written.uri, options.uri));
  options.keep_source = written.keep_source;
  return command;
}

}  // namespace drover::cli
