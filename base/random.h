// SPDX-License-Identifier: Apache-2.0
//
// The one source of (pseudo-)randomness of simulations and tests: same seed, same sequence, on
// every machine. Not for keys: those come from gnutls_rnd.
#pragma once

#include <cstdint>

#include "base/check.h"

namespace drover {

// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }

  // Uniform enough for tests: 0 <= result < bound.
  std::uint64_t below(std::uint64_t bound) {
    CHECK(bound > 0, "a range must not be empty");
    return next() % bound;
  }

  bool one_in(std::uint64_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

}  // namespace drover
