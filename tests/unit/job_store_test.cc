// SPDX-License-Identifier: Apache-2.0
//
// Jobs on disk: what is written is read back, one process at a time works on a job, and no file,
// however damaged, does harm.
#include "job/job_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <fstream>
#include <sstream>

#include "base/random.h"
#include "base/unique_fd.h"
#include "tests/fakes/job_samples.h"

namespace drover::job {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::sample_plan;
using testing::sample_progress;
using testing::sample_record;
using testing::sample_summary;

std::string read(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

void write(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::trunc) << text;
}

class Store : public ::testing::Test {
 protected:
  std::unique_ptr<Job> create(JobRecord record = sample_record()) {
    Result<std::unique_ptr<Job>> job = store.create(std::move(record));
    EXPECT_TRUE(job.has_value()) << job.error().to_string();
    return job ? std::move(*job) : nullptr;
  }
  // A job whose process has ended.
  std::string dead() { return create()->id(); }

  testing::TemporaryPlaces temporary;
  JobStore store{temporary.places()};
};

TEST_F(Store, AJobIsReadBackAsItWasWritten) {
  JobRecord record = sample_record();
  record.options.disk_paths = {{"vda", "/srv/nvme/web1.raw"}};
  record.options.bandwidth = 100_MiB;
  record.options.memory_channels = 3;
  record.options.compression = *mirror::parse_compression("zstd:3");
  record.options.via = {"10.0.0.2", "fd00::2"};
  record.options.link_timeout = std::chrono::minutes(3);
  record.options.keep_partial = true;
  record.options.use_index = false;
  record.options.max_slowdown = std::chrono::milliseconds(40);
  record.options.verify = true;
  record.state = {{"bitmap", "drover-web1"}};
  std::string id;
  {
    const auto job = create(record);
    ASSERT_NE(job, nullptr);
    id = job->id();
    EXPECT_THAT(id, ::testing::MatchesRegex("web1-[0-9a-f]+"));
  }
  const auto job = store.open(id);
  ASSERT_TRUE(job.has_value()) << job.error().to_string();
  const JobRecord& got = (*job)->record();
  EXPECT_EQ(got.id, id);
  EXPECT_EQ(got.kind(), Kind::Move);
  EXPECT_EQ(got.options.disk_paths, record.options.disk_paths);
  EXPECT_EQ(got.options.bandwidth, record.options.bandwidth);
  EXPECT_EQ(got.options.memory_channels, 3U);
  EXPECT_EQ(got.options.compression, record.options.compression);
  EXPECT_EQ(got.options.via, record.options.via);
  EXPECT_EQ(got.options.link_timeout, record.options.link_timeout);
  EXPECT_TRUE(got.options.keep_partial);
  EXPECT_FALSE(got.options.use_index);
  EXPECT_EQ(got.options.max_slowdown, record.options.max_slowdown);
  EXPECT_TRUE(got.options.verify);
  EXPECT_EQ(got.plan.uuid, record.plan.uuid);
  ASSERT_EQ(got.plan.disks.size(), 2U);
  EXPECT_TRUE(got.plan.disks[0].delete_source);
  EXPECT_FALSE(got.plan.disks[1].delete_source);
  EXPECT_EQ(got.plan.disks[1].virtual_size, 1_GiB);
  EXPECT_EQ(got.state, record.state);
  EXPECT_EQ(got.pid, ::getpid());
}

TEST_F(Store, NobodyElseMayLookIn) {
  const auto job = create();
  struct stat status {};
  ASSERT_EQ(::stat(job->directory().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700U);
  ASSERT_EQ(::stat((job->directory() + "/job.json").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0077, 0U);
}

TEST_F(Store, OneProcessAtATimeWorksOnAJob) {
  auto job = create();
  const std::string id = job->id();
  const auto second = store.open(id);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().code, Code::Busy);
  EXPECT_THAT(second.error().message, HasSubstr("in process " + std::to_string(::getpid())));
  EXPECT_THAT(second.error().hint, HasSubstr("drover watch " + id));
  auto view = store.look(id);
  ASSERT_TRUE(view.has_value());
  EXPECT_TRUE(view->alive);
  EXPECT_EQ(view->pid, ::getpid());

  job.reset();
  view = store.look(id);
  ASSERT_TRUE(view.has_value());
  EXPECT_FALSE(view->alive);
  EXPECT_TRUE(store.open(id).has_value());
}

TEST_F(Store, TheLockGoesWithItsProcessHoweverItEnds) {
  const std::string id = dead();
  std::array<int, 2> ready{};
  ASSERT_EQ(::pipe(ready.data()), 0);
  const UniqueFd told(ready[0]);
  UniqueFd tells(ready[1]);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto job = store.open(id);
    (void)!::write(tells.get(), job ? "1" : "0", 1);
    ::pause();
  }
  char has_it = 0;
  ASSERT_EQ(::read(told.get(), &has_it, 1), 1);
  EXPECT_EQ(has_it, '1');
  EXPECT_EQ(store.look(id)->pid, child);
  EXPECT_EQ(store.open(id).error().code, Code::Busy);
  ::kill(child, SIGKILL);
  EXPECT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_FALSE(store.look(id)->alive);
  EXPECT_TRUE(store.open(id).has_value());
}

TEST_F(Store, OfManyAtOnceOneGetsTheLock) {
  const std::string id = dead();
  static constexpr int kProcesses = 16;
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe(ends.data()), 0);
  const UniqueFd results(ends[0]);
  UniqueFd report(ends[1]);
  std::array<int, 2> gate{};
  ASSERT_EQ(::pipe(gate.data()), 0);
  UniqueFd wait_here(gate[0]);
  UniqueFd held(gate[1]);
  std::vector<pid_t> children;
  for (int i = 0; i < kProcesses; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      held.reset();
      const auto job = store.open(id);
      const char what = job ? 'x' : job.error().code == Code::Busy ? '.' : '?';
      (void)!::write(report.get(), &what, 1);
      char byte = 0;
      (void)!::read(wait_here.get(), &byte, 1);  // holds it until all have tried
      ::_exit(0);
    }
    children.push_back(child);
  }
  std::string seen;
  while (seen.size() < kProcesses) {
    char what = 0;
    ASSERT_EQ(::read(results.get(), &what, 1), 1);
    seen += what;
  }
  held.reset();
  for (const pid_t child : children) ::waitpid(child, nullptr, 0);
  EXPECT_EQ(std::count(seen.begin(), seen.end(), 'x'), 1);
  EXPECT_EQ(std::count(seen.begin(), seen.end(), '.'), kProcesses - 1);
}

