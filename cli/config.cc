// SPDX-License-Identifier: Apache-2.0
#include "cli/config.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <functional>

#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#include <toml++/toml.h>

#include "base/unique_fd.h"
#include "cli/text.h"
#include "cli/values.h"
#include "job/memory_channels.h"

namespace drover::cli {

namespace {

using std::chrono::milliseconds;

constexpr std::size_t kLargestFile = std::size_t{1} << 20;
constexpr milliseconds kLeastDowntime{1};
constexpr milliseconds kLeastLinkTimeout{1000};
constexpr milliseconds kLeastSlowdown{10};
constexpr milliseconds kLongestSlowdown{60'000};

Status expect(bool condition, const char* problem, const char* hint) {
  if (condition) return {};
  return fail(Code::InvalidArgument, problem, hint);
}

Result<std::string> text_of(const toml::node& node, const char* example) {
  const auto* value = node.as_string();
  DROVER_TRY(expect(value != nullptr, "must be a text in quotes", example));
  return value->get();
}

Result<std::uint64_t> number_of(const toml::node& node, Range range) {
  const auto* value = node.as_integer();
  const bool good = value != nullptr && value->get() >= 0 &&
                    static_cast<std::uint64_t>(value->get()) >= range.least &&
                    static_cast<std::uint64_t>(value->get()) <= range.most;
  DROVER_TRY(expect(
      good, fmt::format("must be a number from {} to {}", range.least, range.most).c_str(), ""));
  return static_cast<std::uint64_t>(value->get());
}

Status take_bool(const toml::node& node, bool& into) {
  const auto* value = node.as_boolean();
  DROVER_TRY(expect(value != nullptr, "must be true or false", ""));
  into = value->get();
  return {};
}

struct Key {
  std::string_view name;
  Status (*set)(const toml::node&, job::MoveOptions&);
};

constexpr auto kKeys = std::to_array<Key>({
    {"bandwidth",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const std::string text, text_of(node, "bandwidth = \"100M\""));
       DROVER_ASSIGN(options.bandwidth, parse_rate(text));
       return {};
     }},
    {"compress",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const std::string text, text_of(node, "compress = \"zstd:1\""));
       DROVER_ASSIGN(options.compression, mirror::parse_compression(text));
       return {};
     }},
    {"connections",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const auto count, number_of(node, {1, kMostConnections}));
       options.connections = static_cast<unsigned>(count);
       return {};
     }},
    {"keep-partial",
     [](const toml::node& node, job::MoveOptions& options) {
       return take_bool(node, options.keep_partial);
     }},
    {"keep-source", [](const toml::node& node,
                       job::MoveOptions& options) { return take_bool(node, options.keep_source); }},
    {"link-timeout",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const std::string text, text_of(node, "link-timeout = \"10min\""));
       DROVER_ASSIGN(options.link_timeout, parse_link_timeout(text));
       return {};
     }},
    {"max-downtime",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const std::string text, text_of(node, "max-downtime = \"300ms\""));
       DROVER_ASSIGN(options.max_downtime, parse_max_downtime(text));
       return {};
     }},
    {"max-slowdown",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const std::string text, text_of(node, "max-slowdown = \"100ms\""));
       DROVER_ASSIGN(options.max_slowdown, parse_max_slowdown(text));
       return {};
     }},
    {"memory-channels",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const auto count, number_of(node, {1, job::kMostMemoryChannels}));
       options.memory_channels = static_cast<unsigned>(count);
       return {};
     }},
    {"port",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(const auto port, number_of(node, {0, kMostPort}));
       options.target_port = static_cast<std::uint16_t>(port);
       return {};
     }},
    {"source-uri",
     [](const toml::node& node, job::MoveOptions& options) -> Status {
       DROVER_ASSIGN(options.source_uri, text_of(node, "source-uri = \"qemu:///system\""));
       return {};
     }},
    {"use-index", [](const toml::node& node,
                     job::MoveOptions& options) { return take_bool(node, options.use_index); }},
    {"verify", [](const toml::node& node,
                  job::MoveOptions& options) { return take_bool(node, options.verify); }},
});

std::string known_keys() {
  std::string out;
  for (const Key& key : kKeys) out += (out.empty() ? "" : ", ") + std::string(key.name);
  return out;
}

tl::unexpected<Error> bad(const ConfigText& config, toml::source_index line,
                          const std::string& what, const std::string& hint) {
  return fail(Code::InvalidArgument, fmt::format("{}, line {}: {}", config.name, line, what), hint);
}

Result<milliseconds> within(std::string_view text, milliseconds least, milliseconds most) {
  DROVER_ASSIGN(const milliseconds time, parse_time(text));
  if (time < least || time > most) {
    return fail(Code::InvalidArgument, fmt::format("'{}' is out of range", printable(text)),
                fmt::format("give a time from {} to {}", format_time(least), format_time(most)));
  }
  return time;
}

}  // namespace

Result<milliseconds> parse_max_downtime(std::string_view text) {
  return within(text, kLeastDowntime, kLongestTime);
}

Result<milliseconds> parse_max_slowdown(std::string_view text) {
  return within(text, kLeastSlowdown, kLongestSlowdown);
}

Result<milliseconds> parse_link_timeout(std::string_view text) {
  if (text == "none") return milliseconds(0);
  return within(text, kLeastLinkTimeout, kLongestTime);
}

std::string format_link_timeout(milliseconds time) {
  return time == milliseconds(0) ? "none" : format_time(time);
}

std::vector<std::string_view> config_keys() {
  std::vector<std::string_view> out;
  out.reserve(kKeys.size());
  for (const Key& key : kKeys) out.push_back(key.name);
  return out;
}

Status read_config(const ConfigText& config, job::MoveOptions& options) {
  const toml::parse_result parsed = toml::parse(std::string_view(config.text));
  if (!parsed) {
    return bad(config, parsed.error().source().begin.line, printable(parsed.error().description()),
               "the file is TOML: key = value");
  }
  job::MoveOptions result = options;
  for (const auto& [name, node] : parsed.table()) {
    const toml::source_index line = name.source().begin.line;
    const Key* known = nullptr;
    for (const Key& key : kKeys) {
      if (key.name == name.str()) known = &key;
    }
    if (known == nullptr) {
      return bad(config, line, "unknown key '" + printable(name.str()) + "'",
                 "the keys are " + known_keys());
    }
    if (const Status set = known->set(node, result); !set) {
      return bad(config, line, std::string(known->name) + ": " + set.error().message,
                 set.error().hint);
    }
  }
  options = result;
  return {};
}

Status load_config(const ConfigFile& file, job::MoveOptions& options) {
  const std::string doing = "reading " + file.path;
  const UniqueFd fd(::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) {
    if (errno == ENOENT && !file.required) return {};
    return fail_errno(errno, doing);
  }
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return fail_errno(errno, doing);
  if (!S_ISREG(status.st_mode)) return fail(Code::InvalidArgument, doing + ": not a file");
  std::string text;
  std::array<char, 4096> buffer{};
  for (;;) {
    const ssize_t got = ::read(fd.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, doing);
    if (got == 0) break;
    text.append(buffer.data(), static_cast<std::size_t>(got));
    if (text.size() > kLargestFile) return fail(Code::InvalidArgument, doing + ": too large");
  }
  return read_config({file.path, text}, options);
}

}  // namespace drover::cli
