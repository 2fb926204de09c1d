// SPDX-License-Identifier: Apache-2.0
//
// The command line and the configuration file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "cli/command_line.h"
#include "cli/config.h"

namespace drover::cli {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr const char* kNoConfig = "/nonexistent/drover.toml";

Result<Command> parse(const std::vector<std::string>& arguments) {
  return parse_command_line(arguments, kNoConfig);
}

std::string error_of(const std::vector<std::string>& arguments) {
  const auto command = parse(arguments);
  if (command) return "no error";
  EXPECT_EQ(command.error().code, Code::InvalidArgument);
  return command.error().message;
}

std::string shown(const std::vector<std::string>& arguments) {
  const auto command = parse(arguments);
  if (!command) return command.error().to_string();
  const auto* show = std::get_if<ShowCommand>(&*command);
  return show == nullptr ? "" : show->text;
}

TEST(CommandLine, MoveWithoutOptionsIsTheDefaults) {
  const auto command = parse({"move", "web1", "hostb"});
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& move = std::get<MoveCommand>(*command);
  const job::MoveOptions defaults;
  EXPECT_EQ(move.options.guest, "web1");
  EXPECT_EQ(move.options.host, "hostb");
  EXPECT_TRUE(move.options.disk_paths.empty());
  EXPECT_EQ(move.options.source_uri, defaults.source_uri);
  EXPECT_EQ(move.options.target_uri, "");
  EXPECT_EQ(move.options.target_port, 0);
  EXPECT_EQ(move.options.bandwidth, Length(0));
  EXPECT_EQ(move.options.max_downtime, defaults.max_downtime);
  EXPECT_EQ(move.options.connections, defaults.connections);
  EXPECT_EQ(move.options.hold_barrier_file, "");
  EXPECT_TRUE(move.options.compression.automatic);
  EXPECT_TRUE(move.options.via.empty());
  EXPECT_FALSE(move.options.keep_source || move.dry_run || move.json || move.verbose);
  EXPECT_EQ(move.options.link_timeout, milliseconds(0));
  EXPECT_FALSE(move.options.keep_partial || move.detach);
}

TEST(CommandLine, MoveTakesEachOption) {
  // --disk takes one value each time: the arguments behind it stay arguments.
  const auto command = parse({"move",           "--disk",
                              "vda=/srv/a.raw", "web1",
                              "hostb",          "--disk=vdb=/srv/b.qcow2",
                              "--target-uri",   "qemu+tls://hostb/system",
                              "--source-uri",   "qemu:///session",
                              "--address",      "192.0.2.7",
                              "--port",         "49200",
                              "--bandwidth",    "1gbit",
                              "--compress",     "zstd:2",
                              "--max-downtime", "0.2s",
                              "--connections",  "4",
                              "--memory-channels", "3",
                              "--hold-barrier", "/run/hold",
                              "--link-timeout", "10min",
                              "--keep-partial", "--detach",
                              "--max-slowdown", "40ms",
                              "--verify",
                              "--keep-source",
                              "--dry-run",      "--json",
                              "--verbose"});
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& move = std::get<MoveCommand>(*command);
  EXPECT_EQ(move.options.disk_paths,
            (std::map<std::string, std::string>{{"vda", "/srv/a.raw"}, {"vdb", "/srv/b.qcow2"}}));
  EXPECT_EQ(move.options.target_uri, "qemu+tls://hostb/system");
  EXPECT_EQ(move.options.source_uri, "qemu:///session");
  EXPECT_EQ(move.options.target_address, "192.0.2.7");
  EXPECT_EQ(move.options.target_port, 49200);
  EXPECT_EQ(move.options.bandwidth, Length(125'000'000));
  EXPECT_EQ(mirror::compression_name(move.options.compression), "zstd:2");
  EXPECT_EQ(move.options.max_downtime, milliseconds(200));
  EXPECT_EQ(move.options.connections, 4U);
  EXPECT_EQ(move.options.memory_channels, 3U);
  EXPECT_EQ(move.options.hold_barrier_file, "/run/hold");
  EXPECT_TRUE(move.options.keep_source && move.dry_run && move.json && move.verbose);
  EXPECT_EQ(move.options.link_timeout, milliseconds(600'000));
  EXPECT_TRUE(move.options.keep_partial && move.detach);
  EXPECT_EQ(move.options.max_slowdown, milliseconds(40));
  EXPECT_TRUE(move.options.verify);
}

TEST(CommandLine, SeveralAddressesHaveAConnectionEach) {
  const auto options = [](std::vector<std::string> more) {
    std::vector<std::string> words{"move", "web1", "hostb"};
    words.insert(words.end(), more.begin(), more.end());
    return std::get<MoveCommand>(*parse(words)).options;
  };
  const auto two = options({"--via", "10.0.0.2,[fd00::2]"});
  EXPECT_EQ(two.via, (std::vector<std::string>{"10.0.0.2", "fd00::2"}));
  EXPECT_EQ(two.connections, 2U);
  EXPECT_EQ(options({"--via", "a,b,c"}).connections, 3U);
  EXPECT_EQ(options({"--via", "a,b,c", "--connections", "8"}).connections, 8U);
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--via", "a,b,c", "--connections", "2"}),
            "--connections: 2 can't be spread over 3 addresses");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--via", "a", "--address", "b"}),
            "--via and --address exclude each other");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--via", "a,,b"}), "--via: number 2 is no address");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--via", "a,A"}), "--via: number 2 was named before");
}

