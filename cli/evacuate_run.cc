// SPDX-License-Identifier: Apache-2.0
#include "cli/evacuate_run.h"

#include "cli/evacuate_view.h"
#include "cli/exit_codes.h"
#include "cli/job_commands.h"
#include "cli/run_job.h"

namespace drover::cli {

namespace {

class Teller final : public job::EvacuateObserver {
 public:
  Teller(Reporter& reporter, const Style& style) : reporter_(reporter), style_(style) {}

  void resumes(const job::EvacuateSurvey::Job& job) override {
    reporter_.say(render_resume(job), json_resume(job, "begun", {}));
  }
  void resumed(const job::EvacuateSurvey::Job& job, const Status& status) override {
    reporter_.say(render_resumed(job, status, style_),
                  json_resume(job, status ? "done" : "failed", status));
  }
  void planned(const job::EvacuateProposal& proposal) override {
    reporter_.say(render_evacuation(proposal, style_), json_evacuation(proposal));
  }
  void begins(const job::EvacuateProposal& proposal, std::size_t step) override {
    reporter_.say(render_step_begins(proposal, step), json_step(proposal, step, "begun", {}));
  }
  void ended(const job::EvacuateProposal& proposal, std::size_t step,
             const Status& status) override {
    reporter_.say(render_step_ended(proposal, step, status, style_),
                  json_step(proposal, step, status ? "done" : "failed", status));
  }
  void progress(const job::Progress& progress) override { reporter_.progress(progress); }
  void note(const std::string& text) override { reporter_.note(text); }

 private:
  Reporter& reporter_;
  const Style style_;
};

int propose(const EvacuateCommand& command, job::EvacuateWorld& world, Reporter& reporter,
            const Style& style, job::Cancel& cancel) {
  const auto proposal =
      guarded([&] { return job::propose_evacuation(command.options, world, cancel); });
  if (!proposal) return report(proposal.error(), reporter);
  reporter.say(render_evacuation(*proposal, style) + "\nNothing was changed.\n",
               json_evacuation(*proposal));
  if (!proposal->plan.room) return kExitNoSpace;
  return proposal->plan.obstacles.empty() ? kExitOk : kExitBlocked;
}

int carry_out(const EvacuateCommand& command, job::EvacuateWorld& world, Reporter& reporter,
              const Style& style, job::Cancel& cancel) {
  Teller teller(reporter, style);
  const auto summary =
      guarded([&] { return job::evacuate(command.options, world, teller, cancel); });
  if (!summary) return report(summary.error(), reporter);
  reporter.say(render_evacuated(*summary, style), json_evacuated(*summary));
  if (summary->empty()) return kExitOk;
  return summary->failed > 0 ? kExitFailed : kExitBlocked;
}

}  // namespace

int run_evacuate(const EvacuateCommand& command, const Services& services,
                 const Surroundings& surroundings) {
  const Request request{
      .purpose = command.dry_run ? Purpose::Examine : Purpose::Move,
      .json = command.json,
      .verbose = command.verbose,
      .kind = job::Kind::Relocate,
      .interrupted = command.dry_run
                         ? ""
                         : "interrupted: what is under way is undone, what is done stays. Please "
                           "wait."};
  const Style style(terminal_of(surroundings.out, surroundings.environment).colours &&
                    !command.json);
  const auto work = command.dry_run ? propose : carry_out;
  return run_in_front(request, surroundings, [&](Reporter& reporter, job::Cancel& cancel) {
    const auto world = services.evacuate_world(command.options.uri);
    return work(command, *world, reporter, style, cancel);
  });
}

}  // namespace drover::cli
