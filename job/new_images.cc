// SPDX-License-Identifier: Apache-2.0
#include "job/new_images.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <sstream>
#include <utility>

#include "base/log.h"
#include "blockcopy/image_file.h"
#include "memmig/image_lock.h"

namespace drover::job {
namespace {

std::string image_key(const DiskPlan& disk) { return "image/" + disk.disk; }
std::string source_key(const DiskPlan& disk) { return "source/" + disk.disk; }

}  // namespace

std::string NewImages::staged(const DiskPlan& disk) const {
  return blockcopy::staged_path(disk.target_path, options_.job + "-" + disk.disk);
}

Status NewImages::note(const std::string& key, const blockcopy::ImageIdentity& identity) {
  return journal_.put(key, fmt::format("{} {}", identity.device, identity.inode));
}

Result<std::optional<blockcopy::ImageIdentity>> NewImages::noted(const std::string& key) {
  DROVER_ASSIGN(const std::optional<std::string> text, journal_.get(key));
  if (!text) return std::nullopt;
  std::istringstream in(*text);
  blockcopy::ImageIdentity identity;
  in >> identity.device >> identity.inode;
  if (!in) return fail(Code::Protocol, "the job's journal is damaged: " + key);
  return std::optional(identity);
}

Result<std::unique_ptr<blockcopy::TargetImage>> NewImages::begin(const DiskPlan& disk,
                                                                 Length cluster_size) {
  blockcopy::TargetSpec spec;
  spec.path = disk.target_block_device ? disk.target_path : staged(disk);
  spec.format = disk.target_format == "qcow2" ? blockcopy::Format::Qcow2 : blockcopy::Format::Raw;
  spec.block_device = disk.target_block_device;
  spec.size = disk.virtual_size;
  spec.cluster_size = cluster_size;
  spec.work_directory = options_.work_directory;
  return blockcopy::create_target(spec);
}

Status NewImages::finish(const DiskPlan& disk) {
  if (disk.target_block_device) return {};
  const std::string path = staged(disk);
  DROVER_TRY(blockcopy::take_after(disk.source_path, path));
  DROVER_TRY(blockcopy::sync_file(path));
  DROVER_ASSIGN(const blockcopy::ImageIdentity identity, blockcopy::identify_file(path));
  return note(image_key(disk), identity);
}

Status NewImages::make(const DiskPlan& disk, Length cluster_size) {
  {
    DROVER_ASSIGN(const auto target, begin(disk, cluster_size));
    DROVER_TRY(target->release());
  }
  DROVER_TRY(finish(disk));
  return publish(disk);
}

Status NewImages::link(const DiskPlan& disk) {
  DROVER_ASSIGN(const blockcopy::ImageIdentity identity,
                blockcopy::identify_file(disk.source_path));
  DROVER_TRY(blockcopy::link_file(disk.source_path, staged(disk)));
  return note(image_key(disk), identity);
}

Status NewImages::clone(const DiskPlan& disk) {
  DROVER_TRY(blockcopy::clone_file(disk.source_path, staged(disk)));
  return finish(disk);
}

Status NewImages::publish(const DiskPlan& disk) {
  if (disk.target_block_device) return {};
  const std::string path = staged(disk);
  if (::access(path.c_str(), F_OK) != 0 && errno == ENOENT) return {};
  return blockcopy::publish(path, disk.target_path);
}

Error NewImages::in_its_own_name(const DiskPlan& disk, Error error) const {
  const std::string hidden = staged(disk);
  if (const std::size_t at = error.message.find(hidden); at != std::string::npos) {
    error.message.replace(at, hidden.size(), disk.target_path);
  }
  return error;
}

Status NewImages::remove(const DiskPlan& disk) {
  if (disk.target_block_device) return {};
  const std::string path = staged(disk);
  DROVER_TRY(blockcopy::unlink_file(path));
  DROVER_ASSIGN(const auto identity, noted(image_key(disk)));
  if (!identity) return {};
  // Whatever libvirt says of the guest.
  const auto lock = memmig::lock_image(disk.target_path);
  if (!lock && lock.error().code != Code::NotFound) return fail(lock.error());
  const auto removed = blockcopy::remove_file(disk.target_path, *identity);
  // Somebody else's file has that name: nothing of ours is left.
  if (!removed && removed.error().code == Code::Busy) {
    log_warning("{}", removed.error().message);
    return {};
  }
  return removed ? Status() : fail(removed.error());
}

Status NewImages::note_source(const DiskPlan& disk) {
  DROVER_ASSIGN(const blockcopy::ImageIdentity identity,
                blockcopy::identify_file(disk.source_path));
  return note(source_key(disk), identity);
}

Result<blockcopy::UnlinkedFile> NewImages::remove_source(const DiskPlan& disk) {
  DROVER_ASSIGN(const auto identity, noted(source_key(disk)));
  if (!identity) return fail(Code::Busy, disk.source_path + ": the job's journal does not know it");
  return blockcopy::remove_file(disk.source_path, *identity);
}

}  // namespace drover::job
