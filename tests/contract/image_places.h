// SPDX-License-Identifier: Apache-2.0
//
// The places where the contract suite puts images: one per kind. Everything made here goes with its
// object; what the kernel holds (loop devices, mounts) goes with the process at the latest: devices
// are set to clear themselves, mounts are in a mount namespace of this process's own, backing files
// have no name.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/loop.h>
#include <linux/magic.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/loop.h"
#include "base/random.h"
#include "base/subprocess.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"
#include "blockcopy/storage_daemon.h"
#include "tests/fakes/fake_image.h"

namespace drover::blockcopy::test {

using Bytes = std::vector<std::byte>;
namespace fs = std::filesystem;

inline Bytes random_bytes(Random& random, std::size_t count) {
  Bytes bytes(count + 8);
  for (std::size_t i = 0; i < count; i += 8) {
    const std::uint64_t value = random.next();
    std::memcpy(bytes.data() + i, &value, 8);
  }
  bytes.resize(count);
  return bytes;
}

// A directory that goes with its object. What a killed test left behind goes when the next one
// begins: a directory whose lock nobody holds is nobody's.
class TempDir {
 public:
  explicit TempDir(const fs::path& parent) {
    sweep(parent);
    constexpr int kAttempts = 10;  // another process may sweep it away before the lock is taken
    for (int i = 0; i < kAttempts; ++i) {
      std::string name = (parent / (std::string(kPrefix) + "XXXXXX")).string();
      if (::mkdtemp(name.data()) == nullptr) return;
      lock_ = UniqueFd(::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
      if (lock_ && ::flock(lock_.get(), LOCK_EX) == 0 && fs::exists(name)) {
        path_ = name;
        return;
      }
    }
  }
  ~TempDir() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] const fs::path& path() const { return path_; }

 private:
  static constexpr const char* kPrefix = "drover-image-test.";

  static void sweep(const fs::path& parent) {
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(parent, ignored)) {
      if (entry.path().filename().string().rfind(kPrefix, 0) != 0) continue;
      const UniqueFd lock(::open(entry.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
      if (lock && ::flock(lock.get(), LOCK_EX | LOCK_NB) == 0) {
        fs::remove_all(entry.path(), ignored);
      }
    }
  }

  UniqueFd lock_;
  fs::path path_;
};

// A block device of this size, over a file without a name. It is gone when nobody has it open.
class LoopDevice {
 public:
  // The reason why there can be none, or "".
  std::string make(std::uint64_t size, unsigned block_size, const fs::path& directory) {
    backing_ = UniqueFd(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (!backing_ || ::ftruncate(backing_.get(), static_cast<off_t>(size)) != 0) {
      return std::string("no backing file: ") + std::strerror(errno);
    }
    const UniqueFd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    if (!control) return std::string("no loop devices here: ") + std::strerror(errno);
    constexpr int kAttempts = 50;  // another process may take the free one first
    for (int i = 0; i < kAttempts; ++i) {
      const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
      if (number < 0) return std::string("no free loop device: ") + std::strerror(errno);
      path_ = "/dev/loop" + std::to_string(number);
      device_ = UniqueFd(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
      if (!device_) return "cannot open " + path_ + ": " + std::strerror(errno);
      loop_config config{};
      config.fd = static_cast<unsigned>(backing_.get());
      config.block_size = block_size;
      config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
      if (::ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0) return "";
      if (errno != EBUSY) return std::string("no loop device: ") + std::strerror(errno);
    }
    return "no loop device stays free";
  }
  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] int backing() const { return backing_.get(); }

 private:
  UniqueFd backing_;
  UniqueFd device_;
  std::string path_;
};

// A small filesystem of its own, mounted where only this process sees it.
class SmallFilesystem {
 public:
  // The reason why there can be none, or "".
  std::string make(const std::string& type, std::uint64_t size, const fs::path& directory) {
    static const bool isolated = [] {
      return ::unshare(CLONE_NEWNS) == 0 &&
             ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
    }();
    if (!isolated) return std::string("no mount namespace: ") + std::strerror(errno);
    if (std::string why = device_.make(size, 512, directory); !why.empty()) return why;
    const auto made = run_process({"mkfs." + type, type == "ext4" ? "-q" : "-f", device_.path()});
    if (!made) return made.error().to_string();
    if (made->exit_code != 0) return "mkfs." + type + ": " + made->err;
    const fs::path mount_point = directory / ("mounted-" + type);
    fs::create_directory(mount_point);
    if (::mount(device_.path().c_str(), mount_point.c_str(), type.c_str(), 0, nullptr) != 0) {
      return "mounting " + type + ": " + std::strerror(errno);
    }
    mounted_ = mount_point;
    return "";
  }
  ~SmallFilesystem() {
    if (!mounted_.empty()) ::umount2(mounted_.c_str(), MNT_DETACH);
  }
  [[nodiscard]] const fs::path& path() const { return mounted_; }
  [[nodiscard]] const std::string& device() const { return device_.path(); }