TEST(CommandLine, CheckTakesWhatThePlanDependsOn) {
  const auto command = parse({"check", "web1", "hostb", "--disk", "vda=/srv/a.raw", "--target-uri",
                              "test:///default", "--json"});
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& check = std::get<CheckCommand>(*command);
  EXPECT_EQ(check.options.disk_paths.at("vda"), "/srv/a.raw");
  EXPECT_EQ(check.options.target_uri, "test:///default");
  EXPECT_TRUE(check.json);
  EXPECT_EQ(error_of({"check", "web1", "hostb", "--keep-source"}),
            "unknown option '--keep-source'");
}

TEST(CommandLine, TheCommandsAboutJobs) {
  EXPECT_TRUE(std::get<JobsCommand>(*parse({"jobs", "--json"})).json);
  EXPECT_EQ(std::get<StatusCommand>(*parse({"status", "web1"})).job, "web1");
  EXPECT_EQ(std::get<WatchCommand>(*parse({"watch", "--json", "web1"})).job, "web1");
  EXPECT_EQ(std::get<CancelCommand>(*parse({"cancel", "web1-0a"})).job, "web1-0a");
  EXPECT_FALSE(std::get<HistoryCommand>(*parse({"history"})).json);
  const auto set = std::get<SetCommand>(*parse({"set", "web1", "--bandwidth", "800mbit"}));
  EXPECT_EQ(set.bandwidth, Length(100'000'000));
  EXPECT_FALSE(set.compression);
  const auto resume = std::get<ResumeCommand>(*parse({"resume", "web1", "--detach", "--verbose"}));
  EXPECT_EQ(resume.job, "web1");
  EXPECT_TRUE(resume.detach && resume.verbose && !resume.json);
  EXPECT_EQ(std::get<ResumeCommand>(*parse({"resume", "--all"})).job, "");
  EXPECT_EQ(error_of({"resume"}), "name a JOB, or --all");
  EXPECT_NE(error_of({"resume", "web1", "--all"}), "no error");
  EXPECT_EQ(error_of({"status"}), "JOB is required");
  EXPECT_EQ(error_of({"watch", ""}), "JOB is empty");
  EXPECT_EQ(error_of({"set", "web1"}), "say what to set: --bandwidth, --compress or both");
  EXPECT_EQ(error_of({"set", "web1", "--compress", "gzip"}), "--compress: there is no such compression");
  EXPECT_EQ(error_of({"set", "web1", "--bandwidth", "fast"}),
            "--bandwidth: 'fast' is not a rate: no number at its start");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--link-timeout", "10ms"}),
            "--link-timeout: '10ms' is out of range");
  const auto none = parse({"move", "web1", "hostb", "--link-timeout", "none"});
  EXPECT_EQ(std::get<MoveCommand>(*none).options.link_timeout, milliseconds(0));
}

