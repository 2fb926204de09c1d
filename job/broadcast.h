// SPDX-License-Identifier: Apache-2.0
//
// What a job says, to all who listen: the user's observer, those who watch through the control
// socket, and status.json. It also counts for how long the job has been waiting.
//
//   StatusWriter status(job->status_path());
//   DROVER_ASSIGN(auto control, ControlServer::start(job->control_socket(), {...}));
//   Broadcast broadcast(observer, status, *control);
//   broadcast.started(job->id());                 // first: from here on the user may leave
//   broadcast.planned(plan);
//   ... broadcast.progress(progress), broadcast.note(text), status.state(...), status.error(...)
//   job->finish(...);                             // unless it is left for a resume
//   broadcast.ended(summary_or_error);            // then: who hears of it may begin the next move
//   control->stop();
//
// Threads: as job::Observer: any, one call at a time.
#pragma once

#include "job/control.h"
#include "job/job_store.h"
#include "job/move.h"

namespace drover::job {

class Broadcast final : public Observer {
 public:
  Broadcast(Observer& user, StatusWriter& status, ControlServer& control)
      : user_(user), status_(status), control_(control) {}

  void started(const std::string& id) override;
  void planned(const Plan& plan) override;
  void progress(const Progress& progress) override;
  void note(const std::string& text) override;
  void ended(const Result<Summary>& result);

 private:
  Observer& user_;
  StatusWriter& status_;
  ControlServer& control_;
  std::string waiting_for_;
  std::chrono::milliseconds waiting_since_{0};  // Progress::elapsed at its begin
};

}  // namespace drover::job
