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
constexpr double kMostUpAtOnce = 2;
// A limit far above what is read would be noticed late when it is needed.
constexpr double kAhead = 1.2;
// The share of the newest window in the smoothed latency. A disk that hangs for a moment, as all do
// now and then, is no reason to slow down much: a window counts as at most so many times as slow.
constexpr double kNewest = 0.4;
constexpr int kMostCounted = 2;
// The share of a latency that is lower than the baseline in that: some are so by chance.
constexpr double kLower = 0.1;

Duration towards(Duration from, Duration to, double share) {
  return from +
         Duration(static_cast<Duration::rep>(share * static_cast<double>((to - from).count())));
}

Length scaled(Length rate, double factor) {
  return Length(static_cast<std::uint64_t>(static_cast<double>(rate.bytes()) * factor));
}

}  // namespace

Length CopyPace::look(Instant now, const memmig::GuestIo& io, Length read) {
  if (!begun_) {
    begun_ = true;
    since_ = now;
    io_ = io;
    read_ = read;
    return rate_;
  }
  copying_ = copying_ || read > Length();
  const std::uint64_t operations = io.operations - io_.operations;
  const Duration span = now - since_;
  if (span <= Duration::zero() || (operations < kEnough && span < kPatience)) return rate_;
  const std::chrono::duration<double> seconds = span;
  const Length measured(
      static_cast<std::uint64_t>(static_cast<double>((read - read_).bytes()) / seconds.count()));
  fastest_ = std::max(fastest_, measured);
  if (operations < kEnough) {
    awake_ = false;
    latency_ = Duration::zero();
    rate_ = Length();
  } else if (!std::exchange(awake_, true) && copying_) {
    // It was idle, and this window was at full speed: what it is like without that shows next.
    rate_ = kStart;
  } else {
    const Duration mean = (io.time - io_.time) / static_cast<Duration::rep>(operations);
    note(mean);
    if (copying_) {
      adjust(now, measured, span);
    } else {
      rate_ = kStart;
    }
  }
  since_ = now;
  io_ = io;
  read_ = read;
  return rate_;
}

void CopyPace::note(Duration mean) {
  latency_ = latency_ == Duration::zero()
                 ? mean
                 : towards(latency_, std::min(mean, kMostCounted * latency_), kNewest);
  if (baseline_ == Duration::zero() || !copying_) {
    baseline_ = latency_;
  } else if (latency_ < baseline_) {
    baseline_ = towards(baseline_, latency_, kLower);
  }
}

Length CopyPace::handover() const {
  return rate_ == Length() ? rate_ : std::max(rate_, kLeastInHandover);
}

Length CopyPace::least() const { return std::max(kLeast, Length(fastest_.bytes() / kLeastShare)); }

void CopyPace::adjust(Instant now, Length measured, Duration span) {
  const std::chrono::duration<double> limit =
      kTolerated * std::chrono::duration<double>(baseline_) + kSlack;
  const double room = limit / std::chrono::duration<double>(latency_);
  if (room < 1) {
    // Down from what was really read: the limit may be far above it.
    const Length from = rate_ == Length() ? measured : std::min(rate_, measured);
    rate_ = scaled(from, std::max(std::sqrt(room), kMostDown));
  } else if (rate_ > Length()) {
    const double steps = std::max(std::chrono::duration<double>(span) / kStep, 1.0);
    const double up = std::min(std::pow(std::min(std::sqrt(room), kMostUp), steps), kMostUpAtOnce);
    rate_ = std::min(scaled(rate_, up), std::max(kStart, scaled(measured, kAhead * up)));
  } else {
    return;  // there is room without a limit
  }
  const bool least_now = rate_ <= least();
  rate_ = std::max(rate_, least());
  if (least_now && room < 1) {
    if (!at_least_) least_since_ = now;
    if (at_least_ && now - least_since_ >= kNotOurDoing) {
      baseline_ = latency_;
      at_least_ = false;
      return;
    }
    at_least_ = true;
  } else {
    at_least_ = false;
  }
}

}  // namespace drover::job
