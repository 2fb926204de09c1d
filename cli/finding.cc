// SPDX-License-Identifier: Apache-2.0
#include "cli/finding.h"

#include <algorithm>

namespace drover::cli {

std::vector<FindingText> findings_of(const job::Plan& plan) {
  std::vector<FindingText> out;
  for (const memmig::Finding& finding : plan.findings) {
    out.push_back({finding.severity == memmig::Severity::Blocker, finding.rule, finding.disk,
                   finding.what, finding.why, finding.to_do});
  }
  std::stable_partition(out.begin(), out.end(),
                        [](const FindingText& finding) { return finding.blocker; });
  return out;
}

bool blocked(const job::Plan& plan) {
  return std::ranges::any_of(findings_of(plan), &FindingText::blocker);
}

}  // namespace drover::cli
