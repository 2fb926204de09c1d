// SPDX-License-Identifier: Apache-2.0
#include "cli/option_values.h"

namespace drover::cli {

Status take_parallel(const std::optional<std::string>& written, unsigned& into) {
  if (!written) return {};
  std::uint64_t count = 0;
  DROVER_TRY(take(
      "--parallel", *written,
      [](const auto& text) {
        return parse_count(text, {1, kMostParallel});
      },
      count));
  into = static_cast<unsigned>(count);
  return {};
}

Status take_bandwidth(const std::optional<std::string>& written, Length& into) {
  return written ? take("--bandwidth", *written, parse_rate, into) : Status();
}

Status take_source_uri(const std::optional<std::string>& written, std::string& into) {
  if (!written) return {};
  if (written->empty()) return fail(Code::InvalidArgument, "--source-uri: the value is empty");
  into = *written;
  return {};
}

}  // namespace drover::cli
