// SPDX-License-Identifier: Apache-2.0
//
// Positions and sizes on a disk, told apart by type: an Offset is a position in bytes from the
// disk's start, a Length a number of bytes. Offset + Length is an Offset, Offset - Offset a Length.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <string>

#include "base/result.h"

namespace drover {

class Length {
 public:
  constexpr Length() = default;
  constexpr explicit Length(std::uint64_t bytes) : bytes_(bytes) {}
  [[nodiscard]] constexpr std::uint64_t bytes() const { return bytes_; }
  constexpr auto operator<=>(const Length&) const = default;
  constexpr Length& operator+=(Length other) { bytes_ += other.bytes_; return *this; }
  constexpr Length& operator-=(Length other) { bytes_ -= other.bytes_; return *this; }
  friend constexpr Length operator+(Length a, Length b) { return Length(a.bytes_ + b.bytes_); }
  friend constexpr Length operator-(Length a, Length b) { return Length(a.bytes_ - b.bytes_); }
  friend constexpr Length operator*(Length a, std::uint64_t n) { return Length(a.bytes_ * n); }
  friend constexpr std::uint64_t operator/(Length a, Length b) { return a.bytes_ / b.bytes_; }

 private:
  std::uint64_t bytes_ = 0;
};

class Offset {
 public:
  constexpr Offset() = default;
  constexpr explicit Offset(std::uint64_t bytes) : bytes_(bytes) {}
  [[nodiscard]] constexpr std::uint64_t bytes() const { return bytes_; }
  constexpr auto operator<=>(const Offset&) const = default;
  constexpr Offset& operator+=(Length length) { bytes_ += length.bytes(); return *this; }
  friend constexpr Offset operator+(Offset a, Length b) { return Offset(a.bytes_ + b.bytes()); }
  friend constexpr Length operator-(Offset a, Offset b) { return Length(a.bytes_ - b.bytes_); }

 private:
  std::uint64_t bytes_ = 0;
};

// The bytes [offset, offset + length).
struct Extent {
  Offset offset;
  Length length;
  [[nodiscard]] constexpr Offset end() const { return offset + length; }
  constexpr bool operator==(const Extent&) const = default;
};

constexpr bool overlap(const Extent& a, const Extent& b) {
  return a.offset < b.end() && b.offset < a.end();
}

// The smallest extent around `extent` whose ends are multiples of `alignment` (a power of two).
constexpr Extent widen(const Extent& extent, Length alignment) {
  const std::uint64_t mask = alignment.bytes() - 1;
  const std::uint64_t start = extent.offset.bytes() & ~mask;
  const std::uint64_t end = (extent.end().bytes() + mask) & ~mask;
  return Extent{Offset(start), Length(end - start)};
}

constexpr Length operator""_KiB(unsigned long long n) { return Length(n << 10); }
constexpr Length operator""_MiB(unsigned long long n) { return Length(n << 20); }
constexpr Length operator""_GiB(unsigned long long n) { return Length(n << 30); }

// For people: "1.5 GiB", "512 B".
std::string format_length(Length length);

// "100M", "1.5GiB", "1000000": binary multiples (K = 1024), as qemu-img and virsh read them.
Result<Length> parse_length(const std::string& text);

}  // namespace drover
