// SPDX-License-Identifier: Apache-2.0
//
// A thread around mirror/engine_core.h.
#include "mirror/engine.h"

#include <future>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/priority.h"
#include "mirror/endpoint_watchdog.h"
#include "mirror/engine_core.h"

namespace drover::mirror {
namespace {

// The guest's writes pass through the engine's thread, on a host whose CPUs may all be busy, with copying not
// least: it runs when it can. It does little: the lanes do what costs CPU, but for disks that are not raw,
// whose bytes it receives from QEMU. Real time where that is allowed, else by niceness. Measured on two
// busy cores: mean of a guest's write 2.3 and 1.6 ms, worst 180 and 50 ms, without and with it.
class Engine final : public MirrorEngine {
 public:
  Engine(std::unique_ptr<Loop> loop, const Options& options, Events events)
      : options_(options),
        buffers_(options.chunk_size),
        loop_(std::move(loop)),
        core_(*loop_, buffers_, options, std::move(events)),
        thread_([this] {
          come_first();
          loop_->run();
        }) {
    if (!options_.watchdog_command.empty()) on_loop([this] { start_watchdog_on_loop(); });
  }

  ~Engine() override { stop(); }

  Status connect(LinkOptions options) override {
    options.chunk_size = options_.chunk_size;
    DROVER_ASSIGN(auto link, Link::connect(*loop_, options, core_.answers()));
    on_loop([&] { core_.use(std::move(link), options.lanes); });
    return {};
  }

  Link& link() override { return core_.link(); }

  Status add_disk(const Disk& disk) override {
    return on_loop([&] { return add_disk_on_loop(disk); });
  }
  void start() override {
    on_loop([&] { core_.start(); });
  }
  Status enter_strict() override {
    return on_loop([&] { return core_.enter_strict(); });
  }
  void verify() override {
    on_loop([&] { core_.verify(); });
  }
  void leave_strict() override {
    on_loop([&] { core_.leave_strict(); });
  }
  Status restore(std::size_t disk, const GroupRecord& record, bool unflushed_lost) override {
    return on_loop([&] { return core_.restore(disk, record, unflushed_lost); });
  }
  void restore_nothing() override {
    on_loop([&] { core_.restore_nothing(); });
  }
  void restore_holes(std::size_t disk, const std::vector<Extent>& holes) override {
    on_loop([&] { core_.restore_holes(disk, holes); });
  }
  void know_targets(const std::vector<TargetDisk>& target_disks) override {
    on_loop([&] { core_.know_targets(target_disks); });
  }
  void mark_pending(std::size_t disk, const std::vector<Extent>& extents) override {
    on_loop([&] { core_.mark_pending(disk, extents); });
  }
  Arbiter::Records take_records(std::size_t disk, GroupIndex first, std::size_t most) override {
    return on_loop([&] { return core_.take_records(disk, first, most); });
  }
  std::vector<FlushId> flush_begin() override {
    return on_loop([&] { return core_.flush_begin(); });
  }
  void flush_ended(const std::vector<FlushId>& ids, bool done) override {
    on_loop([&] { core_.flush_ended(ids, done); });
  }
  void set_bandwidth(Length per_second) override {
    on_loop([&] { core_.set_bandwidth(per_second); });
  }
  void set_read_rate(Length per_second) override {
    on_loop([&] { core_.set_read_rate(per_second); });
  }
  void stop_copying() override {
    on_loop([&] { core_.stop_copying(); });
  }

  Status drain(std::chrono::milliseconds timeout) override {
    std::promise<Status> drained;
    auto ended = drained.get_future();
    on_loop([&] { core_.drain([&](Status status) { drained.set_value(std::move(status)); }); });
    if (ended.wait_for(timeout) == std::future_status::ready) return ended.get();
    on_loop([&] { core_.stop_draining(); });
    return fail(Code::Busy, "the target did not take the guest's last writes in time");
  }

  void stop() override {
    if (!thread_.joinable()) return;
    std::promise<void> idle;
    on_loop([&] {
      core_.end([&] { idle.set_value(); });
      watchdog_.reset();
    });
    // Reads of a local disk that never end would hang here as they hang everything else.
    idle.get_future().wait();
    loop_->stop();
    thread_.join();
  }

  EngineStatus status() const override {
    return const_cast<Engine*>(this)->on_loop([&] { return core_.status(); });
  }

 private:
  // Runs `function` on the engine's thread and waits for its result; after stop(), here.
  template <class Function>
  auto on_loop(Function function) -> decltype(function()) {
    if (!thread_.joinable()) return function();
    CHECK(std::this_thread::get_id() != thread_.get_id(),
          "the engine's thread must not wait for itself");
    std::packaged_task<decltype(function())()> task(std::move(function));
    auto result = task.get_future();
    loop_->post([&task] { task(); });
    return result.get();
  }

  void start_watchdog_on_loop() {
    auto started = EndpointWatchdog::start(*loop_, {.command = options_.watchdog_command});
    if (started) {
      watchdog_ = std::move(*started);
    } else {
      log_warning("the guest would wait for this process if it was stopped: {}", started.error().message);
    }
  }

  Status add_disk_on_loop(const Disk& disk) {
    EngineCore::Disk one;
    one.name = disk.name;
    one.size = disk.size;
    one.target_initially_zero = disk.target_initially_zero;
    if (const auto* raw = std::get_if<blockcopy::RawSource>(&disk.source)) {
      DROVER_ASSIGN(one.reader, blockcopy::open_raw_reader(*loop_, *raw));
    } else {
      DROVER_ASSIGN(one.reader, blockcopy::open_nbd_reader(
                                    *loop_, std::get<blockcopy::NbdSource>(disk.source)));
    }
    if (!disk.server) return core_.add_disk(std::move(one), nullptr);
    return core_.add_disk(std::move(one), [&](BufferPool& pool, NbdServer::Events events) {
      events.accepted = [this](int socket) {
        if (watchdog_) watchdog_->watch(socket);
      };
      events.closing = [this](int socket) {
        if (watchdog_) watchdog_->forget(socket);
      };
      return NbdServer::listen(*loop_, pool, *disk.server, std::move(events));
    });
  }

  const Options options_;
  // The loop goes before the buffers it may be receiving into.
  EngineBuffers buffers_;
  const std::unique_ptr<Loop> loop_;
  EngineCore core_;
  std::unique_ptr<EndpointWatchdog> watchdog_;  // the loop's thread only
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<MirrorEngine>> MirrorEngine::create(const Options& options, Events events) {
  DROVER_ASSIGN(auto loop, Loop::create());
  return std::make_unique<Engine>(std::move(loop), options, std::move(events));
}

}  // namespace drover::mirror
