// SPDX-License-Identifier: Apache-2.0
//
// What pre-flight found, as the command line shows it: the one place that knows memmig::Finding.
#pragma once

#include <string>
#include <vector>

#include "job/move.h"

namespace drover::cli {

struct FindingText {
  bool blocker = false;
  std::string rule;  // its name for programs: "target-file-exists"
  std::string disk;  // "vda", or empty: the guest or the host
  std::string what;
  std::string why;
  std::string to_do;
};

// Blockers first, otherwise in the plan's order.
std::vector<FindingText> findings_of(const job::Plan& plan);
bool blocked(const job::Plan& plan);

}  // namespace drover::cli