TEST_F(Store, AGuestHasOneJob) {
  const auto job = create();
  const auto live = store.create(sample_record());
  ASSERT_FALSE(live.has_value());
  EXPECT_EQ(live.error().code, Code::AlreadyExists);
  EXPECT_THAT(live.error().hint, HasSubstr("drover watch " + job->id()));

  JobRecord other = sample_record();
  other.plan.uuid = "other";
  other.plan.guest = "db1";
  const std::string other_id = create(other)->id();
  const auto dead_one = store.create(other);
  ASSERT_FALSE(dead_one.has_value());
  EXPECT_THAT(dead_one.error().hint, HasSubstr("drover resume " + other_id));
}

TEST_F(Store, AnEndedJobLeavesALineInTheHistoryAndNothingElse) {
  const auto job = create();
  StatusWriter(job->status_path()).state("copying");
  ASSERT_TRUE(job->finish({Outcome::Moved, {}, sample_summary()}).has_value());
  EXPECT_FALSE(std::filesystem::exists(temporary.places().jobs()));
  EXPECT_THAT(*store.list(), IsEmpty());
  EXPECT_EQ(store.look(job->id()).error().code, Code::NotFound);

  JobRecord record = sample_record();
  const auto next = create(record);
  ASSERT_TRUE(next->finish({Outcome::Undone, Error{Code::Io, "the disk failed", "", false}, {}})
                  .has_value());
  const Result<History> history = store.history();
  ASSERT_TRUE(history.has_value());
  ASSERT_EQ(history->entries.size(), 2U);
  EXPECT_EQ(history->entries[0].id, job->id());
  EXPECT_EQ(history->entries[0].outcome, Outcome::Moved);
  ASSERT_TRUE(history->entries[0].summary.has_value());
  EXPECT_EQ(history->entries[0].summary->wire_bytes, sample_summary().wire_bytes);
  EXPECT_EQ(history->entries[1].outcome, Outcome::Undone);
  EXPECT_EQ(history->entries[1].reason->message, "the disk failed");
}

