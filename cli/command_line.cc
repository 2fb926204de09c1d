// SPDX-License-Identifier: Apache-2.0
#include "cli/command_line.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>

#include "cli/config.h"
#include "cli/text.h"
#include "cli/values.h"
#include "job/memory_channels.h"
#include "mirror/addresses.h"

namespace drover::cli {

namespace {

constexpr const char* kPurpose =
    "drover moves running virtual machines, disks and memory, between hosts that share nothing.";

constexpr const char* kMainExamples = R"(Examples:
  drover check web1 hostb                     what would stop a move, on both hosts
  drover move web1 hostb                      the running guest and all its disks
  drover relocate web1 /mnt/array2            its disks to another storage of this host
  drover rebalance /mnt/a /mnt/b              which disks to move so that both are evenly used
  drover evacuate --from /mnt/a --to /mnt/b   everything of the guests off a storage
  drover index /srv/images                    what moves to this host need not send
  drover jobs                                 what is on its way, and what was interrupted
  drover move --help                          the options of a command

`drover receive` is the target's side; drover starts it there itself, over SSH.
Manual pages: drover(1), drover-move(1), drover-check(1), drover-relocate(1), drover-rebalance(1),
drover-evacuate(1), drover-index(1), drover-jobs(1).)";

constexpr const char* kMoveExamples = R"(Examples:
  drover move web1 hostb
  drover move web1 hostb --dry-run
  drover move web1 root@192.0.2.7 --disk vda=/srv/nvme/web1.raw --bandwidth 800mbit
  drover move web1 hostb --detach
  drover move web1 hostb --json | jq -r 'select(.event == "progress").percent'

Ctrl-C undoes the move: the guest runs on here and nothing is left on the target. With --detach
it leaves the move running in the background.
Manual page: drover-move(1).)";

constexpr const char* kCheckExamples = R"(Examples:
  drover check web1 hostb
  drover check web1 hostb --disk vda=/srv/nvme/web1.raw --json

Exit code: 0 when a move can begin, 4 when something stops it.
Manual page: drover-check(1).)";

constexpr const char* kJobsExamples = R"(Examples:
  drover jobs
  drover jobs --json | jq -r 'select(.alive | not).job'

Manual page: drover-jobs(1).)";

constexpr const char* kStatusExamples = R"(Examples:
  drover status web1
  drover status web1-1f3a5c77 --json | jq .progress.percent

Manual page: drover-jobs(1).)";

constexpr const char* kWatchExamples = R"(Examples:
  drover watch web1
  drover watch web1-1f3a5c77 --json

Ctrl-C ends the watching, not the job. Manual page: drover-jobs(1).)";

constexpr const char* kCancelExamples = R"(Examples:
  drover cancel web1
  drover cancel web1-1f3a5c77

It waits until everything is undone. Manual page: drover-jobs(1).)";

constexpr const char* kResumeExamples = R"(Examples:
  drover resume web1
  drover resume web1-1f3a5c77 --detach
  drover resume --all

--all starts each interrupted job again in the background. Manual page: drover-jobs(1).)";

constexpr const char* kHistoryExamples = R"(Examples:
  drover history
  drover history --json | jq -r 'select(.outcome == "moved").guest'

Manual page: drover-jobs(1).)";

constexpr const char* kSetExamples = R"(Examples:
  drover set web1 --bandwidth 400mbit
  drover set web1 --bandwidth none --compress zstd:3

Manual page: drover-jobs(1).)";

const std::string kEncodings = fmt::format("none, lz4 or zstd:LEVEL (1 to {})", mirror::kHighestZstdLevel);

constexpr const char* kReceiveNotes =
    R"(drover starts it on the target over SSH, with the job on its standard input.)";

// CLI11's help, without its upper-case remarks.
class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter() {
    column_width(26);
    label("Positionals", "Arguments");
    label("OPTIONS", "OPTION...");
    label("SUBCOMMAND", "COMMAND");
  }
  std::string make_option_opts(const CLI::Option* option) const override {
    return option->get_option_text().empty() ? "" : " " + option->get_option_text();
  }
  std::string make_option_name(const CLI::Option* option, bool is_positional) const override {
    std::string name = CLI::Formatter::make_option_name(option, is_positional);
    if (const std::size_t comma = name.find(','); comma != std::string::npos) {
      name.insert(comma + 1, 1, ' ');
    }
    return name;
  }
  std::string make_usage(const CLI::App* app, std::string name) const override {
    const CLI::App* const parent = app->get_parent();
    if (parent != nullptr) name = parent->get_name() + " " + name;
    return "\n" + CLI::Formatter::make_usage(app, name);
  }
  std::string make_footer(const CLI::App* app) const override { return app->get_footer() + "\n"; }
  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override {
    std::string help = CLI::Formatter::make_help(app, std::move(name), mode);
    for (std::size_t at = 0; (at = help.find("\n\n\n", at)) != std::string::npos;)
      help.erase(at, 1);
    return help;
  }
};

