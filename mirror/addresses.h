// SPDX-License-Identifier: Apache-2.0
//
// The addresses of a target that has several (`--via`): host names and IP addresses, without ports.
//
//   parse_addresses("10.0.0.2,[fd00::2]")   -> {"10.0.0.2", "fd00::2"}
//
// Pure; any thread. Errors: InvalidArgument.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace drover::mirror {

inline constexpr std::size_t kMaxAddresses = 8;

// Separated by commas; an IPv6 address may stand in brackets.
Result<std::vector<std::string>> parse_addresses(std::string_view text);
// One to kMaxAddresses, none twice.
Status check_addresses(const std::vector<std::string>& addresses);

}  // namespace drover::mirror
