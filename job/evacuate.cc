// SPDX-License-Identifier: Apache-2.0
#include "job/evacuate.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "job/inbox.h"

namespace drover::job {

namespace {

using namespace std::chrono_literals;
using Job = EvacuateSurvey::Job;

std::string said(const Error& error) {
  return error.hint.empty() ? error.message : error.message + " (" + error.hint + ")";
}

// ---- planning -----------------------------------------------------------------------------------

const Job* job_of(const EvacuateSurvey& survey, const std::string& uuid) {
  const auto found = std::ranges::find(survey.jobs, uuid, &Job::uuid);
  return found == survey.jobs.end() ? nullptr : &*found;
}

void leave_to_their_jobs(EvacuateSurvey& survey) {
  for (EvacuateItem& item : survey.problem.items) {
    if (!item.stays.empty()) continue;
    for (const EvacuateItem::User& user : item.users) {
      const Job* job = job_of(survey, user.uuid);
      if (job == nullptr || !job->alive) continue;
      item.stays =
          fmt::format("job {} is at work on {}: 'drover watch {}' follows it", job->id,
                      item.kind == EvacuateKind::Disk ? "it" : "guest " + user.guest, job->id);
    }
  }
}

// Whether the first plan can begin; what can't becomes an obstacle, and it is planned again.
Status plan_what_can_begin(EvacuateProposal& proposal, EvacuateWorld& world, Cancel& cancel) {
  EvacuateProblem& problem = proposal.survey.problem;
  std::set<std::string> good;  // steps, by where their disks go
  for (bool again = true; std::exchange(again, false);) {
    proposal.plan = plan_evacuation(problem);
    for (const EvacuateStep& step : proposal.plan.steps) {
      const EvacuateItem& first = problem.items[step.files.front().item];
      if (step.kind != EvacuateKind::Disk ||
          job_of(proposal.survey, first.users.front().uuid) != nullptr) {
        continue;  // its job comes first
      }
      std::string key = first.users.front().uuid;
      for (const auto& file : step.files) key += "\n" + file.path;
      if (good.contains(key)) continue;
      if (cancel.requested()) return fail(Code::Cancelled, "cancelled; nothing was changed");
      const Status can = world.check(problem, step, cancel);
      if (can) {
        good.insert(std::move(key));
        continue;
      }
      const Code code = can.error().code;
      if (code == Code::Denied || code == Code::Unreachable || code == Code::Cancelled) {
        return fail(can.error());
      }
      for (const auto& file : step.files) problem.items[file.item].stays = said(can.error());
      again = true;
    }
  }
  return {};
}

// ---- several at once ----------------------------------------------------------------------------

struct Task {
  std::set<std::string> guests;  // UUIDs
  std::string guest;             // for its progress
  Length bytes;
  unsigned files = 1;  // that it could copy at once
  std::function<Status(unsigned files, Observer&, Cancel&)> run;
  std::function<void()> begins;
  std::function<void(const Status&)> ended;
};

// What all of them say, in one voice.
class Chorus {
 public:
  Chorus(EvacuateObserver& observer, const std::vector<Task>& tasks)
      : observer_(observer), tasks_(tasks), parts_(tasks.size()) {}

  void begins(std::size_t task) {
    const std::lock_guard lock(mutex_);
    parts_[task].state = State::Running;
    tasks_[task].begins();
  }
  void ended(std::size_t task, const Status& status) {
    const std::lock_guard lock(mutex_);
    parts_[task].state = status ? State::Done : State::Failed;
    tasks_[task].ended(status);
  }
  void progress(std::size_t task, const Progress& progress) {
    const std::lock_guard lock(mutex_);
    parts_[task].progress = progress;
    observer_.progress(together());
  }
  void note(std::size_t task, const std::string& text) {
    const std::lock_guard lock(mutex_);
    observer_.note(tasks_[task].guest + ": " + text);
  }

 private:
  enum class State { Waiting, Running, Done, Failed };
  struct Part {
    State state = State::Waiting;
    Progress progress;
  };

  [[nodiscard]] Progress together() const {
    Progress out;
    out.phase = Phase::Copy;
    out.elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(now() - begin_);
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      const auto& [state, its] = parts_[i];
      if (state == State::Failed) continue;
      out.data += tasks_[i].bytes;
      if (state == State::Done) out.copied += tasks_[i].bytes;
      if (state != State::Running) continue;
      // As planned, so that the sum is what it was: a job counts what it really finds.
      const double share = its.data == Length() ? 0
                                                : static_cast<double>(its.copied.bytes()) /
                                                      static_cast<double>(its.data.bytes());
      out.copied += Length(static_cast<std::uint64_t>(
          std::min(1.0, share) * static_cast<double>(tasks_[i].bytes.bytes())));
      out.rate += its.rate;
      for (DiskProgress disk : its.disks) {
        disk.disk = tasks_[i].guest + ":" + disk.disk;
        out.disks.push_back(std::move(disk));
      }
      if (out.waiting_for.empty() && !its.waiting_for.empty()) {
        out.waiting_for = its.waiting_for;
        out.waiting = its.waiting;
      }
    }
    if (out.rate != Length()) {
      out.time_left = std::chrono::seconds((out.data - out.copied).bytes() / out.rate.bytes());
    }
    return out;
  }

