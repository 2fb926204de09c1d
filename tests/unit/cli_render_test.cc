// SPDX-License-Identifier: Apache-2.0
//
// What people and programs read, as golden strings.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cli/json_events.h"
#include "cli/render.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::sample_blocker;
using testing::sample_plan;
using testing::sample_progress;
using testing::sample_summary;
using testing::sample_warning;

const Style kPlain;

ProgressView view_of(const job::Progress& progress) {
  ProgressTracker tracker;
  tracker.planned(sample_plan());
  return tracker.update(progress);
}

std::string line(const job::Progress& progress, std::size_t width) {
  return render_progress_line(view_of(progress), width);
}

// ---- the plan -----------------------------------------------------------------------------------

TEST(RenderPlan, SaysWhatGoesWhereAndWhatBecomesOfTheSource) {
  EXPECT_EQ(render_plan(sample_plan(), Purpose::Move, kPlain),
            "Move web1 to hostb: 2 disks of 5.0 GiB (3.0 GiB in use), 512.0 MiB of memory\n"
            "  vda  4.0 GiB (2.0 GiB in use)\n"
            "      from  /var/lib/libvirt/images/web1.raw (raw), deleted after the move\n"
            "      to    /srv/nvme/web1.raw (raw)\n"
            "  vdb  1.0 GiB (1.0 GiB in use)\n"
            "      from  /dev/vg0/web1-data (raw, block device), kept\n"
            "      to    /srv/web1-data.qcow2 (qcow2)\n"
            "\n");
}

TEST(RenderPlan, ShowsBlockersFirstWithWhatWhyAndWhatToDo) {
  job::Plan plan = sample_plan();
  plan.disks.resize(1);
  plan.disks[0].allocation = Length(0);  // not known
  plan.findings = {sample_warning(), sample_blocker()};
  EXPECT_EQ(render_plan(plan, Purpose::Examine, kPlain),
            "Move web1 to hostb: 1 disk of 4.0 GiB, 512.0 MiB of memory\n"
            "  vda  4.0 GiB\n"
            "      from  /var/lib/libvirt/images/web1.raw (raw), deleted after the move\n"
            "      to    /srv/nvme/web1.raw (raw)\n"
            "\n"
            "  blocked  disk vda: /srv/nvme/web1.raw is there already on hostb\n"
            "     why:  drover never overwrites a file\n"
            "   to do:  remove it, or choose another path with --disk vda=PATH\n"
            "  warning  disk vdb becomes qcow2\n"
            "\n"
            "web1 can't move to hostb: 1 blocker, see above. Nothing was changed.\n");
}

TEST(RenderPlan, OfAnExaminationEndsWithTheVerdict) {
  job::Plan plan = sample_plan();
  plan.disks.clear();
  EXPECT_EQ(render_plan(plan, Purpose::Examine, kPlain),
            "Move web1 to hostb: no disks, 512.0 MiB of memory\n"
            "\n"
            "web1 can move to hostb. Nothing was changed.\n");
  plan.findings = {sample_warning()};
  EXPECT_THAT(render_plan(plan, Purpose::Examine, kPlain),
              HasSubstr("\nweb1 can move to hostb, with 1 warning. Nothing was changed.\n"));
}

TEST(RenderPlan, EscapesNamesPathsAndMessages) {
  job::Plan plan = sample_plan();
  plan.guest = "web\x1b[2J\n1";
  plan.disks.resize(1);
  plan.disks[0].source_path = "/srv/\x07.raw";
  plan.findings = {sample_blocker()};
  plan.findings[0].what = "first line\n\x1b]0;title\x07";
  const std::string text = render_plan(plan, Purpose::Examine, kPlain);
  EXPECT_THAT(text, HasSubstr("Move web\\x1b[2J\\n1 to hostb"));
  EXPECT_THAT(text, HasSubstr("/srv/\\x07.raw"));
  EXPECT_THAT(text, HasSubstr("  blocked  first line\n           \\x1b]0;title\\x07\n"));
}

