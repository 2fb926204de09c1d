// SPDX-License-Identifier: Apache-2.0
#include "job/prepare_relocation.h"

#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "base/log.h"
#include "blockcopy/image_file.h"
#include "memmig/image_chain.h"
#include "memmig/libvirt_hypervisor.h"
#include "memmig/preflight.h"
#include "memmig/relocation.h"

namespace drover::job {
namespace {

bool is_directory(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool is_link(const std::string& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
}

// Of a guest that is off libvirt knows no more than the definition says.
void look_at_images(memmig::GuestInfo& guest) {
  if (memmig::copied_live(guest)) return;
  for (memmig::GuestDisk& disk : guest.disks) {
    if (disk.kind != memmig::DiskKind::File && disk.kind != memmig::DiskKind::Block) continue;
    const auto layout = memmig::look_at_image(disk.path, disk.format);
    if (!layout) {
      log_debug("{}", layout.error().to_string());
      disk.virtual_size = Length();  // a finding says that it can't be read
      continue;
    }
    disk.virtual_size = layout->virtual_size;
    disk.cluster_size = layout->cluster_size;
    disk.backing_chain = !layout->backing.empty();
    disk.encrypted = disk.encrypted || layout->encrypted;
    if (disk.kind == memmig::DiskKind::File) disk.allocation = layout->allocation;
  }
}

Result<memmig::RelocationWish> wish_of(const RelocateOptions& options, memmig::DiskHost& host) {
  memmig::RelocationWish wish;
  wish.directory = options.directory;
  if (!options.pool.empty()) {
    DROVER_ASSIGN(wish.directory, host.pool_directory(options.pool));
  }
  for (const auto& [disk, path] : options.places) {
    wish.places[disk] = {path, is_directory(path) || path.ends_with('/')};
  }
  wish.disks = options.disks;
  wish.format = options.format;
  wish.keep_source = options.keep_source;
  return wish;
}

std::string place_text(const RelocateOptions& options) {
  if (!options.pool.empty()) return "pool " + options.pool;
  if (!options.directory.empty()) return options.directory;
  return options.places.size() == 1 ? options.places.begin()->second : "other places";
}

Plan shown_plan(const memmig::GuestInfo& guest, const memmig::RelocationPlan& planned,
                const RelocateOptions& options) {
  Plan plan;
  plan.kind = Kind::Relocate;
  plan.guest = guest.name;
  plan.uuid = guest.uuid;
  plan.host = place_text(options);
  for (const memmig::PlannedDisk& disk : planned.disks) {
    plan.disks.push_back({.disk = disk.disk,
                          .source_path = disk.source_path,
                          .source_format = disk.source_format,
                          .source_block_device = disk.source_block_device,
                          .target_path = disk.target_path,
                          .target_format = disk.target_format,
                          .target_block_device = disk.target_block_device,
                          .delete_source = disk.delete_source,
                          .renamed = planned.renamed.contains(disk.disk),
                          .virtual_size = disk.virtual_size,
                          .allocation = disk.allocation});
  }
  return plan;
}

}  // namespace

Result<std::vector<memmig::ImageUse>> all_image_uses(memmig::DiskHost& host) {
  DROVER_ASSIGN(std::vector<memmig::ImageUse> uses, host.image_uses());
  memmig::complete_chains(uses);
  return uses;
}

Result<PreparedRelocation> prepare_relocation(const RelocateOptions& options) {
  if (::geteuid() != 0) {
    return fail(Code::Denied, "drover needs root: it reads the guests' disks and drives libvirt",
                "run it with sudo");
  }
  PreparedRelocation prepared;
  DROVER_ASSIGN(prepared.host, memmig::connect_disk_host({.uri = options.uri}));
  memmig::DiskHost& host = *prepared.host;
  DROVER_ASSIGN(prepared.guest, host.describe(options.guest));
  look_at_images(prepared.guest);
  DROVER_ASSIGN(const memmig::RelocationWish wish, wish_of(options, host));
  memmig::RelocationPlan planned = memmig::plan_relocation(prepared.guest, wish);
  DROVER_ASSIGN(const memmig::ProbeAnswer probe,
                memmig::probe_here(memmig::probe_request(planned)));
  DROVER_ASSIGN(const memmig::GuestPlaces places, host.disk_places(prepared.guest.uuid));
  DROVER_ASSIGN(const std::vector<memmig::ImageUse> uses, all_image_uses(host));
  memmig::RelocationFacts facts{prepared.guest, places, probe, uses, {}, {}};
  for (const memmig::PlannedDisk& disk : planned.disks) {
    if (blockcopy::same_file(disk.source_path, disk.target_path)) {
      facts.same_file.insert(disk.disk);
    }
    if (is_link(disk.source_path)) facts.linked.insert(disk.disk);
  }
  memmig::settle_relocation(planned, facts, options.keep_source);
  std::vector<memmig::Finding> findings = memmig::examine_relocation(facts, planned);
  for (memmig::PlannedDisk& disk : planned.disks) {
    if (!disk.delete_source) continue;
    const std::string user = memmig::other_user(uses, disk.source_path, prepared.guest.name,
                                                disk.disk, blockcopy::same_file);
    if (user.empty()) continue;
    disk.delete_source = false;
    findings.push_back({memmig::Severity::Warning, "source-in-use",
                        disk.source_path + " is used by " + user + ": it is not deleted", "", "",
                        disk.disk});
  }
  prepared.plan = shown_plan(prepared.guest, planned, options);
  prepared.plan.findings = std::move(findings);
  return prepared;
}

Result<PreparedRelocation> prepare_relocation_again(const RelocateOptions& options,
                                                    const Plan& plan) {
  PreparedRelocation prepared;
  prepared.plan = plan;
  DROVER_ASSIGN(prepared.host, memmig::connect_disk_host({.uri = options.uri}));
  auto guest = prepared.host->describe(plan.uuid);
  if (guest) {
    prepared.guest = std::move(*guest);
    look_at_images(prepared.guest);
  } else if (guest.error().code != Code::NotFound) {
    return fail(guest.error());
  }
  prepared.guest.name = plan.guest;
  prepared.guest.uuid = plan.uuid;
  return prepared;
}

}  // namespace drover::job
