// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/mirror_sim.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include <fmt/format.h>

#include "base/random.h"
#include "mirror/disk_mirror.h"
#include "mirror/lane_queue.h"
#include "mirror/offers.h"
#include "tests/sim/sim_content.h"
#include "tests/sim/sim_frame.h"

namespace drover::sim {
namespace {

using mirror::LaneIndex;
using mirror::NbdRequest;
using Bytes = std::vector<std::byte>;

constexpr std::uint64_t kSector = 512;
constexpr std::size_t kMaxInFlight = 16;  // QEMU: MAX_NBD_REQUESTS, block/nbd.c
constexpr std::uint64_t kMaxSteps = 200000;

// Everything that is still to happen and when it may happen is up to the seed: a bag of steps.
class Steps {
 public:
  explicit Steps(Random& random) : random_(random) {}
  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }
  [[nodiscard]] bool empty() const { return steps_.empty(); }
  [[nodiscard]] std::size_t size() const { return steps_.size(); }
  void run_one() {
    const std::size_t i = random_.below(steps_.size());
    std::swap(steps_[i], steps_.back());
    const std::function<void()> step = std::move(steps_.back());
    steps_.pop_back();
    step();
  }

 private:
  Random& random_;
  std::vector<std::function<void()>> steps_;
};

// Splits a range in two at a random place, in random order: both halves once, each when it pleases.
std::array<std::pair<std::size_t, std::size_t>, 2> halves(std::size_t size, Random& random) {
  const std::size_t cut = random.below(size + 1);
  std::array<std::pair<std::size_t, std::size_t>, 2> parts = {{{0, cut}, {cut, size}}};
  if (random.one_in(2)) std::swap(parts[0], parts[1]);
  return parts;
}

class TornReader final : public blockcopy::ImageReader {
 public:
  TornReader(Bytes& disk, Steps& steps, Random& random)
      : disk_(disk), steps_(steps), random_(random) {}
  [[nodiscard]] Length size() const override { return Length(disk_.size()); }
  [[nodiscard]] Length alignment() const override { return Length(kSector); }

  void read(Offset offset, std::span<std::byte> buffer, blockcopy::Done done) override {
    const auto parts = halves(buffer.size(), random_);
    steps_.add([this, offset, buffer, parts, done = std::move(done)] {
      take(offset, buffer, parts[0]);
      steps_.add([this, offset, buffer, parts, done] {
        take(offset, buffer, parts[1]);
        steps_.add([done] { done({}); });
      });
    });
  }

  void extents(Extent range, blockcopy::ExtentsDone done) override {
    steps_.add([this, range, done = std::move(done)] {
      std::vector<blockcopy::MappedExtent> runs;
      for (Offset at = range.offset; at < range.end();) {
        const Offset next = std::min(range.end(), widen({at, Length(1)}, mirror::kBlock).end());
        static constexpr std::array<std::byte, 4096> kZeroes{};
        const bool data =
            std::memcmp(disk_.data() + at.bytes(), kZeroes.data(),
                        std::min<std::size_t>((next - at).bytes(), disk_.size() - at.bytes())) != 0;
        if (!runs.empty() && runs.back().data == data) {
          runs.back().extent.length += next - at;
        } else {
          if (!runs.empty() && random_.one_in(6)) break;
          runs.push_back({{at, next - at}, data});
        }
        at = next;
      }
      steps_.add([done, runs] { done(runs); });
    });
  }

 private:
  void take(Offset offset, std::span<std::byte> buffer, std::pair<std::size_t, std::size_t> part) {
    std::memcpy(buffer.data() + part.first, disk_.data() + offset.bytes() + part.first,
                part.second - part.first);
  }
  Bytes& disk_;
  Steps& steps_;
  Random& random_;
};

// Writes by read-modify-write of whole sectors, as O_DIRECT needs it: two at once to one sector lose one.
class LooseWriter final : public blockcopy::ImageWriter {
 public:
  LooseWriter(Bytes& disk, Steps& steps, Random& random)
      : disk_(disk), steps_(steps), random_(random) {}
  [[nodiscard]] Length size() const override { return Length(disk_.size()); }
  [[nodiscard]] Length alignment() const override { return Length(kSector); }

  void write(Offset offset, std::span<const std::byte> buffer, blockcopy::Done done) override {
    change({offset, Length(buffer.size())},
           [buffer](std::byte* at) { std::memcpy(at, buffer.data(), buffer.size()); },
           std::move(done));
  }
  blockcopy::Sharing share(int fd, Offset from, Extent extent) override {
    if (content_ == nullptr) return blockcopy::Sharing::Refused;
    const std::span all(disk_);
    return content_->share(fd, from, all.subspan(extent.offset.bytes(), extent.length.bytes()));
  }
  void share_with(const SimContent* content) { content_ = content; }
  void write_zeroes(Extent extent, blockcopy::Done done) override {
    change(extent, [extent](std::byte* at) { std::memset(at, 0, extent.length.bytes()); },
           std::move(done));
  }