 private:
  LoopDevice device_;
  fs::path mounted_;
};

inline bool is_tmpfs(const fs::path& path) {
  struct statfs info {};
  return ::statfs(path.c_str(), &info) == 0 && info.f_type == TMPFS_MAGIC;
}

inline Bytes file_content(const fs::path& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  EXPECT_TRUE(fd) << path << ": " << std::strerror(errno);
  Bytes bytes(fs::is_block_file(path) ? 0 : fs::file_size(path));
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got =
        ::pread(fd.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    EXPECT_GT(got, 0);
    if (got <= 0) break;
    done += static_cast<std::size_t>(got);
  }
  return bytes;
}

// Writes `content` with holes where whole blocks of 4 KiB are zero.
inline void write_sparse(const fs::path& path, std::span<const std::byte> content) {
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_TRUE(fd) << path << ": " << std::strerror(errno);
  if (!fs::is_block_file(path)) {
    ASSERT_EQ(::ftruncate(fd.get(), static_cast<off_t>(content.size())), 0);
  }
  for (std::size_t at = 0; at < content.size(); at += 4096) {
    const auto block = content.subspan(at, std::min<std::size_t>(4096, content.size() - at));
    const bool zero =
        std::all_of(block.begin(), block.end(), [](std::byte b) { return b == std::byte{0}; });
    if (zero && !fs::is_block_file(path)) continue;
    ASSERT_EQ(::pwrite(fd.get(), block.data(), block.size(), static_cast<off_t>(at)),
              static_cast<ssize_t>(block.size()));
  }
  ASSERT_EQ(::fsync(fd.get()), 0);
}

inline std::uint64_t bytes_on_disk(const fs::path& path) {
  struct stat info {};
  EXPECT_EQ(::stat(path.c_str(), &info), 0) << path;
  return static_cast<std::uint64_t>(info.st_blocks) * 512;
}

// Where images of one kind are made, read and written.
class Place {
 public:
  virtual ~Place() = default;
  // Why this kind can't be tried here, or "".
  virtual std::string unusable() { return ""; }

  // What the kind can and can't.
  [[nodiscard]] virtual bool knows_holes() const { return true; }
  [[nodiscard]] virtual bool any_size() const { return true; }  // not only multiples of 512
  [[nodiscard]] virtual bool gives_space_back() const { return true; }
  [[nodiscard]] virtual std::uint64_t overhead() const {
    return 64 << 10;
  }  // of an image, in bytes

  // A source image with this content.
  virtual Result<std::unique_ptr<ImageReader>> source(std::span<const std::byte> content) = 0;
  // A target, at a path where there is nothing (or, a device, garbage).
  virtual Result<std::unique_ptr<TargetImage>> target(Length size) = 0;
  virtual Result<std::unique_ptr<ImageWriter>> writer(TargetImage& target) = 0;
  // What the released target holds, read by other means than drover's.
  virtual Bytes content(const TargetImage& target) = 0;
  // Of the target, as du sees it.
  virtual std::uint64_t space_taken(const TargetImage& target) = 0;

  // Issues what `issue` issues and waits until it calls `stop`.
  virtual void run(const std::function<void(std::function<void()> stop)>& issue) = 0;
  // The target that was made with this spec.
  virtual Result<std::unique_ptr<TargetImage>> reopen(const TargetSpec& spec,
                                                      const ImageIdentity& identity) {
    return open_target(spec, identity);
  }
};

class LoopPlace : public Place {
 public:
  LoopPlace() {
    auto made = Loop::create();
    EXPECT_TRUE(made.has_value()) << made.error().to_string();
    if (made) loop_ = std::move(*made);
  }
  Result<std::unique_ptr<ImageWriter>> writer(TargetImage& target) override {
    return target.open_writer(*loop_);
  }
  void run(const std::function<void(std::function<void()>)>& issue) override {
    loop_->post([&] { issue([this] { loop_->stop(); }); });
    loop_->run();
  }

