// SPDX-License-Identifier: Apache-2.0
#include "base/units.h"

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>

#include <fmt/format.h>

namespace drover {

std::string format_length(Length length) {
  static constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(length.bytes());
  std::size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", length.bytes())
                   : fmt::format("{:.1f} {}", value, kUnits.at(unit));
}

Result<Length> parse_length(const std::string& text) {
  const auto bad = [&](const char* why) {
    return fail(Code::InvalidArgument, "'" + text + "' is not a size: " + why,
                "give a number of bytes, or a number with K, M, G or T, as in 1.5G");
  };
  double number = 0;
  const char* const begin = text.data();
  const char* const end = begin + text.size();
  const auto [rest, error] = std::from_chars(begin, end, number, std::chars_format::fixed);
  if (error != std::errc() || !std::isfinite(number)) return bad("no number at its start");
  if (number < 0) return bad("it is negative");
  std::string suffix(rest, end);
  for (char& c : suffix) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  int shift = 0;
  if (!suffix.empty() && suffix != "B") {
    const std::size_t power = std::string("KMGTP").find(suffix.front());
    const std::string tail = suffix.substr(1);
    if (power == std::string::npos || (!tail.empty() && tail != "B" && tail != "IB")) {
      return bad("unknown unit");
    }
    shift = 10 * (static_cast<int>(power) + 1);
  }
  const double bytes = std::ldexp(number, shift);
  if (bytes >= 9.2e18) return bad("too large");
  return Length(static_cast<std::uint64_t>(std::llround(bytes)));
}

}  // namespace drover