TEST(CommandLine, ABadConfigurationFileKeepsNobodyFromTheJobs) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"jobs"}, {"cancel", "web1"}, {"resume", "--all"}}) {
    EXPECT_TRUE(parse_command_line(arguments, "/dev/null/no-directory").has_value());
  }
}

TEST(CommandLine, ReceiveHasThreeModes) {
  using Mode = ReceiveCommand::Mode;
  EXPECT_EQ(std::get<ReceiveCommand>(*parse({"receive"})).mode, Mode::Serve);
  EXPECT_EQ(std::get<ReceiveCommand>(*parse({"receive", "--probe"})).mode, Mode::Probe);
  const auto cleanup = std::get<ReceiveCommand>(*parse({"receive", "--cleanup", "web1-0a"}));
  EXPECT_EQ(cleanup.mode, Mode::Cleanup);
  EXPECT_EQ(cleanup.job, "web1-0a");
  EXPECT_NE(error_of({"receive", "--cleanup", "x", "--probe"}), "no error");
  EXPECT_NE(error_of({"receive", "--cleanup", ""}), "no error");
}

TEST(CommandLine, SaysWhatIsWrong) {
  EXPECT_EQ(error_of({}), "no command was given");
  EXPECT_EQ(error_of({"mvoe", "web1", "hostb"}), "unknown command 'mvoe'");
  EXPECT_EQ(error_of({"--frobnicate"}), "unknown option '--frobnicate'");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--frobnicate"}), "unknown option '--frobnicate'");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--frobnicate=3"}),
            "unknown option '--frobnicate=3'");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "hostc"}), "one argument too many: 'hostc'");
  EXPECT_EQ(error_of({"move", "web1"}), "HOST is required");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--disk", "vda"}),
            "--disk: 'vda' is not TARGET=PATH");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--disk", "vda=/a", "--disk", "vda=/b"}),
            "--disk: 'vda=/b' names a disk that was named before");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--bandwidth", "fast"}),
            "--bandwidth: 'fast' is not a rate: no number at its start");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--max-slowdown", "2min"}),
            "--max-slowdown: '2min' is out of range");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--max-downtime", "0ms"}),
            "--max-downtime: '0ms' is out of range");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--connections", "17"}),
            "--connections: '17' is out of range");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--memory-channels", "0"}),
            "--memory-channels: '0' is out of range");
  const auto left_to_drover = parse({"move", "web1", "hostb", "--memory-channels", "auto"});
  ASSERT_TRUE(left_to_drover.has_value());
  EXPECT_EQ(std::get<MoveCommand>(*left_to_drover).options.memory_channels, 0U);
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--port", "65536"}),
            "--port: '65536' is out of range");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--address", ""}), "--address: the value is empty");
  EXPECT_EQ(error_of({"move", "", "hostb"}), "VM is empty");
  EXPECT_EQ(error_of({"move", "web1", "--", "-oProxyCommand=reboot"}),
            "'-oProxyCommand=reboot' is not a host: it begins with a dash");
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"move", "web1", "hostb", "--bandwidth"},
        {"move", "web1", "hostb", "--port", "1", "--port", "2"},
        {"move", "web1", "hostb", "--json=false"},
        {"move", "web1", "hostb", "--disk"}}) {
    EXPECT_NE(error_of(arguments), "no error");
  }
}

