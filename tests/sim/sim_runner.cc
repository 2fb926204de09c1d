// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_runner.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "base/check.h"
#include "mirror/engine_core.h"
#include "mirror/lane_queue.h"
#include "mirror/offers.h"
#include "tests/fakes/loop_without_io.h"
#include "tests/sim/sim_frame.h"

namespace drover::sim {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;

Error unreachable(std::string what) { return {Code::Unreachable, std::move(what), "", true}; }

class SimLoop final : public fakes::LoopWithoutIo {
 public:
  SimLoop(World& world, ProcessPtr process) : world_(world), process_(std::move(process)) {}
  ~SimLoop() override { *here_ = false; }

  void post(Task task) override {
    last_post_ = std::max(last_post_, world_.now() + world_.between(0us, 20us));
    (void)plan(last_post_, std::move(task));
  }
  Handle at(Instant when, Task task) override { return plan(when, std::move(task)); }
  void cancel(Handle handle) override { world_.cancel(handle - 1); }
  [[nodiscard]] Instant now() const override { return world_.now(); }

 private:
  Handle plan(Instant when, Task task) {
    return 1 + world_.at(
                   when,
                   [here = here_, task = std::move(task)] {
                     if (*here) task();
                   },
                   process_);
  }
  World& world_;
  const ProcessPtr process_;
  Instant last_post_{};
  std::shared_ptr<bool> here_ = std::make_shared<bool>(true);
};

// The source's end of the link: a model of mirror/link.cc, which heals itself as that does.
class SimLink final : public mirror::Link,
                      public Connection::Source,
                      public Surroundings::Breakable {
 public:
  SimLink(Surroundings& around, ProcessPtr process, Loop& loop, const mirror::LinkOptions& options,
          mirror::Answers& answers, const mirror::EncodeOptions& encode)
      : around_(around),
        world_(around.world),
        process_(std::move(process)),
        loop_(loop),
        options_(options),
        answers_(answers),
        encode_(encode),
        news_(around.world),
        lanes_(options.lanes) {
    renew_lanes();
  }

  ~SimLink() override {
    stop_ = true;
    news_.notify();
    if (keeper_) {
      while (!keeper_->ended && !world_.dead()) world_.wait_in_destructor(keeper_->end);
    }
    close("the source closed the connection");
  }

  Status open() {
    epoch_ = options_.epoch;
    DROVER_TRY(connect_all());
    active_ = epoch_;
    keeper_ = std::make_shared<Keeper>(world_);
    (void)world_.start(process_, [this, keeper = keeper_] {
      keep();
      keeper->ended = true;
      keeper->end.notify();
    });
    return {};
  }

  [[nodiscard]] std::uint32_t count() const override {
    return static_cast<std::uint32_t>(lanes_.size());
  }

  void send(std::uint32_t lane, mirror::OutFrame frame) override {
    if (!up_ || finishing_ || active_ != epoch_) return;
    lanes_[lane].queue->push(std::move(frame));
    ++unanswered_;
    pump(lane);
  }

  bool abandon(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) override {
    if (!lanes_[lane].queue->abandon(disk, token)) return false;
    --unanswered_;
    return true;
  }

  Result<json> call(const json& request, std::chrono::milliseconds timeout) override {
    const Instant deadline = world_.now() + timeout;
    while (!up_ && !failed_ && !world_.dead()) {
      if (!world_.wait(news_, deadline)) return fail(why_);
    }
    if (request.at("op") == "finish") finishing_ = true;
    return ask(request, std::chrono::ceil<std::chrono::milliseconds>(deadline - world_.now()));
  }

  Result<mirror::BarrierTimes> barrier(std::chrono::milliseconds timeout) override {
    const Instant deadline = world_.now() + timeout;
    while (up_ && unanswered_ > 0) {
      if (!world_.wait(news_, deadline)) return fail(Code::Busy, "frames stay unanswered");
    }
    if (!up_) return fail(why_);
    json digests = json::array();
    for (const Lane& lane : lanes_) digests.push_back(lane.digest.to_json());
    DROVER_ASSIGN(const json answer, ask({{"op", "barrier"}, {"lanes", digests}}, timeout));
    return mirror::barrier_times(answer);
  }

  Status start_relay(const RelayOptions& options) override {
    if (!up_) return fail(why_);
    path_ = std::make_shared<Path>(*this, options.gated);
    around_.machines.memory = path_;
    return {};
  }
  void let_memory_pass(bool pass) override { may_pass_ = pass; }
  void stop_relay() override { path_.reset(); }
  void set_compression(const mirror::Compression&) override {}
  [[nodiscard]] mirror::LinkCounters counters() const override {
    return {.reconnects = reconnects_, .found_bytes = found_bytes_};
  }
  void use_filter(std::shared_ptr<const mirror::PieceFilter> filter) override {
    known_.set(std::move(filter));
  }

  // --- what comes from the target ---

  void answered(unsigned index, std::uint64_t sequence, const Result<mirror::BlockMask>& differing) override {
    if (!up_) return;
    Lane& lane = lanes_[index];
    const auto found = lane.sent.find(sequence);
    if (found == lane.sent.end()) return world_.violate("a frame was answered twice");
    const auto [disk, token] = found->second;
    lane.sent.erase(found);
    if (const auto offered = lane.offered.extract(sequence); offered && differing) {
      found_bytes_ += lane.offers->answered(offered.mapped(), *differing).bytes();
    }
    --unanswered_;
    if (unanswered_ == 0) news_.notify();
    pump(index);
    const auto lane_number = static_cast<std::uint32_t>(index);
    loop_.post([this, lane_number, disk = disk, token = token, differing, epoch = epoch_,
                here = std::weak_ptr(here_)] {
      if (here.expired() || active_ != epoch) return;
      if (!differing) {
        answers_.refused(lane_number, disk, token, differing.error());
      } else if (!differing->empty()) {
        answers_.differs(lane_number, disk, token, *differing);
      } else {
        answers_.applied(lane_number, disk, token);
      }
    });
  }

  void replied(std::uint64_t id, const Result<json>& result) override {
    replies_.emplace(id, result);
    news_.notify();
  }

  void lost(const Error& error) override {
    if (!up_) return;
    world_.trace("the link is lost: {}", error.message);
    close("the source gave the connection up");
    why_ = error;
    if (!finishing_) {
      tell([this, error] {
        active_ = 0;
        answers_.link_down(error);
      });
    }
    news_.notify();
  }

  [[nodiscard]] std::size_t unanswered() const { return unanswered_; }

  void reset(const std::string& why) override { lost(unreachable(why)); }

 private:
  struct Lane {
    std::optional<mirror::LaneQueue> queue;  // not begun
    std::uint64_t sequence = 0;
    mirror::LaneDigest digest;
    std::map<std::uint64_t, std::pair<std::uint16_t, std::uint64_t>> sent;  // disk, token
    std::unique_ptr<mirror::LaneOffers> offers;
    std::map<std::uint64_t, mirror::BlockMask> offered;
  };

  class Path final : public MemoryPath {
   public:
    Path(SimLink& link, bool gated) : link_(link), gated_(gated) {}
    [[nodiscard]] bool carries() const override {
      return !broken() && !link_.around_.network.cut() && (!gated_ || link_.may_pass_);
    }
    [[nodiscard]] bool broken() const override { return !link_.up_; }

   private:
    SimLink& link_;
    const bool gated_;
  };

  struct Keeper {
    explicit Keeper(World& world) : end(world) {}
    bool ended = false;
    Signal end;
  };

  // On the engine's thread, in order.
  void tell(Task task) {
    loop_.post([task = std::move(task), here = std::weak_ptr(here_)] {
      if (!here.expired()) task();
    });
  }

  void renew_lanes() {
    for (Lane& lane : lanes_) {
      lane = Lane();
      lane.queue.emplace(options_.chunk_size);
      lane.offers = std::make_unique<mirror::LaneOffers>(
          known_, around_.receivers.content ? around_.receivers.content->piece() : mirror::kPiece);
    }
  }

  Status connect_all() {
    const Instant deadline = world_.now() + options_.connect_timeout;
    while (around_.network.cut()) {
      if (!world_.wait(around_.network.changed, deadline))
        return fail(unreachable("connecting: timed out"));
    }
    world_.sleep(around_.network.delay() * 3);
    SimReceiver* const receiver = around_.receivers.receiver(options_.session);
    if (receiver == nullptr) return fail(unreachable("connection refused"));
    const auto connection = std::make_shared<Connection>(around_.network, options_.lanes);
    connection->epoch = epoch_;
    connection->limits = {options_.disk_sizes, options_.chunk_size};
    connection->silence = options_.silence_timeout;
    connection->receiver = receiver->weak_from_this();
    const auto welcome = std::make_shared<std::optional<Result<json>>>();
    receiver->hello(connection, [this, connection, welcome,
                                 here = std::weak_ptr(here_)](const Result<json>& result) {
      connection->control_down.send([this, welcome, here, result] {
        if (here.expired()) return;
        *welcome = result;
        news_.notify();
      });
    });
    while (!*welcome && !stop_) {
      if (!world_.wait(news_, deadline)) break;
    }
    if (!*welcome || !**welcome) {
      hang_up(connection, "the source gave the connection up");
      return *welcome ? fail((*welcome)->error()) : fail(unreachable("no welcome in time"));
    }
    disks_.clear();
    for (const json& image : (**welcome)->at("images")) {
      disks_.push_back({image.at("path"), image.at("id"), image.at("instance")});
    }
    renew_lanes();
    unanswered_ = 0;
    connection_ = connection;
    connection->source = this;
    around_.link = this;
    up_ = true;
    watch_silence();
    return {};
  }

  // Builds up again what broke.
  void keep() {
    unsigned attempt = 0;
    Instant up_since = world_.now();
    while (!stop_) {
      if (up_ || finishing_) {
        world_.wait(news_, Instant::max());
        continue;
      }
      if (world_.now() >= up_since + options_.retry.longest) attempt = 0;
      Error last = why_;
      const Instant since = world_.now();
      if (last.code == Code::Protocol) return give_up(last);
      while (!up_) {
        const Duration give_up_after = options_.give_up_after;
        if (give_up_after > Duration(0) && world_.now() >= since + give_up_after)
          return give_up(last);
        Instant next =
            world_.now() + mirror::reconnect_delay(attempt, options_.retry, world_.random.next());
        if (give_up_after > Duration(0)) next = std::min(next, since + give_up_after);
        while (!stop_ && world_.now() < next) world_.wait(news_, next);
        if (stop_) return;
        if (options_.locate) {
          if (const auto found = options_.locate(attempt, last, -1); !found) {
            ++attempt;
            last = found.error();
            if (last.retryable || last.code == Code::Unreachable) continue;
            return give_up(last);
          }
        }
        ++attempt;
        ++epoch_;
        if (const Status made = connect_all(); !made) {
          last = made.error();
          if (!options_.locate && last.code == Code::Protocol) return give_up(last);
        }
        if (stop_) return;
      }
      ++reconnects_;
      up_since = world_.now();
      world_.trace("the link is up again, epoch {}", epoch_);
      tell([this, epoch = epoch_, disks = disks_] {
        active_ = epoch;
        answers_.link_up(disks);
      });
      news_.notify();
    }
  }

  void give_up(const Error& error) {
    world_.trace("the link is given up: {}", error.message);
    failed_ = true;
    why_ = error;
    tell([this, error] { answers_.link_failed(error); });
    news_.notify();
  }

  void pump(std::uint32_t index) {
    constexpr std::size_t kOnTheWire = 4;
    Lane& lane = lanes_[index];
    while (up_ && connection_->up[index]->waiting() < kOnTheWire && lane.sent.size() < 16) {
      const auto frame = lane.queue->pop();
      if (!frame) return;
      auto bytes = encode(lane, *frame);
      lane.sent.emplace(lane.sequence, std::pair(frame->disk, frame->token));
      connection_->up[index]->send([this, connection = connection_, index, bytes = std::move(bytes),
                                    here = std::weak_ptr(here_)] {
        if (const auto receiver = connection->receiver.lock())
          receiver->frame(connection, index, *bytes);
        if (!here.expired() && connection == connection_) pump(index);
      });
    }
  }

  std::shared_ptr<Bytes> encode(Lane& lane, const mirror::OutFrame& frame) {
    const auto offer = lane.offers->consider(frame, options_.chunk_size);
    auto bytes = std::make_shared<Bytes>(
        encode_frame(frame, ++lane.sequence, encode_, offer ? &*offer : nullptr));
    if (offer) lane.offered.emplace(lane.sequence, data_blocks(*offer, frame.extent));
    lane.digest.add(std::span(*bytes).first<mirror::kHeaderSize>());
    return bytes;
  }

  Result<json> ask(const json& request, std::chrono::milliseconds timeout) {
    if (world_.dead()) return fail(unreachable("dead"));
    if (!up_) return fail(why_);
    const Instant deadline = world_.now() + timeout;
    const std::uint64_t id = next_id_++;
    const ConnectionPtr connection = connection_;
    connection->control_up.send([connection, id, request] {
      if (const auto receiver = connection->receiver.lock())
        receiver->request(connection, id, request);
    });
    while (!replies_.contains(id)) {
      if (!up_ || connection != connection_) return fail(why_);
      if (!world_.wait(news_, deadline)) return fail(unreachable("no answer in time"));
    }
    return replies_.at(id);
  }

  void close(const std::string& why) {
    if (!std::exchange(up_, false)) return;
    if (around_.link == this) around_.link = nullptr;
    for (Lane& lane : lanes_) {
      lane.queue->clear();
      lane.sent.clear();
    }
    unanswered_ = 0;
    path_.reset();
    hang_up(connection_, why);
  }

  void hang_up(const ConnectionPtr& connection, const std::string& why) {
    connection->source = nullptr;
    for (const auto& pipe : connection->down) pipe->close();
    connection->control_down.close();
    // Behind what is on the way already. A lane whose frames never arrive does not matter any more.
    connection->control_up.send([connection, why] {
      if (const auto receiver = connection->receiver.lock()) receiver->lost(connection, why);
    });
    // Or, if that does not come through either, by the silence.
    world_.after(3 * connection->silence, [connection] {
      if (const auto receiver = connection->receiver.lock()) {
        receiver->lost(connection, "the source was silent for too long");
      }
    });
  }

  // Pings and beats are not played: silence is a network that is cut for so long.
  void watch_silence() {
    world_.after(
        connection_->silence / 2,
        [this, here = std::weak_ptr(here_), cuts = around_.network.cuts(),
         connection = connection_] {
          if (here.expired() || !up_ || connection != connection_) return;
          if (around_.network.cut() && around_.network.cuts() == cuts) {
            return lost(unreachable("nothing was heard of the target for too long"));
          }
          watch_silence();
        },
        process_);
  }

  Surroundings& around_;
  World& world_;
  const ProcessPtr process_;
  Loop& loop_;
  const mirror::LinkOptions options_;
  mirror::Answers& answers_;
  const mirror::EncodeOptions encode_;
  Signal news_;
  std::vector<Lane> lanes_;
  ConnectionPtr connection_;
  bool up_ = false;
  bool finishing_ = false;
  bool may_pass_ = false;
  std::uint64_t epoch_ = 1;
  std::uint64_t active_ = 0;  // the epoch that the engine knows of; 0: none
  std::uint64_t reconnects_ = 0;
  std::uint64_t found_bytes_ = 0;
  mirror::KnownPieces known_;
  std::vector<mirror::TargetDisk> disks_;
  std::shared_ptr<Keeper> keeper_;
  bool stop_ = false;
  bool failed_ = false;
  std::size_t unanswered_ = 0;
  Error why_ = unreachable("the link is down");
  std::map<std::uint64_t, Result<json>> replies_;
  std::uint64_t next_id_ = 1;
  std::shared_ptr<Path> path_;
  std::shared_ptr<bool> here_ = std::make_shared<bool>(true);
};

// drover's NBD server, without a socket.
class SimNbdServer final : public mirror::NbdServer, public Endpoint {
 public:
  SimNbdServer(Machines& machines, std::string socket, std::string disk, BufferPool& pool,
               Events events)
      : machines_(machines),
        socket_(std::move(socket)),
        disk_(std::move(disk)),
        pool_(pool),
        events_(std::move(events)) {
    machines_.listen(socket_, this);
  }
  ~SimNbdServer() override { machines_.unlisten(socket_); }

