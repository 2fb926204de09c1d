// SPDX-License-Identifier: Apache-2.0
//
// A made-up guest's move, at several times: what tests of jobs on disk and of the command line
// show.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>

#include "base/check.h"
#include "job/job_store.h"
#include "job/move.h"

namespace drover::job::testing {

inline Plan sample_plan() {
  Plan plan;
  plan.guest = "web1";
  plan.uuid = "6e0fb4a2-6d4c-4f59-9a39-0f6b0c1fdb57";
  plan.host = "hostb";
  plan.memory = 512_MiB;
  plan.disks = {{.disk = "vda",
                 .source_path = "/var/lib/libvirt/images/web1.raw",
                 .source_format = "raw",
                 .target_path = "/srv/nvme/web1.raw",
                 .target_format = "raw",
                 .delete_source = true,
                 .virtual_size = 4_GiB,
                 .allocation = 2_GiB},
                {.disk = "vdb",
                 .source_path = "/dev/vg0/web1-data",
                 .source_format = "raw",
                 .source_block_device = true,
                 .target_path = "/srv/web1-data.qcow2",
                 .target_format = "qcow2",
                 .delete_source = false,
                 .virtual_size = 1_GiB,
                 .allocation = 1_GiB}};
  return plan;
}

inline memmig::Finding sample_blocker() {
  return {memmig::Severity::Blocker,
          "target-file-exists",
          "disk vda: /srv/nvme/web1.raw is there already on hostb",
          "drover never overwrites a file",
          "remove it, or choose another path with --disk vda=PATH",
          "vda"};
}

inline memmig::Finding sample_warning() {
  return {memmig::Severity::Warning, "disk-format", "disk vdb becomes qcow2", "", "", "vdb"};
}

// In the middle of the copy: 1.5 of 3 GiB.
inline Progress sample_progress() {
  Progress progress;
  progress.phase = Phase::Copy;
  progress.elapsed = std::chrono::seconds(14);
  progress.disks = {{"vda", 4_GiB, 2_GiB, 1_GiB, 1_GiB}, {"vdb", 1_GiB, 1_GiB, 512_MiB, 512_MiB}};
  progress.data = 3_GiB;
  progress.copied = Length(3ULL << 29);
  progress.rate = 110_MiB;
  progress.time_left = std::chrono::seconds(14);
  progress.mirrored_writes = 1234;
  progress.wire_bytes = 1_GiB;
  return progress;
}

inline Summary sample_summary() {
  const Plan plan = sample_plan();
  Summary summary;
  summary.guest = plan.guest;
  summary.host = plan.host;
  summary.disks = plan.disks;
  summary.data = 3_GiB;
  summary.wire_bytes = 2_GiB;
  summary.memory_bytes = 256_MiB;
  summary.mirrored_writes = 12345;
  summary.phase_times = {{Phase::Reserve, std::chrono::milliseconds(120)},
                         {Phase::Copy, std::chrono::milliseconds(27'390)},
                         {Phase::Memory, std::chrono::milliseconds(61'000)}};
  summary.total = std::chrono::milliseconds(89'000);
  summary.blackout = std::chrono::microseconds(61'200);
  using us = std::chrono::microseconds;
  summary.blackout_parts = BlackoutParts{.quiesce = us(3100),
                                         .disks = us(9800),
                                         .drain = us(1200),
                                         .barrier = us(8400),
                                         .compare = us(150),
                                         .flush = us(6100),
                                         .release = us(1900),
                                         .memory = us(41'300),
                                         .wait = us(200),
                                         .guard = us(90),
                                         .resume = us(16'510)};
  summary.deleted = {"/var/lib/libvirt/images/web1.raw"};
  summary.kept = {"/dev/vg0/web1-data"};
  summary.notes = {"a block device is never deleted: /dev/vg0/web1-data"};
  summary.runner_peak_memory = 80_MiB;
  summary.receiver_peak_memory = 60_MiB;
  return summary;
}

// Jobs in a directory that goes when the test ends.
class TemporaryPlaces {
 public:
  TemporaryPlaces() {
    std::string name = "/tmp/drover-test-XXXXXX";
    CHECK(::mkdtemp(name.data()) != nullptr, "a temporary directory can be made");
    directory_ = name;
  }
  ~TemporaryPlaces() {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
  TemporaryPlaces(const TemporaryPlaces&) = delete;
  TemporaryPlaces& operator=(const TemporaryPlaces&) = delete;

  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] JobPlaces places() const {
    return {.state = directory_ + "/state", .logs = directory_ + "/log"};
  }

 private:
  std::string directory_;
};

inline JobRecord sample_record() {
  JobRecord record;
  record.options.guest = "web1";
  record.options.host = "hostb";
  record.plan = sample_plan();
  return record;
}

}  // namespace drover::job::testing