  EvacuateObserver& observer_;
  const std::vector<Task>& tasks_;
  const Instant begin_ = now();
  std::mutex mutex_;  // guards the rest, and keeps the observer's calls apart
  std::vector<Part> parts_;
};

class Voice final : public Observer {
 public:
  Voice(Chorus& chorus, std::size_t task) : chorus_(chorus), task_(task) {}
  void started(const std::string& /*id*/) override {}
  void planned(const Plan& /*plan*/) override {}
  void progress(const Progress& progress) override { chorus_.progress(task_, progress); }
  void note(const std::string& text) override { chorus_.note(task_, text); }

 private:
  Chorus& chorus_;
  const std::size_t task_;
};

// Begins them in their order, each as soon as fewer than `most` files are copied and none of its
// guests is in another; it gets what is left of `most`, as far as it needs it. After a cancel none
// is begun, and those under way are cancelled.
class Crew {
 public:
  Crew(const std::vector<Task>& tasks, unsigned most, EvacuateObserver& observer, Cancel& cancel)
      : tasks_(tasks), most_(most), cancel_(cancel), chorus_(observer, tasks) {
    for (std::size_t i = 0; i < tasks.size(); ++i) waiting_.push_back(i);
  }

  void run() {
    constexpr std::size_t kCancel = static_cast<std::size_t>(-1);
    for (;;) {
      if (!cancel_.requested()) begin_what_can();
      if (running_.empty()) return;
      const auto event = inbox_.wait(cancel_, 1h, kCancel);
      if (!event) continue;
      if (*event != kCancel) {
        running_.at(*event)->thread.join();
        running_.erase(*event);
        continue;
      }
      for (const auto& [task, running] : running_) running->cancel.request();
    }
  }

 private:
  struct Running {
    // Its own: one that somebody cancels by `drover cancel` cancels no other.
    Cancel cancel;
    unsigned files = 0;
    std::thread thread;
  };

  void begin_what_can() {
    std::set<std::string> busy;
    unsigned left = most_;
    for (const auto& [task, running] : running_) {
      busy.insert(tasks_[task].guests.begin(), tasks_[task].guests.end());
      left -= running->files;
    }
    for (auto at = waiting_.begin(); at != waiting_.end() && left > 0;) {
      const std::set<std::string>& guests = tasks_[*at].guests;
      if (std::ranges::any_of(guests, [&](const auto& guest) { return busy.contains(guest); })) {
        ++at;
        continue;
      }
      busy.insert(guests.begin(), guests.end());
      const unsigned files = std::clamp(tasks_[*at].files, 1U, left);
      begin(*at, files);
      left -= files;
      at = waiting_.erase(at);
    }
  }

  void begin(std::size_t task, unsigned files) {
    chorus_.begins(task);
    Running& running = *running_.emplace(task, std::make_unique<Running>()).first->second;
    running.files = files;
    running.thread = std::thread([this, task, files, &running] {
      log_to_stderr();  // until it opens a job's
      Voice voice(chorus_, task);
      chorus_.ended(task, tasks_[task].run(files, voice, running.cancel));
      inbox_.push(task);
    });
  }

  const std::vector<Task>& tasks_;
  const unsigned most_;
  Cancel& cancel_;
  Chorus chorus_;
  std::vector<std::size_t> waiting_;
  std::map<std::size_t, std::unique_ptr<Running>> running_;
  Inbox<std::size_t> inbox_;
};

// ---- carrying out -------------------------------------------------------------------------------

class Evacuation {
 public:
  Evacuation(const EvacuateOptions& options, EvacuateWorld& world, EvacuateObserver& observer,
             Cancel& cancel)
      : options_(options), world_(world), observer_(observer), cancel_(cancel) {}

  Result<EvacuateSummary> run() {
    DROVER_TRY(resume_all());
    DROVER_ASSIGN(const EvacuateProposal proposal, propose_evacuation(options_, world_, cancel_));
    observer_.planned(proposal);
    if (!proposal.plan.room) {
      return fail(Code::NoSpace,
                  fmt::format("there is not room for all that is on {}; nothing was {}changed",
                              options_.from, summary_.resumed > 0 ? "else " : ""),
                  "name another storage with --to, or make room");
    }
    do_steps(proposal);
    if (cancel_.requested()) return fail(cancelled());
    return end();
  }

 private:
  [[nodiscard]] Error cancelled() const {
    return {
        Code::Cancelled,
        fmt::format("emptying {} was stopped; what is done stays, what was under way was undone",
                    options_.from),
        "the same command again goes on with the rest", false};
  }

