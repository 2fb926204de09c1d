// SPDX-License-Identifier: Apache-2.0
#include "job/broadcast.h"

namespace drover::job {

void Broadcast::started(const std::string& id) {
  user_.started(id);
  control_.publish(event_of(Started{id}));
}

void Broadcast::planned(const Plan& plan) {
  user_.planned(plan);
  control_.publish(event_of(plan));
}

void Broadcast::progress(const Progress& progress) {
  if (progress.waiting_for != waiting_for_) {
    waiting_for_ = progress.waiting_for;
    waiting_since_ = progress.elapsed;
  }
  Progress timed = progress;
  timed.waiting =
      waiting_for_.empty() ? std::chrono::milliseconds(0) : progress.elapsed - waiting_since_;
  user_.progress(timed);
  status_.progress(timed);
  control_.publish(event_of(timed));
}

void Broadcast::note(const std::string& text) {
  user_.note(text);
  control_.publish(event_of(Note{text}));
}

void Broadcast::ended(const Result<Summary>& result) {
  if (!result) status_.error(result.error());
  status_.flush();
  control_.publish(result ? event_of(*result) : event_of(result.error()));
}

}  // namespace drover::job
