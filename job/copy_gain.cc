// SPDX-License-Identifier: Apache-2.0
#include "job/copy_gain.h"

namespace drover::job {

bool CopyGain::gained_little(const Mark& since, Length left, Length copied) {
  const Length gained = left < since.left ? since.left - left : Length();
  return gained.bytes() < (copied - since.copied).bytes() / kLeastShare;
}

CopyGain::Verdict CopyGain::look(Instant now, Length left, Length copied) {
  if (!mark_ || copied < mark_->copied) mark_ = Mark{now, left, copied};
  const Length moved = copied - mark_->copied;
  if (now - mark_->at >= kWindow && moved >= kEnough) {
    const std::chrono::duration<double> took = now - mark_->at;
    rate_ = Length(static_cast<std::uint64_t>(static_cast<double>(moved.bytes()) / took.count()));
    if (!losing_ && gained_little(*mark_, left, copied)) losing_ = mark_;
    // One good window is no gain: a guest that rests now and then would be followed for ever.
    if (losing_ && !gained_little(*losing_, left, copied)) losing_.reset();
    mark_ = Mark{now, left, copied};
  }
  if (!losing_) return Verdict::Gaining;
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(kStrict).count();
  if (left.bytes() / static_cast<std::uint64_t>(seconds) <= rate_.bytes()) return Verdict::HandOver;
  return now - losing_->at < kPatience ? Verdict::Waiting : Verdict::Refuse;
}

}  // namespace drover::job