  void complete(std::uint64_t id, int) override { machines_.mirror_answers(disk_, id); }
  [[nodiscard]] bool client_is_there() const override { return machines_.mirrors(disk_); }
  void buffers_available() override {
    while (!waiting_.empty() && hand_on(waiting_.front())) waiting_.pop_front();
  }

  void connected() override { events_.connected(); }
  void disconnected() override {
    events_.disconnected({Code::Unreachable, "QEMU closed the connection", "", true});
  }
  void request(mirror::NbdRequest::Kind kind, Extent extent, std::span<const std::byte> payload,
               std::uint64_t id) override {
    Waiting one{kind, extent, Bytes(payload.begin(), payload.end()), id};
    if (waiting_.empty() && hand_on(one)) return;
    waiting_.push_back(std::move(one));
  }

 private:
  struct Waiting {
    mirror::NbdRequest::Kind kind;
    Extent extent;
    Bytes payload;
    std::uint64_t id;
  };
  // A write longer than a buffer comes in pieces, as QEMU would send it: here the pool's are long
  // enough.
  bool hand_on(const Waiting& one) {
    mirror::NbdRequest request;
    request.kind = one.kind;
    request.extent = one.extent;
    request.id = one.id;
    if (one.kind == mirror::NbdRequest::Kind::Write) {
      request.buffer = pool_.try_take();
      if (!request.buffer) return false;
      std::ranges::copy(one.payload, request.buffer.bytes().begin());
      request.payload = request.buffer.bytes().first(one.payload.size());
    }
    events_.request(std::move(request));
    return true;
  }
  Machines& machines_;
  const std::string socket_;
  const std::string disk_;
  BufferPool& pool_;
  const Events events_;
  std::deque<Waiting> waiting_;
};

class SimEngine final : public mirror::MirrorEngine {
 public:
  SimEngine(Surroundings& around, ProcessPtr process, const Options& options, Events events)
      : around_(around),
        world_(around.world),
        process_(process),
        options_(options),
        buffers_(options.chunk_size, kLargestDisk),
        loop_(around.world, std::move(process)),
        core_(loop_, buffers_, options, std::move(events)),
        done_(around.world) {
    around_.strict = [this] { return core_.strict(); };
  }

