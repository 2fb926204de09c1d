// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "blockcopy/image.h"
#include "blockcopy/targets.h"

namespace drover::blockcopy {

Result<std::unique_ptr<TargetImage>> create_target(const TargetSpec& spec) {
  if (spec.path.empty() || spec.path.front() != '/') {
    return fail(Code::InvalidArgument,
                "the target image's path '" + spec.path + "' is not absolute");
  }
  if (spec.size == Length()) {
    return fail(Code::InvalidArgument, "the target image " + spec.path + " would have no bytes");
  }
  if (spec.size.bytes() > std::uint64_t{1} << 62) {
    return fail(Code::InvalidArgument, "the target image " + spec.path + " would be too large");
  }
  if (spec.format == Format::Raw) return create_raw_target(spec);
  if (spec.block_device) {
    return fail(
        Code::Incompatible,
        "the target " + spec.path + " is a block device, on which drover writes raw images only",
        "give a file as the target, or the raw format");
  }
  if (spec.size.bytes() % 512 != 0) {
    return fail(Code::InvalidArgument,
                fmt::format("a qcow2 image has whole sectors of 512 bytes, {} would have {} bytes",
                            spec.path, spec.size.bytes()));
  }
  return create_qcow2_target(spec);
}

}  // namespace drover::blockcopy
