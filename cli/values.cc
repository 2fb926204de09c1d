// SPDX-License-Identifier: Apache-2.0
#include "cli/values.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <optional>

#include "cli/text.h"
#include "job/memory_channels.h"

namespace drover::cli {

namespace {

constexpr std::string_view kRateHint =
    "write it like 100M (MiB per second), 1.5G or 800mbit (bits), or none for no limit";
constexpr std::string_view kTimeHint = "write it like 300ms, 0.5s or 2min";

std::string quoted(std::string_view text) { return fmt::format("'{}'", printable(text)); }

tl::unexpected<Error> refuse(std::string_view text, std::string_view problem,
                             std::string_view hint) {
  return fail(Code::InvalidArgument, quoted(text) + " " + std::string(problem), std::string(hint));
}

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

struct Number {
  double value;
  std::string_view rest;  // what follows it
};

// A plain decimal number: no sign, no exponent, no hexadecimal, no "inf".
std::optional<Number> leading_number(std::string_view text) {
  if (text.empty() || std::isdigit(static_cast<unsigned char>(text.front())) == 0) return {};
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value, std::chars_format::fixed);
  if (error != std::errc() || !std::isfinite(value)) return {};
  if (*(rest - 1) == '.') return {};  // "5." is a slip of the finger
  return Number{value, std::string_view(rest, static_cast<std::size_t>(end - rest))};
}

}  // namespace

Result<Length> parse_rate(std::string_view text) {
  if (lower(text) == "none") return Length(0);
  const auto number = leading_number(text);
  if (!number) return refuse(text, "is not a rate: no number at its start", kRateHint);
  std::string_view unit = number->rest;
  if (unit.ends_with("/s")) unit.remove_suffix(2);

  static constexpr std::string_view kPrefixes = "kmgt";
  const std::string small = lower(unit);
  double factor = 1;
  if (small.ends_with("bit")) {
    const std::string prefix = small.substr(0, small.size() - 3);
    const std::size_t power = prefix.size() == 1 ? kPrefixes.find(prefix.front()) : 0;
    if (prefix.size() > 1 || power == std::string_view::npos) {
      return refuse(text, "is not a rate: unknown unit", kRateHint);
    }
    if (!prefix.empty()) factor = std::pow(1000.0, static_cast<double>(power + 1));
    factor /= 8;
  } else if (!unit.empty()) {
    if (unit.back() == 'b') {
      return refuse(text, "is not clear: bits or bytes?",
                    "write M for MiB per second, mbit for megabits per second");
    }
    if (unit != "B") {
      const std::size_t power = kPrefixes.find(small.front());
      const std::string_view tail = unit.substr(1);
      if (power == std::string_view::npos || (!tail.empty() && tail != "B" && tail != "iB")) {
        return refuse(text, "is not a rate: unknown unit", kRateHint);
      }
      factor = std::pow(1024.0, static_cast<double>(power + 1));
    }
  }
  const double rate = std::round(number->value * factor);
  if (rate == 0) {
    return refuse(text, "would let nothing through", "none means no limit");
  }
  if (rate < static_cast<double>(kSmallestRate.bytes())) {
    return refuse(
        text,
        fmt::format("is less than the smallest rate, {} per second", format_length(kSmallestRate)),
        kRateHint);
  }
  if (rate > 1e15) return refuse(text, "is more than any link carries", kRateHint);
  return Length(static_cast<std::uint64_t>(rate));
}

Result<std::chrono::milliseconds> parse_time(std::string_view text) {
  const auto number = leading_number(text);
  if (!number) return refuse(text, "is not a time: no number at its start", kTimeHint);
  double factor = 0;
  if (number->rest == "ms") {
    factor = 1;
  } else if (number->rest == "s") {
    factor = 1000;
  } else if (number->rest == "min") {
    factor = 60'000;
  } else if (number->rest.empty()) {
    return refuse(text, "has no unit", kTimeHint);
  } else {
    return refuse(text, "is not a time: unknown unit", kTimeHint);
  }
  const double time = number->value * factor;
  if (time > static_cast<double>(kLongestTime.count())) {
    return refuse(text, "is longer than an hour", kTimeHint);
  }
  const double whole = std::round(time);
  if (std::abs(time - whole) > 1e-6) {
    return refuse(text, "is not a whole number of milliseconds", kTimeHint);
  }
  return std::chrono::milliseconds(static_cast<std::int64_t>(whole));
}

Result<double> parse_percent(std::string_view text) {
  static constexpr std::string_view kHint = "write it like 5% or 0.5%";
  const auto number = leading_number(text);
  if (!number || number->rest != "%") return refuse(text, "is not a percentage", kHint);
  if (number->value > 100) return refuse(text, "is more than all of it", kHint);
  return number->value / 100;
}

