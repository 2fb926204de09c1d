// SPDX-License-Identifier: Apache-2.0
//
// How fast the disks are copied, so that the guest does not notice: follows the guest's own disk
// latency and gives way when that rises. A pure state machine: what QEMU has counted goes in, a
// rate comes out.
//
//   CopyPace pace;
//   pace.look(now, io, Length());                      // before copying begins: the guest alone
//   pace.begin(now, io);                               // it begins
//   engine.set_bandwidth(pace.look(now, io, read));    // a few times a second while it goes on
//
// The rate begins at kStart and follows the mean latency of the guest's requests: it grows while
// that is below kTolerated times what it is without the copy, and kSlack more, and shrinks above. A
// guest that asks little may wait longer for each request, until it waits for one part in kSlackShare
// of its time more, and for it the rate begins without a limit; one that asks nothing holds up
// nobody. What the guest feels without the copy changes: now and then, and when the rate has been at
// its least for a while and the guest is slow still, a window is spent looking at that, with the copy
// at kLeast; not while the guest waits for less than it may wait in any case.
//
// Threads: none; use from one.
#pragma once

#include <cstdint>
#include <optional>

#include "base/clock.h"
#include "base/units.h"
#include "memmig/hypervisor.h"

namespace drover::job {

class CopyPace {
 public:
  // The guest's mean latency may become this much of what it is alone, and kSlack more (disks that
  // answer within microseconds need not be crept around).
  static constexpr double kTolerated = 1.5;
  static constexpr Duration kSlack = std::chrono::microseconds(300);
  static constexpr int kSlackShare = 20;  // of a guest that asks little: until it waits for 1/20 more
  // A mean of fewer requests says little; so many are waited for, at most so long.
  static constexpr std::uint64_t kEnough = 40;
  static constexpr Duration kPatience = std::chrono::seconds(1);
  static constexpr std::uint64_t kFew = 10;
  // Rates, per second: the first, and what none is below.
  static constexpr Length kStart = Length(std::uint64_t{256} << 20);
  static constexpr Length kLeastInHandover = Length(std::uint64_t{128} << 20);
  static constexpr Length kLeast = Length(std::uint64_t{8} << 20);
  static constexpr std::uint64_t kLeastShare =
      8;  // of the fastest so far: never below one part in 8
  // So long at the least rate, and the guest slow: perhaps it is not the copy's doing.
  static constexpr Duration kNotOurDoing = std::chrono::seconds(2);
  // One window of so many is without the copy, if the guest waits for more than it may in any case.
  static constexpr unsigned kAloneEvery = 50;

  // `io`: what the guest has had done since it started; `read`: what the copy has read since it
  // began. The rate from now on, per second; zero: no limit.
  Length look(Instant now, const memmig::GuestIo& io, Length read);
  // Copying begins now: what the guest had done since the last window is what it takes without the copy, if that are
  // kFew requests. (They are not waited for: a guest that asks little would be asked to wait for long.)
  void begin(Instant now, const memmig::GuestIo& io);

  // While the disks are kept equal and the memory follows, of which little is left to copy: as
  // before, but never a reason for the handover to take long.
  [[nodiscard]] Length handover() const;

  [[nodiscard]] Duration latency() const { return latency_; }    // of the guest, smoothed
  [[nodiscard]] Duration baseline() const { return baseline_; }  // and without us

 private:
  void start_window(Instant now, const memmig::GuestIo& io, Length read);
  void look_alone(Length then);
  void note(Duration mean);
  void adjust(Instant now, Length measured, Duration span, Duration slack);
  [[nodiscard]] Length least() const;

  bool begun_ = false;
  Instant since_{};     // begin of the present window
  memmig::GuestIo io_;  // at that time
  Length read_;
  bool copying_ = false;
  Length measured_;      // in the last window
  bool quiet_ = false;   // the last one was; the next such one says that it is idle
  bool awake_ = false;   // the guest asks something of its disks
  Duration latency_{};   // zero: not known
  Duration baseline_{};  // zero: not known
  Length rate_;          // zero: no limit
  Length fastest_;
  std::optional<Instant> least_since_;  // the rate is at its least, and the guest still slow
  std::optional<Length> then_;          // this window is without the copy; the rate afterwards
  bool looked_ = false;                 // there was such a window though nothing was known
  unsigned windows_ = 0;                // since the last such one
};

}  // namespace drover::job
