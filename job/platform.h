// SPDX-License-Identifier: Apache-2.0
//
// What a job takes from the world besides hypervisors and the mirror engine that it is given here:
// time, threads, files, SSH. The job's own code (job/run_move.h) asks only this, so that the
// simulation can run it on a virtual clock, with hosts that crash and disks that lie.
//
//   const auto platform = real_platform();
//   DROVER_ASSIGN(auto source, platform->connect_libvirt("qemu:///system", {}));
//
// Threads: any. sleep(), Thread's destructor, EventQueue::wait() and what talks to a host or a disk
// block.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/subprocess.h"
#include "job/event_queue.h"
#include "job/journal.h"
#include "job/move.h"
#include "memmig/hypervisor.h"
#include "mirror/bootstrap.h"
#include "mirror/engine.h"

namespace drover::job {

// A thread that runs; its destruction waits for its end.
class Thread {
 public:
  virtual ~Thread() = default;
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;

 protected:
  Thread() = default;
};

// While it is held, no QEMU on this host can open the image for writing (memmig/image_lock.h).
class ImageGuard {
 public:
  virtual ~ImageGuard() = default;
  ImageGuard(const ImageGuard&) = delete;
  ImageGuard& operator=(const ImageGuard&) = delete;

 protected:
  ImageGuard() = default;
};

class Platform {
 public:
  virtual ~Platform() = default;
  Platform(const Platform&) = delete;
  Platform& operator=(const Platform&) = delete;

  // --- time and threads ---
  [[nodiscard]] virtual Instant now() = 0;
  virtual void sleep(std::chrono::milliseconds time) = 0;
  virtual std::unique_ptr<Thread> start_thread(std::function<void()> run) = 0;
  virtual std::unique_ptr<EventQueue> new_event_queue() = 0;

  // --- this host ---
  virtual Result<mirror::LinkKey> new_key() = 0;
  virtual Result<std::unique_ptr<Journal>> open_journal(const std::string& directory, Journal::Make make) = 0;
  virtual Result<std::unique_ptr<mirror::MirrorEngine>> create_engine(
      const mirror::MirrorEngine::Options& options, mirror::MirrorEngine::Events events) = 0;
  virtual Result<std::unique_ptr<ImageGuard>> guard_image(const std::string& path) = 0;
  // Another one, once the image was written to (blockcopy/image_file.h).
  virtual Result<std::string> image_stamp(const std::string& path) = 0;
  // One that is not there is removed already. The name is gone then; what it held is freed once this object goes, where
  // that is much by a process that goes on for a while (blockcopy/image_file.h).
  virtual Status remove_image(const std::string& path) = 0;
  // Resident, of this process.
  [[nodiscard]] virtual Length peak_memory() = 0;

  // --- both hosts ---
  // `sockets`: memmig::ConnectOptions's.
  virtual Result<std::unique_ptr<memmig::Hypervisor>> connect_libvirt(const std::string& uri,
                                                                      const std::vector<std::string>& sockets) = 0;

  // --- the target; `host` is an SSH destination ---
  // `cancel_fd` readable: gives up.
  virtual Result<mirror::ReceiverInfo> start_receiver(const std::string& host, const mirror::ReceiverRequest& request,
                                                      std::chrono::milliseconds timeout, int cancel_fd = -1) = 0;
  // Has the receiver of a job end in order, if one is alive (mirror::stop_receiver_there()).
  virtual Status stop_receiver(const std::string& host, const std::string& id) = 0;
  struct Command {
    std::vector<std::string> argv;
    std::string input;               // its standard input
    const Cancel* cancel = nullptr;  // gives up (Cancelled) when it is requested
  };
  // As mirror::run_on_target(); the connection is kept for the next.
  virtual Result<ProcessResult> run_on_target(const std::string& host, const Command& command) = 0;
  // memmig::ConnectOptions::sockets for that host: they lead there by the connection of a command before.
  [[nodiscard]] virtual std::vector<std::string> libvirt_sockets(const std::string& host) = 0;

 protected:
  Platform() = default;
};

// This machine.
std::unique_ptr<Platform> real_platform();

}  // namespace drover::job