TEST(CommandLine, RelocateTakesADirectoryAPoolOrPlaces) {
  const auto options = [](const std::vector<std::string>& arguments) {
    const auto command = parse(arguments);
    EXPECT_TRUE(command.has_value()) << command.error().to_string();
    return std::get<RelocateCommand>(*command).options;
  };
  EXPECT_EQ(options({"relocate", "web1", "/mnt/b"}).directory, "/mnt/b");
  EXPECT_EQ(options({"relocate", "web1", "fast"}).pool, "fast");
  const auto places = options({"relocate", "web1", "vda=/mnt/b", "vdb=/mnt/c/x=y.raw"}).places;
  EXPECT_EQ(places,
            (std::map<std::string, std::string>{{"vda", "/mnt/b"}, {"vdb", "/mnt/c/x=y.raw"}}));
  const auto all =
      parse({"relocate",      "web1",       "/mnt/b=c", "--disk",       "vdb",
             "--disk",        "vda",        "--format", "qcow2",        "--bandwidth",
             "100M",          "--parallel", "2",        "--source-uri", "qemu:///session",
             "--keep-source", "--dry-run",  "--detach", "--json",       "--verbose"});
  ASSERT_TRUE(all.has_value()) << all.error().to_string();
  const auto& command = std::get<RelocateCommand>(*all);
  EXPECT_EQ(command.options.directory, "/mnt/b=c") << "a path that begins with a slash is no place";
  EXPECT_EQ(command.options.disks, (std::vector<std::string>{"vda", "vdb"}));
  EXPECT_EQ(command.options.format, "qcow2");
  EXPECT_EQ(command.options.bandwidth, 100_MiB);
  EXPECT_EQ(command.options.parallel, 2U);
  EXPECT_EQ(command.options.uri, "qemu:///session");
  EXPECT_TRUE(command.options.keep_source && command.dry_run && command.detach && command.json &&
              command.verbose);
}

TEST(CommandLine, RelocateSaysWhatIsWrong) {
  EXPECT_THAT(error_of({"relocate", "web1"}), HasSubstr("DEST"));
  EXPECT_THAT(error_of({"relocate", "web1", "/a", "/b"}), HasSubstr("more than one DEST"));
  EXPECT_THAT(error_of({"relocate", "web1", "/a", "vda=/b"}), HasSubstr("exclude"));
  EXPECT_THAT(error_of({"relocate", "web1", "vda=/b", "--disk", "vda"}), HasSubstr("exclude"));
  EXPECT_THAT(error_of({"relocate", "web1", "vda=/b", "vda=/c"}), HasSubstr("named before"));
  EXPECT_THAT(error_of({"relocate", "web1", "=/b"}), HasSubstr("TARGET=PATH"));
  EXPECT_THAT(error_of({"relocate", "web1", "/a", "--format", "vmdk"}), HasSubstr("neither"));
  EXPECT_THAT(error_of({"relocate", "web1", "/a", "--parallel", "0"}), HasSubstr("--parallel"));
  EXPECT_THAT(error_of({"relocate", "web1", "/a", "--bandwidth", "5"}), HasSubstr("--bandwidth"));
  EXPECT_THAT(error_of({"relocate", "web1", "/a", "--disk", "vda", "--disk", "vda"}),
              HasSubstr("twice"));
}

TEST(CommandLine, ErrorsShowNoControlCharacters) {
  EXPECT_EQ(error_of({"\x1b[2J"}), "unknown command '\\x1b[2J'");
  EXPECT_EQ(error_of({"move", "web1", "hostb", "--x\x1b[2J"}), "unknown option '--x\\x1b[2J'");
}

