// SPDX-License-Identifier: Apache-2.0
//
// Pre-flight: everything that would stop a move, found before anything is changed.
//
//   DROVER_ASSIGN(GuestInfo guest, source->describe("web1"));
//   MovePlan plan = plan_move(guest, {.places = {{"vda", "/srv/nvme/web1.raw"}}});
//   DROVER_ASSIGN(HostFacts facts, target->facts(host_question(guest)));
//   ... send to_json(probe_request(guest, plan)) to the target, get `probe` back
//   for (const Finding& finding : examine({guest, source_facts, here, facts, probe, plan})) print
//   it
//
// All functions are pure: facts in, findings out. Every rule has a name (Finding::rule) that stays
// the same, for --json and tests.
//
// Threads: any.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "memmig/domain_xml.h"
#include "memmig/hypervisor.h"
#include "memmig/probe.h"

namespace drover::memmig {

enum class Severity { Warning, Blocker };

struct Finding {
  Severity severity = Severity::Blocker;
  std::string rule;   // "target-file-exists"
  std::string what;   // "disk vda: /srv/web1.raw is there already on hostb"
  std::string why;    // "drover never overwrites a file"; may be empty
  std::string to_do;  // "remove it, or choose another path with --disk vda=PATH"; may be empty
  std::string disk;   // "vda", or empty
};

// What the user wants.
struct PlanOptions {
  struct Place {
    std::string disk;
    std::string path;
  };
  std::vector<Place> places;       // --disk TARGET=PATH; the others keep their path
  std::vector<std::string> eject;  // drives whose medium is taken out
};

// One disk that is copied.
struct PlannedDisk {
  std::string disk;
  bool named = false;  // by the user
  std::string source_path;
  std::string source_format;
  std::string source_node;
  bool source_block_device = false;
  // The source file holds the disk's bytes as the guest sees them: drover may read it directly. If
  // not, through QEMU's export.
  bool source_plain = false;
  std::string target_path;
  std::string target_format;  // "raw" or "qcow2"
  // A path that exists on the target as a block device; set by settle_plan().
  bool target_block_device = false;
  bool mirror = true;         // false: nobody writes to it (read-only)
  bool delete_source = true;  // after the move; false: others may use it (read-only media, devices)
  Length virtual_size;
  Length allocation;  // what the copy takes at most; the virtual size where it is not known
  Length cluster_size;
};

struct MovePlan {
  std::vector<PlannedDisk> disks;
  std::vector<std::string> eject;
  std::vector<std::string> staying;         // media that must be on the target at the same path
  std::vector<std::string> unknown_disks;   // named by the user, not the guest's
  std::vector<std::string> repeated_disks;  // named twice
};

// Which disks are copied to where. Never fails: what cannot be is examine()'s to say.
//   Disks (files, devices, pool volumes): copied, to the same path unless told otherwise.
//   Read-only disks: copied without a mirror; the source's file stays.
//   CD-ROMs and floppies: an empty one stays empty. A medium stays in the drive if the target has
//   it at the same path; it is copied if --disk names the drive; or it is ejected.
MovePlan plan_move(const GuestInfo& guest, const PlanOptions& options);
// Fills in what the probe knows: which target paths are block devices.
void settle_plan(MovePlan& plan, const ProbeAnswer& probe);

HostQuestion host_question(const GuestInfo& guest);
ProbeRequest probe_request(const GuestInfo& guest, const MovePlan& plan);

struct Facts {
  const GuestInfo& guest;
  const HostFacts& source;
  const ProbeAnswer& source_probe;  // probe_here({})
  const HostFacts& target;
  const ProbeAnswer& target_probe;
  const MovePlan& plan;
};

// Space beyond the data that the target's filesystem must have, and memory beyond the guest's.
inline constexpr Length kSpaceMargin = 64_MiB;
inline constexpr Length kMemoryMargin = 128_MiB;

// Blockers first.
std::vector<Finding> examine(const Facts& facts);
// The rules that need only the source: for an early answer, before the target is asked.
std::vector<Finding> examine_source(const GuestInfo& guest, const MovePlan& plan);

[[nodiscard]] bool blocked(const std::vector<Finding>& findings);
// The first blockers as one Error (Blocked); for a move that was not checked before.
[[nodiscard]] Error blocked_error(const std::vector<Finding>& findings);

// The definitions' rewrite for this plan (memmig/domain_xml.h).
Rewrite rewrite_of(const MovePlan& plan, bool live);

}  // namespace drover::memmig
