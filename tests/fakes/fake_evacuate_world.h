// SPDX-License-Identifier: Apache-2.0
//
// A storage that only exists as a list of files, for tests of job/evacuate.h and of its command.
// A step takes until the test lets it go on, or no time at all.
//
// Threads: steps run on the driver's; the public members belong to the test before and after.
#pragma once

#include <poll.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "job/evacuate.h"

namespace drover::job::testing {

class FakeEvacuateWorld : public EvacuateWorld {
 public:
  std::vector<EvacuateItem> items;
  std::vector<EvacuateProblem::Target> targets;
  std::vector<std::string> others;
  std::vector<EvacuateSurvey::Job> jobs;
  bool claimed = false;                  // by another
  std::map<std::string, Error> blocked;  // by a disk's path: what check() answers
  std::map<std::string, Error> broken;   // by a path or a job: carry_out(), resume()
  std::set<std::string> stuck;           // paths and jobs: under way until they are cancelled

  // What was done, in the order in which it ended: "web1.raw > /mnt/b", "resume web1-1".
  std::vector<std::string> log;
  std::size_t most_at_once = 0;
  unsigned most_files = 0;   // copied at once
  bool guest_twice = false;  // two steps of one guest at once
  std::vector<Length> bandwidths;

  static EvacuateItem file(EvacuateKind kind, const std::string& name, Length bytes,
                           std::vector<std::string> guests) {
    EvacuateItem item{.kind = kind, .path = "/mnt/a/" + name, .bytes = bytes};
    for (const std::string& guest : guests) {
      item.users.push_back({guest, "uuid-of-" + guest,
                            kind == EvacuateKind::Disk     ? "vda"
                            : kind == EvacuateKind::Medium ? "sda"
                                                           : ""});
    }
    return item;
  }

  // Four guests, a shared ISO image, an NVRAM file.
  static void fill(FakeEvacuateWorld& world) {
    world.items = {file(EvacuateKind::Disk, "db1.raw", 40_GiB, {"db1"}),
                   file(EvacuateKind::Disk, "web1.raw", 30_GiB, {"web1"}),
                   file(EvacuateKind::Disk, "web2.raw", 20_GiB, {"web2"}),
                   file(EvacuateKind::Disk, "web3.raw", 10_GiB, {"web3"}),
                   file(EvacuateKind::Medium, "debian.iso", 1_GiB, {"web1", "web2"}),
                   file(EvacuateKind::Nvram, "web3_VARS.fd", 1_MiB, {"web3"})};
    world.targets = {{"/mnt/b", "/mnt/b", 100_GiB, {}}, {"/mnt/c", "/mnt/c", 50_GiB, {}}};
    world.others = {"/mnt/a/notes.txt"};
  }

  // Waits until so many steps are under way.
  void wait_for_running(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return running_.size() >= count; });
  }

  // Waits until so many steps have begun.
  void wait_for_begun(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return begun_ >= count; });
  }

  Status claim(const EvacuateSurvey& /*survey*/) override {
    if (claimed) return fail(Code::Busy, "another drover empties it");
    return {};
  }

  Result<EvacuateSurvey> look(const EvacuateOptions& options) override {
    const std::lock_guard lock(mutex_);
    EvacuateSurvey survey;
    survey.source.name = options.from;
    for (const auto& target : targets) {
      memmig::Storage storage;
      storage.name = target.name;
      storage.directory = target.directory;
      survey.targets.push_back(storage);
    }
    survey.problem.items = items;
    survey.problem.targets = targets;
    survey.others = others;
    survey.jobs = jobs;
    return survey;
  }

  Status check(const EvacuateProblem& problem, const EvacuateStep& step,
               Cancel& /*cancel*/) override {
    const auto found = blocked.find(problem.items[step.files.front().item].path);
    if (found != blocked.end()) return fail(found->second);
    return {};
  }

  Status carry_out(const EvacuateProblem& problem, const EvacuateStep& step,
                   const EvacuateShare& share, Observer& observer, Cancel& cancel) override {
    const EvacuateItem item = problem.items[step.files.front().item];
    std::set<std::string> guests;
    for (const auto& user : item.users) guests.insert(user.uuid);
    {
      const std::lock_guard lock(mutex_);
      bandwidths.push_back(share.bandwidth);
      files_ += share.files;
      most_files = std::max(most_files, files_);
    }
    const Status done = work(item.path, guests, item.bytes, observer, cancel);
    const std::lock_guard lock(mutex_);
    files_ -= share.files;
    DROVER_TRY(done);
    for (const auto& file : step.files) {
      const std::string& path = problem.items[file.item].path;
      std::erase_if(items, [&](const EvacuateItem& one) { return one.path == path; });
      targets[file.target].free -= problem.items[file.item].bytes;
      log.push_back(path.substr(path.rfind('/') + 1) + " > " + targets[file.target].name);
    }
    return {};
  }

  Status resume(const std::string& job, Observer& observer, Cancel& cancel) override {
    DROVER_TRY(work(job, {job}, 1_GiB, observer, cancel));
    const std::lock_guard lock(mutex_);
    log.push_back("resume " + job);
    const auto its = std::ranges::find(jobs, job, &EvacuateSurvey::Job::id);
    std::erase_if(items, [&](const EvacuateItem& one) {
      return one.kind == EvacuateKind::Disk && one.users.front().uuid == its->uuid;
    });
    jobs.erase(its);
    return {};
  }

 private:
  Status work(const std::string& what, const std::set<std::string>& guests, Length bytes,
              Observer& observer, Cancel& cancel) {
    {
      const std::lock_guard lock(mutex_);
      for (const auto& [other, its] : running_) {
        for (const std::string& guest : guests) guest_twice = guest_twice || its.contains(guest);
      }
      running_[what] = guests;
      ++begun_;
      most_at_once = std::max(most_at_once, running_.size());
      changed_.notify_all();
    }
    Progress progress;
    progress.phase = Phase::Copy;
    progress.data = bytes;
    progress.copied = Length(bytes.bytes() / 2);
    progress.disks = {{.disk = "vda", .size = bytes}};
    observer.progress(progress);
    Status status;
    if (stuck.contains(what)) {
      while (!cancel.requested()) {
        pollfd stop{cancel.fd(), POLLIN, 0};
        ::poll(&stop, 1, -1);
      }
      status = fail(Code::Cancelled, "cancelled");
    }
    if (const auto found = broken.find(what); found != broken.end()) status = fail(found->second);
    const std::lock_guard lock(mutex_);
    running_.erase(what);
    return status;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t begun_ = 0;
  unsigned files_ = 0;
  std::map<std::string, std::set<std::string>> running_;
};

}  // namespace drover::job::testing