  Status resume_all() {
    DROVER_ASSIGN(const EvacuateSurvey survey, world_.look(options_));
    DROVER_TRY(world_.claim(survey));
    std::vector<Task> tasks;
    for (const Job& job : survey.jobs) {
      if (job.alive) continue;
      tasks.push_back({.guests = {job.uuid},
                       .guest = job.guest,
                       .bytes = {},
                       .files = job.files,
                       .run = [&](unsigned /*files*/, Observer& voice,
                                  Cancel& cancel) { return world_.resume(job.id, voice, cancel); },
                       .begins = [&] { observer_.resumes(job); },
                       .ended =
                           [&](const Status& status) {
                             ++(status ? summary_.resumed : summary_.failed);
                             observer_.resumed(job, status);
                           }});
    }
    Crew(tasks, options_.parallel, observer_, cancel_).run();
    if (cancel_.requested()) return fail(cancelled());
    return {};
  }

  void do_steps(const EvacuateProposal& proposal) {
    const EvacuateProblem& problem = proposal.survey.problem;
    const auto& steps = proposal.plan.steps;
    std::size_t files = 0;
    for (const EvacuateStep& step : steps) files += step.files.size();
    const std::size_t at_once = std::clamp<std::size_t>(files, 1, options_.parallel);
    // No limit stays none, and a limit stays one.
    const Length each(options_.bandwidth == Length()
                          ? 0
                          : std::max<std::uint64_t>(1, options_.bandwidth.bytes() / at_once));
    std::vector<Task> tasks;
    for (std::size_t i = 0; i < steps.size(); ++i) {
      Task task;
      for (const auto& file : steps[i].files) {
        for (const auto& user : problem.items[file.item].users) task.guests.insert(user.uuid);
      }
      const EvacuateItem& first = problem.items[steps[i].files.front().item];
      task.guest = first.users.empty() ? first.path : first.users.front().guest;
      task.bytes = steps[i].bytes;
      task.files = static_cast<unsigned>(steps[i].files.size());
      task.run = [this, &problem, &step = steps[i], each](unsigned its, Observer& voice,
                                                          Cancel& cancel) {
        return world_.carry_out(problem, step, {its, Length(each.bytes() * its)}, voice, cancel);
      };
      task.begins = [this, &proposal, i] { observer_.begins(proposal, i); };
      task.ended = [this, &proposal, i](const Status& status) { ended(proposal, i, status); };
      tasks.push_back(std::move(task));
    }
    Crew(tasks, options_.parallel, observer_, cancel_).run();
  }

  void ended(const EvacuateProposal& proposal, std::size_t i, const Status& status) {
    const EvacuateStep& step = proposal.plan.steps[i];
    if (status) {
      ++summary_.steps;
      summary_.bytes += step.bytes;
    } else {
      ++summary_.failed;
      for (const auto& file : step.files) {
        failures_[proposal.survey.problem.items[file.item].path] = said(status.error());
      }
    }
    observer_.ended(proposal, i, status);
  }

  Result<EvacuateSummary> end() {
    DROVER_ASSIGN(EvacuateProposal last, propose_evacuation(options_, world_, cancel_));
    std::map<std::size_t, std::string> why;
    for (const auto& obstacle : last.plan.obstacles) why[obstacle.item] = obstacle.why;
    for (std::size_t i = 0; i < last.survey.problem.items.size(); ++i) {
      EvacuateItem& item = last.survey.problem.items[i];
      std::string reason = "it could go now: the same command again takes it";
      if (const auto found = why.find(i); found != why.end()) reason = found->second;
      if (const auto found = failures_.find(item.path); found != failures_.end()) {
        reason = found->second;
      }
      summary_.left.push_back({std::move(item), std::move(reason)});
    }
    summary_.source = std::move(last.survey.source);
    summary_.others = std::move(last.survey.others);
    return std::move(summary_);
  }

  const EvacuateOptions& options_;
  EvacuateWorld& world_;
  EvacuateObserver& observer_;
  Cancel& cancel_;
  EvacuateSummary summary_;
  std::map<std::string, std::string> failures_;  // by path
};

}  // namespace

Result<EvacuateProposal> propose_evacuation(const EvacuateOptions& options, EvacuateWorld& world,
                                            Cancel& cancel) {
  EvacuateProposal out;
  DROVER_ASSIGN(out.survey, world.look(options));
  leave_to_their_jobs(out.survey);
  DROVER_TRY(plan_what_can_begin(out, world, cancel));
  return out;
}

Result<EvacuateSummary> evacuate(const EvacuateOptions& options, EvacuateWorld& world,
                                 EvacuateObserver& observer, Cancel& cancel) {
  log_to_stderr();  // not to the log of the job that was begun last
  return Evacuation(options, world, observer, cancel).run();
}

}  // namespace drover::job
