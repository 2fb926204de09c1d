// SPDX-License-Identifier: Apache-2.0
#include "job/platform.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "memmig/image_lock.h"
#include "memmig/libvirt_hypervisor.h"
#include "mirror/session.h"

namespace drover::job {
namespace {

constexpr const char* kLogDirectory = "/var/log/drover";

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
  Instant now() override { return drover::now(); }
  void sleep(std::chrono::milliseconds time) override { std::this_thread::sleep_for(time); }
  std::unique_ptr<Thread> start_thread(std::function<void()> run) override {
    return std::make_unique<RealThread>(std::move(run));
  }
  std::unique_ptr<EventQueue> new_event_queue() override { return EventQueue::create(); }

  std::string new_job_id(const std::string& guest) override {
    std::string id;
    for (const char c : guest) {
      const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_';
      id += plain ? c : '-';
    }
    id.resize(std::min<std::size_t>(id.size(), 40));
    std::array<unsigned char, 4> random{};
    const int fd = ::open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && ::read(fd, random.data(), random.size()) == 4, "the kernel has random bytes");
    ::close(fd);
    return fmt::format("{}-{:02x}{:02x}{:02x}{:02x}", id, random[0], random[1], random[2],
                       random[3]);
  }

  Result<mirror::LinkKey> new_key() override { return mirror::random_key(); }

  Status make_job_directory(const std::string& directory, const std::string& id) override {
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) return fail_errno(error.value(), "creating the job's directory " + directory);
    ::chmod(directory.c_str(), 0700);
    std::filesystem::create_directories(kLogDirectory, error);
    return log_to_file(fmt::format("{}/{}.log", kLogDirectory, id));
  }

  void remove_job_directory(const std::string& directory) override {
    std::error_code ignored;
    const std::filesystem::path path(directory);
    std::filesystem::remove_all(path, ignored);
    // Only if no other job is there.
    ::rmdir(path.parent_path().c_str());
  }

  Result<std::unique_ptr<Journal>> open_journal(const std::string& directory) override {
    return Journal::open(directory);
  }

  Result<std::unique_ptr<mirror::MirrorEngine>> create_engine(
      const mirror::MirrorEngine::Options& options, mirror::MirrorEngine::Events events) override {
    return mirror::MirrorEngine::create(options, std::move(events));
  }

  Result<std::unique_ptr<ImageGuard>> guard_image(const std::string& path) override {
    DROVER_ASSIGN(memmig::ImageLock lock, memmig::lock_image(path));
    return std::make_unique<RealGuard>(std::move(lock));
  }

  Status remove_image(const std::string& path) override {
    if (::unlink(path.c_str()) == 0 || errno == ENOENT) return {};
    return fail_errno(errno, "deleting the source's " + path);
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

  Result<std::unique_ptr<memmig::Hypervisor>> connect_libvirt(const std::string& uri) override {
    return memmig::connect_libvirt({.uri = uri});
  }

  Result<mirror::ReceiverInfo> start_receiver(const std::string& host,
                                              const mirror::ReceiverRequest& request) override {
    return mirror::start_receiver(ssh_to(host), request);
  }

  Result<ProcessResult> run_on_target(const std::string& host, const Command& command) override {
    mirror::Ssh ssh = ssh_to(host);
    if (command.cancel != nullptr) ssh.cancel_fd = command.cancel->fd();
    return mirror::run_on_target(ssh, command.argv, command.input);
  }

 private:
  const mirror::Ssh& ssh_to(const std::string& host) {
    const std::lock_guard lock(mutex_);
    auto& shared = ssh_[host];
    if (!shared) shared = std::make_unique<mirror::SharedSsh>(mirror::Ssh{.host = host});
    return shared->ssh();
  }

  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<mirror::SharedSsh>> ssh_;  // one connection for each host
};

}  // namespace

std::unique_ptr<Platform> real_platform() { return std::make_unique<RealPlatform>(); }

}  // namespace drover::job