TEST(RenderPlan, HasColoursOnlyWhenAsked) {
  job::Plan plan = sample_plan();
  plan.findings = {sample_blocker(), sample_warning()};
  EXPECT_THAT(render_plan(plan, Purpose::Examine, kPlain), Not(HasSubstr("\x1b")));
  const std::string text = render_plan(plan, Purpose::Examine, Style(true));
  EXPECT_THAT(text, HasSubstr("\x1b[1;31mblocked\x1b[0m"));
  EXPECT_THAT(text, HasSubstr("\x1b[33mwarning\x1b[0m"));
}

// ---- progress -----------------------------------------------------------------------------------

TEST(RenderProgress, AsTextHasEverything) {
  EXPECT_EQ(render_progress_text(view_of(sample_progress())),
            "   0:14  [ 42%] copying disks  1.5 GiB of 3.0 GiB  110.0 MiB/s  0:14 left  "
            "vda 50%, vdb 50%  1,234 guest writes mirrored");
}

TEST(RenderProgress, LeavesOutWhatMattersLeastWhenItIsNarrow) {
  const job::Progress progress = sample_progress();
  EXPECT_EQ(line(progress, 119),
            "[ 42%] copying disks  1.5 GiB of 3.0 GiB  110.0 MiB/s  0:14 left  vda 50%, vdb 50%  "
            "1,234 guest writes mirrored");
  EXPECT_EQ(line(progress, 99),
            "[ 42%] copying disks  1.5 GiB of 3.0 GiB  110.0 MiB/s  0:14 left  vda 50%, vdb 50%");
  EXPECT_EQ(line(progress, 79), "[ 42%] copying disks  1.5 GiB of 3.0 GiB  110.0 MiB/s  0:14 left");
  EXPECT_EQ(line(progress, 59), "[ 42%] copying disks  110.0 MiB/s  0:14 left");
  EXPECT_EQ(line(progress, 39), "[ 42%] copying disks  0:14 left");
  EXPECT_EQ(line(progress, 25), "[ 42%] copying disks");
  EXPECT_EQ(line(progress, 15), "[ 42%] copy");
  EXPECT_EQ(line(progress, 8), "42%");
  EXPECT_EQ(line(progress, 2), "42");
  EXPECT_EQ(line(progress, 0), "");
}

TEST(RenderProgress, NeverIsWiderThanTheTerminal) {
  job::Progress progress = sample_progress();
  progress.waiting_for = "the link to hostb, which has been down for 12 s";
  progress.disks[0].disk = "a disk with a name that nobody would give to a disk";
  for (const job::Phase phase :
       {job::Phase::Plan, job::Phase::Reserve, job::Phase::Attach, job::Phase::Copy,
        job::Phase::Synchronised, job::Phase::Memory, job::Phase::Barrier, job::Phase::Resume,
        job::Phase::Commit, job::Phase::Done, job::Phase::Undo}) {
    progress.phase = phase;
    for (std::size_t width = 0; width <= 200; ++width) {
      EXPECT_LE(columns(line(progress, width)), width);
    }
  }
}

TEST(RenderProgress, SaysWhatItWaitsForBeforeAnythingElse) {
  job::Progress progress = sample_progress();
  progress.waiting_for = "the link to hostb";
  EXPECT_EQ(line(progress, 79),
            "[ 42%] copying disks  waiting for the link to hostb  110.0 MiB/s  0:14 left");
  EXPECT_EQ(line(progress, 45), "[ 42%] copying disks  waiting for the link...");
  EXPECT_EQ(render_progress_text(view_of(progress)),
            "   0:14  [ 42%] copying disks  waiting for the link to hostb  1.5 GiB of 3.0 GiB  "
            "110.0 MiB/s  0:14 left  vda 50%, vdb 50%  1,234 guest writes mirrored");
}