 private:
  void change(Extent extent, std::function<void(std::byte*)> apply, blockcopy::Done done) {
    const Extent sectors = widen(extent, Length(kSector));
    const std::size_t start = sectors.offset.bytes();
    const std::size_t size = std::min<std::size_t>(sectors.end().bytes(), disk_.size()) - start;
    steps_.add([this, extent, apply = std::move(apply), done = std::move(done), start, size] {
      auto content = std::make_shared<Bytes>(disk_.begin() + static_cast<std::ptrdiff_t>(start),
                                             disk_.begin() + static_cast<std::ptrdiff_t>(start + size));
      apply(content->data() + (extent.offset.bytes() - start));
      const auto parts = halves(size, random_);
      steps_.add([this, content, start, parts, done] {
        put(*content, start, parts[0]);
        steps_.add([this, content, start, parts, done] {
          put(*content, start, parts[1]);
          done({});
        });
      });
    });
  }
  void put(const Bytes& content, std::size_t start, std::pair<std::size_t, std::size_t> part) {
    std::memcpy(disk_.data() + start + part.first, content.data() + part.first,
                part.second - part.first);
  }
  Bytes& disk_;
  Steps& steps_;
  Random& random_;
  const SimContent* content_ = nullptr;
};

class MirrorSim;

// DiskMirror's tokens: a write's piece has the lowest bit set.
bool is_piece(std::uint64_t token) { return (token & 1) != 0; }

// Which of a disk's blocks were written, as QEMU keeps it.
class DirtyBitmap {
 public:
  DirtyBitmap(std::uint64_t size, std::uint64_t granularity)
      : size_(size), granularity_(granularity), bits_((size + granularity - 1) / granularity) {}
  void set(Extent extent) {
    for (std::uint64_t i = extent.offset.bytes() / granularity_;
         i * granularity_ < extent.end().bytes(); ++i) {
      bits_[i] = true;
    }
  }
  template <class Use>
  void for_each(const Use& use) const {
    for (std::uint64_t i = 0; i < bits_.size(); ++i) {
      const std::uint64_t at = i * granularity_;
      if (bits_[i]) use(Extent{Offset(at), Length(std::min(granularity_, size_ - at))});
    }
  }

 private:
  std::uint64_t size_;
  std::uint64_t granularity_;
  std::vector<bool> bits_;
};

// Lanes of encoded frames, each with its own Applier on the target.
class SimLanes final : public mirror::Lanes {
 public:
  SimLanes(MirrorSim& sim, LaneIndex count);
  [[nodiscard]] std::uint32_t count() const override {
    return static_cast<std::uint32_t>(lanes_.size());
  }
  void send(std::uint32_t lane, mirror::OutFrame frame) override;
  bool abandon(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) override;
  void lose(LaneIndex lane);
  // The guest's writes that were given to the lanes and are neither answered, nor dropped, nor
  // lost.
  struct Piece {
    LaneIndex lane = 0;
    Extent extent;
  };
  [[nodiscard]] const std::map<std::uint64_t, Piece>& pieces() const { return pieces_; }
  [[nodiscard]] bool down(LaneIndex lane) const { return lanes_[lane].down; }
  [[nodiscard]] bool quiet() const;
  // Something a lane could do now; false: nothing.
  bool step();

 private:
  struct Lane {
    bool down = false;
    std::uint64_t epoch = 1;
    std::uint64_t sequence = 0;
    std::optional<mirror::LaneQueue> queue;            // not begun
    std::deque<Bytes> wire;                            // encoded, in order
    std::map<std::uint64_t, std::uint64_t> tokens;     // sequence -> token
    std::optional<mirror::LaneOffers> offers;
    std::map<std::uint64_t, mirror::BlockMask> offered;  // sequence -> blocks
    std::unique_ptr<mirror::KnownContent> known;
    struct Answer {
      std::uint64_t epoch = 0;
      std::uint64_t sequence = 0;
      mirror::BlockMask differing;
    };
    std::deque<Answer> answers;
    std::unique_ptr<mirror::Applier> applier;
  };
  void encode_one(Lane& lane);
  void deliver_one(Lane& lane);
  void come_back(LaneIndex index, std::uint64_t delay);
  MirrorSim& sim_;
  std::vector<Lane> lanes_;
  std::map<std::uint64_t, Piece> pieces_;
};

class MirrorSim {
 public:
  MirrorSim(std::uint64_t seed, const MirrorSimOptions& options)
      : options_(options), random_(seed), steps_(random_) {}

  std::optional<std::string> run(MirrorSimStats* stats);

 private:
  friend class SimLanes;
  struct GuestOp {
    NbdRequest request;
    Bytes content;
    Instant begun{};
    bool with_mirror = false;  // the request is with the mirror, unanswered
  };

  void set_up();
  void make_disks(std::uint64_t chunk, std::uint64_t chunks);
  void make_mirror();
  void crash_runner();
  void resume_runner(std::uint64_t delay);
  void mark_bitmaps();
  void restart_target();
  void target_is_back();
  void write_back();
  void begin_flush();
  void end_flush(mirror::FlushId id, std::uint64_t runner, std::uint64_t instance);
  void drive_journal();
  void after_transit();
  void check_fence();
  void take_pass();
  void store_all();
  bool fault();
  bool guest_step();
  void issue_guest_op();
  void change_source(std::uint64_t id, std::size_t first, std::size_t end);
  void send_to_mirror(std::uint64_t id);
  void answered(std::uint64_t id);
  void advance_clock();
  void check_bound();
  void check_strict();
  [[nodiscard]] bool verified() const {
    return verification_ == Verification::None || verification_ == Verification::Done;
  }
  // Where masks run out, some blocks of a chunk may become all of them.
  [[nodiscard]] bool few_masks() const { return mirror_options_.arbiter.max_masks < 1000; }
  bool world_step(bool calm);
  void finish();
  void compare();
  void drive_verification();
  void damage_target();
  void violate(std::string what) {
    if (!violation_) violation_ = std::move(what);
  }
  template <class... Args>
  void trace(fmt::format_string<Args...> format, Args&&... args) const {
    if (!options_.trace) return;
    fmt::print("{:>8} {}\n", steps_taken_, fmt::format(format, std::forward<Args>(args)...));
  }

