// SPDX-License-Identifier: Apache-2.0
#include "cli/render.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <vector>

#include "cli/finding.h"
#include "cli/values.h"

namespace drover::cli {

namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;
using std::chrono::seconds;

// ---- the plan -----------------------------------------------------------------------------------

std::string plan_title(const job::Plan& plan) {
  const bool move = plan.kind == job::Kind::Move;
  std::string out =
      fmt::format("{} {} to {}: {}", move ? "Move" : "Relocate", printable(plan.guest),
                  printable(plan.host), plural(plan.disks.size(), "disk"));
  Length size;
  Length used;
  bool all_known = !plan.disks.empty();
  for (const job::DiskPlan& disk : plan.disks) {
    size += disk.virtual_size;
    used += disk.allocation;
    if (disk.allocation == Length(0)) all_known = false;
  }
  if (!plan.disks.empty()) out += " of " + format_length(size);
  if (all_known) out += " (" + format_length(used) + " in use)";
  return move ? out + ", " + format_length(plan.memory) + " of memory" : out;
}

std::string image(const std::string& path, const std::string& format, bool block_device) {
  return fmt::format("{} ({}{})", printable(path), printable(format),
                     block_device ? ", block device" : "");
}

std::string plan_disk(const job::DiskPlan& disk, job::Kind kind, const Style& style) {
  std::string out =
      "  " + style.bold(printable(disk.disk)) + "  " + format_length(disk.virtual_size);
  if (disk.allocation > Length(0)) out += " (" + format_length(disk.allocation) + " in use)";
  out += "\n      from  " + image(disk.source_path, disk.source_format, disk.source_block_device);
  const bool move = kind == job::Kind::Move;
  if (!disk.renamed) {
    out += !disk.delete_source ? ", kept"
           : move              ? ", deleted after the move"
                               : ", deleted afterwards";
  }
  out += "\n      to    " + image(disk.target_path, disk.target_format, disk.target_block_device);
  if (disk.renamed) out += ", only renamed: the same filesystem";
  return out + "\n";
}

std::string finding_text(const FindingText& finding, const Style& style) {
  std::string out = "  ";
  out += finding.blocker ? style.bad("blocked") : style.warning("warning");
  out += "  ";
  out += printable_lines(finding.what, 11) + "\n";
  if (!finding.why.empty()) out += "     why:  " + printable_lines(finding.why, 11) + "\n";
  if (!finding.to_do.empty()) out += "   to do:  " + printable_lines(finding.to_do, 11) + "\n";
  return out;
}

// ---- progress -----------------------------------------------------------------------------------

// One part of a progress line. Those with the smallest rank stay when there is little room.
struct Part {
  int rank;
  std::string text;
};
constexpr std::string_view kGap = "  ";

bool copies(job::Phase phase) {
  return phase == job::Phase::Copy || phase == job::Phase::Synchronised ||
         phase == job::Phase::Memory;
}

std::string amount(const job::Progress& progress) {
  if (progress.phase == job::Phase::Copy && progress.data > Length(0)) {
    return fmt::format("{} of {}", format_length(std::min(progress.copied, progress.data)),
                       format_length(progress.data));
  }
  if (progress.phase == job::Phase::Memory && progress.memory_total > Length(0)) {
    const Length remaining = std::min(progress.memory_remaining, progress.memory_total);
    return fmt::format("{} of {}", format_length(progress.memory_total - remaining),
                       format_length(progress.memory_total));
  }
  return {};
}

std::string time_left(const job::Progress& progress) {
  if (progress.time_left) return format_clock(*progress.time_left) + " left";
  if (progress.phase == job::Phase::Copy || progress.phase == job::Phase::Memory) {
    return "time left unknown";
  }
  return {};
}

std::string each_disk(const ProgressView& view) {
  std::string out;
  for (std::size_t i = 0; i < view.progress.disks.size(); ++i) {
    out += fmt::format("{}{} {}%", i == 0 ? "" : ", ", printable(view.progress.disks[i].disk),
                       view.disk_percent[i]);
  }
  return out;
}

std::string disks_done(const ProgressView& view) {
  const auto done = std::count(view.disk_percent.begin(), view.disk_percent.end(), 100);
  return fmt::format("{} of {} disks done", done, view.disk_percent.size());
}

std::string head(const ProgressView& view, std::string_view phase) {
  return view.progress.phase == job::Phase::Undo ? std::string(phase)
                                                 : fmt::format("[{:3}%] {}", view.percent, phase);
}

std::string waiting(const job::Progress& progress) {
  if (progress.waiting_for.empty()) return "";
  std::string out = "waiting for " + printable(progress.waiting_for);
  // A moment is not worth a number.
  if (progress.waiting >= seconds(2)) {
    out += " for " + format_clock(duration_cast<seconds>(progress.waiting));
  }
  return out;
}

// Below it a wait is what any write takes.
constexpr auto kWorthSaying = milliseconds(5);

std::string slowdown_text(const job::Slowdown& slowdown) {
  const double mean = static_cast<double>(slowdown.waited.count()) / 1000 /
                      static_cast<double>(std::max<std::uint64_t>(1, slowdown.writes));
  return fmt::format("{:.1f} ms, at most {} ms", mean, duration_cast<milliseconds>(slowdown.longest).count());
}

// How many times less was sent than without compression, if that is worth a word.
std::string times_less(Length sent, Length saved) {
  if (sent == Length(0)) return {};
  const double times = static_cast<double>((sent + saved).bytes()) / static_cast<double>(sent.bytes());
  return times < 1.05 ? std::string() : fmt::format("{:.1f} times less", times);
}

std::string compression_text(const job::Progress& progress) {
  const std::string less = times_less(progress.wire_bytes, progress.saved_bytes);
  if (progress.compression.empty() || (progress.compression == "none" && less.empty())) return {};
  return "compression " + printable(progress.compression) + (less.empty() ? "" : ", " + less);
}

// The parts behind the head, in the order in which they are written.
std::vector<Part> parts(const ProgressView& view, std::string disks) {
  const job::Progress& progress = view.progress;
  std::vector<Part> out;
  const auto add = [&](int rank, std::string text) {
    if (!text.empty()) out.push_back({rank, std::move(text)});
  };
  add(0, waiting(progress));
  if (!copies(progress.phase)) return out;
  add(3, amount(progress));
  if (progress.to_verify > Length(0)) add(1, format_length(progress.to_verify) + " to verify");
  if (progress.slowdown.longest >= kWorthSaying) add(2, "guest writes wait: " + slowdown_text(progress.slowdown));
  add(2, format_rate(progress.rate));
  add(1, time_left(progress));
  if (progress.phase == job::Phase::Copy && progress.disks.size() > 1) add(4, std::move(disks));
  add(5, compression_text(progress));
  if (progress.found > Length(0)) add(4, format_length(progress.found) + " was there already");
  if (progress.sent_again > Length(0)) {
    add(5, format_length(progress.sent_again) + " sent again");
  }
  if (progress.reconnects > 0) add(5, plural(progress.reconnects, "reconnect"));
  if (progress.mirrored_writes > 0) {
    add(5, plural(progress.mirrored_writes, "guest write") + " mirrored");
  }
  return out;
}

// All parts that fit, by rank, in their order.
std::string fit(const std::string& start, const std::vector<Part>& all, std::size_t width) {
  std::vector<bool> taken(all.size(), false);
  std::size_t room = width - std::min(width, columns(start));
  for (int rank = 0; rank <= 5; ++rank) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::size_t wanted = kGap.size() + columns(all[i].text);
      if (all[i].rank != rank || wanted > room) continue;
      taken[i] = true;
      room -= wanted;
    }
  }
  std::string out = start;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (taken[i]) out += std::string(kGap) + all[i].text;
  }
  return out;
}