TEST(RenderProgress, SaysForHowLongItWaitsAndWhatThatCost) {
  job::Progress progress = sample_progress();
  progress.waiting_for = "the link to hostb";
  progress.waiting = seconds(1);
  EXPECT_THAT(line(progress, 200), HasSubstr("waiting for the link to hostb  "));
  progress.waiting = seconds(45);
  EXPECT_THAT(line(progress, 200), HasSubstr("waiting for the link to hostb for 0:45"));
  progress.waiting_for.clear();
  progress.sent_again = 3_MiB;
  progress.found = 7_MiB;
  progress.reconnects = 2;
  EXPECT_THAT(line(progress, 200), HasSubstr("7.0 MiB was there already"));
  EXPECT_THAT(line(progress, 200), HasSubstr("3.0 MiB sent again  2 reconnects"));
  const auto json = nlohmann::json::parse(json_progress(view_of(progress)));
  EXPECT_EQ(json.at("sent_again_bytes"), 3 << 20);
  EXPECT_EQ(json.at("reconnects"), 2);
}

TEST(RenderProgress, SaysWhatCompressionSaves) {
  job::Progress progress = sample_progress();
  EXPECT_THAT(line(progress, 200), Not(HasSubstr("compression")));
  progress.compression = "none";
  EXPECT_THAT(line(progress, 200), Not(HasSubstr("compression")));
  progress.saved_bytes = 512_MiB;
  EXPECT_THAT(line(progress, 200), HasSubstr("  compression none, 1.5 times less  "));
  progress.compression = "zstd:1";
  EXPECT_THAT(line(progress, 200), HasSubstr("  compression zstd:1, 1.5 times less  "));
  const auto json = nlohmann::json::parse(json_progress(view_of(progress)));
  EXPECT_EQ(json.at("saved_bytes"), 512 << 20);
  EXPECT_EQ(json.at("compression"), "zstd:1");
  job::Summary summary = sample_summary();
  EXPECT_THAT(render_summary(summary, kPlain), Not(HasSubstr("compression")));
  summary.saved_bytes = 3_GiB;
  EXPECT_THAT(render_summary(summary, kPlain),
              HasSubstr("256.0 MiB of it memory\n            compression saved 3.0 GiB: 2.7 times less for the disks\n"));
}

TEST(RenderSummary, SaysWhatOutagesCost) {
  job::Summary summary = sample_summary();
  EXPECT_THAT(render_summary(summary, kPlain), Not(HasSubstr("again")));
  summary.sent_again = 3_MiB;
  summary.reconnects = 1;
  const std::string text = render_summary(summary, kPlain);
  EXPECT_THAT(text, Not(HasSubstr("already")));
  summary.found = 1_GiB;
  EXPECT_THAT(render_summary(summary, kPlain),
              HasSubstr("\n  found     1.0 GiB of it was on hostb already\n"));
  EXPECT_THAT(text, HasSubstr("\n  again     3.0 MiB sent again, 1 reconnect\n"));
}

TEST(RenderSlowdown, IsShownWhereItIsMoreThanAnyWriteTakes) {
  job::Progress progress = sample_progress();
  progress.slowdown = {.writes = 10, .waited = milliseconds(4), .longest = milliseconds(3)};
  EXPECT_THAT(line(progress, 200), Not(HasSubstr("guest writes wait")));
  progress.slowdown = {.writes = 10, .waited = milliseconds(45), .longest = milliseconds(31)};
  EXPECT_THAT(line(progress, 200), HasSubstr("guest writes wait: 4.5 ms, at most 31 ms"));
  job::Summary summary = sample_summary();
  EXPECT_THAT(render_summary(summary, kPlain), Not(HasSubstr("handover")));
  summary.slowdown = progress.slowdown;
  EXPECT_THAT(render_summary(summary, kPlain),
              HasSubstr("\n  handover  10 guest writes waited for hostb: 4.5 ms, at most 31 ms\n"));
}

