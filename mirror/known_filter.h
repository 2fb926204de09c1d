// SPDX-License-Identifier: Apache-2.0
//
// How the source learns what the target has: {"op":"index"} of the control connection, which hands
// out the filter of the target's content index (mirror/piece.h) in parts. docs/protocol.md, 5.
//
//   DROVER_ASSIGN(auto filter, fetch_filter([&](const json& r) { return link.call(r, 30s); }));
//   if (filter) link.use_filter(filter);
//
// Threads: any; pure but for what the given function does.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/result.h"
#include "mirror/piece.h"

namespace drover::mirror {

// Target: the answer to a request. `filter` null: there is no index, or nothing in it.
Result<nlohmann::json> filter_part(const PieceFilter* filter, const nlohmann::json& request);

// Source: asks until it is whole. Null: the target has nothing, or does not know the question
// (an older drover), or its pieces are of another size. Protocol: what it says makes no sense.
Result<std::shared_ptr<const PieceFilter>> fetch_filter(
    const std::function<Result<nlohmann::json>(const nlohmann::json& request)>& call);

}  // namespace drover::mirror
