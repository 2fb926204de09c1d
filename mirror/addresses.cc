// SPDX-License-Identifier: Apache-2.0
#include "mirror/addresses.h"

#include <arpa/inet.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <set>

namespace drover::mirror {

namespace {

constexpr std::size_t kLongestName = 253;
constexpr std::size_t kLongestZone = 15;
constexpr std::string_view kHint =
    "give host names or IP addresses without a port, like 10.0.0.2,[fd00::2]";

bool is_name_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '.' || c == '_';
}

// Two spellings of one address have one key. Empty: it is no address.
std::string key_of(const std::string& address) {
  std::array<unsigned char, sizeof(in6_addr)> bytes{};
  if (address.find(':') != std::string::npos) {
    const std::string plain = address.substr(0, address.find('%'));
    const std::string zone = plain.size() == address.size() ? "" : address.substr(plain.size() + 1);
    const bool zone_is_good =
        plain.size() == address.size() || (!zone.empty() && zone.size() <= kLongestZone &&
                                           std::ranges::all_of(zone, is_name_character));
    if (!zone_is_good || ::inet_pton(AF_INET6, plain.c_str(), bytes.data()) != 1) return {};
    return "6" + std::string(bytes.begin(), bytes.end()) + zone;
  }
  if (address.empty() || address.size() > kLongestName || address.front() == '-' ||
      address.front() == '.' || address.find("..") != std::string::npos ||
      !std::ranges::all_of(address, is_name_character)) {
    return {};
  }
  // What consists of numbers would not be looked up as a name.
  if (address.find_first_not_of("0123456789.") == std::string::npos) {
    if (::inet_pton(AF_INET, address.c_str(), bytes.data()) != 1) return {};
    return "4" + std::string(bytes.begin(), bytes.begin() + sizeof(in_addr));
  }
  std::string name = "n";
  for (const char c : address)
    name += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (name.ends_with('.')) name.pop_back();
  return name;
}

}  // namespace

Result<std::vector<std::string>> parse_addresses(std::string_view text) {
  std::vector<std::string> addresses;
  while (true) {
    const std::size_t comma = text.find(',');
    std::string one(text.substr(0, comma));
    if (one.size() > 2 && one.front() == '[' && one.back() == ']' &&
        one.find(':') != std::string::npos) {
      one = one.substr(1, one.size() - 2);
    }
    addresses.push_back(std::move(one));
    if (comma == std::string_view::npos || addresses.size() > kMaxAddresses) break;
    text.remove_prefix(comma + 1);
  }
  DROVER_TRY(check_addresses(addresses));
  return addresses;
}

Status check_addresses(const std::vector<std::string>& addresses) {
  if (addresses.empty() || addresses.size() > kMaxAddresses) {
    return fail(Code::InvalidArgument,
                fmt::format("one to {} addresses are possible", kMaxAddresses), std::string(kHint));
  }
  std::set<std::string> seen;
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    const std::string key = key_of(addresses[i]);
    if (key.empty()) {
      return fail(Code::InvalidArgument, fmt::format("number {} is no address", i + 1),
                  std::string(kHint));
    }
    if (!seen.insert(key).second) {
      return fail(Code::InvalidArgument, fmt::format("number {} was named before", i + 1),
                  std::string(kHint));
    }
  }
  return {};
}

}  // namespace drover::mirror