  ~SimEngine() override {
    stop();
    // Of a process that was killed: nothing more comes of what it was reading.
    core_.end([] {});
    for (SimReader* reader : readers_) reader->drop();
    around_.strict = nullptr;
  }

  Status connect(mirror::LinkOptions options) override {
    options.chunk_size = options_.chunk_size;
    auto link = std::make_unique<SimLink>(around_, process_, loop_, options, core_.answers(),
                                          around_.engine.encode);
    DROVER_TRY(link->open());
    link_ = link.get();
    core_.use(std::move(link), options.lanes);
    return {};
  }
  mirror::Link& link() override { return core_.link(); }

  Status add_disk(const Disk& disk) override {
    const auto* const raw = std::get_if<blockcopy::RawSource>(&disk.source);
    const auto setup = std::ranges::find(around_.machines.disks(), disk.name, &DiskSetup::name);
    const FilePtr file = around_.machines.image(Side::Source, *setup);
    if (file == nullptr) return fail(Code::NotFound, "no such file: " + setup->path);
    mirror::EngineCore::Disk one;
    one.name = disk.name;
    one.size = disk.size;
    one.target_initially_zero = disk.target_initially_zero;
    const bool through_qemu = raw == nullptr;
    auto reader = std::make_unique<SimReader>(world_, around_.source, file, [this, through_qemu] {
      return !through_qemu || around_.machines.domain(Side::Source).exports;
    });
    readers_.push_back(reader.get());
    one.reader = std::move(reader);
    if (!disk.server) return core_.add_disk(std::move(one), nullptr);
    return core_.add_disk(
        std::move(one),
        [&](BufferPool& pool,
            mirror::NbdServer::Events events) -> Result<std::unique_ptr<mirror::NbdServer>> {
          return std::make_unique<SimNbdServer>(around_.machines, disk.server->socket_path,
                                                disk.name, pool, std::move(events));
        });
  }

