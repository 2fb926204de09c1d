// SPDX-License-Identifier: Apache-2.0
#include "job/copy_pace.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace drover::job {
namespace {

// How fast the rate follows: latencies are noisy, and a step down that was too small shows again
// soon.
constexpr double kMostDown = 0.5;
constexpr double kMostUp = 1.25;

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
    recent_.clear();
    latency_ = Duration::zero();
    rate_ = Length();
  } else if (!std::exchange(awake_, true) && copying_) {
    // It was idle, and this window was at full speed: what it is like without that shows next.
    rate_ = kStart;
  } else {
    const Duration mean = (io.time - io_.time) / static_cast<Duration::rep>(operations);
    note(mean);
    if (baseline_ == Duration::zero() || latency_ < baseline_) baseline_ = latency_;
    if (copying_) {
      adjust(now, measured);
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
  recent_.push_back(mean);
  if (recent_.size() > kWindows) recent_.pop_front();
  std::vector<Duration> sorted(recent_.begin(), recent_.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::ranges::nth_element(sorted, middle);
  latency_ = *middle;
}

Length CopyPace::handover() const { return rate_ == Length() ? rate_ : std::max(rate_, kStart); }

Length CopyPace::least() const { return std::max(kLeast, Length(fastest_.bytes() / kLeastShare)); }

void CopyPace::adjust(Instant now, Length measured) {
  const std::chrono::duration<double> limit =
      kTolerated * std::chrono::duration<double>(baseline_) + kSlack;
  const double room = limit / std::chrono::duration<double>(latency_);
  if (room < 1) {
    // Down from what was really read: the limit may be far above it.
    const Length from = rate_ == Length() ? measured : std::min(rate_, measured);
    rate_ = scaled(from, std::max(room, kMostDown));
  } else if (rate_ > Length()) {
    rate_ = std::min(scaled(rate_, std::min(room, kMostUp)), std::max(kStart, scaled(measured, 2)));
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