TEST(CommandLine, HelpShowsPurposeDefaultsAndExamples) {
  const std::string main = shown({"--help"});
  EXPECT_THAT(main, HasSubstr("drover moves running virtual machines"));
  EXPECT_THAT(main, HasSubstr("\n  move "));
  EXPECT_THAT(main, HasSubstr("\n  check "));
  EXPECT_THAT(main, Not(HasSubstr("\n  receive ")));  // listed for nobody, but explained
  EXPECT_THAT(main, HasSubstr("`drover receive` is the target's side"));
  EXPECT_THAT(main, HasSubstr("Examples:\n"));

  const std::string move = shown({"move", "--help"});
  EXPECT_THAT(move, HasSubstr("Move a running guest to another host.\n"));
  EXPECT_THAT(move, HasSubstr("drover move [OPTION...] VM HOST\n"));
  EXPECT_THAT(move, Not(HasSubstr("\n\n\n")));
  EXPECT_THAT(move, HasSubstr("[default: qemu:///system]"));
  EXPECT_THAT(move, Not(HasSubstr("hold-barrier")));
  EXPECT_THAT(move, HasSubstr("Examples:\n"));
  EXPECT_THAT(shown({"check", "-h"}), HasSubstr("Examples:\n"));
  EXPECT_THAT(shown({"receive", "--help"}), HasSubstr("--probe"));
  for (const char* command : {"jobs", "status", "watch", "cancel", "resume", "history", "set"}) {
    EXPECT_THAT(main, HasSubstr(std::string("\n  ") + command + " "));
    EXPECT_THAT(shown({command, "--help"}), HasSubstr("Examples:\n"));
  }
  EXPECT_THAT(shown({"watch", "--help"}), HasSubstr("drover watch [OPTION...] JOB\n"));
  for (const std::string& text : {main, move, shown({"check", "--help"}),
                                  shown({"resume", "--help"}), shown({"set", "--help"})}) {
    std::size_t start = 0;
    while (start < text.size()) {
      const std::size_t end = text.find('\n', start);
      EXPECT_LE(end - start, 100U) << text.substr(start, end - start);
      start = end + 1;
    }
  }
}

TEST(CommandLine, VersionIsOneLine) {
  EXPECT_EQ(shown({"--version"}), "drover " DROVER_VERSION "\n");
}

// ---- the configuration file ---------------------------------------------------------------------

std::string config_error(const std::string& text) {
  job::MoveOptions options;
  const Status status = read_config({"drover.toml", text}, options);
  if (status) return "no error";
  EXPECT_EQ(status.error().code, Code::InvalidArgument);
  return status.error().message;
}