TEST(RenderVerification, SaysWhatIsToBeSeenAndWhatWasFound) {
  job::Progress progress = sample_progress();
  progress.to_verify = 3_GiB;
  EXPECT_THAT(line(progress, 200), HasSubstr("3.0 GiB to verify"));
  job::Summary summary = sample_summary();
  EXPECT_THAT(render_summary(summary, kPlain), Not(HasSubstr("verified")));
  summary.verified = true;
  EXPECT_THAT(render_summary(summary, kPlain), HasSubstr("\n  verified  what was read back on the target is equal\n"));
  summary.damaged = 2;
  summary.unverified = 1;
  EXPECT_THAT(render_summary(summary, kPlain),
              HasSubstr("\n  verified  2 chunks differed and were sent again; 1 chunk written too often to tell\n"));
}

TEST(RenderProgress, KnowsThatItDoesNotKnow) {
  job::Progress progress = sample_progress();
  progress.time_left.reset();
  progress.data = Length(0);  // not looked at yet
  progress.copied = Length(0);
  progress.rate = Length(0);
  progress.mirrored_writes = 0;
  progress.disks.resize(1);
  progress.disks[0].data = Length(0);
  progress.disks[0].copied = Length(0);
  EXPECT_EQ(line(progress, 79), "[  0%] copying disks  0 B/s  time left unknown");
}

TEST(RenderProgress, CountsDisksWhenThereAreMany) {
  job::Progress progress = sample_progress();
  progress.disks.clear();
  for (int i = 0; i < 40; ++i) {
    progress.disks.push_back({"vd" + std::to_string(i), 1_GiB, 1_GiB, i < 12 ? 1_GiB : 5_MiB, {}});
  }
  EXPECT_EQ(line(progress, 119),
            "[ 42%] copying disks  1.5 GiB of 3.0 GiB  110.0 MiB/s  0:14 left  12 of 40 disks done"
            "  1,234 guest writes mirrored");
  EXPECT_THAT(render_progress_text(view_of(progress)), HasSubstr("vd0 100%, vd1 100%, "));
}

TEST(RenderProgress, OfMemoryShowsMemory) {
  job::Progress progress = sample_progress();
  progress.phase = job::Phase::Memory;
  progress.copied = progress.data;
  progress.memory_total = 512_MiB;
  progress.memory_remaining = 128_MiB;
  EXPECT_EQ(line(progress, 79),
            "[ 96%] moving memory  384.0 MiB of 512.0 MiB  110.0 MiB/s  0:14 left");
}

TEST(RenderProgress, OfOtherPhasesIsShort) {
  job::Progress progress = sample_progress();
  const auto text = [&](job::Phase phase) {
    progress.phase = phase;
    return line(progress, 79);
  };
  EXPECT_EQ(text(job::Phase::Plan), "[  0%] examining both hosts");
  EXPECT_EQ(text(job::Phase::Reserve), "[  0%] reserving space");
  EXPECT_EQ(text(job::Phase::Barrier), "[ 99%] switching over");
  EXPECT_EQ(text(job::Phase::Commit), "[ 99%] clearing up here");
  EXPECT_EQ(text(job::Phase::Done), "[100%] done");
  EXPECT_EQ(text(job::Phase::Undo), "undoing");
  progress.waiting_for = "libvirt on hostb";
  EXPECT_EQ(text(job::Phase::Undo), "undoing  waiting for libvirt on hostb");
}

