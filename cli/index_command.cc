// SPDX-License-Identifier: Apache-2.0
#include "cli/index_command.h"

#include <CLI/CLI.hpp>

namespace drover::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  drover index /srv/images
  drover index /srv/images/debian-12.raw /srv/templates
  drover index --remove /srv/images/old.raw
  drover index --list --json

On the host that guests are moved to. What its images hold already is not sent by later moves.
Manual page: drover-index(1).)";

}  // namespace

CLI::App* add_index(CLI::App& app, WrittenIndex& written) {
  CLI::App* const index = app.add_subcommand(
      "index", "Note what this host's images hold, so that moves to it need not send it.");
  index->group("Commands");
  index->footer(kExamples);
  index->add_option("PATH", written.paths, "image files, or directories with image files in them")
      ->option_text(" ");
  index
      ->add_option("--remove", written.remove,
                   "take the image PATH out of the index; may be given\nseveral times")
      ->option_text("PATH")
      ->allow_extra_args(false);
  index->add_flag("--list", written.list, "list the images in it; change nothing")
      ->disable_flag_override();
  index->add_flag("--json", written.json, "print one JSON object per image, for programs")
      ->disable_flag_override();
  return index;
}

Result<IndexCommand> index_command(const WrittenIndex& written) {
  const bool changes = !written.paths.empty() || !written.remove.empty();
  if (written.list && changes) {
    return fail(Code::InvalidArgument, "--list changes nothing: no PATH and no --remove with it");
  }
  if (!written.list && !changes) return fail(Code::InvalidArgument, "name a PATH, or --list");
  for (const auto* const paths : {&written.paths, &written.remove}) {
    for (const std::string& path : *paths) {
      if (path.empty()) return fail(Code::InvalidArgument, "a PATH is empty");
    }
  }
  return written;
}

}  // namespace drover::cli