 protected:
  std::unique_ptr<Loop> loop_;
};

// Raw files in a directory.
class RawPlace : public LoopPlace {
 public:
  explicit RawPlace(fs::path parent, bool cached = false)
      : directory_(std::make_unique<TempDir>(parent)), cached_(cached) {}
  std::string unusable() override {
    return directory_->path().empty() ? "no directory for images here" : "";
  }
  Result<std::unique_ptr<ImageReader>> source(std::span<const std::byte> content) override {
    const fs::path path = next_path();
    write_sparse(path, content);
    return open_raw_reader(*loop_, {.path = path, .size = {}, .cached = cached_});
  }
  Result<std::unique_ptr<TargetImage>> target(Length size) override {
    TargetSpec spec;
    spec.path = next_path();
    spec.size = size;
    spec.work_directory = directory_->path();
    spec.cached = cached_;
    return create_target(spec);
  }
  Bytes content(const TargetImage& target) override { return file_content(target.spec().path); }
  std::uint64_t space_taken(const TargetImage& target) override {
    return bytes_on_disk(target.spec().path);
  }
  [[nodiscard]] const fs::path& directory() const { return directory_->path(); }
  [[nodiscard]] Loop& loop() { return *loop_; }

 protected:
  fs::path next_path() { return directory_->path() / ("image-" + std::to_string(++count_)); }
  std::unique_ptr<TempDir> directory_;
  bool cached_;
  int count_ = 0;
};

class RealFilesystemPlace final : public RawPlace {
 public:
  explicit RealFilesystemPlace(bool cached = false) : RawPlace(fs::current_path(), cached) {}
  std::string unusable() override {
    if (is_tmpfs(directory())) return "the tests were started in a tmpfs";
    return RawPlace::unusable();
  }
};

class TmpfsPlace final : public RawPlace {
 public:
  TmpfsPlace() : RawPlace("/dev/shm") {}
  std::string unusable() override {
    if (RawPlace::unusable().empty() && !is_tmpfs(directory())) return "/dev/shm is no tmpfs";
    return RawPlace::unusable();
  }
};

// Raw files on a small filesystem of its own.
class SmallFilesystemPlace final : public LoopPlace {
 public:
  SmallFilesystemPlace(std::string type, std::uint64_t size)
      : type_(std::move(type)), size_(size), directory_(fs::current_path()) {}
  std::string unusable() override {
    if (std::string why = filesystem_.make(type_, size_, directory_.path()); !why.empty()) {
      return why;
    }
    inside_.emplace(filesystem_.path());
    return inside_->unusable();
  }
  Result<std::unique_ptr<ImageReader>> source(std::span<const std::byte> content) override {
    return inside_->source(content);
  }
  Result<std::unique_ptr<TargetImage>> target(Length size) override {
    return inside_->target(size);
  }
  Result<std::unique_ptr<ImageWriter>> writer(TargetImage& target) override {
    return inside_->writer(target);
  }
  Bytes content(const TargetImage& target) override { return inside_->content(target); }
  std::uint64_t space_taken(const TargetImage& target) override {
    return inside_->space_taken(target);
  }
  [[nodiscard]] std::uint64_t overhead() const override { return 256 << 10; }
  void run(const std::function<void(std::function<void()>)>& issue) override {
    inside_->run(issue);
  }