// What the user wrote; values are checked after CLI11 is done, so that all errors read alike.
struct Written {
  std::string guest;
  std::string host;
  std::vector<std::string> disks;
  std::optional<std::string> source_uri;
  std::optional<std::string> target_uri;
  std::optional<std::string> address;
  std::optional<std::string> via;
  std::optional<std::string> port;
  std::optional<std::string> bandwidth;
  std::optional<std::string> compress;
  std::optional<std::string> max_downtime;
  std::optional<std::string> connections;
  std::optional<std::string> memory_channels;
  std::optional<std::string> link_timeout;
  std::optional<std::string> max_slowdown;
  std::string hold_barrier;
  bool start_target_at_once = false;
  std::string config;
  std::string job;
  bool all = false;
  bool detach = false;
  bool keep_source = false;
  bool keep_partial = false;
  bool verify = false;
  bool no_index = false;
  bool dry_run = false;
  bool json = false;
  bool verbose = false;
  bool probe = false;
  bool force = false;
  bool keep = false;
  std::string cleanup;
  std::string stop;
};

CLI::Option* value(CLI::App& app, const std::string& name, std::optional<std::string>& into,
                   const std::string& placeholder, const std::string& help) {
  return app.add_option(name, into, help)->option_text(placeholder);
}

void flag(CLI::App& app, const std::string& name, bool& into, const std::string& help) {
  app.add_flag(name, into, help)->disable_flag_override();
}

std::string with_default(const std::string& help, const std::string& standard) {
  return fmt::format("{} [default: {}]", help, standard);
}

// What `drover move` and `drover check` have in common.
void add_common(CLI::App& app, Written& written, const job::MoveOptions& defaults) {
  app.add_option("VM", written.guest, "the guest: its name or UUID")->required()->option_text(" ");
  app.add_option("HOST", written.host, "where to: an SSH destination, as ssh takes it")
      ->required()
      ->option_text(" ");
  app.add_option("--disk", written.disks,
                 "put the guest's disk TARGET (as vda) at PATH on the target;\n"
                 "may be given once for each disk [default: the same path as here]")
      ->option_text("TARGET=PATH")
      ->allow_extra_args(false);
  value(app, "--target-uri", written.target_uri, "URI",
        with_default("libvirt on the target", "qemu+ssh://HOST/system"));
  value(app, "--source-uri", written.source_uri, "URI",
        with_default("libvirt on this host", defaults.source_uri));
  value(app, "--address", written.address, "ADDR",
        with_default("the target's address for the data", "where SSH goes"));
  value(app, "--via", written.via, "ADDR[,ADDR...]",
        fmt::format("several addresses of the target, over which the data is\nspread, at most {}",
                    mirror::kMaxAddresses));
  value(app, "--port", written.port, "N",
        with_default(
            "the target listens on this TCP port for the data",
            defaults.target_port == 0 ? "any free one" : std::to_string(defaults.target_port)));
}

void add_output(CLI::App& app, Written& written, const std::string& config_path) {
  app.add_option("--config", written.config,
                 with_default("file with defaults for these options", config_path))
      ->option_text("FILE");
  flag(app, "--json", written.json, "print one JSON object per line, for programs");
  flag(app, "--verbose", written.verbose, "log in detail; progress as lines");
}

