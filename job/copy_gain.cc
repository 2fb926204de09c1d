// SPDX-License-Identifier: Apache-2.0
#include "job/copy_gain.h"

namespace drover::job {

CopyGain::Verdict CopyGain::look(Instant now, Length left, Length sent) {
  if (!mark_ || sent < mark_->sent) mark_ = Mark{now, left, sent};
  const Length moved = sent - mark_->sent;
  if (now - mark_->at >= kWindow && moved >= kEnough) {
    const Length gained = left < mark_->left ? mark_->left - left : Length();
    const std::chrono::duration<double> took = now - mark_->at;
    rate_ = Length(static_cast<std::uint64_t>(static_cast<double>(moved.bytes()) / took.count()));
    if (gained.bytes() >= moved.bytes() / kLeastShare) {
      losing_since_.reset();
    } else if (!losing_since_) {
      losing_since_ = mark_->at;
    }
    mark_ = Mark{now, left, sent};
  }
  if (!losing_since_) return Verdict::Gaining;
  const std::uint64_t seconds =
      static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::seconds>(kStrict).count());
  if (left.bytes() <= rate_.bytes() * seconds) return Verdict::HandOver;
  return now - *losing_since_ < kPatience ? Verdict::Waiting : Verdict::Refuse;
}

}  // namespace drover::job
