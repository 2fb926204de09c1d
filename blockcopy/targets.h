// SPDX-License-Identifier: Apache-2.0
//
// What is behind create_target() and open_target(), which have checked the spec. Internal to
// blockcopy.
#pragma once

#include <memory>

#include "blockcopy/image.h"

namespace drover::blockcopy {

inline constexpr unsigned kMaxWriters = 32;

Result<std::unique_ptr<TargetImage>> create_raw_target(const TargetSpec& spec);
Result<std::unique_ptr<TargetImage>> create_qcow2_target(const TargetSpec& spec);
Result<std::unique_ptr<TargetImage>> open_raw_target(const TargetSpec& spec,
                                                     const ImageIdentity& identity);
Result<std::unique_ptr<TargetImage>> open_qcow2_target(const TargetSpec& spec,
                                                       const ImageIdentity& identity);
Error corrupt_image(const std::string& path, const std::string& why);

}  // namespace drover::blockcopy
