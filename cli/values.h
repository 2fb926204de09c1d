// SPDX-License-Identifier: Apache-2.0
//
// Rates, times and the like as people write them and read them. Pure functions, any thread.
//
// What is read is read strictly: a value that could mean two things is refused, with an example of
// what to write, because a limit that is wrong by a factor of eight or a thousand is worse than
// none.
//
//   parse_rate("100M")   -> 100 MiB per second       parse_time("300ms") -> 300 ms
//   parse_rate("1gbit")  -> 125,000,000 bytes/s      parse_time("0.5s")  -> 500 ms
//
// Errors: InvalidArgument; the message quotes the value, the hint shows a good one.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "base/result.h"
#include "base/units.h"

namespace drover::cli {

// Lower limits are refused as a mistake: virsh takes MiB/s without a suffix, drover bytes.
inline constexpr Length kSmallestRate = 64_KiB;
inline constexpr std::chrono::milliseconds kLongestTime{3'600'000};

// Bytes per second. K, M, G, T count by 1024, as drover's sizes do; "B" or "iB" and "/s" may
// follow. With "bit", k, m, g, t count by 1000, as networks do. "none" is no limit: zero.
Result<Length> parse_rate(std::string_view text);

// "300ms", "0.5s", "2min": a unit is needed, and the result must be a whole number of milliseconds.
Result<std::chrono::milliseconds> parse_time(std::string_view text);

// "5%", "0.5%": a share, 0 to 1. The sign is needed.
Result<double> parse_percent(std::string_view text);

struct Range {
  std::uint64_t least;
  std::uint64_t most;
};
// Digits only.
Result<std::uint64_t> parse_count(std::string_view text, Range range);

// "3" or "auto", which is 0 (job::MoveOptions::memory_channels).
Result<unsigned> parse_memory_channels(std::string_view text);
std::string format_memory_channels(unsigned channels);

// "vda=/srv/a.raw" -> {"vda", "/srv/a.raw"}; the path must be absolute.
Result<std::pair<std::string, std::string>> parse_disk(std::string_view text);

// An SSH destination as ssh takes it; refuses what ssh would take for an option.
Status check_host(std::string_view host);

std::string format_rate(Length per_second);               // "100.0 MiB/s"
std::string format_rate_setting(Length per_second);       // as parse_rate reads it: "100M", "none"
std::string format_time(std::chrono::milliseconds time);  // as parse_time reads it: "500ms", "2s"
std::string format_percent(double share);                 // as parse_percent reads it: "5%"
std::string format_clock(std::chrono::seconds time);      // "0:25", "1:02:03"
std::string format_span(std::chrono::milliseconds time);  // "61 ms", "6.2 s", "1:02"
std::string format_count(std::uint64_t count);            // "1,234,567"
std::string plural(std::uint64_t count, std::string_view noun);  // "1 disk", "2 disks", "no disks"

}  // namespace drover::cli
