// SPDX-License-Identifier: Apache-2.0
//
// A relocation's plan and its pre-flight: which of a guest's disks go where on the same host, and
// everything that would stop that, found before anything is changed.
//
//   RelocationPlan plan = plan_relocation(guest, {.directory = "/mnt/array2"});
//   DROVER_ASSIGN(ProbeAnswer probe, probe_here(probe_request(plan)));
//   settle_relocation(plan, facts);
//   for (const Finding& finding : examine_relocation(facts, plan)) print it
//
// Pure: facts in, findings out. Every rule has a name (Finding::rule) that stays the same.
//
// Threads: any.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/units.h"
#include "memmig/disk_host.h"
#include "memmig/hypervisor.h"
#include "memmig/preflight.h"
#include "memmig/probe.h"

namespace drover::memmig {

struct RelocationWish {
  std::string directory;  // for the disks that have no place of their own; may be empty
  struct Place {
    std::string path;
    bool directory = false;  // the file gets its name there
  };
  std::map<std::string, Place> places;  // by disk
  std::vector<std::string> disks;       // only these; empty: all that can be, or those with places
  std::string format;                   // "raw", "qcow2"; empty: as it is
  bool keep_source = false;
};

struct RelocationPlan {
  std::vector<PlannedDisk> disks;  // node and plain are not needed
  std::set<std::string> renamed;   // of them: the same file gets another name, nothing is copied
  struct Stays {
    std::string disk;
    std::string rule;
    std::string why;     // "is a CD-ROM"
    bool named = false;  // the user wants it to go
  };
  std::vector<Stays> staying;
  std::vector<std::string> unknown_disks;
};

struct RelocationFacts {
  const GuestInfo& guest;
  const GuestPlaces& places;
  const ProbeAnswer& probe;           // of probe_request()'s paths
  const std::vector<ImageUse>& uses;  // whole chains
  std::set<std::string> same_file;    // disks whose target is there already and is their source
  std::set<std::string> linked;       // disks whose source path is a symbolic link
};

// Whether the guest's QEMU copies (it runs, or stands still) or drover itself.
bool copied_live(const GuestInfo& guest);

// Never fails: what cannot be is examine_relocation()'s to say.
RelocationPlan plan_relocation(const GuestInfo& guest, const RelocationWish& wish);
ProbeRequest probe_request(const RelocationPlan& plan);
// Fills in what the facts say: devices, what needs only another name, what must not be deleted.
void settle_relocation(RelocationPlan& plan, const RelocationFacts& facts, bool keep_source);
// Blockers first.
std::vector<Finding> examine_relocation(const RelocationFacts& facts, const RelocationPlan& plan);

// Who but the disk itself uses the image; empty: nobody. `same` says whether two paths name one
// file.
using SameFile = std::function<bool(const std::string&, const std::string&)>;
std::string other_user(const std::vector<ImageUse>& uses, const std::string& path,
                       const std::string& guest, const std::string& disk, const SameFile& same);

}  // namespace drover::memmig