// What becomes of the guest, for the end of an examination.
std::string examined(const job::Plan& plan, const char* can) {
  const std::string guest = printable(plan.guest);
  const std::string host = printable(plan.host);
  return plan.kind == job::Kind::Move
             ? fmt::format("{} {} move to {}", guest, can, host)
             : fmt::format("the disks of {} {} go to {}", guest, can, host);
}

// ---- the summary --------------------------------------------------------------------------------

std::string row(std::string_view name, const std::string& text) {
  return "  " + padded(std::string(name), 10) + text + "\n";
}

std::string list(std::string_view name, const std::vector<std::string>& lines) {
  std::string out;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    out += row(i == 0 ? name : "", printable_lines(lines[i], 12));
  }
  return out;
}

std::string blackout_text(std::chrono::microseconds blackout) {
  if (blackout < milliseconds(10)) {
    return fmt::format("{}.{} ms", blackout.count() / 1000, blackout.count() / 100 % 10);
  }
  return format_span(duration_cast<milliseconds>(blackout));
}

}  // namespace

std::string render_plan(const job::Plan& plan, Purpose purpose, const Style& style) {
  std::string out = style.bold(plan_title(plan)) + "\n";
  for (const job::DiskPlan& disk : plan.disks) out += plan_disk(disk, plan.kind, style);
  const std::vector<FindingText> findings = findings_of(plan);
  if (!findings.empty()) out += "\n";
  std::uint64_t blockers = 0;
  for (const FindingText& finding : findings) {
    out += finding_text(finding, style);
    if (finding.blocker) ++blockers;
  }
  out += "\n";
  if (purpose == Purpose::Move) return out;
  if (blockers > 0) {
    out += style.bad(examined(plan, "can't")) + ": " + plural(blockers, "blocker") + ", see above";
  } else {
    out += style.good(examined(plan, "can"));
    if (!findings.empty()) out += ", with " + plural(findings.size(), "warning");
  }
  return out + ". Nothing was changed.\n";
}

