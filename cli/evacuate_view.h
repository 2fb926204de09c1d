// SPDX-License-Identifier: Apache-2.0
//
// What `drover evacuate` shows: for people, and as lines of JSON (docs/drover-evacuate.1 lists
// their members). Pure functions: same input, same text.
//
// Threads: any. A block of text ends with a new line, a line of JSON has none.
#pragma once

#include <cstddef>
#include <string>

#include "base/result.h"
#include "cli/text.h"
#include "job/evacuate.h"

namespace drover::cli {

std::string render_evacuation(const job::EvacuateProposal& proposal, const Style& style);
std::string json_evacuation(const job::EvacuateProposal& proposal);

// plan.steps[step]; its number for people and programs is one more.
std::string render_step_begins(const job::EvacuateProposal& proposal, std::size_t step);
std::string render_step_ended(const job::EvacuateProposal& proposal, std::size_t step,
                              const Status& status, const Style& style);
std::string json_step(const job::EvacuateProposal& proposal, std::size_t step, const char* state,
                      const Status& status);

// An interrupted relocation.
std::string render_resume(const job::EvacuateSurvey::Job& job);
std::string render_resumed(const job::EvacuateSurvey::Job& job, const Status& status,
                           const Style& style);
std::string json_resume(const job::EvacuateSurvey::Job& job, const char* state,
                        const Status& status);

std::string render_evacuated(const job::EvacuateSummary& summary, const Style& style);
std::string json_evacuated(const job::EvacuateSummary& summary);

}  // namespace drover::cli
