// SPDX-License-Identifier: Apache-2.0
#include "job/copy_pace.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace drover::job {
namespace {

// How fast the rate follows: slowly, for latencies are noisy and tell late; a rate that swings
// costs the guest more than a steady one of the same mean.
constexpr double kMostDown = 0.7;
constexpr double kMostUp = 1.15;  // per kStep, but by one window at most kMostUpAtOnce
constexpr std::chrono::duration<double> kStep = std::chrono::milliseconds(100);
constexpr double kMostUpAtOnce = 1.5;
constexpr double kMostStepsDown = 3;
// A limit far above what is read would be noticed late when it is needed.
constexpr double kAhead = 1.2;
// The share of the newest window in the smoothed latency. A disk that hangs for a moment, as all do
// now and then, is no reason to slow down much: a window counts as at most so many times as slow.
constexpr double kNewest = 0.4;
constexpr int kMostCounted = 2;
// A window so long is none: there was something else in between.
constexpr Duration kStale = std::chrono::seconds(5);
// A guest that waits for its disks for less of the time than one part in this is idle.
constexpr int kIdleShare = 10;

Duration towards(Duration from, Duration to, double share) {
  return from +
         Duration(static_cast<Duration::rep>(share * static_cast<double>((to - from).count())));
}

Length scaled(Length rate, double factor) {
  return Length(static_cast<std::uint64_t>(static_cast<double>(rate.bytes()) * factor));
}

}  // namespace

Length CopyPace::look(Instant now, const memmig::GuestIo& io, Length read) {
  const Duration span = now - since_;
  // Counters fall when a disk is taken away.
  const bool fell = io.operations < io_.operations || io.time < io_.time;
  if (!begun_ || span > kStale || fell) {
    begun_ = true;
    start_window(now, io, read);
    return rate_;
  }
  copying_ = copying_ || read > Length();
  const std::uint64_t operations = io.operations - io_.operations;
  const Duration busy = io.time - io_.time;
  if (span <= Duration::zero() || (operations < kEnough && span < kPatience)) return rate_;
  const std::chrono::duration<double> seconds = span;
  const Length measured(
      static_cast<std::uint64_t>(static_cast<double>((read - read_).bytes()) / seconds.count()));
  fastest_ = std::max(fastest_, measured);
  // Few requests, and they did not take long: not one that asks little because it waits.
  const bool quiet = operations < kEnough && busy < span / kIdleShare;
  const bool idle = quiet && (quiet_ || !awake_);
  quiet_ = quiet;
  if (then_) {
    // However few they were: it is what they take without the copy. None says nothing.
    if (operations > 0) note(busy / static_cast<Duration::rep>(operations));
    rate_ = *std::exchange(then_, std::nullopt);
  } else if (idle) {
    awake_ = false;
    least_since_.reset();
    latency_ = Duration::zero();
    rate_ = Length();
  } else if (!quiet) {
    awake_ = true;
    if (operations > 0) {
      const auto count = static_cast<Duration::rep>(operations);
      const Duration slack = std::max(kSlack, Duration(span / (kSlackShare * count)));
      const bool asks_little = slack > kSlack;
      const Duration mean = busy / count;
      const bool known = baseline_ != Duration::zero();
      note(mean);
      if (!copying_) {
        rate_ = asks_little ? Length() : kStart;
      } else if (!known && latency_ > slack && !std::exchange(looked_, true)) {
        look_alone(asks_little ? Length() : kStart);
      } else {
        adjust(now, std::max(measured, measured_), span, slack);
        if (++windows_ >= kAloneEvery && latency_ > slack) look_alone(rate_);
      }
    }
  }
  measured_ = measured;
  start_window(now, io, read);
  return rate_;
}

void CopyPace::begin(Instant now, const memmig::GuestIo& io) {
  const bool goes_on = begun_ && now - since_ <= kStale && io.operations >= io_.operations && io.time >= io_.time;
  begun_ = true;
  if (goes_on && io.operations - io_.operations >= kFew) {
    note((io.time - io_.time) / static_cast<Duration::rep>(io.operations - io_.operations));
  }
  start_window(now, io, Length());
}

void CopyPace::start_window(Instant now, const memmig::GuestIo& io, Length read) {
  since_ = now;
  io_ = io;
  read_ = read;
}

// The next window shows what it is like almost without the copy.
void CopyPace::look_alone(Length then) {
  windows_ = 0;
  then_ = then;
  rate_ = kLeast;
}

void CopyPace::note(Duration mean) {
  if (then_) {
    // A hang of the disk just then must not count for long; what has got much slower shows again.
    baseline_ = baseline_ == Duration::zero() ? mean : std::min(mean, kMostCounted * baseline_);
    return;
  }
  latency_ = latency_ == Duration::zero()
                 ? mean
                 : towards(latency_, std::min(mean, kMostCounted * latency_), kNewest);
  if (!copying_ || latency_ < baseline_) baseline_ = latency_;
}

Length CopyPace::handover() const {
  const Length rate = then_.value_or(rate_);
  return rate == Length() ? rate : std::max(rate, kLeastInHandover);
}

Length CopyPace::least() const { return std::max(kLeast, Length(fastest_.bytes() / kLeastShare)); }

void CopyPace::adjust(Instant now, Length measured, Duration span, Duration slack) {
  const std::chrono::duration<double> limit =
      kTolerated * std::chrono::duration<double>(baseline_) + slack;
  const double room = limit / std::chrono::duration<double>(latency_);
  const double steps = std::max(std::chrono::duration<double>(span) / kStep, 1.0);
  if (room < 1) {
    // Down from what was really read: the limit may be far above it.
    const Length from = rate_ == Length() ? measured : std::min(rate_, measured);
    rate_ = scaled(from,
                   std::pow(std::max(std::sqrt(room), kMostDown), std::min(steps, kMostStepsDown)));
  } else if (rate_ > Length()) {
    const double up =
        std::min({std::pow(std::min(std::sqrt(room), kMostUp), steps), kMostUpAtOnce, room});
    rate_ = std::min(scaled(rate_, up), std::max(kStart, scaled(measured, kAhead * up)));
  } else {
    return;  // there is room without a limit
  }
  const bool least_now = rate_ <= least() && room < 1;
  rate_ = std::max(rate_, least());
  if (!least_now) {
    least_since_.reset();
  } else if (!least_since_) {
    least_since_ = now;
  } else if (now - *least_since_ >= kNotOurDoing) {
    least_since_.reset();
    windows_ = kAloneEvery;  // the next window is without the copy
  }
}

}  // namespace drover::job
