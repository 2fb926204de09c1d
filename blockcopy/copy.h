// SPDX-License-Identifier: Apache-2.0
//
// The copier of a disk that nobody writes to: what a reader says, into a writer, thin.
//
//   DROVER_ASSIGN(auto loop, Loop::create());
//   DROVER_ASSIGN(auto reader, open_raw_reader(*loop, {.path = "/srv/web1.raw"}));
//   DROVER_ASSIGN(auto writer, target->open_writer(*loop));
//   DROVER_TRY(copy_image(*loop, *reader, *writer, {.target_zero = target->initially_zero()}));
//   DROVER_TRY(target->flush());
//
// Holes and zeroes are not written to a target that is zero to begin with. Memory: kCopyChunk *
// CopyOptions::in_flight.
//
// Threads: the loop's, which copy_image() runs until it is done. The functions of the options are
// called on it, and must return soon.
//
// Errors: the reader's and writer's; Cancelled when `stopped` said so. The target is then partly
// written.
#pragma once

#include <functional>

#include "base/loop.h"
#include "base/result.h"
#include "base/units.h"
#include "blockcopy/image.h"

namespace drover::blockcopy {

inline constexpr Length kCopyChunk = 1_MiB;

struct CopyOptions {
  bool target_zero = false;
  unsigned in_flight = 16;            // chunks at once
  std::function<Length()> bandwidth;  // per second, asked again and again; zero: no limit
  std::function<bool()> stopped;      // asked before each chunk
  std::function<void(Length copied, Length data)> progress;  // of what is not a hole
};

// The writer's disk is at least as large as the reader's.
Status copy_image(Loop& loop, ImageReader& reader, ImageWriter& writer, const CopyOptions& options);

}  // namespace drover::blockcopy