TEST_F(Store, TheHistoryIsBounded) {
  std::string lines;
  for (std::size_t i = 0; i < JobStore::kMostHistory + 5; ++i) {
    lines +=
        to_line(HistoryEntry{.id = "old-" + std::to_string(i), .kind = "move"}.to_json()) + "\n";
  }
  const auto job = create();
  write(temporary.places().history(), lines);
  ASSERT_TRUE(job->finish({}).has_value());
  const Result<History> history = store.history();
  ASSERT_TRUE(history.has_value());
  EXPECT_EQ(history->entries.size(), JobStore::kMostHistory);
  EXPECT_EQ(history->entries.front().id, "old-6");
  EXPECT_EQ(history->entries.back().id, job->id());
}

TEST_F(Store, ADamagedHistoryKeepsNoJobFromEnding) {
  const auto job = create();
  write(temporary.places().history(), "garbage\n{\"job\":1}\n\n[]\n");
  ASSERT_TRUE(job->finish({}).has_value());
  EXPECT_EQ(store.history()->entries.size(), 1U);
  EXPECT_EQ(store.history()->damaged, 3U);

  const auto next = create();
  std::filesystem::remove(temporary.places().history());
  std::filesystem::create_directory(temporary.places().history());
  EXPECT_TRUE(next->finish({}).has_value());
  EXPECT_EQ(store.history()->entries.size(), 1U);
}

TEST_F(Store, IsFoundByItsIdAndByItsGuest) {
  const auto job = create();
  EXPECT_EQ(store.find(job->id())->id, job->id());
  EXPECT_EQ(store.find("web1")->id, job->id());
  EXPECT_EQ(store.find(sample_plan().uuid)->id, job->id());
  EXPECT_EQ(store.find("db1").error().code, Code::NotFound);
  EXPECT_EQ(store.find("../jobs").error().code, Code::NotFound);
  EXPECT_EQ(store.find("").error().code, Code::NotFound);

  JobRecord twin = sample_record();
  twin.plan.uuid = "another";  // defined again under the same name
  const auto other = create(twin);
  const auto both = store.find("web1");
  ASSERT_FALSE(both.has_value());
  EXPECT_EQ(both.error().code, Code::InvalidArgument);
  EXPECT_THAT(both.error().hint, HasSubstr(job->id()));
  EXPECT_THAT(both.error().hint, HasSubstr(other->id()));
}

TEST_F(Store, WhatIsNotAJobOfThisHostIsNotListed) {
  const auto job = create();
  const std::string jobs = temporary.places().jobs();
  std::filesystem::create_directories(jobs + "/web9-received/receiver");
  std::filesystem::create_directories(jobs + "/.half-made");
  std::filesystem::create_directories(jobs + "/empty");
  write(jobs + "/a-file", "x");
  const auto list = store.list();
  ASSERT_TRUE(list.has_value()) << list.error().to_string();
  ASSERT_EQ(list->size(), 1U);
  EXPECT_EQ(store.look("web9-received").error().code, Code::NotFound);
}

