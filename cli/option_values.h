// SPDX-License-Identifier: Apache-2.0
//
// Reading the values of options, and those that several commands have, read the same everywhere.
// Errors: InvalidArgument; the message names the option. Pure, any thread.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "base/result.h"
#include "base/units.h"
#include "cli/values.h"

namespace drover::cli {

// `text` as `parse` reads it, to `into`.
template <class T, class Parse>
Status take(const char* option, const T& text, Parse parse, auto& into) {
  auto parsed = parse(text);
  if (!parsed) {
    return fail(Code::InvalidArgument, std::string(option) + ": " + parsed.error().message,
                parsed.error().hint);
  }
  into = std::move(*parsed);
  return {};
}

// How many of something are copied at once.
inline constexpr unsigned kMostParallel = 64;

// What was not written stays as it is in `into`.
Status take_parallel(const std::optional<std::string>& written, unsigned& into);
Status take_bandwidth(const std::optional<std::string>& written, Length& into);
Status take_source_uri(const std::optional<std::string>& written, std::string& into);

}  // namespace drover::cli
