// SPDX-License-Identifier: Apache-2.0
#include "mirror/compression_policy.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace drover::mirror {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kWindow{250};
constexpr milliseconds kLongestWindow{1000};
constexpr std::uint64_t kWindowFrames = 4;

// Of the time with something to send: from here on the wire is the limit; and below, it is not.
constexpr double kPressed = 0.25;
constexpr double kFree = 0.10;
// Of the whole time without anything to send: more, and the source is the limit.
constexpr double kFed = 0.25;
constexpr double kStarved = 0.50;
// So much of the wire a lane whose source is the limit may take.
constexpr double kRoom = 0.70;

// A step up must be that much cheaper, and go that much faster once it is taken; one down may cost
// that much. What lies between keeps both from following each other.
constexpr double kCheaper = 0.92;
constexpr double kFaster = 1.03;
constexpr double kNoDearer = 1.03;
constexpr double kNoSlower = 0.97;
// Encoding and the wire overlap, but for so much of the shorter one: a lane has one thread.
constexpr double kOverlapLost = 0.25;

constexpr milliseconds kHoldUp{2000};
constexpr milliseconds kLongestHoldUp{64000};
constexpr milliseconds kHoldDown{1000};
constexpr milliseconds kLongestHoldDown{16000};
// A wire that is so many times faster or slower is another one.
constexpr double kOtherWire = 1.5;

constexpr std::size_t kLeastSample = std::size_t{64} << 10;
constexpr unsigned kEnoughSamples = 2;
constexpr double kUseless = 0.95;
constexpr std::uint64_t kProbeEvery = 16;
constexpr std::uint64_t kRarestProbe = 64;
constexpr milliseconds kProbeInterval{1000};
// Of the lane's time a 50th at most.
constexpr int kProbeShare = 50;
constexpr milliseconds kFirstLook{20};
// zstd:1 finds whatever there is to gain, and costs little where there is nothing.
constexpr std::array<std::size_t, 3> kProbeOrder{2, 1, 3};

double seconds(Duration time) { return std::chrono::duration<double>(time).count(); }

std::size_t step_of(const EncodeOptions& with) {
  for (std::size_t step = 0; step < CompressionPolicy::kSteps; ++step) {
    const EncodeOptions& one = CompressionPolicy::kEncodings[step];
    if (one.encoding == with.encoding && one.level == with.level) return step;
  }
  CHECK(false, "only what choose() said is reported");
}

}  // namespace

void CompressionPolicy::Estimate::add(const Encoded& what, double weight) {
  const auto bytes = static_cast<double>(what.plain);
  const double share = std::max(weight, 1.0 / (samples + 1));
  ratio += share * (static_cast<double>(what.wire) / bytes - ratio);
  seconds += share * (drover::mirror::seconds(what.took) / bytes - seconds);
  ++samples;
}

EncodeOptions CompressionPolicy::choose(Instant now) {
  ++since_probe_;
  probing_ = probe_of(now);
  if (!probing_) return current();
  since_probe_ = 0;
  last_probe_ = now;
  probed_[*probing_] = ++probes_;
  return kEncodings[*probing_];
}

EncodeOptions CompressionPolicy::choose_write(std::size_t bytes) const {
  return pressed_ && bytes >= kLeastWrite ? current() : EncodeOptions{};
}

bool CompressionPolicy::waits_for_wire(Instant now) const {
  if (pressed_) return true;
  const Duration elapsed = now - window_.begin;
  return window_.blocked >= kFirstLook && seconds(window_.idle) <= kFed * seconds(elapsed) &&
         seconds(window_.blocked) >= kPressed * seconds(elapsed - window_.idle);
}

std::optional<CompressionPolicy::Step> CompressionPolicy::probe_of(Instant now) const {
  if (!waits_for_wire(now) || trial_) return std::nullopt;
  const bool affordable = now - last_probe_ >= kProbeShare * probe_took_;
  const Estimate& first = estimates_[kProbeOrder[0]];
  if (step_ == 0 && first.samples > 0 && first.ratio > kUseless) {
    const bool due = since_probe_ >= probe_every_ || now - last_probe_ >= kProbeInterval;
    return due && affordable ? std::optional(kProbeOrder[0]) : std::nullopt;
  }
  std::optional<Step> stalest;
  for (const Step step : kProbeOrder) {
    if (step == step_) continue;
    if (estimates_[step].samples < kEnoughSamples) return step;
    if (!stalest || probed_[step] < probed_[*stalest]) stalest = step;
  }
  return since_probe_ >= kProbeEvery && affordable ? stalest : std::nullopt;
}

void CompressionPolicy::encoded(const EncodeOptions& with, const Encoded& what) {
  const Step step = step_of(with);
  ++window_.frames;
  window_.plain += what.plain;
  window_.wire += what.wire;
  window_.encoding += what.took;
  const bool probe = probing_ == step;
  if (what.plain < kLeastSample) return;
  estimates_[step].add(what, probe ? 0.25 : 0.125);
  if (!probe) return;
  probing_.reset();
  probe_took_ = what.took;
  const bool useless = estimates_[kProbeOrder[0]].ratio > kUseless;
  probe_every_ = useless ? std::min(2 * probe_every_, kRarestProbe) : 1;
}

