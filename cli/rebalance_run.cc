// SPDX-License-Identifier: Apache-2.0
#include "cli/rebalance_run.h"

#include "cli/exit_codes.h"
#include "cli/job_commands.h"
#include "cli/rebalance_view.h"
#include "cli/run_job.h"
#include "cli/values.h"

namespace drover::cli {

namespace {

// What the moves say goes to the reporter, but for their plans and ends: those are ours.
class Teller final : public job::RebalanceObserver, public job::Observer {
 public:
  Teller(Reporter& reporter, const Style& style) : reporter_(reporter), style_(style) {}

  void proposed(const job::RebalanceProposal& proposal, const std::string& why) override {
    reporter_.say(render_proposal(proposal, why, style_), json_proposal(proposal, why));
  }
  void begins(std::size_t number, const job::RebalanceMove& move) override {
    reporter_.next(move.guest);
    reporter_.say(render_begin({number, move}, style_), json_begin({number, move}));
  }
  void ended(std::size_t number, const job::RebalanceMove& move, const Status& status) override {
    reporter_.say(render_end({number, move}, status, style_), json_end({number, move}, status));
  }
  job::Observer& of_move() override { return *this; }

  void started(const std::string& id) override { reporter_.started(id); }
  void planned(const job::Plan& /*plan*/) override {}
  void progress(const job::Progress& progress) override { reporter_.progress(progress); }
  void note(const std::string& text) override { reporter_.note(text); }

 private:
  Reporter& reporter_;
  const Style style_;
};

int propose(const RebalanceCommand& command, job::RebalanceWorld& world, Reporter& reporter,
            const Style& style, job::Cancel& cancel) {
  const auto proposal =
      guarded([&] { return job::propose_rebalance(command.options, world, cancel); });
  if (!proposal) return report(proposal.error(), reporter);
  std::string text = render_proposal(*proposal, "", style);
  if (!proposal->moves.empty()) text += "\nNothing was changed; --apply carries it out.\n";
  reporter.say(text, json_proposal(*proposal, ""));
  return proposal->plan.reached ? kExitOk : kExitBlocked;
}

int apply(const RebalanceCommand& command, job::RebalanceWorld& world, Reporter& reporter,
          const Style& style, job::Cancel& cancel) {
  Teller teller(reporter, style);
  const auto summary =
      guarded([&] { return job::rebalance(command.options, world, teller, cancel); });
  if (!summary) return report(summary.error(), reporter);
  reporter.say(render_rebalanced(*summary, style), json_rebalanced(*summary));
  return summary->reached ? kExitOk : summary->failed > 0 ? kExitFailed : kExitBlocked;
}

}  // namespace

int run_rebalance(const RebalanceCommand& command, const Services& services,
                  const Surroundings& surroundings) {
  const Request request{.purpose = command.apply ? Purpose::Move : Purpose::Examine,
                        .json = command.json,
                        .verbose = command.verbose,
                        .kind = job::Kind::Relocate};
  const Style style(terminal_of(surroundings.out, surroundings.environment).colours);
  const auto work = command.apply ? apply : propose;
  return run_in_front(request, surroundings, [&](Reporter& reporter, job::Cancel& cancel) {
    if (command.options.by == job::RebalanceProblem::By::Io) {
      reporter.remark("measuring the load of the disks for " + format_time(command.options.window));
    }
    const auto world = services.rebalance_world(command.options.uri);
    return work(command, *world, reporter, style, cancel);
  });
}

}  // namespace drover::cli