void add_move(CLI::App& app, Written& written, const job::MoveOptions& defaults) {
  flag(app, "--dry-run", written.dry_run, "print the plan and what would stop it; change nothing");
  flag(app, "--keep-source", written.keep_source,
       with_default("leave the disks' files and the definition here",
                    defaults.keep_source ? "yes" : "no"));
  value(app, "--bandwidth", written.bandwidth, "RATE",
        with_default("limit for disks and memory, per second: 100M (MiB),\n800mbit, none",
                     format_rate_setting(defaults.bandwidth)));
  value(app, "--compress", written.compress, "HOW",
        with_default(fmt::format("compress what goes over the link: auto (as it needs it),\n{}", kEncodings),
                     mirror::compression_name(defaults.compression)));
  value(app, "--max-downtime", written.max_downtime, "T",
        with_default("how long the guest may stand still at the switch",
                     format_time(defaults.max_downtime)));
  value(app, "--connections", written.connections, "N",
        with_default(fmt::format("TCP connections for the data, 1 to {}", kMostConnections),
                     std::to_string(defaults.connections)));
  value(app, "--memory-channels", written.memory_channels, "N",
        with_default(fmt::format("connections for the guest's memory, 1 to {}, or auto",
                                 job::kMostMemoryChannels),
                     format_memory_channels(defaults.memory_channels)));
  value(app, "--max-slowdown", written.max_slowdown, "T",
        with_default("how long a guest's write may wait for the target in the\nhandover",
                     format_time(defaults.max_slowdown)));
  flag(app, "--verify", written.verify,
       with_default("before the handover compare all that is on the target's\ndisks with the source",
                    defaults.verify ? "yes" : "no"));
  flag(app, "--no-index", written.no_index,
       with_default("send also what the target has already, of other images\n(see drover index)",
                    defaults.use_index ? "no" : "yes"));
  value(app, "--link-timeout", written.link_timeout, "T",
        with_default("undo the move when the link was gone for so long",
                     format_link_timeout(defaults.link_timeout)));
  flag(app, "--keep-partial", written.keep_partial,
       with_default("on a failure keep the target's images for drover resume",
                    defaults.keep_partial ? "yes" : "no"));
  flag(app, "--detach", written.detach,
       "run in the background: closing the terminal and Ctrl-C leave it\nrunning");
  // Test switches.
  app.add_option("--hold-barrier", written.hold_barrier, "")->group("");
  app.add_flag("--start-target-at-once", written.start_target_at_once, "")->group("");
}

// Commands about one job.
CLI::App* add_job_command(CLI::App& app, const std::string& name, const std::string& purpose,
                          const char* examples) {
  CLI::App* const command = app.add_subcommand(name, purpose);
  command->group("Commands");
  command->footer(examples);
  return command;
}

CLI::Option* add_job(CLI::App& app, Written& written) {
  return app.add_option("JOB", written.job, "its id, or its guest's name")->option_text(" ");
}

void add_json(CLI::App& app, Written& written, const std::string& what) {
  flag(app, "--json", written.json, what);
}

tl::unexpected<Error> usage(const std::string& command, const std::string& message,
                            std::string hint = {}) {
  if (hint.empty()) hint = "drover" + command + " --help lists the options";
  return fail(Code::InvalidArgument, message, std::move(hint));
}

// One value of the command line, with the option's name in the error.
template <class T, class Parse, class Set>
Status take(const std::string& option, const T& text, Parse parse, Set set) {
  auto parsed = parse(text);
  if (!parsed) {
    return fail(Code::InvalidArgument, option + ": " + parsed.error().message, parsed.error().hint);
  }
  set(*parsed);
  return {};
}

