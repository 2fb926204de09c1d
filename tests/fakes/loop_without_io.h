// SPDX-License-Identifier: Apache-2.0
//
// For fake loops of what does no I/O of its own: timers and posted tasks are left to be told.
#pragma once

#include <span>

#include "base/check.h"
#include "base/loop.h"

namespace drover::fakes {

class LoopWithoutIo : public Loop {
 public:
  void run() override { CHECK(false, "somebody else runs the loop"); }
  void stop() override {}
  Handle read(int, std::span<std::byte>, Offset, Completion) override { return none(); }
  Handle write(int, std::span<const std::byte>, Offset, Completion) override { return none(); }
  Handle fdatasync(int, Completion) override { return none(); }
  Handle fallocate(int, int, Extent, Completion) override { return none(); }
  Handle receive(int, std::span<std::byte>, Completion) override { return none(); }
  Handle send(int, std::span<const std::byte>, Completion) override { return none(); }
  Handle accept(int, Completion) override { return none(); }
  Handle poll(int, short, Completion) override { return none(); }

 private:
  static Handle none() { CHECK(false, "there is no I/O on this loop"); }
};

}  // namespace drover::fakes
