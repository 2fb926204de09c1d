// SPDX-License-Identifier: Apache-2.0
//
// What a user says about compression on the link, and its names: "auto", "none", "lz4", "zstd" or
// "zstd:LEVEL".
//
//   DROVER_ASSIGN(const Compression wanted, parse_compression("zstd:3"));
//   compression_name(wanted);                                      // "zstd:3"
//
// Pure; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"
#include "mirror/frame.h"

namespace drover::mirror {

inline constexpr int kDefaultZstdLevel = 1;
// What a lane's compression needs grows with the level: 3.5 MiB here, and there may be 16 lanes.
inline constexpr int kHighestZstdLevel = 6;

// Fits a lock-free atomic.
struct alignas(4) Compression {
  bool automatic = true;  // as the link needs it (mirror/compression_policy.h), else:
  Encoding encoding = Encoding::Plain;
  std::int8_t level = 0;  // Zstd: 1 to kHighestZstdLevel
  bool operator==(const Compression&) const = default;
};

// InvalidArgument for anything else.
Result<Compression> parse_compression(std::string_view text);
std::string compression_name(const Compression& compression);
std::string encoding_name(const EncodeOptions& options);  // "none", "lz4", "zstd:1"

}  // namespace drover::mirror
