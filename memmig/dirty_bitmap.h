// SPDX-License-Identifier: Apache-2.0
//
// QEMU's dirty bitmaps as drover uses them: how they are named, how fine they are, how one is read.
// Which bitmap says what is in memmig/hypervisor.h (begin_bitmaps()). Internal to memmig.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace drover::memmig {

// "drover-vda-7"
std::string bitmap_name(std::string_view disk, std::uint64_t generation);

struct BitmapName {
  std::string disk;
  std::uint64_t generation = 0;
};
// None: not a name of drover's.
std::optional<BitmapName> parse_bitmap_name(std::string_view name);

// A bit stands for 4 KiB as long as that makes the bitmap no larger than kFineBitmap (a disk of
// 256 GiB); beyond, for 64 KiB or what keeps it within kCoarseBitmap (64 TiB: 128 KiB, 64 MiB).
// QEMU holds as many per disk as there are generations, usually one or two.
inline constexpr Length kFineBitmap = 8_MiB;
inline constexpr Length kCoarseBitmap = 64_MiB;
Length bitmap_granularity(Length disk_size);

// Extents in ascending order, those that touch joined, in bounded memory: when there are more than
// kMaxExtents, the nearest are joined across what lies between them (which is then copied again for
// nothing).
class ExtentUnion {
 public:
  static constexpr std::size_t kMaxExtents = std::size_t{1} << 20;
  explicit ExtentUnion(std::size_t max_extents = kMaxExtents) : max_(max_extents) {}

  // Begins at or behind the end of the one before.
  void add(const Extent& extent);
  std::vector<Extent> take() { return std::move(extents_); }

 private:
  void coarsen();

  std::size_t max_;
  std::uint64_t gap_ = 0;  // extents no farther apart are joined
  std::vector<Extent> extents_;
};

// What is set in `bitmap`, which an NBD server offers with the export `export_name` on
// `unix_socket`. Unreachable when nothing answers, NotFound without that bitmap.
Result<std::vector<Extent>> read_bitmap_export(const std::string& unix_socket,
                                               const std::string& export_name,
                                               const std::string& bitmap);

}  // namespace drover::memmig