std::string render_progress_line(const ProgressView& view, std::size_t width) {
  std::string start = head(view, phase_label(view.progress.phase));
  if (columns(start) > width) start = head(view, job::phase_name(view.progress.phase));
  if (columns(start) > width && view.progress.phase != job::Phase::Undo) {
    start = fmt::format("{}%", view.percent);
  }
  start = clip(start, width);

  // What it waits for is the news: it is shortened rather than left out.
  std::vector<Part> all = parts(view, each_disk(view));
  const std::size_t room = width - columns(start);
  for (Part& part : all) {
    if (part.rank == 0 && room > kGap.size() + 8) part.text = clip(part.text, room - kGap.size());
    const bool disks = part.rank == 4;
    if (disks && columns(part.text) > room / 2) part.text = disks_done(view);
  }
  return fit(start, all, width);
}

std::string render_progress_text(const ProgressView& view) {
  std::string out =
      fmt::format("{:>7}  {}", format_clock(duration_cast<seconds>(view.progress.elapsed)),
                  head(view, phase_label(view.progress.phase)));
  for (const Part& part : parts(view, each_disk(view))) out += std::string(kGap) + part.text;
  return out;
}

std::string render_note(const std::string& text, const Style& style) {
  return style.bold("note:") + " " + printable_lines(text, 6) + "\n";
}

namespace {

// The rows of a summary that both kinds of job have.
std::string disks_text(const job::Summary& summary) {
  Length size;
  for (const job::DiskPlan& disk : summary.disks) size += disk.virtual_size;
  std::string disks = plural(summary.disks.size(), "disk");
  if (!summary.disks.empty()) {
    disks += " of " + format_length(size) + ", " + format_length(summary.data) + " of it read";
  }
  return disks;
}

std::string phases_row(const job::Summary& summary) {
  std::string times;
  for (const auto& [phase, time] : summary.phase_times) {
    times += fmt::format("{}{} {}", times.empty() ? "" : ", ", job::phase_name(phase),
                         format_span(time));
  }
  return times.empty() ? "" : row("phases", times);
}

// Where the blackout's time went: what is done one after the other, and what beside it.
std::string blackout_row(const job::Summary& summary) {
  if (!summary.blackout_parts) return "";
  const job::BlackoutParts& parts = *summary.blackout_parts;
  const auto ms = [](std::chrono::microseconds time) {
    return fmt::format("{:.1f}", static_cast<double>(time.count()) / 1000);
  };
  return row("blackout",
             fmt::format(
                 "{} ms in QEMU's drain, {} in the memory's end, {} in the lock of the source's "
                 "images, {} in the resume",
                 ms(parts.quiesce), ms(parts.memory), ms(parts.guard), ms(parts.resume))) +
         row("", fmt::format("beside the memory's end {} ms for the disks: {} to drain, {} to "
                             "compare, {} to flush, {} "
                             "to release",
                             ms(parts.disks), ms(parts.drain), ms(parts.compare), ms(parts.flush),
                             ms(parts.release)));
}

std::string files_rows(const job::Summary& summary) {
  return list("deleted", summary.deleted) + list("kept", summary.kept) +
         list("note", summary.notes);
}

std::string relocation_summary(const job::Summary& summary, const Style& style) {
  std::string out = style.good(fmt::format("the disks of {} are on {}", printable(summary.guest),
                                           printable(summary.host))) +
                    fmt::format(". It took {}.\n\n", format_span(summary.total));
  out += row("moved", disks_text(summary));
  for (const job::DiskPlan& disk : summary.disks) {
    out += row("", fmt::format("{} is {}", printable(disk.disk), printable(disk.target_path)));
  }
  return out + phases_row(summary) + files_rows(summary);
}

}  // namespace