void CompressionPolicy::starved(Duration time, std::uint64_t before, std::uint64_t after) {
  if (after > 0) {
    window_.blocked += time;
    return;
  }
  // All arrived in the meantime: as long as that took at the rate that is known.
  Duration wire{0};
  if (before > 0 && wire_ > 0) {
    wire = std::min(time, std::chrono::duration_cast<Duration>(
                              std::chrono::duration<double>(static_cast<double>(before) / wire_)));
  }
  window_.blocked += wire;
  window_.idle += time - wire;
}

bool CompressionPolicy::due(Instant now) const {
  const Duration elapsed = now - window_.begin;
  return elapsed >= kLongestWindow || (elapsed >= kWindow && window_.frames >= kWindowFrames);
}

void CompressionPolicy::begin_window(Instant now, std::uint64_t left) {
  window_ = {.begin = now, .left = left};
}

CompressionPolicy::Share CompressionPolicy::measure(Instant now, std::uint64_t left) {
  Share share;
  const double elapsed = seconds(now - window_.begin);
  share.active = std::max(elapsed - seconds(window_.idle), 1e-6);
  share.waiting = std::clamp(seconds(window_.blocked - window_.delayed), 0.0, share.active);
  share.idle = std::clamp(seconds(window_.idle) / elapsed, 0.0, 1.0);
  const auto arrived = static_cast<double>(left - window_.left);
  const double ratio = window_.plain > 0 && window_.wire > 0
                           ? static_cast<double>(window_.wire) / static_cast<double>(window_.plain)
                           : estimates_[step_].ratio;
  // Not by the chunks that were encoded: of those only a few go into a slow wire's window.
  share.goodput = arrived / elapsed / std::max(ratio, 1e-6);
  const double rate = arrived / share.active;
  wire_ = share.waiting >= kPressed * share.active ? rate : std::max(wire_, rate);
  pressed_ = share.waiting >= kPressed * share.active && share.idle <= kFed;
  if (window_.wire > 0) {
    const double other = share.active - share.waiting - seconds(window_.encoding);
    const double per_byte = std::max(other, 0.0) / static_cast<double>(window_.wire);
    handling_ = handling_ > 0 ? (handling_ + per_byte) / 2 : per_byte;
  }
  return share;
}

void CompressionPolicy::look(Instant now, std::uint64_t left) {
  CHECK(now > window_.begin && left >= window_.left, "time and counters go forward");
  if (left == window_.left && window_.frames == 0) return begin_window(now, left);
  const Share share = measure(now, left);
  if (!trial_ || judge(now, share)) decide(now, share);
  begin_window(now, left);
}

// Seconds of the lane's time that a byte of data takes.
double CompressionPolicy::cost(Step step) const {
  const Estimate& estimate = estimates_[step];
  const double work = estimate.seconds + estimate.ratio * handling_;
  const double wire = wire_ > 0 ? estimate.ratio / wire_ : 0;
  return std::max(work, wire) + kOverlapLost * std::min(work, wire);
}

// True: it is over, and where it led is where the lane stays.
bool CompressionPolicy::judge(Instant now, const Share& share) {
  if (!std::exchange(trial_->settled, true)) return false;
  const Trial trial = *std::exchange(trial_, std::nullopt);
  const bool up = step_ > trial.from;
  const bool good = up ? share.goodput >= kFaster * trial.before
                       : share.goodput >= kNoSlower * trial.before || share.idle > kFed;
  Hold& its = up ? up_ : down_;
  if (good) {
    its = {};
    return true;
  }
  // A target that takes no more makes the wire seem slower the more is compressed.
  if (up) wire_ = trial.wire;
  its.next = its.next == milliseconds(0)
                 ? (up ? kHoldUp : kHoldDown)
                 : std::min(2 * its.next, up ? kLongestHoldUp : kLongestHoldDown);
  its.until = now + its.next;
  its.wire = wire_;
  step_ = trial.from;
  return false;
}

bool CompressionPolicy::held(const Hold& what, Instant now) const {
  const bool same = wire_ <= kOtherWire * what.wire && what.wire <= kOtherWire * wire_;
  return now < what.until && same;
}

void CompressionPolicy::go(Step to, const Share& share) {
  trial_ = Trial{.from = step_, .before = share.goodput, .wire = wire_};
  if (to == 0 && estimates_[step_].ratio > kUseless) {
    // What was known of the others is of other data.
    for (Step step = 1; step < kSteps; ++step) estimates_[step].samples = 0;
    probe_every_ = 1;
    since_probe_ = 0;
  }
  step_ = to;
}

void CompressionPolicy::decide(Instant now, const Share& share) {
  if (pressed_) {
    Step best = 0;
    for (Step step = 1; step < kSteps; ++step) {
      if (step != step_ && estimates_[step].samples < kEnoughSamples) continue;
      if (cost(step) < kCheaper * cost(best)) best = step;
    }
    if (best > step_ && !held(up_, now) && cost(best) < kCheaper * cost(step_)) go(best, share);
    if (best < step_ && !held(down_, now) && cost(best) <= kNoDearer * cost(step_)) go(best, share);
    return;
  }
  if (step_ == 0 || held(down_, now)) return;
  if (share.idle > kStarved) {
    for (Step step = 0; step < step_; ++step) {
      if (share.goodput * estimates_[step].ratio > kRoom * wire_) continue;
      return go(step, share);
    }
  } else if (share.waiting < kFree * share.active) {
    go(step_ - 1, share);
  }
}

}  // namespace drover::mirror