TEST_F(Store, WhatAKilledProcessLeftHalfMadeIsSweptByTheNext) {
  const std::string half = temporary.places().jobs() + "/.web1-00000000";
  std::filesystem::create_directories(half);
  const auto job = create();
  EXPECT_FALSE(std::filesystem::exists(half));
}

TEST_F(Store, NoJobsIsNoError) {
  EXPECT_THAT(*store.list(), IsEmpty());
  EXPECT_THAT(store.history()->entries, IsEmpty());
}

TEST_F(Store, ADamagedRecordIsSaidAndHarmsNobody) {
  const std::string id = dead();
  JobRecord other = sample_record();
  other.plan.uuid = "other";
  const std::string good = create(other)->id();
  const std::string path = temporary.places().jobs() + "/" + id + "/job.json";
  const std::string whole = read(path);
  nlohmann::json json = nlohmann::json::parse(whole);
  std::vector<std::string> damages = {"",
                                      "garbage",
                                      "[]",
                                      "{}",
                                      "{\"version\":1}",
                                      whole.substr(0, whole.size() / 2),
                                      std::string(1000, '['),
                                      std::string("\0\0\0\0", 4),
                                      std::string(std::size_t{5} << 20, ' ')};
  for (const auto& [name, value] : json.items()) {  // each member missing, and of another type
    nlohmann::json without = json;
    without.erase(name);
    damages.push_back(without.dump());
    without[name] = nlohmann::json::array({-1});
    damages.push_back(without.dump());
  }
  for (const auto& [name, value] : json.at("options").items()) {
    nlohmann::json without = json;
    without["options"].erase(name);
    damages.push_back(without.dump());
    without["options"][name] = nlohmann::json::array();
    damages.push_back(without.dump());
  }
  json["id"] = "another";
  damages.push_back(json.dump());
  for (const std::string& damage : damages) {
    write(path, damage);
    const auto view = store.look(id);
    ASSERT_TRUE(view.has_value());
    EXPECT_FALSE(view->record.has_value()) << damage.substr(0, 300);
    EXPECT_THAT(view->damaged, HasSubstr(id));
    EXPECT_THAT(view->damaged, HasSubstr("job.json"));
    const auto opened = store.open(id);
    ASSERT_FALSE(opened.has_value());
    EXPECT_EQ(opened.error().code, Code::Io);
    EXPECT_THAT(opened.error().hint, HasSubstr("nothing is deleted"));
    EXPECT_EQ(store.list()->size(), 2U);
    EXPECT_EQ(store.find(good)->id, good);
  }
  std::filesystem::remove(path);
  EXPECT_THAT(store.look(id)->damaged, HasSubstr("job.json"));
  std::filesystem::create_symlink("/etc/passwd", path);
  EXPECT_THAT(store.look(id)->damaged, HasSubstr("job.json"));
}

TEST_F(Store, ARecordThatANewerDroverWroteIsLeftAlone) {
  const std::string id = dead();
  const std::string path = temporary.places().jobs() + "/" + id + "/job.json";
  nlohmann::json json = nlohmann::json::parse(read(path));
  json["something_new"] = 1;
  write(path, json.dump());
  EXPECT_TRUE(store.open(id).has_value());  // more members: the same version
  json["version"] = 2;
  write(path, json.dump());
  EXPECT_EQ(store.open(id).error().code, Code::Incompatible);
  EXPECT_EQ(store.open(id).error().hint, "use the drover that began it");
}

TEST_F(Store, ManyMutationsOfARecordAreReadWithoutHarm) {
  const std::string whole = sample_record().to_json().dump();
  Random random(7);
  for (int i = 0; i < 20'000; ++i) {
    std::string text = whole;
    for (std::uint64_t n = 1 + random.below(4); n > 0; --n) {
      text[random.below(text.size())] = static_cast<char>(random.below(256));
    }
    const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
    if (json.is_object()) (void)JobRecord::from_json(json);
  }
}

// ---- the status ---------------------------------------------------------------------------------