  void start() override { core_.start(); }
  Status enter_strict() override { return core_.enter_strict(); }
  void leave_strict() override { core_.leave_strict(); }
  void verify() override {
    // From here on what was written stays: what is read back is what is there in the end.
    around_.target.corrupts = 0;
    core_.verify();
  }
  void set_bandwidth(Length per_second) override { core_.set_bandwidth(per_second); }
  void set_read_rate(Length per_second) override { core_.set_read_rate(per_second); }
  void stop_copying() override { core_.stop_copying(); }
  Status restore(std::size_t disk, const mirror::GroupRecord& record,
                 bool unflushed_lost) override {
    return core_.restore(disk, record, unflushed_lost);
  }
  void restore_nothing() override { core_.restore_nothing(); }
  void restore_holes(std::size_t disk, const std::vector<Extent>& holes) override {
    core_.restore_holes(disk, holes);
  }
  void know_targets(const std::vector<mirror::TargetDisk>& disks) override {
    core_.know_targets(disks);
  }
  void mark_pending(std::size_t disk, const std::vector<Extent>& extents) override {
    core_.mark_pending(disk, extents);
  }
  mirror::Arbiter::Records take_records(std::size_t disk, mirror::GroupIndex first,
                                        std::size_t most) override {
    mirror::Arbiter::Records taken = core_.take_records(disk, first, most);
    // The engine's thread goes on before the caller's does.
    if (world_.chance(500)) world_.sleep(world_.between(20us, 3ms));
    return taken;
  }
  std::vector<mirror::FlushId> flush_begin() override { return core_.flush_begin(); }
  void flush_ended(const std::vector<mirror::FlushId>& ids, bool done) override {
    core_.flush_ended(ids, done);
  }

