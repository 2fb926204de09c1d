// SPDX-License-Identifier: Apache-2.0
#include "job/platform.h"

#include <fstream>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "blockcopy/image_file.h"
#include "memmig/image_lock.h"
#include "memmig/libvirt_hypervisor.h"
#include "mirror/session.h"

namespace drover::job {
namespace {

class RealThread final : public Thread {
 public:
  explicit RealThread(std::function<void()> run) : thread_(std::move(run)) {}
  ~RealThread() override { thread_.join(); }

 private:
  std::thread thread_;
};

class RealGuard final : public ImageGuard {
 public:
  explicit RealGuard(memmig::ImageLock lock) : lock_(std::move(lock)) {}

 private:
  memmig::ImageLock lock_;
};

class RealPlatform final : public Platform {
 public:
  ~RealPlatform() override {
    blockcopy::free_in_background(std::move(removed_), {"/proc/self/exe", std::string(blockcopy::kFreeCommand)});
  }

  Instant now() override { return drover::now(); }
  void sleep(std::chrono::milliseconds time) override { std::this_thread::sleep_for(time); }
  std::unique_ptr<Thread> start_thread(std::function<void()> run) override {
    return std::make_unique<RealThread>(std::move(run));
  }
  std::unique_ptr<EventQueue> new_event_queue() override { return EventQueue::create(); }

  Result<mirror::LinkKey> new_key() override { return mirror::random_key(); }

  Result<std::unique_ptr<Journal>> open_journal(const std::string& directory, Journal::Make make) override {
    return Journal::open(directory, make);
  }

  Result<std::unique_ptr<mirror::MirrorEngine>> create_engine(
      const mirror::MirrorEngine::Options& options, mirror::MirrorEngine::Events events) override {
    return mirror::MirrorEngine::create(options, std::move(events));
  }

  Result<std::unique_ptr<ImageGuard>> guard_image(const std::string& path) override {
    DROVER_ASSIGN(memmig::ImageLock lock, memmig::lock_image(path));
    return std::make_unique<RealGuard>(std::move(lock));
  }

  Result<std::string> image_stamp(const std::string& path) override {
    return blockcopy::image_stamp(path);
  }

  Status remove_image(const std::string& path) override {
    DROVER_ASSIGN(blockcopy::UnlinkedFile gone, blockcopy::unlink_open(path));
    removed_.push_back({std::move(gone), path});
    return {};
  }

  Length peak_memory() override {
    std::ifstream status("/proc/self/status");
    std::string word;
    while (status >> word) {
      if (word == "VmHWM:") {
        std::uint64_t kib = 0;
        status >> kib;
        return Length(kib * 1024);
      }
    }
    return {};
  }

  Result<std::unique_ptr<memmig::Hypervisor>> connect_libvirt(const std::string& uri,
                                                              const std::vector<std::string>& sockets) override {
    return memmig::connect_libvirt({.uri = uri, .sockets = sockets});
  }

  Result<mirror::ReceiverInfo> start_receiver(const std::string& host, const mirror::ReceiverRequest& request,
                                              std::chrono::milliseconds timeout, int cancel_fd) override {
    mirror::Ssh ssh = ssh_to(host);
    ssh.timeout = timeout;
    ssh.cancel_fd = cancel_fd;
    return mirror::start_receiver(ssh, request);
  }

  Status stop_receiver(const std::string& host, const std::string& id) override {
    return mirror::stop_receiver_there(ssh_to(host), id);
  }

  Result<ProcessResult> run_on_target(const std::string& host, const Command& command) override {
    mirror::Ssh ssh = ssh_to(host);
    if (command.cancel != nullptr) ssh.cancel_fd = command.cancel->fd();
    return mirror::run_on_target(ssh, command.argv, command.input);
  }

  std::vector<std::string> libvirt_sockets(const std::string& host) override {
    return shared_ssh(host).local_sockets();
  }

 private:
  const mirror::SharedSsh& shared_ssh(const std::string& host) {
    const std::lock_guard lock(mutex_);
    auto& shared = ssh_[host];
    if (!shared) {
      shared = std::make_unique<mirror::SharedSsh>(mirror::Ssh{.host = host}, memmig::libvirt_sockets());
    }
    return *shared;
  }
  const mirror::Ssh& ssh_to(const std::string& host) { return shared_ssh(host).ssh(); }

  std::vector<blockcopy::NamedFile> removed_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<mirror::SharedSsh>> ssh_;  // one connection for each host
};

}  // namespace

std::unique_ptr<Platform> real_platform() { return std::make_unique<RealPlatform>(); }

}  // namespace drover::job
