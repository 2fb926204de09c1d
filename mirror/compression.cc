// SPDX-License-Identifier: Apache-2.0
#include "mirror/compression.h"

#include <fmt/format.h>

namespace drover::mirror {

Result<Compression> parse_compression(std::string_view text) {
  constexpr std::string_view kZstd = "zstd";
  if (text == "auto") return Compression{};
  if (text == "none") return Compression{.automatic = false};
  if (text == "lz4") return Compression{.automatic = false, .encoding = Encoding::Lz4};
  Compression zstd{.automatic = false, .encoding = Encoding::Zstd, .level = kDefaultZstdLevel};
  if (text == kZstd) return zstd;
  if (text.size() == kZstd.size() + 2 && text.starts_with(kZstd) && text[kZstd.size()] == ':') {
    const int level = text.back() - '0';
    if (level >= 1 && level <= kHighestZstdLevel) {
      zstd.level = static_cast<std::int8_t>(level);
      return zstd;
    }
  }
  return fail(
      Code::InvalidArgument, "there is no such compression",
      fmt::format("it is auto, none, lz4, zstd or zstd:LEVEL (1 to {})", kHighestZstdLevel));
}

std::string encoding_name(const EncodeOptions& options) {
  switch (options.encoding) {
    case Encoding::Plain: return "none";
    case Encoding::Lz4: return "lz4";
    case Encoding::Zstd: return fmt::format("zstd:{}", options.level);
  }
  return "none";
}

std::string compression_name(const Compression& compression) {
  if (compression.automatic) return "auto";
  return encoding_name({compression.encoding, compression.level});
}

}  // namespace drover::mirror