TEST(ProgressTracker, NeverRunsBackwards) {
  Random random(1);
  for (int run = 0; run < 200; ++run) {
    ProgressTracker tracker;
    tracker.planned(sample_plan());
    job::Progress progress = sample_progress();
    int last = 0;
    std::vector<int> last_disks(progress.disks.size(), 0);
    for (int step = 0; step < 50; ++step) {
      // Whatever the job says, in whatever order.
      progress.phase = static_cast<job::Phase>(random.below(11));
      progress.data = Length(random.below(1ULL << 33));
      progress.copied = Length(random.below(1ULL << 33));
      progress.memory_total = Length(random.below(1ULL << 30));
      progress.memory_remaining = Length(random.below(1ULL << 30));
      for (job::DiskProgress& disk : progress.disks) {
        disk.data = Length(random.below(1ULL << 32));
        disk.copied = Length(random.below(1ULL << 32));
        disk.dirty = Length(random.below(3));
      }
      const ProgressView view = tracker.update(progress);
      EXPECT_GE(view.percent, last);
      EXPECT_LE(view.percent, 100);
      last = view.percent;
      for (std::size_t i = 0; i < last_disks.size(); ++i) {
        EXPECT_GE(view.disk_percent[i], last_disks[i]);
        EXPECT_LE(view.disk_percent[i], 100);
        last_disks[i] = view.disk_percent[i];
      }
    }
  }
}

TEST(ProgressTracker, SaysHundredOnlyWhenItIsDone) {
  ProgressTracker tracker;
  tracker.planned(sample_plan());
  job::Progress progress = sample_progress();
  progress.phase = job::Phase::Memory;
  progress.copied = progress.data;
  progress.memory_total = 512_MiB;
  progress.memory_remaining = Length(0);
  EXPECT_EQ(tracker.update(progress).percent, 99);
  progress.phase = job::Phase::Commit;
  EXPECT_EQ(tracker.update(progress).percent, 99);
  progress.phase = job::Phase::Done;
  EXPECT_EQ(tracker.update(progress).percent, 100);
}

TEST(ProgressTracker, ADiskThatIsDirtyIsNotDone) {
  ProgressTracker tracker;
  job::Progress progress = sample_progress();
  progress.disks[0].copied = progress.disks[0].data;
  progress.disks[0].dirty = Length(1);
  EXPECT_EQ(tracker.update(progress).disk_percent[0], 99);
}

TEST(ProgressTracker, AnEmptyGuestIsNoDivisionByZero) {
  ProgressTracker tracker;
  job::Progress progress;
  progress.phase = job::Phase::Copy;
  EXPECT_EQ(tracker.update(progress).percent, 0);
  progress.disks = {{"vda", 1_GiB, {}, {}, {}}};
  progress.phase = job::Phase::Synchronised;
  EXPECT_EQ(tracker.update(progress).disk_percent[0], 100);  // holes only: all there
}

TEST(ProgressPace, ShowsPhasesAndWaitingAtOnceTheRestNowAndThen) {
  ProgressPace pace(seconds(5));
  job::Progress progress = sample_progress();
  progress.elapsed = seconds(1);
  EXPECT_TRUE(pace.due(progress));
  progress.elapsed = milliseconds(5999);
  EXPECT_FALSE(pace.due(progress));
  progress.elapsed = seconds(6);
  EXPECT_TRUE(pace.due(progress));
  progress.waiting_for = "the link";
  EXPECT_TRUE(pace.due(progress));
  EXPECT_FALSE(pace.due(progress));
  progress.phase = job::Phase::Synchronised;
  EXPECT_TRUE(pace.due(progress));
}

// ---- summary, errors, interruptions -------------------------------------------------------------

TEST(RenderSummary, SaysWhatWasDone) {
  EXPECT_EQ(render_summary(sample_summary(), kPlain),
            "web1 runs on hostb. It stood still for 61 ms; the move took 1:29.\n"
            "\n"
            "  blackout  3.1 ms in QEMU's drain, 41.3 in the memory's end, 0.1 in the lock of the "
            "source's images, 16.5 in the resume\n"
            "            beside the memory's end 9.8 ms for the disks: 1.2 to drain, 0.1 to "
            "compare, 6.1 to flush, 1.9 to release\n"
            "  moved     2 disks of 5.0 GiB, 3.0 GiB of it read\n"
            "  sent      2.0 GiB, 256.0 MiB of it memory\n"
            "  mirrored  12,345 guest writes\n"
            "  phases    reserve 120 ms, copy 27.3 s, memory 1:01\n"
            "  memory    drover took 80.0 MiB here, 60.0 MiB on hostb\n"
            "  deleted   /var/lib/libvirt/images/web1.raw\n"
            "  kept      /dev/vg0/web1-data\n"
            "  note      a block device is never deleted: /dev/vg0/web1-data\n");
}

