// SPDX-License-Identifier: Apache-2.0
#include "cli/job_commands.h"

#include <fmt/format.h>

#include <csignal>
#include <utility>

#include "cli/background.h"
#include "cli/exit_codes.h"
#include "cli/jobs_view.h"
#include "cli/json_events.h"
#include "cli/output.h"
#include "cli/signals.h"
#include "cli/values.h"
#include "job/control.h"
#include "job/job_store.h"

namespace drover::cli {

namespace {

using job::ControlClient;
using job::JobStore;
using job::JobView;
using nlohmann::json;

int print(const std::string& text, const Surroundings& surroundings) {
  return write_all(surroundings.out, text) ? kExitOk : kExitFailed;
}

Style output_style(const Surroundings& surroundings) {
  return Style(terminal_of(surroundings.out, surroundings.environment).colours);
}

std::string as_lines(const std::vector<std::string>& lines) {
  std::string out;
  for (const std::string& line : lines) out += line + "\n";
  return out;
}

std::string ending_text(const job::HistoryEntry& entry) {
  const bool done = entry.outcome == job::Outcome::Moved;
  if (entry.kind == job::kind_name(job::Kind::Relocate)) {
    return fmt::format("the disks of {} {} {}", entry.guest, done ? "are on" : "did not go to",
                       entry.host);
  }
  return fmt::format("{} {} {}", entry.guest, done ? "runs on" : "did not move to", entry.host);
}

// How a job ended that is on disk no more.
std::optional<Error> ending_of(const JobStore& store, const std::string& id) {
  const Result<job::History> history = store.history();
  if (!history) return std::nullopt;
  for (auto at = history->entries.rbegin(); at != history->entries.rend(); ++at) {
    if (at->id != id) continue;
    return Error{Code::NotFound, fmt::format("job {} has ended: {}", id, ending_text(*at)),
                 at->reason ? "it was undone: " + at->reason->message : "", false};
  }
  return std::nullopt;
}

Result<JobView> find_job(const JobStore& store, const std::string& name) {
  Result<JobView> view = store.find(name);
  if (!view && view.error().code == Code::NotFound) {
    if (const auto ending = ending_of(store, name)) return fail(*ending);
  }
  return view;
}

Error dead(const JobView& view) {
  return {Code::Held, fmt::format("job {} has no process any more", view.id), advice(view), false};
}

// What became of a job whose process went away while we looked.
Error gone(const JobStore& store, const std::string& id) {
  if (id.empty()) {
    return {Code::Internal, "the process in the background has ended before the job began",
            "please report it, with what the system's journal says", false};
  }
  const Result<JobView> view = store.look(id);
  if (view && view->alive) {
    return {Code::Unreachable, fmt::format("the process of job {} listens no more", id),
            "try again", true};
  }
  if (view) return dead(*view);
  if (const auto ending = ending_of(store, id)) return *ending;
  return view.error();
}

Result<ControlClient> connect(const JobStore& store, const JobView& view) {
  if (!view.alive) return fail(dead(view));
  Result<ControlClient> client = ControlClient::connect(view.directory + "/control.sock");
  if (!client && client.error().code == Code::Unreachable) return fail(gone(store, view.id));
  return client;
}

std::string how_to_go_on(const std::string& id) {
  return fmt::format("`drover watch {0}` shows it, `drover cancel {0}` undoes it", id);
}

Request request_for(const JobView& view, bool as_json) {
  Request request;
  request.json = as_json;
  request.guest = view.record ? view.record->plan.guest : view.id;
  request.host = view.record ? view.record->plan.host : "";
  request.kind = view.record ? view.record->kind() : job::Kind::Move;
  return request;
}

struct Subject {
  const JobStore& store;
  std::string id;
};

// The end of what was followed, as of the job itself.
int report_followed(const Followed& followed, const Subject& job, Reporter& reporter) {
  if (const auto* summary = std::get_if<job::Summary>(&followed)) {
    return report(Result<job::Summary>(*summary), reporter);
  }
  if (const auto* error = std::get_if<Error>(&followed)) return report(*error, reporter);
  if (std::holds_alternative<Died>(followed)) return report(gone(job.store, job.id), reporter);
  reporter.remark(fmt::format("job {} goes on: {}", job.id, how_to_go_on(job.id)));
  return kExitLeft;
}

Request leaving(Request request) {
  request.signals = Request::Signals::Leave;
  return request;
}

// Asks a live job to end, and looks on.
int cancel_live(const JobView& view, bool as_json, const Surroundings& surroundings) {
  const JobStore store(surroundings.places);
  return run_job(leaving(request_for(view, as_json)), surroundings,
                 [&](Reporter& reporter, job::Cancel& stop) {
                   Result<ControlClient> client = connect(store, view);
                   if (!client) return report(client.error(), reporter);
                   for (const char* const op : {"watch", "cancel"}) {
                     if (const auto answer = client->call({{"op", op}}); !answer) {
                       return report(answer.error(), reporter);
                     }
                   }
                   const Followed followed =
                       follow(events_of(*client), {.observer = reporter, .stop_fd = stop.fd()});
                   if (const auto* error = std::get_if<Error>(&followed);
                       error != nullptr && error->code == Code::Cancelled) {
                     reporter.note(fmt::format("job {}: {}", view.id, error->to_string()));
                     return kExitOk;
                   }
                   if (const auto* summary = std::get_if<job::Summary>(&followed)) {
                     reporter.finished(*summary);
                     return report(
                         Error{Code::Held, fmt::format("it was too late to cancel job {}", view.id),
                               view.record && view.record->kind() == job::Kind::Relocate
                                   ? "to have its disks back, relocate them again"
                                   : "to have the guest back, move it from there",
                               false},
                         reporter);
                   }
                   if (std::holds_alternative<Left>(followed)) {
                     reporter.remark(fmt::format("job {} is undone without this command", view.id));
                     return kExitLeft;
                   }
                   return report_followed(followed, {store, view.id}, reporter);
                 });
}

Work resuming(const Services& services, const std::string& id) {
  return [&services, id](Reporter& reporter, job::Cancel& cancel) {
    return report(guarded([&] { return services.resume(id, reporter, cancel); }), reporter);
  };
}

Result<Background> start(const Request& request, const Surroundings& surroundings,
                         const Work& work) {
  return start_background([&](int events) {
    Request there = request;
    there.json = true;
    there.on_started = [&](const std::string& id) {
      print_to_log(surroundings.places.logs + "/" + id + ".log");
    };
    Surroundings its = surroundings;
    its.out = events;
    its.err = STDERR_FILENO;
    return run_job(there, its, work);
  });
}

// Starts each job that has no process, in the background, and waits until it is at work.
int resume_all(const ResumeCommand& command, const Services& services,
               const Surroundings& surroundings) {
  const JobStore store(surroundings.places);
  const Result<std::vector<JobView>> jobs = store.list();
  if (!jobs) return refuse(jobs.error(), command.json, surroundings);
  int code = kExitOk;
  const auto failed = [&](const JobView& view, const Error& error) {
    const int its = refuse({error.code, fmt::format("job {}: {}", view.id, error.message),
                            error.hint, error.retryable},
                           command.json, surroundings);
    if (code == kExitOk) code = its;
  };
  for (const JobView& view : *jobs) {
    if (view.alive) continue;
    Request request = request_for(view, false);
    request.verbose = command.verbose;
    const Result<Background> background = start(request, surroundings, resuming(services, view.id));
    if (!background) {
      failed(view, background.error());
      continue;
    }
    class Nobody final : public job::Observer {
      void started(const std::string& /*id*/) override {}
      void planned(const job::Plan& /*plan*/) override {}
      void progress(const job::Progress& /*progress*/) override {}
      void note(const std::string& /*text*/) override {}
    } nobody;
    const Followed followed =
        follow(events_of(*background), {.observer = nobody, .until_started = true});
    if (const auto* error = std::get_if<Error>(&followed)) {
      failed(view, *error);
    } else if (std::holds_alternative<Died>(followed)) {
      failed(view, gone(store, view.id));
    } else {
      (void)print(command.json
                      ? as_lines({job::to_line(job::event_of(job::Started{view.id}))})
                      : fmt::format("job {} goes on: {}\n", view.id, how_to_go_on(view.id)),
                  surroundings);
    }
  }
  return code;
}

}  // namespace

int refuse(const Error& error, bool json, const Surroundings& surroundings) {
  if (json) write_all(surroundings.out, json_error(error) + "\n");
  const Style style(terminal_of(surroundings.err, surroundings.environment).colours);
  write_all(surroundings.err, render_error(error, style));
  return exit_code(error.code);
}

int run_in_front(const Request& request, const Surroundings& surroundings, const Work& work) {
  const auto body = [&] { return run_job(request, surroundings, work); };
  return surroundings.away_from_keyboard ? run_away_from_keyboard(body) : body();
}

int run_in_background(const Request& request, const Surroundings& surroundings, const Work& work) {
  const Result<Background> background = start(request, surroundings, work);
  if (!background) return refuse(background.error(), request.json, surroundings);
  std::string id;
  Request in_front = leaving(request);
  in_front.on_started = [&](const std::string& its) { id = its; };
  return run_job(in_front, surroundings, [&](Reporter& reporter, job::Cancel& stop) {
    const JobStore store(surroundings.places);
    const EventSource events = events_of(*background);
    Followed followed =
        follow(events, {.observer = reporter, .stop_fd = stop.fd(), .until_started = true});
    if (std::holds_alternative<Begun>(followed)) {
      reporter.remark(fmt::format("job {} runs in the background; Ctrl-C leaves it running: {}", id,
                                  how_to_go_on(id)));
      followed = follow(events, {.observer = reporter, .stop_fd = stop.fd()});
    } else if (std::holds_alternative<Left>(followed)) {
      // There is nothing yet that could be watched or cancelled later.
      reporter.remark("interrupted before the job began");
      ::kill(background->pid, SIGTERM);
      followed = follow(events, {.observer = reporter});
    }
    return report_followed(followed, {store, id}, reporter);
  });
}

int list_jobs(const JobsCommand& command, const Surroundings& surroundings) {
  const Result<std::vector<JobView>> jobs = JobStore(surroundings.places).list();
  if (!jobs) return refuse(jobs.error(), command.json, surroundings);
  if (!command.json) return print(render_jobs(*jobs, output_style(surroundings)), surroundings);
  std::vector<std::string> lines;
  for (const JobView& view : *jobs) lines.push_back(json_job(view));
  return print(as_lines(lines), surroundings);
}

int show_status(const StatusCommand& command, const Surroundings& surroundings) {
  const JobStore store(surroundings.places);
  Result<JobView> view = find_job(store, command.job);
  if (!view) return refuse(view.error(), command.json, surroundings);
  // Fresher than the file, if its process answers.
  if (Result<ControlClient> client = connect(store, *view)) {
    if (const auto answer = client->call({{"op", "status"}});
        answer && answer->contains("status")) {
      const json& status = answer->at("status");
      if (status.is_object()) {
        if (auto fresh = job::JobStatus::from_json(status)) view->status = std::move(*fresh);
      }
    }
  }
  return print(
      command.json ? json_job(*view) + "\n" : render_job(*view, output_style(surroundings)),
      surroundings);
}

int watch_job(const WatchCommand& command, const Surroundings& surroundings) {
  const JobStore store(surroundings.places);
  const Result<JobView> view = find_job(store, command.job);
  if (!view) return refuse(view.error(), command.json, surroundings);
  if (!view->alive && !command.json) {
    (void)print(render_job(*view, output_style(surroundings)), surroundings);
  }
  return run_job(leaving(request_for(*view, command.json)), surroundings,
                 [&](Reporter& reporter, job::Cancel& stop) {
                   Result<ControlClient> client = connect(store, *view);
                   if (!client) return report(client.error(), reporter);
                   if (const auto answer = client->call({{"op", "watch"}}); !answer) {
                     return report(answer.error(), reporter);
                   }
                   return report_followed(
                       follow(events_of(*client), {.observer = reporter, .stop_fd = stop.fd()}),
                       {store, view->id}, reporter);
                 });
}

int cancel_job(const CancelCommand& command, const Services& services,
               const Surroundings& surroundings) {
  const JobStore store(surroundings.places);
  const Result<JobView> view = find_job(store, command.job);
  if (!view) return refuse(view.error(), command.json, surroundings);
  if (view->alive) return cancel_live(*view, command.json, surroundings);
  return run_in_front(
      request_for(*view, command.json), surroundings, [&](Reporter& reporter, job::Cancel& cancel) {
        const Status undone = guarded([&] { return services.cancel(view->id, reporter, cancel); });
        if (!undone) return report(undone.error(), reporter);
        reporter.note(fmt::format("job {} was undone", view->id));
        return kExitOk;
      });
}

int resume_job(const ResumeCommand& command, const Services& services,
               const Surroundings& surroundings) {
  if (command.job.empty()) return resume_all(command, services, surroundings);
  const Result<JobView> view = find_job(JobStore(surroundings.places), command.job);
  if (!view) return refuse(view.error(), command.json, surroundings);
  Request request = request_for(*view, command.json);
  request.verbose = command.verbose;
  const Work work = resuming(services, view->id);
  return command.detach ? run_in_background(request, surroundings, work)
                        : run_in_front(request, surroundings, work);
}

int show_history(const HistoryCommand& command, const Surroundings& surroundings) {
  const Result<job::History> history = JobStore(surroundings.places).history();
  if (!history) return refuse(history.error(), command.json, surroundings);
  if (!command.json) {
    return print(render_history(*history, output_style(surroundings)), surroundings);
  }
  std::vector<std::string> lines;
  for (const job::HistoryEntry& entry : history->entries) lines.push_back(json_history(entry));
  return print(as_lines(lines), surroundings);
}

int set_job(const SetCommand& command, const Surroundings& surroundings) {
  const JobStore store(surroundings.places);
  const Result<JobView> view = find_job(store, command.job);
  if (!view) return refuse(view.error(), command.json, surroundings);
  Result<ControlClient> client = connect(store, *view);
  if (!client) return refuse(client.error(), command.json, surroundings);
  nlohmann::json request = {{"op", "set"}};
  job::OrderedJson done = {{"job", view->id}};
  std::string text;
  if (command.bandwidth) {
    request["bandwidth"] = done["bandwidth_bytes_per_s"] = command.bandwidth->bytes();
    text = "bandwidth " + format_rate_setting(*command.bandwidth);
  }
  if (command.compression) {
    const std::string name = mirror::compression_name(*command.compression);
    request["compress"] = done["compress"] = name;
    text += (text.empty() ? "compression " : ", compression ") + name;
  }
  const auto answer = client->call(request);
  if (!answer) return refuse(answer.error(), command.json, surroundings);
  return print(command.json ? job::to_line(done) + "\n" : fmt::format("job {}: {}\n", view->id, text), surroundings);
}

}  // namespace drover::cli
