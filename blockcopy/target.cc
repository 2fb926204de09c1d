// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "blockcopy/image.h"
#include "blockcopy/targets.h"

namespace drover::blockcopy {

namespace {

constexpr const char* kCorruptHint = "the image must be made anew";

Status check_spec(const TargetSpec& spec) {
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
  if (spec.format == Format::Raw) return {};
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
  return {};
}

}  // namespace

Result<std::unique_ptr<TargetImage>> create_target(const TargetSpec& spec) {
  DROVER_TRY(check_spec(spec));
  return spec.format == Format::Raw ? create_raw_target(spec) : create_qcow2_target(spec);
}

Result<std::unique_ptr<TargetImage>> open_target(const TargetSpec& spec,
                                                 const ImageIdentity& identity) {
  DROVER_TRY(check_spec(spec));
  return spec.format == Format::Raw ? open_raw_target(spec, identity)
                                    : open_qcow2_target(spec, identity);
}

Error corrupt_image(const std::string& path, const std::string& why) {
  return {Code::Io, fmt::format("the target image {} is damaged: {}", path, why), kCorruptHint,
          false};
}

bool is_corrupt(const Error& error) { return error.code == Code::Io && error.hint == kCorruptHint; }

}  // namespace drover::blockcopy