  Status drain(std::chrono::milliseconds timeout) override {
    std::optional<Status> drained;
    core_.drain([&](Status status) {
      drained = std::move(status);
      done_.notify();
    });
    const Instant deadline = world_.now() + timeout;
    while (!drained && world_.wait(done_, deadline)) {
    }
    core_.stop_draining();
    if (drained) return *drained;
    for (const DiskStatus& disk : core_.status().disks) {
      world_.trace("not drained: {}: {} bytes left to copy, {} waiting in the link", disk.name,
                   disk.left.bytes(), link_ == nullptr ? 0 : link_->unanswered());
    }
    return fail(Code::Busy, "the target did not take the guest's last writes in time");
  }

  void stop() override {
    if (std::exchange(stopped_, true)) return;
    bool idle = false;
    core_.end([&] {
      idle = true;
      done_.notify();
    });
    if (world_.dead()) return core_.end([] {});
    while (!idle && !world_.dead()) world_.wait_in_destructor(done_);
    core_.end([] {});
  }

  EngineStatus status() const override { return core_.status(); }

 private:
  // No write of the guest's is longer.
  static constexpr Length kLargestDisk = 64_KiB;
  Surroundings& around_;
  World& world_;
  const ProcessPtr process_;
  const Options options_;
  mirror::EngineBuffers buffers_;
  SimLoop loop_;
  std::vector<SimReader*> readers_;
  mirror::EngineCore core_;
  SimLink* link_ = nullptr;
  Signal done_;
  bool stopped_ = false;
};

class SimThread final : public job::Thread {
 public:
  SimThread(World& world, const ProcessPtr& process, std::function<void()> run)
      : world_(world), state_(std::make_shared<State>(world)) {
    if (world.dead()) {
      state_->ended = true;
      return;
    }
    (void)world.start(process, [state = state_, run = std::move(run)] {
      run();
      state->ended = true;
      state->end.notify();
    });
  }
  ~SimThread() override {
    while (!state_->ended && !world_.dead()) world_.wait_in_destructor(state_->end);
  }