TEST(RenderSummary, OfAGuestWithoutDisks) {
  job::Summary summary;
  summary.guest = "web1";
  summary.host = "hostb";
  summary.blackout = std::chrono::microseconds(8'760);
  summary.total = milliseconds(900);
  EXPECT_EQ(render_summary(summary, kPlain),
            "web1 runs on hostb. It stood still for 8.7 ms; the move took 900 ms.\n"
            "\n"
            "  moved     no disks\n"
            "  sent      0 B, 0 B of it memory\n"
            "  mirrored  no guest writes\n");
}

TEST(RenderError, HasAHintIfThereIsOne) {
  EXPECT_EQ(render_error({Code::NotFound, "no guest is named web1", "", false}, kPlain),
            "drover: no guest is named web1\n");
  EXPECT_EQ(
      render_error({Code::NotFound, "no\nsuch \x1b[2Jguest", "virsh list --all", false}, kPlain),
      "drover: no\n        such \\x1b[2Jguest\n  hint: virsh list --all\n");
}

TEST(RenderInterruption, SaysWhetherTheMoveIsUndoneOrFinished) {
  Interruption interruption{sample_progress(), "web1", "hostb", false};
  EXPECT_EQ(render_interruption(interruption, Purpose::Move),
            "interrupted: undoing the move; web1 runs on here. Please wait.");
  interruption.again = true;
  interruption.progress.phase = job::Phase::Undo;
  EXPECT_EQ(render_interruption(interruption, Purpose::Move),
            "still undoing, please wait; stopping now would leave things behind");
  interruption.progress.waiting_for = "libvirt on hostb";
  EXPECT_EQ(render_interruption(interruption, Purpose::Move),
            "still undoing, waiting for libvirt on hostb; stopping now would leave things "
            "behind");
  interruption.again = false;
  interruption.progress.phase = job::Phase::Resume;
  EXPECT_EQ(render_interruption(interruption, Purpose::Move),
            "interrupted too late to undo: web1 has been handed over to hostb, and the move "
            "is finished instead");
  EXPECT_EQ(render_interruption(interruption, Purpose::Examine),
            "interrupted; nothing was changed");
}

// ---- JSON ---------------------------------------------------------------------------------------

nlohmann::json parsed(const std::string& text) {
  EXPECT_THAT(text, Not(HasSubstr("\n")));
  return nlohmann::json::parse(text);
}

TEST(RenderRelocation, SaysWhatGoesWhereWithoutMemory) {
  job::Plan plan = sample_plan();
  plan.kind = job::Kind::Relocate;
  plan.host = "/mnt/b";
  plan.disks[0].renamed = true;
  const std::string text = render_plan(plan, Purpose::Examine, kPlain);
  EXPECT_THAT(text, HasSubstr("Relocate web1 to /mnt/b: 2 disks of 5.0 GiB"));
  EXPECT_THAT(text, Not(HasSubstr("memory")));
  EXPECT_THAT(text, HasSubstr("only renamed"));
  EXPECT_THAT(text, HasSubstr("the disks of web1 can go to /mnt/b. Nothing was changed."));
}

TEST(RenderRelocation, SummaryAndInterruption) {
  job::Summary summary = sample_summary();
  summary.kind = job::Kind::Relocate;
  summary.host = "/mnt/b";
  const std::string text = render_summary(summary, kPlain);
  EXPECT_THAT(text, HasSubstr("the disks of web1 are on /mnt/b. It took 1:29."));
  EXPECT_THAT(text, HasSubstr("vda is /srv/nvme/web1.raw"));
  EXPECT_THAT(text, Not(HasSubstr("stood still")));
  Interruption interruption{sample_progress(), "web1", "/mnt/b", false, job::Kind::Relocate};
  EXPECT_EQ(render_interruption(interruption, Purpose::Move),
            "interrupted: undoing the relocation; the disks of web1 stay where they are. Please "
            "wait.");
  interruption.progress.phase = job::Phase::Switch;
  EXPECT_THAT(render_interruption(interruption, Purpose::Move), HasSubstr("too late to undo"));
}

TEST(Json, Plan) {
  job::Plan plan = sample_plan();
  plan.findings = {sample_warning(), sample_blocker()};
  const auto json = parsed(json_plan(plan));
  EXPECT_EQ(json.at("event"), "plan");
  EXPECT_EQ(json.at("guest"), "web1");
  EXPECT_EQ(json.at("blocked"), true);
  EXPECT_EQ(json.at("disks").size(), 2U);
  EXPECT_EQ(json.at("disks")[0].at("size_bytes"), 4ULL << 30);
  EXPECT_EQ(json.at("findings")[0].at("severity"), "blocker");
  EXPECT_EQ(json.at("findings")[0].at("rule"), "target-file-exists");
  EXPECT_EQ(json.at("findings")[1].at("why"), nullptr);
  plan.findings.clear();
  plan.disks[0].allocation = Length(0);
  EXPECT_EQ(parsed(json_plan(plan)).at("blocked"), false);
  EXPECT_EQ(parsed(json_plan(plan)).at("disks")[0].at("allocated_bytes"), nullptr);
}

TEST(Json, Progress) {
  job::Progress progress = sample_progress();
  const auto json = parsed(json_progress(view_of(progress)));
  EXPECT_EQ(json.at("event"), "progress");
  EXPECT_EQ(json.at("phase"), "copy");
  EXPECT_EQ(json.at("percent"), 42);
  EXPECT_EQ(json.at("time_left_s"), 14);
  EXPECT_EQ(json.at("waiting_for"), nullptr);
  EXPECT_EQ(json.at("disks")[1].at("copied_bytes"), 512ULL << 20);
  progress.time_left.reset();
  progress.waiting_for = "the link";
  EXPECT_EQ(parsed(json_progress(view_of(progress))).at("time_left_s"), nullptr);
  EXPECT_EQ(parsed(json_progress(view_of(progress))).at("waiting_for"), "the link");
}

TEST(Json, SummaryNoteAndError) {
  const auto summary = parsed(json_summary(sample_summary()));
  EXPECT_EQ(summary.at("event"), "summary");
  EXPECT_EQ(summary.at("blackout_us"), 61'200);
  EXPECT_EQ(summary.at("blackout").at("memory_us"), 41'300);
  EXPECT_EQ(summary.at("blackout").at("release_us"), 1900);
  EXPECT_EQ(summary.at("phases")[1], (nlohmann::json{{"phase", "copy"}, {"ms", 27'390}}));
  EXPECT_EQ(summary.at("deleted")[0], "/var/lib/libvirt/images/web1.raw");
  EXPECT_EQ(parsed(json_note("a\nb")), (nlohmann::json{{"event", "note"}, {"text", "a\nb"}}));
  EXPECT_EQ(parsed(json_error({Code::NotFound, "no guest", "", true})),
            (nlohmann::json{{"event", "error"},
                            {"code", "not-found"},
                            {"exit_code", 3},
                            {"message", "no guest"},
                            {"hint", nullptr},
                            {"retryable", true}}));
}

TEST(Json, IsValidWhateverBytesANameHas) {
  job::Plan plan = sample_plan();
  plan.guest = std::string("\xff\xfe\0\x1b\"\\", 6);
  EXPECT_EQ(parsed(json_plan(plan)).at("guest"),
            std::string("\xef\xbf\xbd\xef\xbf\xbd\0\x1b\"\\", 10));
}

}  // namespace
}  // namespace drover::cli