TEST_F(Store, TheStatusIsReadBack) {
  const auto job = create();
  EXPECT_FALSE(store.look(job->id())->status.has_value());
  StatusWriter writer(job->status_path());
  writer.progress(sample_progress());
  writer.state("copying");
  writer.error(Error{Code::Unreachable, "the link broke", "look at it", true});
  const auto view = store.look(job->id());
  ASSERT_TRUE(view->status.has_value());
  EXPECT_EQ(view->status->state, "copying");
  EXPECT_EQ(view->status->progress.copied, sample_progress().copied);
  EXPECT_EQ(view->status->progress.time_left, sample_progress().time_left);
  EXPECT_EQ(view->status->progress.disks.size(), 2U);
  EXPECT_EQ(view->status->last_error->message, "the link broke");
  EXPECT_THAT(view->damaged, IsEmpty());
}

TEST_F(Store, TheStatusIsWrittenAtOnceForNewsAndElseNowAndThen) {
  const auto job = create();
  StatusWriter writer(job->status_path());
  Progress progress = sample_progress();
  writer.progress(progress);
  progress.copied = 2_GiB;
  writer.progress(progress);  // less than a second later
  EXPECT_EQ(store.look(job->id())->status->progress.copied, sample_progress().copied);
  EXPECT_EQ(writer.current().progress.copied, 2_GiB);
  progress.waiting_for = "the link";
  writer.progress(progress);
  EXPECT_EQ(store.look(job->id())->status->progress.waiting_for, "the link");
  progress.copied = 3_GiB;
  writer.progress(progress);
  writer.flush();
  EXPECT_EQ(store.look(job->id())->status->progress.copied, 3_GiB);
}

TEST_F(Store, ARelocationIsReadBackAsItWasWritten) {
  JobRecord record = sample_record();
  record.options = {};
  record.relocation = RelocateOptions{.guest = "web1",
                                      .pool = "fast",
                                      .places = {{"vda", "/mnt/b"}},
                                      .disks = {"vda", "vdb"},
                                      .format = "qcow2",
                                      .uri = "test:///default",
                                      .keep_source = true,
                                      .bandwidth = 100_MiB,
                                      .parallel = 7};
  record.plan.kind = Kind::Relocate;
  record.plan.disks[0].renamed = true;
  const auto back = JobRecord::from_json([&] {
    JobRecord with_id = record;
    with_id.id = "web1-0a";
    return with_id.to_json();
  }());
  ASSERT_TRUE(back.has_value()) << back.error().to_string();
  EXPECT_EQ(back->kind(), Kind::Relocate);
  ASSERT_TRUE(back->relocation.has_value());
  EXPECT_EQ(back->relocation->guest, "web1");
  EXPECT_EQ(back->relocation->pool, "fast");
  EXPECT_EQ(back->relocation->places, record.relocation->places);
  EXPECT_EQ(back->relocation->disks, record.relocation->disks);
  EXPECT_EQ(back->relocation->format, "qcow2");
  EXPECT_EQ(back->relocation->uri, "test:///default");
  EXPECT_TRUE(back->relocation->keep_source);
  EXPECT_EQ(back->relocation->bandwidth, 100_MiB);
  EXPECT_EQ(back->relocation->parallel, 7U);
  EXPECT_EQ(back->plan.kind, Kind::Relocate);
  EXPECT_TRUE(back->plan.disks[0].renamed);
}

TEST_F(Store, AJobOfAnUnknownKindIsLeftToTheDroverThatBeganIt) {
  JobRecord record = sample_record();
  record.id = "web1-0a";
  nlohmann::json json = record.to_json();
  json["kind"] = "teleport";
  const auto back = JobRecord::from_json(json);
  ASSERT_FALSE(back.has_value());
  EXPECT_EQ(back.error().code, Code::Incompatible);
}