 private:
  const std::string type_;
  const std::uint64_t size_;
  TempDir directory_;
  SmallFilesystem filesystem_;
  std::optional<RawPlace> inside_;
};

// A loop device; every image of a test is on the same one.
class BlockDevicePlace final : public LoopPlace {
 public:
  explicit BlockDevicePlace(unsigned block_size)
      : block_size_(block_size), directory_(fs::current_path()) {}
  std::string unusable() override { return device_.make(kSize, block_size_, directory_.path()); }
  [[nodiscard]] bool knows_holes() const override { return false; }
  [[nodiscard]] std::uint64_t overhead() const override { return kSize; }
  Result<std::unique_ptr<ImageReader>> source(std::span<const std::byte> content) override {
    write_sparse(device_.path(), content);
    return open_raw_reader(*loop_, {.path = device_.path(), .size = Length(content.size())});
  }
  Result<std::unique_ptr<TargetImage>> target(Length size) override {
    Random random(7);
    write_sparse(device_.path(), random_bytes(random, kSize));
    TargetSpec spec;
    spec.path = device_.path();
    spec.block_device = true;
    spec.size = size;
    return create_target(spec);
  }
  Bytes content(const TargetImage& target) override {
    Bytes bytes(target.spec().size.bytes());
    const UniqueFd fd(::open(target.spec().path.c_str(), O_RDONLY | O_CLOEXEC));
    EXPECT_EQ(::pread(fd.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return bytes;
  }
  std::uint64_t space_taken(const TargetImage& /*target*/) override {
    struct stat info {};
    EXPECT_EQ(::fstat(device_.backing(), &info), 0);
    return static_cast<std::uint64_t>(info.st_blocks) * 512;
  }

 private:
  static constexpr std::uint64_t kSize = 8 << 20;
  const unsigned block_size_;
  TempDir directory_;
  LoopDevice device_;
};

// qcow2 files, read through a qemu-storage-daemon of the place's own, as a running QEMU would serve
// them.
class Qcow2Place final : public LoopPlace {
 public:
  explicit Qcow2Place(fs::path parent = fs::current_path()) : directory_(parent) {}
  ~Qcow2Place() override = default;
  [[nodiscard]] bool any_size() const override { return false; }
  [[nodiscard]] std::uint64_t overhead() const override { return 1 << 20; }
  Result<std::unique_ptr<ImageReader>> source(std::span<const std::byte> content) override {
    const fs::path raw = next_path();
    const fs::path image = next_path();
    write_sparse(raw, content);
    DROVER_ASSIGN(const ProcessResult made,
                  run_process({"qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image}));
    EXPECT_EQ(made.exit_code, 0) << made.err;
    fs::remove(raw);
    const UniqueFd fd(::open(image.c_str(), O_RDONLY | O_CLOEXEC));
    StorageDaemonOptions options;
    options.image_fd = fd.get();
    options.image = image;
    options.driver = "qcow2";
    options.work_directory = directory_.path();
    DROVER_ASSIGN(auto daemon, StorageDaemon::start(options));
    daemons_.push_back(std::move(daemon));
    const NbdAddress& address = daemons_.back()->address();
    return open_nbd_reader(
        *loop_,
        {.unix_socket = address.unix_socket, .export_name = address.export_name, .connections = 3});
  }
  Result<std::unique_ptr<TargetImage>> target(Length size) override {
    TargetSpec spec;
    spec.path = next_path();
    spec.format = Format::Qcow2;
    spec.size = size;
    spec.work_directory = directory_.path();
    return create_target(spec);
  }
  Bytes content(const TargetImage& target) override {
    const fs::path raw = next_path();
    const auto made =
        run_process({"qemu-img", "convert", "-f", "qcow2", "-O", "raw", target.spec().path, raw});
    EXPECT_TRUE(made.has_value() && made->exit_code == 0) << (made ? made->err : "");
    Bytes bytes = file_content(raw);
    fs::remove(raw);
    return bytes;
  }
  std::uint64_t space_taken(const TargetImage& target) override {
    return bytes_on_disk(target.spec().path);
  }
  [[nodiscard]] const fs::path& directory() const { return directory_.path(); }
  [[nodiscard]] Loop& loop() { return *loop_; }
  // That which serves the last source.
  [[nodiscard]] StorageDaemon& daemon() { return *daemons_.back(); }

 private:
  fs::path next_path() { return directory_.path() / ("image-" + std::to_string(++count_)); }
  TempDir directory_;
  std::vector<std::unique_ptr<StorageDaemon>> daemons_;
  int count_ = 0;
};

// Disks in memory.
class FakePlace final : public Place {
 public:
  explicit FakePlace(std::uint64_t seed) : queue_(seed), seed_(seed) {}
  ~FakePlace() override { queue_.clear(); }
  Result<std::unique_ptr<ImageReader>> source(std::span<const std::byte> content) override {
    fakes::FakeImage& image = make(Length(content.size()));
    image.preset(Offset(), content);
    return image.open_reader();
  }
  Result<std::unique_ptr<TargetImage>> target(Length size) override {
    TargetSpec spec;
    spec.path = "/fake/image";
    spec.size = size;
    return std::make_unique<fakes::FakeTarget>(make(size), spec);
  }
  Result<std::unique_ptr<ImageWriter>> writer(TargetImage& target) override {
    return dynamic_cast<fakes::FakeTarget&>(target).open_writer();
  }
  Result<std::unique_ptr<TargetImage>> reopen(const TargetSpec& spec,
                                              const ImageIdentity& /*identity*/) override {
    return std::make_unique<fakes::FakeTarget>(*images_.back(), spec);
  }
  Bytes content(const TargetImage& /*target*/) override {
    EXPECT_EQ(images_.back()->overlaps(), 0U) << "this suite keeps overlapping writes apart";
    const auto synced = images_.back()->synced();
    return {synced.begin(), synced.end()};
  }
  std::uint64_t space_taken(const TargetImage& /*target*/) override {
    return images_.back()->allocated().bytes();
  }
  void run(const std::function<void(std::function<void()>)>& issue) override {
    bool stopped = false;
    queue_.add([&] { issue([&] { stopped = true; }); });
    while (!stopped && queue_.run_one()) {
    }
    EXPECT_TRUE(stopped) << "nothing left to do, and still not done";
  }

 private:
  fakes::FakeImage& make(Length size) {
    images_.push_back(std::make_unique<fakes::FakeImage>(size, ++seed_, queue_.schedule()));
    return *images_.back();
  }
  fakes::FakeQueue queue_;
  std::uint64_t seed_;
  std::vector<std::unique_ptr<fakes::FakeImage>> images_;
};

}  // namespace drover::blockcopy::test
