// SPDX-License-Identifier: Apache-2.0
//
// What a job's process is made of in the simulation: the real job driver (job/move.cc) and the real
// EngineCore (with DiskMirror, Arbiter, LaneQueue and the frame codec) on a virtual clock, over a
// link that the network may cut, a journal that knows what was synced, and fibers for threads.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "job/platform.h"
#include "job/prepare.h"
#include "mirror/arbiter.h"
#include "mirror/engine.h"
#include "tests/sim/sim_guest.h"
#include "tests/sim/sim_host.h"
#include "tests/sim/sim_target.h"
#include "tests/sim/sim_world.h"

namespace drover::sim {

// A job's directory on the source host: what is in it survives the runner; what was synced, the
// host.
struct JournalFile {
  bool damaged = false;  // it can't be opened again
  std::map<std::string, std::string, std::less<>> written;
  std::map<std::string, std::string, std::less<>> synced;
};

struct EngineSetup {
  Length chunk_size = 4_KiB;
  Length handover_rest;
  mirror::Arbiter::Options arbiter;
  mirror::EncodeOptions encode;
  Length max_unflushed;
};

// Everything outside of the runner's process that it can reach.
struct Surroundings {
  World& world;
  Network& network;
  Host& source;
  Host& target;
  Machines& machines;
  SimTarget& receivers;
  EngineSetup engine;
  std::map<std::string, JournalFile> journals;  // by directory
  bool journal_fails = false;
  // The runner removes a source image: what is wrong with that, if anything.
  std::function<std::optional<std::string>(const std::string& path)> may_remove;
  // Of the runner that lives: whether its engine is in strict mode.
  std::function<bool()> strict;
  // Its link, to be cut or told of silence.
  struct Breakable {
    virtual ~Breakable() = default;
    virtual void reset(const std::string& why) = 0;
  };
  Breakable* link = nullptr;
};

class SimPlatform final : public job::Platform {
 public:
  SimPlatform(Surroundings& around, ProcessPtr process);

  Instant now() override;
  void sleep(std::chrono::milliseconds time) override;
  std::unique_ptr<job::Thread> start_thread(std::function<void()> run) override;
  std::unique_ptr<job::EventQueue> new_event_queue() override;
  Result<mirror::LinkKey> new_key() override;
  Result<std::unique_ptr<job::Journal>> open_journal(const std::string& directory,
                                                     job::Journal::Make make) override;
  Result<std::unique_ptr<mirror::MirrorEngine>> create_engine(
      const mirror::MirrorEngine::Options& options, mirror::MirrorEngine::Events events) override;
  Result<std::unique_ptr<job::ImageGuard>> guard_image(const std::string& path) override;
  Result<std::string> image_stamp(const std::string& path) override;
  Status remove_image(const std::string& path) override;
  Length peak_memory() override { return {}; }
  Result<std::unique_ptr<memmig::Hypervisor>> connect_libvirt(const std::string& uri,
                                                              const std::vector<std::string>&) override;
  Result<mirror::ReceiverInfo> start_receiver(const std::string& host,
                                              const mirror::ReceiverRequest& request,
                                              std::chrono::milliseconds timeout,
                                              int cancel_fd) override;
  Status stop_receiver(const std::string& host, const std::string& id) override;
  Result<ProcessResult> run_on_target(const std::string& host, const Command& command) override;
  std::vector<std::string> libvirt_sockets(const std::string&) override { return {}; }

 private:
  // Over SSH: waits for the network, as long as SSH does.
  Status reach_target(Duration timeout);
  Surroundings& around_;
  World& world_;
  const ProcessPtr process_;
};

}  // namespace drover::sim