std::string render_summary(const job::Summary& summary, const Style& style) {
  if (summary.kind == job::Kind::Relocate) return relocation_summary(summary, style);
  std::string out =
      style.good(fmt::format("{} runs on {}", printable(summary.guest), printable(summary.host))) +
      fmt::format(". It stood still for {}; the move took {}.\n\n", blackout_text(summary.blackout),
                  format_span(summary.total));
  out += blackout_row(summary);
  out += row("moved", disks_text(summary));
  out += row("sent", fmt::format("{}, {} of it memory", format_length(summary.wire_bytes),
                                 format_length(summary.memory_bytes)));
  if (const Length disks = summary.wire_bytes - std::min(summary.memory_bytes, summary.wire_bytes);
      !times_less(disks, summary.saved_bytes).empty()) {
    out += row("", fmt::format("compression saved {}: {} for the disks", format_length(summary.saved_bytes),
                               times_less(disks, summary.saved_bytes)));
  }
  if (summary.found > Length(0)) {
    out += row("found", fmt::format("{} of it was on {} already", format_length(summary.found),
                                    printable(summary.host)));
  }
  if (summary.sent_again > Length(0) || summary.reconnects > 0) {
    out += row("again", fmt::format("{} sent again, {}", format_length(summary.sent_again),
                                    plural(summary.reconnects, "reconnect")));
  }
  out += row("mirrored", plural(summary.mirrored_writes, "guest write"));
  if (summary.slowdown.writes > 0) {
    out += row("handover", fmt::format("{} waited for {}: {}", plural(summary.slowdown.writes, "guest write"),
                                       printable(summary.host), slowdown_text(summary.slowdown)));
  }
  if (summary.verified) {
    std::string verified = summary.damaged == 0 ? "what was read back on the target is equal"
                                                : plural(summary.damaged, "chunk") + " differed and were sent again";
    if (summary.unverified > 0) {
      verified += fmt::format("; {} written too often to tell", plural(summary.unverified, "chunk"));
    }
    out += row("verified", verified);
  }
  out += phases_row(summary);
  if (summary.runner_peak_memory > Length(0)) {
    std::string memory = format_length(summary.runner_peak_memory) + " here";
    if (summary.receiver_peak_memory > Length(0)) {
      memory += fmt::format(", {} on {}", format_length(summary.receiver_peak_memory),
                            printable(summary.host));
    }
    out += row("memory", "drover took " + memory);
  }
  return out + files_rows(summary);
}

std::string render_error(const Error& error, const Style& style) {
  std::string out = style.bad("drover:") + " " + printable_lines(error.message, 8) + "\n";
  if (!error.hint.empty()) out += "  hint: " + printable_lines(error.hint, 8) + "\n";
  return out;
}

std::string render_interruption(const Interruption& interruption, Purpose purpose) {
  const std::string guest = printable(interruption.guest);
  if (purpose == Purpose::Examine) {
    return interruption.again ? "still waiting for an answer of the hosts"
                              : "interrupted; nothing was changed";
  }
  const bool finish = past_undoing(interruption.progress.phase);
  if (!interruption.again && interruption.kind == job::Kind::Relocate) {
    return finish ? fmt::format(
                        "interrupted too late to undo: the disks of {} are going over to {}, "
                        "and the relocation is finished instead",
                        guest, printable(interruption.host))
                  : fmt::format(
                        "interrupted: undoing the relocation; the disks of {} stay where they "
                        "are. Please wait.",
                        guest);
  }
  if (!interruption.again) {
    return finish
               ? fmt::format(
                     "interrupted too late to undo: {} has been handed over to {}, and "
                     "the move is finished instead",
                     guest, printable(interruption.host))
               : fmt::format("interrupted: undoing the move; {} runs on here. Please wait.", guest);
  }
  const std::string what = waiting(interruption.progress);
  return fmt::format("still {}, {}; stopping now would leave things behind",
                     finish ? "finishing" : "undoing", what.empty() ? "please wait" : what);
}

}  // namespace drover::cli