 private:
  struct State {
    explicit State(World& world) : end(world) {}
    bool ended = false;
    Signal end;
  };
  World& world_;
  std::shared_ptr<State> state_;
};

class SimQueue final : public job::EventQueue {
 public:
  explicit SimQueue(World& world) : world_(world), news_(world) {}
  void push(job::Event event) override {
    events_.push_back(std::move(event));
    news_.notify();
  }
  std::optional<job::Event> wait(job::Cancel& cancel, std::chrono::milliseconds timeout) override {
    const Instant deadline = world_.now() + timeout;
    // Time passes with each event, so that one that leads to another at once lets others have their
    // turn.
    if (!events_.empty()) world_.sleep(2us);
    if (events_.empty() && (cancel_taken_ || !cancel.requested())) world_.wait(news_, deadline);
    if (!cancel_taken_ && cancel.requested()) {
      cancel_taken_ = true;
      return job::CancelWished{};
    }
    if (events_.empty()) return std::nullopt;
    job::Event event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

 private:
  World& world_;
  Signal news_;
  std::deque<job::Event> events_;
  bool cancel_taken_ = false;
};

class SimJournal final : public job::Journal {
 public:
  SimJournal(Surroundings& around, std::string directory)
      : around_(around), directory_(std::move(directory)) {}
  Status write(const Batch& batch, Sync sync) override {
    if (around_.world.dead()) return fail(Code::Io, "dead");
    if (around_.journal_fails) return fail(Code::Io, "writing the job's journal: I/O error");
    for (const Batch::Change& change : batch.changes()) {
      auto& written = around_.journals[directory_].written;
      if (change.value) {
        written[change.key] = *change.value;
        around_.world.trace("journal: {} = {}", change.key, change.value->substr(0, 40));
      } else {
        written.erase(change.key);
      }
    }
    if (sync == Sync::No) return {};
    around_.world.sleep(around_.world.between(50us, 800us));
    JournalFile& file = around_.journals[directory_];
    file.synced = file.written;
    return {};
  }
  Result<std::optional<std::string>> get(std::string_view key) override {
    const JournalFile& file = around_.journals[directory_];
    const auto found = file.written.find(key);
    if (found == file.written.end()) return std::nullopt;
    return std::optional<std::string>(found->second);
  }
  Status scan(std::string_view prefix, const Visitor& visitor) override {
    for (const auto& [key, value] : around_.journals[directory_].written) {
      if (key.starts_with(prefix)) DROVER_TRY(visitor(key, value));
    }
    return {};
  }

