// SPDX-License-Identifier: Apache-2.0
//
// The two makers behind create_target(), which has checked the spec. Internal to blockcopy.
#pragma once

#include <memory>

#include "blockcopy/image.h"

namespace drover::blockcopy {

inline constexpr unsigned kMaxWriters = 32;

Result<std::unique_ptr<TargetImage>> create_raw_target(const TargetSpec& spec);
Result<std::unique_ptr<TargetImage>> create_qcow2_target(const TargetSpec& spec);

}  // namespace drover::blockcopy