Result<std::uint64_t> parse_count(std::string_view text, Range range) {
  const std::string hint = fmt::format("give a number from {} to {}", range.least, range.most);
  std::uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (text.empty() || error == std::errc::invalid_argument || rest != end) {
    return refuse(text, "is not a number", hint);
  }
  if (error != std::errc() || value < range.least || value > range.most) {
    return refuse(text, "is out of range", hint);
  }
  return value;
}

Result<unsigned> parse_memory_channels(std::string_view text) {
  if (text == "auto") return 0U;
  DROVER_ASSIGN(const std::uint64_t count, parse_count(text, {1, job::kMostMemoryChannels}));
  return static_cast<unsigned>(count);
}

std::string format_memory_channels(unsigned channels) {
  return channels == 0 ? "auto" : std::to_string(channels);
}

Result<std::pair<std::string, std::string>> parse_disk(std::string_view text) {
  static constexpr std::string_view kHint =
      "write the disk's name in the guest and an absolute path on the target, as in "
      "vda=/srv/images/web1.raw";
  const std::size_t equals = text.find('=');
  if (equals == std::string_view::npos) return refuse(text, "is not TARGET=PATH", kHint);
  const std::string_view disk = text.substr(0, equals);
  const std::string_view path = text.substr(equals + 1);
  if (disk.empty() || path.empty()) return refuse(text, "is not TARGET=PATH", kHint);
  if (disk.find('/') != std::string_view::npos) {
    return refuse(disk, "is not the name of a disk in the guest", kHint);
  }
  if (path.front() != '/') return refuse(path, "is not an absolute path", kHint);
  if (path.back() == '/') return refuse(path, "is a directory, not a file", kHint);
  if (path.find('\0') != std::string_view::npos) return refuse(path, "is not a path", kHint);
  return std::pair(std::string(disk), std::string(path));
}

Status check_host(std::string_view host) {
  static constexpr std::string_view kHint =
      "HOST is what ssh takes: a name, an address, USER@HOST or a Host of ~/.ssh/config";
  if (host.empty()) return fail(Code::InvalidArgument, "HOST is empty", std::string(kHint));
  if (host.front() == '-') return refuse(host, "is not a host: it begins with a dash", kHint);
  std::string_view rest = host;
  static constexpr std::string_view kScheme = "ssh://";  // ssh takes this one URI
  if (rest.starts_with(kScheme)) {
    rest.remove_prefix(kScheme.size());
  } else if (rest.find("://") != std::string_view::npos) {
    return refuse(host, "is a URI, not a host", "give the libvirt URI with --target-uri");
  }
  for (const char c : rest) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte <= ' ' || byte == 0x7f || c == '/') {
      return refuse(host, "is not a host: it contains a space, a slash or a control character",
                    kHint);
    }
  }
  return {};
}

std::string format_rate(Length per_second) { return format_length(per_second) + "/s"; }

std::string format_rate_setting(Length per_second) {
  if (per_second == Length(0)) return "none";
  std::uint64_t value = per_second.bytes();
  std::size_t power = 0;
  while (power < 4 && value % 1024 == 0) {
    value /= 1024;
    ++power;
  }
  static constexpr std::string_view kSuffixes = " KMGT";
  return power == 0 ? std::to_string(value) : std::to_string(value) + kSuffixes[power];
}

std::string format_time(std::chrono::milliseconds time) {
  const auto count = time.count();
  return count != 0 && count % 1000 == 0 ? fmt::format("{}s", count / 1000)
                                         : fmt::format("{}ms", count);
}

std::string format_percent(double share) { return fmt::format("{:g}%", share * 100); }

std::string format_clock(std::chrono::seconds time) {
  const auto seconds = std::max<std::chrono::seconds::rep>(time.count(), 0);
  if (seconds < 3600) return fmt::format("{}:{:02}", seconds / 60, seconds % 60);
  return fmt::format("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
}

std::string format_span(std::chrono::milliseconds time) {
  if (time < std::chrono::seconds(1)) return fmt::format("{} ms", time.count());
  if (time < std::chrono::seconds(60)) {
    // Rounded down, so that it never says 60.0 s.
    const auto tenths = time.count() / 100;
    return fmt::format("{}.{} s", tenths / 10, tenths % 10);
  }
  return format_clock(std::chrono::duration_cast<std::chrono::seconds>(time));
}

std::string format_count(std::uint64_t count) {
  return fmt::format("{}", fmt::group_digits(count));
}

std::string plural(std::uint64_t count, std::string_view noun) {
  if (count == 1) return fmt::format("1 {}", noun);
  return fmt::format("{} {}s", count == 0 ? "no" : format_count(count), noun);
}

}  // namespace drover::cli