 private:
  Surroundings& around_;
  const std::string directory_;
};

class SimGuard final : public job::ImageGuard {
 public:
  SimGuard(Machines& machines, std::string path) : machines_(machines), path_(std::move(path)) {
    machines_.guards.insert(path_);
  }
  ~SimGuard() override { machines_.guards.erase(machines_.guards.find(path_)); }

 private:
  Machines& machines_;
  const std::string path_;
};

}  // namespace

// --- the platform ---

constexpr auto kSshTimeout = 30s;

SimPlatform::SimPlatform(Surroundings& around, ProcessPtr process)
    : around_(around), world_(around.world), process_(std::move(process)) {}

Instant SimPlatform::now() { return world_.now(); }
void SimPlatform::sleep(std::chrono::milliseconds time) { world_.sleep(time); }

std::unique_ptr<job::Thread> SimPlatform::start_thread(std::function<void()> run) {
  return std::make_unique<SimThread>(world_, process_, std::move(run));
}

std::unique_ptr<job::EventQueue> SimPlatform::new_event_queue() {
  return std::make_unique<SimQueue>(world_);
}

Result<mirror::LinkKey> SimPlatform::new_key() { return mirror::LinkKey{}; }

Result<std::unique_ptr<job::Journal>> SimPlatform::open_journal(const std::string& directory,
                                                                job::Journal::Make make) {
  if (make == job::Journal::Make::Never && !around_.journals.contains(directory)) {
    return fail(Code::Protocol, "there is no journal in " + directory);
  }
  if (around_.journals.contains(directory) && around_.journals.at(directory).damaged) {
    return fail(Code::Protocol, "the job's journal is damaged");
  }
  around_.journals[directory];
  return std::make_unique<SimJournal>(around_, directory);
}

Result<std::unique_ptr<mirror::MirrorEngine>> SimPlatform::create_engine(
    const mirror::MirrorEngine::Options& options, mirror::MirrorEngine::Events events) {
  mirror::MirrorEngine::Options small = options;
  small.chunk_size = around_.engine.chunk_size;
  small.handover_rest = around_.engine.handover_rest;
  small.arbiter = around_.engine.arbiter;
  small.arbiter.max_strict_wait = options.arbiter.max_strict_wait;
  small.max_unflushed = around_.engine.max_unflushed;
  return std::make_unique<SimEngine>(around_, process_, small, std::move(events));
}

Result<std::unique_ptr<job::ImageGuard>> SimPlatform::guard_image(const std::string& path) {
  const Machines::Domain& here = around_.machines.domain(Side::Source);
  if (here.qemu && here.has_images) return fail(Code::Busy, path + " is open for writing");
  return std::make_unique<SimGuard>(around_.machines, path);
}

Result<std::string> SimPlatform::image_stamp(const std::string& path) {
  const auto file = around_.source.files.find(path);
  if (file == around_.source.files.end()) return fail(Code::NotFound, path + " is not there");
  return fmt::format("boot {}, {} changes", around_.machines.boots(Side::Source), file->second->changes);
}

Status SimPlatform::remove_image(const std::string& path) {
  if (world_.dead()) return fail(Code::Io, "dead");
  if (around_.may_remove) {
    if (const auto wrong = around_.may_remove(path)) world_.violate(*wrong);
  }
  around_.source.files.erase(path);
  world_.trace("removed {}", path);
  return {};
}

Result<std::unique_ptr<memmig::Hypervisor>> SimPlatform::connect_libvirt(const std::string& uri,
                                                                         const std::vector<std::string>&) {
  const Side side = uri == "qemu:///system" ? Side::Source : Side::Target;
  if (side == Side::Target) DROVER_TRY(reach_target(kSshTimeout));
  world_.sleep(world_.between(1ms, 10ms));
  if (!around_.machines.libvirt_up(side)) return fail(unreachable("libvirt does not answer"));
  return std::make_unique<SimHypervisor>(world_, around_.network, around_.machines, side, process_);
}

Status SimPlatform::reach_target(Duration timeout) {
  if (world_.dead()) return fail(unreachable("dead"));
  const Instant deadline = world_.now() + timeout;
  while (around_.network.cut()) {
    if (!world_.wait(around_.network.changed, deadline)) {
      return fail(unreachable("ssh: connection timed out"));
    }
  }
  world_.sleep(around_.network.delay() * 4);
  return {};
}

Result<mirror::ReceiverInfo> SimPlatform::start_receiver(const std::string&,
                                                         const mirror::ReceiverRequest& request,
                                                         std::chrono::milliseconds timeout, int) {
  DROVER_TRY(reach_target(timeout));
  const bool was_running = around_.receivers.receiver(request.session) != nullptr;
  DROVER_ASSIGN(const auto receiver,
                around_.receivers.start(request.session, request.resumable, request.resume));
  // The answer may be lost: then nobody knows that a receiver is there.
  DROVER_TRY(reach_target(timeout));
  return mirror::ReceiverInfo{
      .address = "hostb", .port = 1, .version = "sim", .pid = 1, .was_running = was_running};
}

Status SimPlatform::stop_receiver(const std::string&, const std::string& id) {
  constexpr auto kPatience = 60s;
  DROVER_TRY(reach_target(kSshTimeout));
  const Instant deadline = world_.now() + kPatience;
  while (!around_.receivers.stop(id)) {
    if (world_.now() > deadline) return fail(Code::Busy, "the receiver does not end");
    world_.sleep(20ms);
  }
  return reach_target(kSshTimeout);
}

Result<ProcessResult> SimPlatform::run_on_target(const std::string&, const Command& command) {
  DROVER_TRY(reach_target(kSshTimeout));
  const auto has = [&](const char* word) { return std::ranges::count(command.argv, word) > 0; };
  if (has("true")) return ProcessResult{};  // only asks whether the host is in reach
  CHECK(has("--cleanup"), "nothing else is run there after the plan");
  // One that is just ending is waited for.
  constexpr auto kPatience = 15s;
  const Instant deadline = world_.now() + kPatience;
  ProcessResult result;
  result.exit_code = 1;
  while (world_.now() < deadline) {
    const auto code = around_.receivers.clean_up(command.argv.at(3), has("--force"), has("--keep"));
    if (code) {
      result.exit_code = *code;
      break;
    }
    world_.sleep(20ms);
  }
  DROVER_TRY(reach_target(kSshTimeout));
  return result;
}

}  // namespace drover::sim
