// SPDX-License-Identifier: Apache-2.0
#include "job/copy_meter.h"

#include <algorithm>

namespace drover::job {

using std::chrono::duration_cast;
using std::chrono::milliseconds;

constexpr auto kInterval = milliseconds(250);
constexpr auto kRateWindow = std::chrono::seconds(4);

CopyMeter::CopyMeter(const std::vector<DiskPlan>& disks) : start_(now()), phase_start_(start_) {
  for (const DiskPlan& disk : disks) {
    disks_.push_back({.disk = disk.disk, .size = disk.virtual_size});
  }
}

void CopyMeter::enter(Phase phase) {
  if (phase == phase_) return;
  const Instant time = now();
  phase_times_.emplace_back(phase_, duration_cast<milliseconds>(time - phase_start_));
  phase_ = phase;
  phase_start_ = time;
}

void CopyMeter::disk(std::size_t index, Length copied, Length data, bool done) {
  DiskProgress& shown = disks_[index];
  shown.data = std::max(shown.data, data);
  // What the guest writes meanwhile is to be copied again; what is shown does not fall for it.
  shown.copied = std::max(shown.copied, std::min(copied, shown.data));
  shown.dirty = data > copied ? data - copied : Length();
  if (done) {
    shown.copied = shown.data;
    shown.dirty = Length();
  }
}

bool CopyMeter::due() const { return now() - last_ >= kInterval; }

Length CopyMeter::data() const {
  Length sum;
  for (const DiskProgress& disk : disks_) sum += disk.data;
  return sum;
}

Progress CopyMeter::progress(Phase phase) {
  last_ = now();
  Progress out;
  out.phase = phase;
  out.elapsed = elapsed();
  out.disks = disks_;
  out.data = data();
  for (const DiskProgress& disk : disks_) out.copied += disk.copied;
  samples_.push_back({last_, out.copied});
  while (samples_.size() > 2 && samples_.front().at < last_ - kRateWindow) samples_.pop_front();
  const std::chrono::duration<double> span = samples_.back().at - samples_.front().at;
  if (span.count() > 0.2) {
    const Length copied = samples_.back().copied - samples_.front().copied;
    out.rate =
        Length(static_cast<std::uint64_t>(static_cast<double>(copied.bytes()) / span.count()));
  }
  if (phase == Phase::Copy && out.rate > Length() && out.data > Length()) {
    out.time_left = std::chrono::seconds((out.data - out.copied) / out.rate);
  }
  return out;
}

milliseconds CopyMeter::elapsed() const { return duration_cast<milliseconds>(now() - start_); }

}  // namespace drover::job
