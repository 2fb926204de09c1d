// SPDX-License-Identifier: Apache-2.0
#include "job/copy_lead.h"

#include <algorithm>
#include <utility>

namespace drover::job {

bool CopyLead::look(Instant now, Length left, Length copied) {
  if (!mark_ || copied < mark_->copied) {
    before_.reset();
    mark_ = Mark{now, left, copied};
  }
  if (now - mark_->at >= kWindow) before_ = std::exchange(mark_, Mark{now, left, copied});
  const Mark& since = before_ ? *before_ : *mark_;
  if (now - since.at < kLeast) return false;
  const Length less = since.left - std::min(since.left, left);
  const auto moved = static_cast<double>(std::min(less, copied - since.copied).bytes());
  const double passed = std::chrono::duration<double>(now - since.at).count();
  const double lead = std::chrono::duration<double>(kLead).count();
  return static_cast<double>(left.bytes()) * passed <= moved * lead;
}

}  // namespace drover::job