Status apply(const Written& written, job::MoveOptions& options) {
  if (written.guest.empty()) return fail(Code::InvalidArgument, "VM is empty");
  options.guest = written.guest;
  DROVER_TRY(check_host(written.host));
  options.host = written.host;
  for (const std::string& text : written.disks) {
    bool again = false;
    DROVER_TRY(take("--disk", text, parse_disk,
                    [&](const auto& disk) { again = !options.disk_paths.emplace(disk).second; }));
    if (again) {
      return fail(Code::InvalidArgument,
                  "--disk: '" + printable(text) + "' names a disk that was named before");
    }
  }
  if (written.source_uri) options.source_uri = *written.source_uri;
  if (written.target_uri) options.target_uri = *written.target_uri;
  if (written.address) options.target_address = *written.address;
  for (const auto& [name, text] :
       {std::pair("--source-uri", written.source_uri),
        std::pair("--target-uri", written.target_uri), std::pair("--address", written.address)}) {
    if (text && text->empty()) {
      return fail(Code::InvalidArgument, std::string(name) + ": the value is empty");
    }
  }
  if (written.via) {
    if (written.address) {
      return fail(Code::InvalidArgument, "--via and --address exclude each other", "name all addresses with --via");
    }
    DROVER_TRY(take("--via", *written.via, mirror::parse_addresses,
                    [&](std::vector<std::string> addresses) { options.via = std::move(addresses); }));
  }
  if (written.port) {
    DROVER_TRY(take(
        "--port", *written.port,
        [](const auto& t) {
          return parse_count(t, {0, kMostPort});
        },
        [&](std::uint64_t port) { options.target_port = static_cast<std::uint16_t>(port); }));
  }
  if (written.bandwidth) {
    DROVER_TRY(take("--bandwidth", *written.bandwidth, parse_rate,
                    [&](Length rate) { options.bandwidth = rate; }));
  }
  if (written.compress) {
    DROVER_TRY(take("--compress", *written.compress, mirror::parse_compression,
                    [&](mirror::Compression how) { options.compression = how; }));
  }
  if (written.max_downtime) {
    DROVER_TRY(take("--max-downtime", *written.max_downtime, parse_max_downtime,
                    [&](std::chrono::milliseconds time) { options.max_downtime = time; }));
  }
  if (written.connections) {
    DROVER_TRY(take(
        "--connections", *written.connections,
        [](const auto& t) {
          return parse_count(t, {1, kMostConnections});
        },
        [&](std::uint64_t count) { options.connections = static_cast<unsigned>(count); }));
  }
  if (written.memory_channels) {
    DROVER_TRY(take("--memory-channels", *written.memory_channels, parse_memory_channels,
                    [&](unsigned count) { options.memory_channels = count; }));
  }
  if (const auto addresses = static_cast<unsigned>(options.via.size()); options.connections < addresses) {
    if (written.connections) {
      return fail(Code::InvalidArgument,
                  fmt::format("--connections: {} can't be spread over {} addresses", options.connections, addresses),
                  "leave it out, or name fewer addresses with --via");
    }
    options.connections = addresses;
  }
  if (written.link_timeout) {
    DROVER_TRY(take("--link-timeout", *written.link_timeout, parse_link_timeout,
                    [&](std::chrono::milliseconds time) { options.link_timeout = time; }));
  }
  if (written.max_slowdown) {
    DROVER_TRY(take("--max-slowdown", *written.max_slowdown, parse_max_slowdown,
                    [&](std::chrono::milliseconds time) { options.max_slowdown = time; }));
  }
  if (written.verify) options.verify = true;
  if (written.no_index) options.use_index = false;
  if (written.keep_source) options.keep_source = true;
  if (written.keep_partial) options.keep_partial = true;
  options.hold_barrier_file = written.hold_barrier;
  options.start_target_at_once = written.start_target_at_once;
  return {};
}

Status apply(const Written& written, SetCommand& command) {
  if (!written.bandwidth && !written.compress) {
    return fail(Code::InvalidArgument, "say what to set: --bandwidth, --compress or both");
  }
  if (written.bandwidth) {
    DROVER_TRY(take("--bandwidth", *written.bandwidth, parse_rate,
                    [&](Length rate) { command.bandwidth = rate; }));
  }
  if (written.compress) {
    DROVER_TRY(take("--compress", *written.compress, mirror::parse_compression,
                    [&](mirror::Compression how) { command.compression = how; }));
  }
  return {};
}

// The file that --config names: it has to be read before --help can say what the defaults are.
ConfigFile config_file(const std::vector<std::string>& arguments, const std::string& standard) {
  static constexpr std::string_view kOption = "--config";
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--") break;
    if (argument == kOption && i + 1 < arguments.size()) return {arguments[i + 1], true};
    if (argument.starts_with(std::string(kOption) + "=")) {
      return {argument.substr(kOption.size() + 1), true};
    }
  }
  return {standard, false};
}

bool asks_for_help(const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments) {
    if (argument == "--help" || argument == "-h") return true;
  }
  return false;
}

// CLI11's errors in the program's own words where its own are hard to understand.
tl::unexpected<Error> parse_error(const CLI::ParseError& error, const CLI::App& app,
                                  const std::vector<std::string>& arguments) {
  const auto used = app.get_subcommands();
  const std::string command = used.empty() ? "" : " " + used.front()->get_name();
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    const std::vector<std::string> extra = app.remaining(true);
    const std::string first = extra.empty() ? "" : extra.front();
    const std::string what = !first.empty() && first.front() == '-' ? "unknown option"
                             : used.empty()                         ? "unknown command"
                                                                    : "one argument too many:";
    const bool is_command = used.empty() && what == "unknown command";
    return usage(command, what + " '" + printable(first) + "'",
                 is_command ? "drover --help lists the commands" : "");
  }
  if (dynamic_cast<const CLI::RequiredError*>(&error) != nullptr) {
    if (used.empty()) {
      if (!arguments.empty() && !arguments.front().empty()) {
        const bool option = arguments.front().front() == '-';
        return usage("",
                     (option ? "unknown option '" : "unknown command '") +
                         printable(arguments.front()) + "'",
                     option ? "" : "drover --help lists the commands");
      }
      return usage("", "no command was given", "drover --help lists the commands");
    }
    const CLI::App& one = *used.front();
    const std::string what = one.get_option_no_throw("STORAGE") != nullptr ? "STORAGE STORAGE..."
                             : one.get_option_no_throw("DEST") != nullptr  ? "VM DEST"
                             : one.get_option_no_throw("VM") != nullptr    ? "VM HOST"
                                                                           : "JOB";
    return usage(command, printable(error.what()),
                 fmt::format("usage: drover{} {} [OPTION...]; --help says more", command, what));
  }
  return usage(command, printable(error.what()));
}

}  // namespace