  const MirrorSimOptions& options_;
  Random random_;
  Steps steps_;
  Instant clock_{std::chrono::seconds(1000)};
  mirror::FrameLimits limits_;
  Bytes source_;
  Bytes target_;
  std::unique_ptr<BufferPool> copy_buffers_;
  std::unique_ptr<BufferPool> write_buffers_;
  std::unique_ptr<TornReader> reader_;
  std::unique_ptr<LooseWriter> writer_;
  std::unique_ptr<TornReader> target_reader_;
  std::unique_ptr<SimLanes> lanes_;
  mirror::DiskMirror::Options mirror_options_;
  std::vector<std::unique_ptr<mirror::DiskMirror>> dead_mirrors_;  // until their reads have ended
  std::unique_ptr<mirror::DiskMirror> mirror_;                     // none: the runner is dead
  std::uint64_t runner_ = 0;                                       // counts the runners
  std::map<std::uint64_t, GuestOp> guest_ops_;
  // The target's disk: what is on stable storage, and which boot it is.
  Bytes synced_;
  std::uint64_t instance_ = 1;
  bool restarting_ = false;
  bool flushing_ = false;
  // The journal and QEMU's bitmaps: what survives the runner.
  bool journaled_ = false;
  std::map<mirror::GroupIndex, std::string> journal_;
  std::uint64_t journal_instance_ = 1;
  std::vector<DirtyBitmap> bitmaps_;
  bool drained_ = false;  // QEMU lets no request begin
  // The driver: alternates the bitmaps as mirror/arbiter.h says.
  enum class Rotation { None, Transit, Fence, Flush, Pass };
  Rotation rotation_ = Rotation::None;
  std::uint64_t rotation_op_ = 0;  // requests before this one may be in the old bitmap only
  mirror::FenceId fence_ = 0;
  std::vector<std::uint64_t> fenced_;  // tokens of the pieces on their way when it began
  std::optional<mirror::GroupIndex> pass_next_;
  std::uint64_t pass_instance_ = 0;
  std::uint64_t told_instance_ = 1;  // the one that the mirror knows to talk to
  std::deque<mirror::GroupRecord> unstored_;
  std::uint64_t next_op_ = 1;
  std::uint64_t guest_budget_ = 0;
  std::uint64_t steps_taken_ = 0;
  std::uint64_t lanes_lost_ = 0;
  std::uint64_t loss_odds_ = 0;  // one in so many steps; 0: never
  std::uint64_t crash_odds_ = 0;
  std::uint64_t restart_odds_ = 0;
  std::uint64_t crashes_ = 0;
  std::uint64_t restarts_ = 0;
  std::uint64_t rotations_ = 0;
  std::uint64_t hot_chunk_ = 0;
  bool hot_ = false;
  std::optional<std::string> violation_;
  Length strict_left_;
  bool was_strict_ = false;
  // Verification: wished for, and how far it is.
  enum class Verification { None, Wanted, Runs, Done };
  Verification verification_ = Verification::None;
  bool damage_done_ = false;
  std::uint64_t damages_ = 0;        // bytes changed behind everybody's back
  std::uint64_t damaged_chunks_ = 0; // reported
  // What else the target has; none: nothing.
  std::unique_ptr<SimContent> content_;
  mirror::KnownPieces known_pieces_;
  std::uint64_t offers_ = 0;
  std::uint64_t not_found_ = 0;
};

// --- lanes ---

SimLanes::SimLanes(MirrorSim& sim, LaneIndex count) : sim_(sim), lanes_(count) {
  for (LaneIndex i = 0; i < count; ++i) {
    lanes_[i].queue.emplace(sim.limits_.chunk_size);
    mirror::Applier::Options applier = sim.options_.applier;
    if (sim.content_) {
      lanes_[i].offers.emplace(sim.known_pieces_, sim.content_->piece());
      lanes_[i].known = sim.content_->open(
          [this](std::function<void()> task) { sim_.steps_.add(std::move(task)); });
      applier.known = lanes_[i].known.get();
    }
    lanes_[i].applier = std::make_unique<mirror::Applier>(
        std::vector<mirror::Applier::Disk>{{sim.writer_.get(), sim.target_reader_.get()}},
        [this, i](std::uint64_t sequence, std::uint16_t, const Result<mirror::BlockMask>& differing) {
          if (!differing) sim_.violate("the target refused a frame: " + differing.error().message);
          lanes_[i].answers.push_back({lanes_[i].epoch, sequence, differing ? *differing : mirror::BlockMask()});
        },
        applier);
  }
}

void SimLanes::send(std::uint32_t lane, mirror::OutFrame frame) {
  if (lanes_[lane].down) return sim_.violate("a frame was sent on a lane that is down");
  if (is_piece(frame.token)) pieces_.emplace(frame.token, Piece{lane, frame.extent});
  lanes_[lane].queue->push(std::move(frame));
}

bool SimLanes::abandon(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) {
  const bool dropped = lanes_[lane].queue->abandon(disk, token);
  if (dropped) pieces_.erase(token);
  return dropped;
}

void SimLanes::lose(LaneIndex index) {
  Lane& lane = lanes_[index];
  // Some of what is on the wire still arrives; its answers don't.
  for (std::uint64_t arrive = sim_.random_.below(lane.wire.size() + 1); arrive > 0; --arrive) {
    deliver_one(lane);
  }
  std::erase_if(pieces_, [index](const auto& piece) { return piece.second.lane == index; });
  lane.queue->clear();
  lane.wire.clear();
  lane.tokens.clear();
  lane.offered.clear();
  lane.answers.clear();
  lane.down = true;
  // The receiver applies what it got before it takes the new epoch's first frame.
  const std::uint64_t delay = sim_.random_.one_in(4) ? sim_.random_.below(400) : 0;
  lane.applier->when_idle([this, index, delay] { come_back(index, delay); });
}

void SimLanes::come_back(LaneIndex index, std::uint64_t delay) {
  sim_.steps_.add([this, index, delay] {
    if (delay > 0) return come_back(index, delay - 1);
    if (sim_.restarting_) {
      const bool settled = std::ranges::all_of(
          lanes_, [](const Lane& lane) { return lane.applier->in_flight() == 0; });
      if (!settled) return come_back(index, 0);
      sim_.target_is_back();
    }
    Lane& back = lanes_[index];
    back.answers.clear();
    ++back.epoch;
    back.sequence = 0;
    back.down = false;
    if (sim_.mirror_) sim_.mirror_->lane_up(index);
    sim_.trace("lane {} is up again", index);
  });
}

void SimLanes::encode_one(Lane& lane) {
  const mirror::OutFrame frame = *lane.queue->pop();
  mirror::EncodeOptions encode;
  if (sim_.random_.one_in(4)) encode.encoding = mirror::Encoding::Lz4;
  lane.tokens.emplace(++lane.sequence, frame.token);
  std::optional<mirror::Offer> offer;
  if (lane.offers) offer = lane.offers->consider(frame, sim_.limits_.chunk_size);
  if (offer) {
    ++sim_.offers_;
    lane.offered.emplace(lane.sequence, data_blocks(*offer, frame.extent));
  }
  lane.wire.push_back(encode_frame(frame, lane.sequence, encode, offer ? &*offer : nullptr));
}

void SimLanes::deliver_one(Lane& lane) {
  static thread_local BufferPool pool(Length(1U << 16), 4096);
  const Bytes bytes = std::move(lane.wire.front());
  lane.wire.pop_front();
  auto in = decode_frame(bytes, sim_.limits_, pool);
  if (!in) return sim_.violate("a frame did not arrive: " + in.error().message);
  lane.applier->apply(in->header, std::move(in->buffer), in->runs);
}

bool SimLanes::step() {
  const std::size_t first = sim_.random_.below(lanes_.size());
  for (std::size_t n = 0; n < lanes_.size(); ++n) {
    Lane& lane = lanes_[(first + n) % lanes_.size()];
    if (lane.down) continue;
    const std::uint64_t choice = sim_.random_.below(3);
    for (std::uint64_t k = 0; k < 3; ++k) {
      switch ((choice + k) % 3) {
        case 0:
          if (lane.queue->empty()) break;
          encode_one(lane);
          return true;
        case 1:
          if (lane.wire.empty()) break;
          deliver_one(lane);
          return true;
        default: {
          if (lane.answers.empty()) break;
          const auto [epoch, sequence, differing] = lane.answers.front();
          lane.answers.pop_front();
          if (epoch != lane.epoch) return true;  // fenced
          const auto token = lane.tokens.extract(sequence);
          if (token.empty()) {
            sim_.violate("a frame was answered twice");
            return true;
          }
          pieces_.erase(token.mapped());
          if (const auto offered = lane.offered.extract(sequence)) {
            (void)lane.offers->answered(offered.mapped(), differing);
            if (!differing.empty()) ++sim_.not_found_;
          }
          if (!differing.empty()) {
            sim_.mirror_->differs(token.mapped(), differing);
          } else {
            sim_.mirror_->applied(token.mapped());
          }
          return true;
        }
      }
    }
  }
  return false;
}

bool SimLanes::quiet() const {
  return std::ranges::all_of(lanes_, [](const Lane& lane) {
    return !lane.down && lane.queue->empty() && lane.wire.empty() && lane.answers.empty() &&
           lane.applier->in_flight() == 0;
  });
}

// --- the world ---

void MirrorSim::set_up() {
  const std::uint64_t shift = random_.below(5);
  std::uint64_t chunk = std::uint64_t{4096} << shift;
  std::uint64_t chunks = 1 + random_.below(shift < 3 ? 10 : 4);
  if (random_.one_in(120)) {  // more than one span of a record
    chunk = 4096;
    chunks = 60 + random_.below(100);
  }
  make_disks(chunk, chunks);

  mirror::DiskMirror::Options& options = mirror_options_;
  options.arbiter.disk_size = Length(source_.size());
  options.arbiter.chunk_size = Length(chunk);
  options.arbiter.lanes = static_cast<LaneIndex>(1 + random_.below(4));
  options.arbiter.first_lane = static_cast<LaneIndex>(random_.below(options.arbiter.lanes));
  options.arbiter.max_forwarded = Length(random_.one_in(3) ? chunk : 1U << 20);
  options.arbiter.strict_window = Length(random_.one_in(2) ? random_.below(8192) : 1U << 20);
  options.arbiter.max_lag = std::chrono::milliseconds(1 + random_.below(20));
  if (random_.one_in(4)) {
    options.arbiter.max_strict_wait = std::chrono::milliseconds(1 + random_.below(40));
  }
  if (random_.one_in(4)) options.arbiter.max_masks = random_.below(20);
  options.arbiter.verify_pause = std::chrono::milliseconds(5);
  options.arbiter.verify_tries = random_.one_in(2) ? 8 : 1 + static_cast<unsigned>(random_.below(3));
  if (random_.one_in(2)) options.arbiter.max_doubts = 1 + random_.below(2);
  options.arbiter.mutation = options_.mutation;
  options.max_copies = 1 + random_.below(4);
  options.target_initially_zero = target_.front() == std::byte{0};
  limits_.disk_sizes = {Length(source_.size())};
  limits_.chunk_size = options.arbiter.chunk_size;

  copy_buffers_ = std::make_unique<BufferPool>(Length(chunk), options.max_copies);
  write_buffers_ = std::make_unique<BufferPool>(widen({Offset(0), Length(source_.size())}, 4_KiB).length, 64);
  reader_ = std::make_unique<TornReader>(source_, steps_, random_);
  writer_ = std::make_unique<LooseWriter>(target_, steps_, random_);
  target_reader_ = std::make_unique<TornReader>(target_, steps_, random_);
  if (options.target_initially_zero && random_.one_in(3)) {
    const Length piece(std::uint64_t{4096} << random_.below(shift + 1));
    content_ = std::make_unique<SimContent>(random_, source_, std::min(piece, Length(chunk)));
    known_pieces_.set(content_->filter());
    writer_->share_with(content_.get());
  }
  lanes_ = std::make_unique<SimLanes>(*this, options.arbiter.lanes);
  journaled_ = random_.one_in(2);
  if (journaled_) {
    bitmaps_.emplace_back(source_.size(), std::uint64_t{4096} << random_.below(4));
    crash_odds_ = random_.one_in(2) ? 0 : 50 + random_.below(400);
  }
  if (random_.one_in(3)) {
    synced_ = target_;
    restart_odds_ = 50 + random_.below(400);
  }
  make_mirror();
  mirror_->start();

  if (random_.one_in(3)) verification_ = Verification::Wanted;
  guest_budget_ = random_.below(80);
  hot_ = random_.one_in(3);
  hot_chunk_ = random_.below(chunks);
  loss_odds_ = random_.one_in(3) ? 20 + random_.below(200) : 0;
  trace("disk {} bytes, chunk {}, lanes {}, {}", source_.size(), chunk, options.arbiter.lanes,
        options.target_initially_zero ? "fresh target" : "used target");
}

void MirrorSim::make_mirror() {
  mirror::DiskMirror::Events events;
  events.acknowledge = [this, runner = runner_](std::uint64_t id) {
    if (runner == runner_) answered(id);
  };
  events.failed = [this](const Error& error) { violate("it gave up: " + error.message); };
  events.changed = [] {};  // here somebody tries all the time
  events.now = [this] { return clock_; };
  events.damaged = [this](Extent extent) {
    trace("damaged: {}+{}", extent.offset.bytes(), extent.length.bytes());
    ++damaged_chunks_;
  };
  events.touching = [this](mirror::GroupIndex group) {
    store_all();
    journal_[group] = mirror_->take_record(group).bytes;
    return true;
  };
  mirror_ = std::make_unique<mirror::DiskMirror>(mirror_options_, *reader_, *lanes_, *copy_buffers_,
                                                 events);
}

// --- the runner's death and its successor ---

void MirrorSim::crash_runner() {
  trace("the runner dies");
  // Power fails in more than one place at once.
  if (restart_odds_ > 0 && !restarting_ && random_.one_in(3)) restart_target();
  ++crashes_;
  ++runner_;
  for (LaneIndex lane = 0; lane < lanes_->count(); ++lane) {
    if (!lanes_->down(lane)) lanes_->lose(lane);
    mirror_->lane_lost(lane);  // its reads come to nothing
  }
  mirror_->stop();
  dead_mirrors_.push_back(std::move(mirror_));
  // QEMU drops the mirror; its bitmaps go on. What waited for the mirror is done.
  std::erase_if(guest_ops_, [](const auto& op) { return op.second.with_mirror; });
  rotation_ = Rotation::None;
  unstored_.clear();
  flushing_ = false;
  was_strict_ = false;
  resume_runner(random_.one_in(3) ? random_.below(300) : 0);
}

void MirrorSim::resume_runner(std::uint64_t delay) {
  steps_.add([this, delay] {
    if (delay > 0) return resume_runner(delay - 1);
    // QEMU puts the mirror in while no request is under way.
    drained_ = true;
    if (!guest_ops_.empty()) return resume_runner(0);
    drained_ = false;
    make_mirror();
    told_instance_ = instance_;
    for (const auto& [group, record] : journal_) {
      std::string bytes = record;
      const bool damaged = random_.one_in(16);
      if (damaged) bytes[random_.below(bytes.size())] ^= static_cast<char>(1 + random_.below(255));
      const Status status = mirror_->restore(group, bytes, journal_instance_ != instance_);
      if (status.has_value() == damaged) violate("a record was not told from a damaged one");
    }
    for (LaneIndex lane = 0; lane < lanes_->count(); ++lane) {
      if (lanes_->down(lane)) mirror_->lane_lost(lane);
    }
    trace("another runner takes over");
    if (verification_ == Verification::Runs) verification_ = Verification::Wanted;
    steps_.add([this, runner = runner_] {
      if (runner == runner_) mark_bitmaps();
    });
  });
}

void MirrorSim::mark_bitmaps() {
  for (const DirtyBitmap& bitmap : bitmaps_) {
    bitmap.for_each([this](Extent extent) { mirror_->mark_pending(extent); });
  }
  mirror_->start();
}

// --- the target's restart ---

void MirrorSim::restart_target() {
  trace("the target restarts");
  ++restarts_;
  restarting_ = true;
  for (LaneIndex lane = 0; lane < lanes_->count(); ++lane) {
    if (lanes_->down(lane)) continue;
    lanes_->lose(lane);
    if (mirror_) mirror_->lane_lost(lane);
  }
}

// Of what was written and not synced some is there, some not.
void MirrorSim::target_is_back() {
  for (std::size_t at = 0; at < target_.size(); at += kSector) {
    if (random_.one_in(2)) continue;
    const std::size_t size = std::min<std::size_t>(kSector, target_.size() - at);
    std::memcpy(target_.data() + at, synced_.data() + at, size);
  }
  synced_ = target_;
  restarting_ = false;
  ++instance_;
  if (!mirror_) return;
  mirror_->target_lost_unflushed();
  told_instance_ = instance_;
}

// The target's kernel writes back what it likes.
void MirrorSim::write_back() {
  const std::size_t at = random_.below(target_.size()) / kSector * kSector;
  const std::size_t size = std::min<std::size_t>(kSector, target_.size() - at);
  std::memcpy(synced_.data() + at, target_.data() + at, size);
}

void MirrorSim::begin_flush() {
  flushing_ = true;
  const mirror::FlushId id = mirror_->flush_begin();
  steps_.add([this, id, runner = runner_, instance = instance_] {
    // Synced first, answered later: what is acknowledged in between is not covered.
    if (instance == instance_ && !restarting_ && !synced_.empty()) synced_ = target_;
    const std::uint64_t synced_by = restarting_ ? 0 : instance;
    steps_.add([this, id, runner, synced_by] { end_flush(id, runner, synced_by); });
  });
}

void MirrorSim::end_flush(mirror::FlushId id, std::uint64_t runner, std::uint64_t instance) {
  if (runner != runner_) return;
  flushing_ = false;
  if (instance == instance_) {
    mirror_->flush_done(id);
  } else if (random_.one_in(2)) {
    mirror_->flush_failed(id);
  }
}

// --- the driver's journal ---

void MirrorSim::store_all() {
  for (mirror::GroupRecord& record : unstored_) journal_[record.group] = std::move(record.bytes);
  unstored_.clear();
}

void MirrorSim::drive_journal() {
  if (!mirror_ || !mirror_->scanned()) return;
  if (!flushing_ && random_.one_in(20)) begin_flush();
  if (!journaled_) return;
  switch (rotation_) {
    case Rotation::None:
      if (!random_.one_in(8)) return;
      bitmaps_.emplace_back(source_.size(), std::uint64_t{4096} << random_.below(4));
      rotation_op_ = next_op_;
      rotation_ = Rotation::Transit;
      return;
    case Rotation::Transit: return after_transit();
    case Rotation::Fence:
      if (!mirror_->arbiter().fence_passed(fence_)) return;
      check_fence();
      rotation_ = Rotation::Flush;
      if (!flushing_) begin_flush();
      return;
    case Rotation::Flush:
      if (flushing_) return;
      rotation_ = Rotation::Pass;
      pass_next_ = 0;
      pass_instance_ = told_instance_;
      return;
    case Rotation::Pass: return take_pass();
  }
}

// Fence and flush make records better, not safer: half of the time there are none.
void MirrorSim::after_transit() {
  for (const auto& [id, op] : guest_ops_) {
    if (id < rotation_op_ && !op.with_mirror) return;
  }
  fence_ = mirror_->arbiter().fence_begin();
  fenced_.clear();
  for (const auto& [token, piece] : lanes_->pieces()) fenced_.push_back(token);
  rotation_ = random_.one_in(2) ? Rotation::Fence : Rotation::Flush;
}

void MirrorSim::check_fence() {
  for (const std::uint64_t token : fenced_) {
    const auto piece = lanes_->pieces().find(token);
    if (piece == lanes_->pieces().end()) continue;
    const std::uint64_t chunk = piece->second.extent.offset.bytes() / limits_.chunk_size.bytes();
    if (mirror_->arbiter().is_copied(chunk)) violate("a fence passed before what it waits for");
  }
}

void MirrorSim::take_pass() {
  if (pass_next_) {
    auto taken = mirror_->take_records(*pass_next_, 1);
    pass_next_ = taken.next;
    for (mirror::GroupRecord& record : taken.records) unstored_.push_back(std::move(record));
    return;
  }
  store_all();
  journal_instance_ = pass_instance_;
  bitmaps_.erase(bitmaps_.begin(), bitmaps_.end() - 1);
  rotation_ = Rotation::None;
  ++rotations_;
}

void MirrorSim::make_disks(std::uint64_t chunk, std::uint64_t chunks) {
  std::uint64_t size = chunk * chunks;
  if (random_.one_in(2)) size -= kSector * random_.below(chunk / kSector);
  source_.resize(size);
  target_.resize(size);
  for (std::uint64_t at = 0; at < size; at += 4096) {
    if (random_.one_in(2)) continue;
    const auto fill = static_cast<int>(1 + random_.below(255));
    std::memset(source_.data() + at, fill, std::min<std::uint64_t>(4096, size - at));
  }
  if (random_.one_in(4)) std::ranges::fill(target_, std::byte{0xee});
}

bool MirrorSim::guest_step() {
  if (guest_budget_ == 0 || drained_ || guest_ops_.size() >= kMaxInFlight) return false;
  --guest_budget_;
  issue_guest_op();
  return true;
}

void MirrorSim::issue_guest_op() {
  GuestOp op;
  const std::uint64_t size = source_.size();
  std::uint64_t length = 1 + random_.below(std::min<std::uint64_t>(size, 3 * 4096));
  if (random_.one_in(8)) length = 1 + random_.below(size);
  std::uint64_t offset = random_.below(size - length + 1);
  if (hot_) {
    const std::uint64_t chunk = limits_.chunk_size.bytes();
    offset = std::min(size - length, hot_chunk_ * chunk + random_.below(chunk));
  }
  if (random_.one_in(2)) {  // as filesystems do it
    offset &= ~(kSector - 1);
    length = std::min((length + kSector - 1) & ~(kSector - 1), size - offset);
  }
  op.request.extent = {Offset(offset), Length(length)};
  // QEMU makes overlapping requests wait for each other.
  for (const auto& [id, other] : guest_ops_) {
    if (overlap(other.request.extent, op.request.extent)) return;
  }
  const std::uint64_t kind = random_.below(8);
  op.request.kind = kind < 5   ? NbdRequest::Kind::Write
                    : kind < 7 ? NbdRequest::Kind::Zero
                               : NbdRequest::Kind::Discard;
  op.request.id = next_op_++;
  op.begun = clock_;
  op.content.resize(length);
  if (op.request.kind == NbdRequest::Kind::Write) {
    const auto value = static_cast<std::byte>(1 + op.request.id % 255);
    std::ranges::fill(op.content, value);
  } else if (op.request.kind == NbdRequest::Kind::Discard && !random_.one_in(3)) {
    // Ignored, or done for a part only.
    const std::size_t done = random_.below(length + 1);
    std::copy_n(source_.begin() + static_cast<std::ptrdiff_t>(offset + done), length - done,
                op.content.begin() + static_cast<std::ptrdiff_t>(done));
  }
  const std::uint64_t id = op.request.id;
  trace("guest {} {} {}+{}", id, static_cast<int>(op.request.kind), offset, length);
  guest_ops_.emplace(id, std::move(op));
  const auto parts = halves(length, random_);
  steps_.add([this, id, parts] {
    change_source(id, parts[0].first, parts[0].second);
    steps_.add([this, id, parts] {
      change_source(id, parts[1].first, parts[1].second);
      for (DirtyBitmap& bitmap : bitmaps_) bitmap.set(guest_ops_.at(id).request.extent);
      steps_.add([this, id] { send_to_mirror(id); });
    });
  });
}

void MirrorSim::change_source(std::uint64_t id, std::size_t first, std::size_t end) {
  const GuestOp& op = guest_ops_.at(id);
  std::copy(op.content.begin() + static_cast<std::ptrdiff_t>(first),
            op.content.begin() + static_cast<std::ptrdiff_t>(end),
            source_.begin() +
                static_cast<std::ptrdiff_t>(op.request.extent.offset.bytes() + first));
}

void MirrorSim::send_to_mirror(std::uint64_t id) {
  GuestOp& op = guest_ops_.at(id);
  if (!mirror_) {
    guest_ops_.erase(id);
    return;
  }
  NbdRequest request = op.request;
  if (request.kind == NbdRequest::Kind::Write) {
    request.buffer = write_buffers_->try_take();
    if (!request.buffer) return violate("payloads of answered writes are kept");
    std::ranges::copy(op.content, request.buffer.bytes().begin());
    request.payload = request.buffer.bytes().first(op.content.size());
  }
  op.with_mirror = true;
  trace("mirror gets {}", id);
  if (request.kind == NbdRequest::Kind::Discard) {
    // Acknowledged at once: its blocks are left to be copied.
    strict_left_ += widen(request.extent, few_masks() ? limits_.chunk_size : mirror::kBlock).length;
  }
  mirror_->guest(std::move(request));
}

void MirrorSim::answered(std::uint64_t id) {
  const auto found = guest_ops_.find(id);
  if (found == guest_ops_.end() || !found->second.with_mirror) {
    return violate("a write was answered that nobody waits for");
  }
  trace("answered {}", id);
  guest_ops_.erase(found);
}

void MirrorSim::advance_clock() {
  Duration by = std::chrono::microseconds(random_.below(500));
  if (random_.one_in(30)) by = std::chrono::milliseconds(random_.below(60));
  Instant goal = clock_ + by;
  // What a write has changed on the source is here before a chunk that differs is looked at again.
  for (const auto& [id, op] : guest_ops_) {
    if (!op.with_mirror) goal = std::min(goal, std::max(clock_, op.begun + mirror_options_.arbiter.verify_pause));
  }
  // Timers fire on time.
  while (mirror_) {
    const auto deadline = mirror_->next_deadline();
    if (!deadline || *deadline > goal) break;
    clock_ = std::max(clock_, *deadline);
    mirror_->tick();
  }
  clock_ = goal;
  if (!mirror_) return;
  if (random_.one_in(500)) mirror_->shed();
  check_bound();
}

// Invariant 2: outside strict mode nobody waits.
void MirrorSim::check_bound() {
  if (mirror_->arbiter().strict()) return;
  for (const auto& [id, op] : guest_ops_) {
    if (op.with_mirror) return violate(fmt::format("write {} waits outside strict mode", id));
  }
}

// Strict: what is left to copy only gets less, but for discards: send_to_mirror() allows for
// theirs.
void MirrorSim::check_strict() {
  if (!mirror_ || !mirror_->arbiter().strict()) {
    was_strict_ = false;
    return;
  }
  const auto summary = mirror_->arbiter().summary();
  const Length left =
      few_masks() ? limits_.chunk_size * (summary.pending + summary.copying) : summary.left;
  if (!was_strict_) {
    was_strict_ = true;
    strict_left_ = left;
  } else if (left > strict_left_) {
    violate("in strict mode, blocks became Pending");
  }
  strict_left_ = std::min(strict_left_, left);
}

bool MirrorSim::fault() {
  const auto is_time = [this](std::uint64_t odds) { return odds > 0 && random_.one_in(odds); };
  if (mirror_ && is_time(crash_odds_)) {
    crash_runner();
    return true;
  }
  if (!restarting_ && is_time(restart_odds_)) {
    restart_target();
    return true;
  }
  if (!is_time(loss_odds_)) return false;
  const auto lane = static_cast<LaneIndex>(random_.below(lanes_->count()));
  if (lanes_->down(lane)) return false;
  trace("lane {} is lost", lane);
  ++lanes_lost_;
  lanes_->lose(lane);
  if (mirror_) mirror_->lane_lost(lane);
  return true;
}

// One thing happens. False: nothing could.
bool MirrorSim::world_step(bool calm) {
  ++steps_taken_;
  if (steps_taken_ > kMaxSteps) violate("it does not come to an end");
  advance_clock();
  if (!synced_.empty() && random_.one_in(8)) write_back();
  if (content_ && random_.one_in(50)) content_->change();
  const bool flushes = journaled_ || !synced_.empty() || verification_ == Verification::Runs;
  if (flushes && random_.one_in(3)) drive_journal();
  if (!calm && fault()) return true;
  const std::uint64_t choice = random_.below(4);
  for (std::uint64_t k = 0; k < 4; ++k) {
    switch ((choice + k) % 4) {
      case 0:
        if (guest_step()) return true;
        break;
      case 1:
        if (mirror_ && mirror_->start_copy()) return true;
        break;
      case 2:
        if (mirror_ && lanes_->step()) return true;
        break;
      default:
        if (steps_.empty()) break;
        steps_.run_one();
        return true;
    }
  }
  return false;
}

void MirrorSim::finish() {
  // The link heals; the handover begins once everything has been copied.
  while (!violation_ &&
         !(mirror_ && mirror_->all_copied() && lanes_->quiet() && guest_budget_ == 0 && verified())) {
    const bool progress = world_step(guest_budget_ == 0);
    check_strict();
    const bool waits = verification_ == Verification::Runs;  // for a flush
    drive_verification();
    if (random_.one_in(16) && mirror_ && mirror_->all_copied() && verified()) (void)mirror_->enter_strict();
    if (!progress && !waits && !(mirror_ && mirror_->next_deadline())) violate("it is stuck");
  }
  if (violation_) return;
  if (!mirror_->enter_strict()) violate("every lane is up and strict mode is refused");
  was_strict_ = false;
  guest_budget_ = random_.below(30);
  // The guest has stopped when its last write is answered; the barrier waits for synchronised(), no
  // longer: what is compared then is what the target has.
  while (!violation_ && !(guest_budget_ == 0 && guest_ops_.empty() &&
                          mirror_->arbiter().synchronised())) {
    // Strict mode may have ended because somebody waited for too long.
    if (!mirror_->arbiter().strict() && mirror_->all_copied()) (void)mirror_->enter_strict();
    if (!world_step(true)) violate("the handover is stuck");
    check_strict();
  }
}

// Storage that does not keep what was written to it, once, while nothing is under way on it.
void MirrorSim::damage_target() {
  if (!lanes_->quiet() || restarting_ || std::exchange(damage_done_, true)) return;
  for (std::uint64_t left = random_.below(4); left > 0; --left) {
    const std::size_t at = random_.below(target_.size());
    // What was never written to does not change.
    if (!mirror_->arbiter().was_sent(at / limits_.chunk_size.bytes())) continue;
    target_[at] ^= static_cast<std::byte>(1 + random_.below(255));
    if (!synced_.empty()) synced_[at] = target_[at];
    ++damages_;
    trace("byte {} of the target is damaged", at);
  }
}

// What was damaged is mended (compare() sees to that), and nothing else is taken for damaged.
void MirrorSim::drive_verification() {
  if (!mirror_) return;
  if (verification_ == Verification::Wanted && mirror_->all_copied()) {
    damage_target();
    mirror_->verify();
    verification_ = Verification::Runs;
  } else if (verification_ == Verification::Runs && mirror_->arbiter().summary().to_verify == 0) {
    verification_ = Verification::Done;
    if (damages_ == 0 && damaged_chunks_ > 0) violate("what nobody had damaged was taken for damaged");
  }
}

void MirrorSim::compare() {
  if (std::memcmp(source_.data(), target_.data(), source_.size()) == 0) return;
  const auto [at, other] = std::ranges::mismatch(source_, target_);
  violate(fmt::format("byte {}: the source has {:02x}, the target {:02x}", at - source_.begin(),
                      static_cast<unsigned>(*at), static_cast<unsigned>(*other)));
}

void add_counters(const mirror::DiskMirror& mirror, MirrorSimStats& stats) {
  stats.guest_writes += mirror.counters().guest_writes;
  stats.forwarded += mirror.counters().forwarded_writes;
  stats.copies += mirror.counters().copies;
  stats.expired += mirror.arbiter().summary().expired;
}

std::optional<std::string> MirrorSim::run(MirrorSimStats* stats) {
  set_up();
  finish();
  if (!violation_) compare();
  if (stats != nullptr) {
    stats->steps += steps_taken_;
    for (const auto& dead : dead_mirrors_) add_counters(*dead, *stats);
    if (mirror_) add_counters(*mirror_, *stats);
    stats->lanes_lost += lanes_lost_;
    stats->crashes += crashes_;
    stats->restarts += restarts_;
    stats->rotations += rotations_;
    stats->damaged += damaged_chunks_;
    stats->offers += offers_;
    stats->not_found += not_found_;
  }
  // After a violation too, let what is in flight end, so that everything can be taken apart.
  if (mirror_) mirror_->stop();
  while (!steps_.empty()) steps_.run_one();
  return violation_;
}

}  // namespace

MirrorSimStats& MirrorSimStats::operator+=(const MirrorSimStats& other) {
  steps += other.steps;
  guest_writes += other.guest_writes;
  forwarded += other.forwarded;
  copies += other.copies;
  expired += other.expired;
  lanes_lost += other.lanes_lost;
  crashes += other.crashes;
  restarts += other.restarts;
  rotations += other.rotations;
  damaged += other.damaged;
  offers += other.offers;
  not_found += other.not_found;
  return *this;
}

std::optional<std::string> run_mirror_sim(std::uint64_t seed, const MirrorSimOptions& options,
                                          MirrorSimStats* stats) {
  MirrorSim sim(seed, options);
  return sim.run(stats);
}

}  // namespace drover::sim