TEST(Config, SetsDefaults) {
  job::MoveOptions options;
  const Status status = read_config({"drover.toml",
                                     "# this machine\n"
                                     "bandwidth = \"400M\"\n"
                                     "compress = \"lz4\"\n"
                                     "connections = 4\n"
                                     "keep-partial = true\n"
                                     "keep-source = true\n"
                                     "link-timeout = \"3min\"\n"
                                     "max-downtime = \"0.3s\"\n"
                                     "max-slowdown = \"50ms\"\n"
                                     "verify = true\n"
                                     "port = 49200\n"
                                     "source-uri = \"qemu+unix:///system\"\n"},
                                    options);
  ASSERT_TRUE(status.has_value()) << status.error().to_string();
  EXPECT_EQ(options.bandwidth, 400_MiB);
  EXPECT_EQ(mirror::compression_name(options.compression), "lz4");
  EXPECT_EQ(options.connections, 4U);
  EXPECT_TRUE(options.keep_source);
  EXPECT_EQ(options.max_downtime, milliseconds(300));
  EXPECT_EQ(options.target_port, 49200);
  EXPECT_EQ(options.source_uri, "qemu+unix:///system");
  EXPECT_TRUE(options.keep_partial);
  EXPECT_EQ(options.max_slowdown, milliseconds(50));
  EXPECT_TRUE(options.verify);
  EXPECT_EQ(options.link_timeout, milliseconds(180'000));
}

TEST(Config, SaysFileLineAndKey) {
  EXPECT_EQ(config_error("connections = 4\nbandwith = \"1M\"\n"),
            "drover.toml, line 2: unknown key 'bandwith'");
  EXPECT_EQ(config_error("\n\nbandwidth = \"quick\"\n"),
            "drover.toml, line 3: bandwidth: 'quick' is not a rate: no number at its start");
  EXPECT_EQ(config_error("compress = \"zstd:9\"\n"), "drover.toml, line 1: compress: there is no such compression");
  EXPECT_EQ(config_error("bandwidth = 100\n"),
            "drover.toml, line 1: bandwidth: must be a text in quotes");
  EXPECT_EQ(config_error("connections = 0\n"),
            "drover.toml, line 1: connections: must be a number from 1 to 16");
  EXPECT_EQ(config_error("connections = \"4\"\n"),
            "drover.toml, line 1: connections: must be a number from 1 to 16");
  EXPECT_EQ(config_error("port = -1\n"),
            "drover.toml, line 1: port: must be a number from 0 to 65535");
  EXPECT_EQ(config_error("keep-source = 1\n"),
            "drover.toml, line 1: keep-source: must be true or false");
  EXPECT_EQ(config_error("max-downtime = \"20\"\n"),
            "drover.toml, line 1: max-downtime: '20' has no unit");
  EXPECT_THAT(config_error("connections = 4\nport = = 3\n"), HasSubstr("drover.toml, line 2: "));
  EXPECT_THAT(config_error("[move]\nport = 1\n"), HasSubstr("line 1: unknown key 'move'"));
}

TEST(Config, ChangesNothingWhenItIsBad) {
  job::MoveOptions options;
  ASSERT_FALSE(read_config({"x", "connections = 9\nport = \"a\"\n"}, options).has_value());
  EXPECT_EQ(options.connections, job::MoveOptions().connections);
}

class ConfigFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "drover-config-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
    path_ = directory_ + "/drover.toml";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  void write(const std::string& text) { std::ofstream(path_) << text; }

  std::string directory_;
  std::string path_;
};

TEST_F(ConfigFileTest, TheCommandLineGoesBeforeTheFile) {
  write("connections = 4\nmax-downtime = \"1s\"\n");
  const auto command = parse_command_line({"move", "web1", "hostb", "--connections", "8"}, path_);
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& move = std::get<MoveCommand>(*command);
  EXPECT_EQ(move.options.connections, 8U);
  EXPECT_EQ(move.options.max_downtime, milliseconds(1000));
}

TEST_F(ConfigFileTest, HelpShowsTheDefaultsThatHold) {
  write("max-downtime = \"1s\"\nbandwidth = \"10M\"\n");
  const auto command = parse_command_line({"move", "--help", "--config", path_}, kNoConfig);
  ASSERT_TRUE(command.has_value());
  const std::string text = std::get<ShowCommand>(*command).text;
  EXPECT_THAT(text, HasSubstr("[default: 1s]"));
  EXPECT_THAT(text, HasSubstr("[default: 10M]"));
  EXPECT_THAT(text, HasSubstr("[default: " + path_ + "]"));
}

TEST_F(ConfigFileTest, ABadFileStopsAMoveButNotTheHelp) {
  write("nonsense\n");
  EXPECT_FALSE(parse_command_line({"move", "web1", "hostb"}, path_).has_value());
  EXPECT_FALSE(
      parse_command_line({"move", "web1", "hostb", "--config=" + path_}, kNoConfig).has_value());
  EXPECT_TRUE(parse_command_line({"move", "--help"}, path_).has_value());
  EXPECT_TRUE(
      parse_command_line({"receive"}, path_).has_value());  // the target's file is not asked
}

TEST_F(ConfigFileTest, OnlyTheUsualFileMayBeMissing) {
  EXPECT_TRUE(parse_command_line({"move", "web1", "hostb"}, path_).has_value());
  const auto named = parse_command_line({"move", "web1", "hostb", "--config", path_}, kNoConfig);
  ASSERT_FALSE(named.has_value());
  EXPECT_EQ(named.error().message, "reading " + path_ + ": No such file or directory");
  EXPECT_FALSE(parse_command_line({"move", "web1", "hostb", "--config", directory_}, kNoConfig));
}

}  // namespace
}  // namespace drover::cli
