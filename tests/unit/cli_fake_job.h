// SPDX-License-Identifier: Apache-2.0
//
// What the command line's tests move: a made-up guest, and a job that says what it is told to.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/unique_fd.h"
#include "cli/app.h"
#include "job/move.h"

namespace drover::cli::testing {

inline job::Plan sample_plan() {
  job::Plan plan;
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
inline job::Progress sample_progress() {
  job::Progress progress;
  progress.phase = job::Phase::Copy;
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

inline job::Summary sample_summary() {
  const job::Plan plan = sample_plan();
  job::Summary summary;
  summary.guest = plan.guest;
  summary.host = plan.host;
  summary.disks = plan.disks;
  summary.data = 3_GiB;
  summary.wire_bytes = 2_GiB;
  summary.memory_bytes = 256_MiB;
  summary.mirrored_writes = 12345;
  summary.phase_times = {{job::Phase::Reserve, std::chrono::milliseconds(120)},
                         {job::Phase::Copy, std::chrono::milliseconds(27'390)},
                         {job::Phase::Memory, std::chrono::milliseconds(61'000)}};
  summary.total = std::chrono::milliseconds(89'000);
  summary.blackout = std::chrono::microseconds(61'200);
  summary.deleted = {"/var/lib/libvirt/images/web1.raw"};
  summary.kept = {"/dev/vg0/web1-data"};
  summary.notes = {"a block device is never deleted: /dev/vg0/web1-data"};
  summary.runner_peak_memory = 80_MiB;
  summary.receiver_peak_memory = 60_MiB;
  return summary;
}

// A job that fails, or does what is asked for here.
struct FakeJob {
  using Act = std::function<Result<job::Summary>(job::Observer&, job::Cancel&)>;
  Act act = [](job::Observer& observer, job::Cancel&) -> Result<job::Summary> {
    observer.planned(sample_plan());
    observer.progress(sample_progress());
    job::Progress done = sample_progress();
    done.phase = job::Phase::Done;
    observer.progress(done);
    return sample_summary();
  };
  Result<job::Plan> plan = sample_plan();

  // What came in.
  std::vector<job::MoveOptions> moves;
  std::vector<job::MoveOptions> plans;
  std::vector<ReceiveCommand> receives;

  Services services() {
    return {[this](const job::MoveOptions& options, job::Observer& observer, job::Cancel& cancel) {
              moves.push_back(options);
              return act(observer, cancel);
            },
            [this](const job::MoveOptions& options, job::Cancel&) {
              plans.push_back(options);
              return plan;
            },
            [this](const ReceiveCommand& command) {
              receives.push_back(command);
              return 7;
            }};
  }
};

// A file without a name that takes what a program prints.
class Captured {
 public:
  Captured() : fd_(::memfd_create("captured", MFD_CLOEXEC)) {}
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::string text() const {
    std::string out(static_cast<std::size_t>(::lseek(fd_.get(), 0, SEEK_END)), '\0');
    const ssize_t got = ::pread(fd_.get(), out.data(), out.size(), 0);
    out.resize(got < 0 ? 0 : static_cast<std::size_t>(got));
    return out;
  }

 private:
  UniqueFd fd_;
};

struct RunResult {
  int code = -1;
  std::string out;
  std::string err;
};

// run() in this process, with no terminal and no configuration file.
inline RunResult run_cli(const std::vector<std::string>& arguments, const Services& services,
                         const std::string& config_path = "/nonexistent/drover.toml") {
  const Captured out;
  const Captured err;
  RunResult result;
  result.code = run(arguments, services,
                    {.out = out.fd(),
                     .err = err.fd(),
                     .config_path = config_path,
                     .environment = {.term = "xterm", .no_color = ""},
                     .away_from_keyboard = false});
  result.out = out.text();
  result.err = err.text();
  return result;
}

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> out;
  std::size_t start = 0;
  while (start < text.size()) {
    const std::size_t end = std::min(text.find('\n', start), text.size());
    out.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return out;
}

}  // namespace drover::cli::testing
