// SPDX-License-Identifier: Apache-2.0
#include "job/progress_meter.h"

#include <algorithm>

namespace drover::job {

using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr auto kInterval = std::chrono::milliseconds(250);
constexpr auto kRateWindow = std::chrono::seconds(4);

Slowdown slowdown_of(const mirror::MirrorEngine::EngineStatus& status) {
  Slowdown out;
  for (const auto& disk : status.disks) {
    out.writes += disk.counters.strict_writes;
    out.waited += duration_cast<microseconds>(disk.counters.strict_wait);
    out.longest = std::max(out.longest, duration_cast<microseconds>(disk.counters.longest_wait));
  }
  return out;
}

ProgressMeter::ProgressMeter(std::function<Instant()> clock)
    : now_(std::move(clock)), start_(now_()), phase_start_(start_) {}

void ProgressMeter::enter(Phase phase) {
  const Instant time = now_();
  phase_times_.emplace_back(phase_, duration_cast<milliseconds>(time - phase_start_));
  phase_ = phase;
  phase_start_ = time;
}

void ProgressMeter::copy(const mirror::MirrorEngine::EngineStatus& status) {
  progress_.mirrored_writes = 0;
  progress_.sent_again = progress_.to_verify = Length();
  progress_.slowdown = slowdown_of(status);
  progress_.reconnects = status.link.reconnects;
  std::vector<DiskProgress> seen;
  for (const auto& disk : status.disks) {
    seen.push_back({.disk = disk.name,
                    .size = disk.size,
                    .data = disk.data,
                    .copied = disk.left < disk.data ? disk.data - disk.left : Length(),
                    .dirty = disk.left});
    progress_.mirrored_writes += disk.counters.guest_writes;
    progress_.sent_again += disk.counters.sent_again;
    progress_.to_verify += disk.to_verify;
  }
  progress_.saved_bytes = Length(status.link.bytes_saved);
  progress_.compression = mirror::encoding_name(status.link.encoding);
  progress_.found = Length(status.link.found_bytes);
  progress_.wire_bytes = Length(status.link.bytes_sent + status.link.memory_bytes);
  disks(seen);
}

void ProgressMeter::disks(const std::vector<DiskProgress>& disks) {
  progress_.disks.resize(disks.size());
  progress_.data = progress_.copied = Length();
  for (std::size_t i = 0; i < disks.size(); ++i) {
    DiskProgress& shown = progress_.disks[i];
    // What guests write meanwhile makes chunks dirty again; what is shown does not fall for it.
    const Length copied = std::max(shown.copied, disks[i].copied);
    shown = disks[i];
    shown.copied = copied;
    progress_.data += shown.data;
    progress_.copied += shown.copied;
  }
  const Instant time = now_();
  samples_.push_back({time, progress_.copied});
  while (samples_.size() > 2 && samples_.front().at < time - kRateWindow) samples_.pop_front();
}

void ProgressMeter::memory(Length total, Length remaining) {
  const std::lock_guard lock(mutex_);
  memory_total_ = total;
  memory_remaining_ = remaining;
}

bool ProgressMeter::due() const { return now_() - last_ >= kInterval; }

Progress ProgressMeter::progress(Phase phase) {
  last_ = now_();
  progress_.phase = phase;
  progress_.elapsed = elapsed();
  progress_.rate = Length();
  progress_.time_left.reset();
  if (samples_.size() >= 2) {
    const std::chrono::duration<double> span = samples_.back().at - samples_.front().at;
    const Length moved = samples_.back().copied - samples_.front().copied;
    if (span.count() > 0.2) {
      progress_.rate = Length(static_cast<std::uint64_t>(static_cast<double>(moved.bytes()) / span.count()));
    }
  }
  if (phase == Phase::Copy && progress_.rate > Length() && progress_.data >= progress_.copied) {
    progress_.time_left = std::chrono::seconds((progress_.data - progress_.copied) / progress_.rate);
  }
  {
    const std::lock_guard lock(mutex_);
    progress_.memory_total = memory_total_;
    progress_.memory_remaining = memory_remaining_;
  }
  return progress_;
}

milliseconds ProgressMeter::elapsed() const { return duration_cast<milliseconds>(now_() - start_); }

}  // namespace drover::job
