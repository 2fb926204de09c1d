// SPDX-License-Identifier: Apache-2.0
//
// What `drover rebalance` shows: for people, and as lines of JSON (docs/drover-rebalance.1 lists
// their members). Pure functions: same input, same text.
//
// Threads: any. A block of text ends with a new line, a line of JSON has none.
#pragma once

#include <cstddef>
#include <string>

#include "base/result.h"
#include "cli/text.h"
#include "job/rebalance.h"

namespace drover::cli {

// `why`: another plan was followed before; empty: it is the first.
std::string render_proposal(const job::RebalanceProposal& proposal, const std::string& why,
                            const Style& style);
std::string json_proposal(const job::RebalanceProposal& proposal, const std::string& why);

// One move, at its begin and end.
struct MoveView {
  std::size_t number = 0;  // from 1 on, over all plans
  const job::RebalanceMove& move;
};
std::string render_begin(const MoveView& view, const Style& style);
std::string json_begin(const MoveView& view);
std::string render_end(const MoveView& view, const Status& status, const Style& style);
std::string json_end(const MoveView& view, const Status& status);

std::string render_rebalanced(const job::RebalanceSummary& summary, const Style& style);
std::string json_rebalanced(const job::RebalanceSummary& summary);

}  // namespace drover::cli