Result<Command> parse_command_line(const std::vector<std::string>& arguments,
                                   const std::string& config_path) {
  job::MoveOptions defaults;
  const ConfigFile file = config_file(arguments, config_path);
  // For the others there is nothing in it: they have to work whatever it says.
  const bool moves =
      !arguments.empty() && (arguments.front() == "move" || arguments.front() == "check");
  if (moves) {
    const Status loaded = load_config(file, defaults);
    // A broken file must not keep anybody from reading the help.
    if (!loaded && !asks_for_help(arguments)) {
      return fail(Code::InvalidArgument, loaded.error().message, loaded.error().hint);
    }
  }

  Written written;
  CLI::App app(kPurpose, "drover");
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_help_flag("-h,--help", "print this and end");
  app.set_version_flag("--version", "drover " DROVER_VERSION, "print the version and end");
  app.require_subcommand(1);
  app.footer(kMainExamples);

  CLI::App* const move = app.add_subcommand("move", "Move a running guest to another host.");
  move->group("Commands");
  move->footer(kMoveExamples);
  add_common(*move, written, defaults);
  add_move(*move, written, defaults);
  add_output(*move, written, file.path);

  CLI::App* const check =
      app.add_subcommand("check", "Say what would stop a move, on both hosts; change nothing.");
  check->group("Commands");
  check->footer(kCheckExamples);
  add_common(*check, written, defaults);
  add_output(*check, written, file.path);

  WrittenRebalance rebalancing;
  CLI::App* const rebalance = add_rebalance(app, rebalancing);
  WrittenEvacuation evacuation;
  CLI::App* const evacuate = add_evacuate(app, evacuation);
  WrittenRelocation relocation;
  CLI::App* const relocate = add_relocate(app, relocation);

  WrittenIndex indexing;
  CLI::App* const index = add_index(app, indexing);

  static constexpr const char* kEvents = "print one JSON object per line, for programs";
  static constexpr const char* kObjects = "print JSON, for programs";
  CLI::App* const jobs = add_job_command(
      app, "jobs", "List the jobs of this host, also those that were interrupted.", kJobsExamples);
  add_json(*jobs, written, "print one JSON object per job, for programs");

  CLI::App* const status = add_job_command(app, "status", "Say how far a job is.", kStatusExamples);
  add_job(*status, written)->required();
  add_json(*status, written, kObjects);

  CLI::App* const watch = add_job_command(app, "watch", "Follow a job to its end.", kWatchExamples);
  add_job(*watch, written)->required();
  add_json(*watch, written, kEvents);

  CLI::App* const cancel =
      add_job_command(app, "cancel", "Undo a job, running or interrupted.", kCancelExamples);
  add_job(*cancel, written)->required();
  add_json(*cancel, written, kEvents);

  CLI::App* const resume =
      add_job_command(app, "resume", "Go on with a job whose process has ended.", kResumeExamples);
  CLI::Option* const which = add_job(*resume, written);
  flag(*resume, "--all", written.all, "each such job of this host, in the background");
  resume->get_option("--all")->excludes(which);
  flag(*resume, "--detach", written.detach, "run in the background, as drover move --detach");
  add_json(*resume, written, kEvents);
  flag(*resume, "--verbose", written.verbose, "log in detail; progress as lines");

  CLI::App* const history =
      add_job_command(app, "history", "List the jobs that have ended.", kHistoryExamples);
  add_json(*history, written, "print one JSON object per job, for programs");

  CLI::App* const set = add_job_command(app, "set", "Change a running job.", kSetExamples);
  add_job(*set, written)->required();
  value(*set, "--bandwidth", written.bandwidth, "RATE",
        "limit for disks and memory, per second: 100M (MiB),\n800mbit, none");
  value(*set, "--compress", written.compress, "HOW",
        fmt::format("compress what goes over a move's link: auto (as it needs\nit), {}", kEncodings));
  add_json(*set, written, "print one JSON object, for programs");

  CLI::App* const receive =
      app.add_subcommand("receive", "Receive a guest: the target's side of a move (internal).");
  receive->group("");
  receive->footer(kReceiveNotes);
  flag(*receive, "--probe", written.probe, "say in one line of JSON what this host can do");
  receive->add_option("--cleanup", written.cleanup, "remove what JOB has left on this host")
      ->option_text("JOB")
      ->excludes("--probe");
  receive->add_option("--stop", written.stop, "end the receiver of JOB, which keeps what can be resumed")
      ->option_text("JOB")
      ->excludes("--probe")
      ->excludes("--cleanup");
  flag(*receive, "--force", written.force,
       "with --cleanup: also the images of a handover (only when the guest runs on the source)");
  flag(*receive, "--keep", written.keep,
       "with --cleanup: all but the images of a handover (when the guest runs here)");

  try {
    std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    const auto used = app.get_subcommands();
    return ShowCommand{used.empty() ? app.help() : used.front()->help()};
  } catch (const CLI::CallForVersion& version) {
    return ShowCommand{std::string(version.what()) + "\n"};
  } catch (const CLI::ParseError& error) {
    return parse_error(error, app, arguments);
  }

  if (receive->parsed()) {
    if (written.probe) return ReceiveCommand{ReceiveCommand::Mode::Probe, "", {}};
    if (receive->count("--cleanup") > 0) {
      if (written.cleanup.empty()) return usage(" receive", "--cleanup: the job's name is empty");
      using mirror::KeptImages;
      const KeptImages kept = written.force  ? KeptImages::Remove
                              : written.keep ? KeptImages::Leave
                                             : KeptImages::Refuse;
      return ReceiveCommand{ReceiveCommand::Mode::Cleanup, written.cleanup, kept};
    }
    if (receive->count("--stop") > 0) {
      if (written.stop.empty()) return usage(" receive", "--stop: the job's name is empty");
      return ReceiveCommand{ReceiveCommand::Mode::Stop, written.stop, {}};
    }
    return ReceiveCommand{};
  }
  if (jobs->parsed()) return JobsCommand{written.json};
  if (history->parsed()) return HistoryCommand{written.json};
  for (const CLI::App* const one : {status, watch, cancel, resume, set}) {
    const bool all = one == resume && written.all;
    if (one->parsed() && written.job.empty() && !all) {
      return usage(" " + one->get_name(), one == resume ? "name a JOB, or --all" : "JOB is empty");
    }
  }
  if (status->parsed()) return StatusCommand{written.job, written.json};
  if (watch->parsed()) return WatchCommand{written.job, written.json};
  if (cancel->parsed()) return CancelCommand{written.job, written.json};
  if (resume->parsed()) {
    return ResumeCommand{written.job, written.json, written.verbose, written.detach};
  }
  if (relocate->parsed()) {
    auto command = relocate_command(relocation);
    if (!command) return usage(" relocate", command.error().message, command.error().hint);
    return std::move(*command);
  }
  if (set->parsed()) {
    SetCommand command{written.job, {}, {}, written.json};
    if (const Status taken = apply(written, command); !taken) {
      return usage(" set", taken.error().message, taken.error().hint);
    }
    return command;
  }
  if (evacuate->parsed()) {
    auto command = evacuate_command(evacuation);
    if (!command) return usage(" evacuate", command.error().message, command.error().hint);
    return std::move(*command);
  }
  if (index->parsed()) {
    auto command = index_command(indexing);
    if (!command) return usage(" index", command.error().message, command.error().hint);
    return std::move(*command);
  }
  if (rebalance->parsed()) {
    auto command = rebalance_command(rebalancing);
    if (!command) return usage(" rebalance", command.error().message, command.error().hint);
    return std::move(*command);
  }
  job::MoveOptions options = defaults;
  if (const Status applied = apply(written, options); !applied) {
    const std::string command = move->parsed() ? " move" : " check";
    return usage(command, applied.error().message, applied.error().hint);
  }
  if (move->parsed()) {
    return MoveCommand{options, written.dry_run, written.json, written.verbose, written.detach};
  }
  return CheckCommand{options, written.json, written.verbose};
}

}  // namespace drover::cli
