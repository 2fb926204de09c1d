// SPDX-License-Identifier: Apache-2.0
#include "job/memory_channels.h"

#include <algorithm>

namespace drover::job {
namespace {

// One connection keeps four threads busy (QEMU, relay and encryption, twice): with fewer cores than
// this a second one takes turns with the first.
constexpr unsigned kCoresForMore = 8;
constexpr unsigned kOfItself = 2;

}  // namespace

unsigned memory_channels(unsigned asked, unsigned cores, Length bandwidth) {
  if (asked != 0) return std::min(asked, kMostMemoryChannels);
  return cores >= kCoresForMore && bandwidth == Length() ? kOfItself : 1;
}

}  // namespace drover::job
