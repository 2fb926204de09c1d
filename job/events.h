// SPDX-License-Identifier: Apache-2.0
//
// What a job says, as lines of JSON: for `--json`, for those who watch a running job through its
// control socket, and for the files in its directory. docs/drover-move.1 lists the members; each
// event has "event", its kind. Members may be added; none changes its meaning.
//
//   std::string line = to_line(event_of(progress));         // without its new line
//   DROVER_ASSIGN(JobEvent event, parse_event(line));          // and back, from whoever wrote it
//   std::visit(..., event);
//
// Pure functions; any thread. Lines are valid UTF-8: bytes of names that are not become U+FFFD.
// Parsing trusts nothing: Protocol for what is not an event; unknown members are ignored.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <variant>

#include "base/result.h"
#include "job/move.h"

namespace drover::job {

struct Started {
  std::string id;
};
struct Note {
  std::string text;
};
// The end of an event stream is a Summary or an Error.
using JobEvent = std::variant<Started, Plan, Progress, Note, Summary, Error>;

using OrderedJson = nlohmann::ordered_json;

OrderedJson event_of(const Started& started);
OrderedJson event_of(const Plan& plan);  // blockers first
OrderedJson event_of(const Progress& progress);
OrderedJson event_of(const Note& note);
OrderedJson event_of(const Summary& summary);
OrderedJson event_of(const Error& error);

std::string to_line(const OrderedJson& json);

inline constexpr std::size_t kMaxEventLine = std::size_t{1} << 20;
Result<JobEvent> parse_event(std::string_view line);

// Of the objects above, when they are members of something else.
Result<Plan> plan_from_json(const nlohmann::json& json);
Result<Progress> progress_from_json(const nlohmann::json& json);

}  // namespace drover::job