TEST_F(Store, ADamagedStatusIsSaidAndTheJobIsStillAJob) {
  const std::string id = dead();
  const std::string path = temporary.places().jobs() + "/" + id + "/status.json";
  for (const char* damage : {"", "x", "{\"state\":\"\"", "{\"state\":3,\"progress\":{}}",
                             R"({"state":"","progress":{"phase":"dance"},"updated_at":1})",
                             R"({"state":"","progress":{"phase":"copy"},"updated_at":-1})"}) {
    write(path, damage);
    const auto view = store.look(id);
    ASSERT_TRUE(view.has_value());
    EXPECT_TRUE(view->record.has_value());
    EXPECT_FALSE(view->status.has_value()) << damage;
    EXPECT_THAT(view->damaged, HasSubstr("status.json"));
    EXPECT_TRUE(store.open(id).has_value());
  }
}

// ---- events -------------------------------------------------------------------------------------

template <class T>
T back(const T& said) {
  const Result<JobEvent> event = parse_event(to_line(event_of(said)));
  EXPECT_TRUE(event.has_value()) << event.error().to_string();
  return event ? std::get<T>(*event) : T{};
}

TEST(Events, AreReadBack) {
  EXPECT_EQ(back(Started{"web1-0a"}).id, "web1-0a");
  EXPECT_EQ(back(Note{"a\nb"}).text, "a\nb");
  Plan plan = sample_plan();
  plan.findings = {testing::sample_warning(), testing::sample_blocker()};
  EXPECT_TRUE(back(plan).blocked());
  EXPECT_EQ(back(plan).findings[1].rule, "disk-format");
  EXPECT_EQ(back(plan).disks[0].target_path, plan.disks[0].target_path);
  Progress progress = sample_progress();
  progress.waiting_for = "the link";
  progress.waiting = std::chrono::seconds(7);
  progress.sent_again = 3_MiB;
  progress.found = 5_MiB;
  progress.reconnects = 2;
  progress.to_verify = 5_MiB;
  progress.slowdown = {.writes = 3, .waited = std::chrono::microseconds(70), .longest = std::chrono::microseconds(50)};
  EXPECT_EQ(to_line(event_of(back(progress))), to_line(event_of(progress)));
  Summary summary = sample_summary();
  summary.slowdown = progress.slowdown;
  summary.verified = true;
  summary.found = 1_GiB;
  summary.damaged = 1;
  summary.unverified = 2;
  EXPECT_EQ(to_line(event_of(back(summary))), to_line(event_of(summary)));
  const Error error = back(Error{Code::NoSpace, "full", "", true});
  EXPECT_EQ(error.code, Code::NoSpace);
  EXPECT_EQ(error.hint, "");
  EXPECT_TRUE(error.retryable);
}

TEST(Events, ThatAreNoneAreRefused) {
  for (const char* line : {"", "x", "[]", "{}", R"({"event":"dance"})", R"({"event":"progress"})",
                           R"({"event":"progress","phase":"copy","disks":{}})",
                           R"({"event":"progress","phase":"copy","copied_bytes":-1})",
                           R"({"event":"summary","guest":"a","host":"b","phases":[1]})",
                           R"({"event":"plan","guest":"a","uuid":"b","host":"c","disks":[{}]})",
                           R"({"event":"note","text":1})", R"({"event":"error"})"}) {
    const auto event = parse_event(line);
    ASSERT_FALSE(event.has_value()) << line;
    EXPECT_EQ(event.error().code, Code::Protocol);
  }
  EXPECT_FALSE(parse_event(std::string(kMaxEventLine + 1, ' ')).has_value());
  EXPECT_FALSE(parse_event(std::string(100'000, '[')).has_value());
}

TEST(JobId, IsAFilesNameWhateverTheGuestsNameIs) {
  EXPECT_THAT(new_job_id("web/../1\n"), ::testing::MatchesRegex("web----1--[0-9a-f]+"));
  EXPECT_LE(new_job_id(std::string(500, 'x')).size(), 64U);
  EXPECT_NE(new_job_id("a"), new_job_id("a"));
}

}  // namespace
}  // namespace drover::job
