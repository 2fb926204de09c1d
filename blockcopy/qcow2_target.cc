// SPDX-License-Identifier: Apache-2.0
//
// qcow2 files as a target: qemu-img formats the file that we made, a qemu-storage-daemon of ours
// exports it, and each writer has a connection of its own to it.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <iterator>
#include <list>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/subprocess.h"
#include "blockcopy/nbd_connection.h"
#include "blockcopy/storage_daemon.h"
#include "blockcopy/storage_reader.h"
#include "blockcopy/target_file.h"
#include "blockcopy/targets.h"

namespace drover::blockcopy {
namespace {

constexpr unsigned kReadConnections = 1;
// It reads all of the image's tables.
constexpr std::chrono::minutes kCheckTimeout{5};

// A write-zeroes request carries no data and may be long; not so long that it holds up others.
constexpr std::uint64_t kMaxZeroes = std::uint64_t{256} << 20;

class NbdWriter final : public ImageWriter {
 public:
  NbdWriter(Loop& loop, std::string image, std::shared_ptr<NbdConnection> connection,
            std::shared_ptr<std::atomic<unsigned>> writers)
      : loop_(loop),
        image_(std::move(image)),
        connection_(std::move(connection)),
        writers_(std::move(writers)) {
    connection_->attach(loop);
    ++*writers_;
  }
  ~NbdWriter() override {
    CHECK(ops_.empty(), "a writer goes when its requests are done");
    connection_->close();
    --*writers_;
  }

  [[nodiscard]] Length size() const override { return connection_->size(); }
  // The NBD protocol leaves open what overlapping writes do, and QEMU widens to this.
  [[nodiscard]] Length alignment() const override { return connection_->alignment(); }

  void write(Offset offset, std::span<const std::byte> buffer, Done done) override {
    const Extent whole{offset, Length(buffer.size())};
    Op* const op = begin("writing", whole, connection_->max_transfer().bytes(), std::move(done));
    while (!buffer.empty()) {
      const auto piece =
          buffer.first(std::min<std::size_t>(buffer.size(), connection_->max_transfer().bytes()));
      connection_->write(offset, piece, [this, op](int error) { piece_done(op, error); });
      offset += Length(piece.size());
      buffer = buffer.subspan(piece.size());
    }
  }

  void write_zeroes(Extent extent, Done done) override {
    Op* const op = begin("zeroing", extent, kMaxZeroes, std::move(done));
    while (extent.length > Length()) {
      const Extent piece{extent.offset, std::min(extent.length, Length(kMaxZeroes))};
      connection_->write_zeroes(piece, [this, op](int error) { piece_done(op, error); });
      extent = Extent{piece.end(), extent.length - piece.length};
    }
  }

 private:
  struct Op {
    const char* doing = nullptr;
    Extent whole;
    Done done;
    std::size_t pieces = 0;
    int error = 0;
    std::list<Op>::iterator self;
  };

  Op* begin(const char* doing, const Extent& whole, std::uint64_t limit, Done done) {
    CHECK(whole.end().bytes() <= size().bytes() && whole.end() >= whole.offset,
          "a write stays inside the disk");
    const std::uint64_t bytes = whole.length.bytes();
    Op* const op = &ops_.emplace_back();
    op->self = std::prev(ops_.end());
    op->doing = doing;
    op->whole = whole;
    op->done = std::move(done);
    op->pieces = (bytes + limit - 1) / limit;
    if (bytes == 0) {
      op->pieces = 1;
      loop_.post([this, op] { piece_done(op, 0); });
    }
    return op;
  }

  void piece_done(Op* op, int error) {
    if (op->error == 0) op->error = error;
    if (--op->pieces != 0) return;
    const Done done = std::move(op->done);
    Status status = nbd_status(op->error, op->doing, image_, op->whole);
    ops_.erase(op->self);
    done(std::move(status));  // may destroy this
  }

  Loop& loop_;
  const std::string image_;
  const std::shared_ptr<NbdConnection> connection_;
  const std::shared_ptr<std::atomic<unsigned>> writers_;
  std::list<Op> ops_;
};

class Qcow2Target final : public TargetImage {
 public:
  Qcow2Target(TargetSpec spec, TargetFile file)
      : spec_(std::move(spec)),
        file_(std::move(file)),
        writers_(std::make_shared<std::atomic<unsigned>>(0)) {}
  ~Qcow2Target() override {
    if (!daemon_) return;  // released, removed or never begun
    if (const Status status = release(); !status) log_warning("{}", status.error().to_string());
  }

  Status begin_new() {
    DROVER_TRY(format());
    return begin();
  }
  // Of a file that was formatted before.
  Status begin_again() {
    Status begun = check();
    if (begun) begun = begin();
    if (!begun) {
      control_.reset();
      daemon_.reset();  // nothing was written through it
    }
    return begun;
  }

  [[nodiscard]] const TargetSpec& spec() const override { return spec_; }
  [[nodiscard]] bool initially_zero() const override { return true; }
  [[nodiscard]] ImageIdentity identity() const override { return file_.identity(); }
  [[nodiscard]] std::string holder() const override { return holder_; }
  [[nodiscard]] bool alive() override { return daemon_ != nullptr && daemon_->running(); }

  Result<std::unique_ptr<ImageWriter>> open_writer(Loop& loop) override {
    CHECK(daemon_ != nullptr, "a released image has no writers");
    if (*writers_ >= kMaxWriters) {
      return fail(Code::Internal, "too many writers for " + spec_.path);
    }
    DROVER_ASSIGN(auto connection, daemon_->connect());
    clean_ = false;
    return std::make_unique<NbdWriter>(loop, spec_.path, std::move(connection), writers_);
  }

  Result<std::unique_ptr<ImageReader>> open_reader(Loop& loop) override {
    CHECK(daemon_ != nullptr, "a released image has no readers");
    DROVER_ASSIGN(auto reader,
                  open_nbd_reader(loop, {daemon_->address().unix_socket,
                                         daemon_->address().export_name, kReadConnections}));
    if (direct_) return reader;
    UniqueFd again(::fcntl(file_.fd(), F_DUPFD_CLOEXEC, 0));
    if (!again) return fail_errno(errno, "opening " + spec_.path);
    return read_storage(std::move(reader), std::move(again), CacheScope::File);
  }
  [[nodiscard]] bool reads_storage() const override { return reads_storage_; }

  Status flush() override {
    if (!flushed_ || daemon_ == nullptr) return flushed_;  // release() has flushed it
    flushed_ = control_->flush_and_wait();
    if (flushed_) flushed_ = file_.flush();
    clean_ = *writers_ == 0;
    return flushed_;
  }

  Status release() override {
    if (!daemon_) return {};
    CHECK(*writers_ == 0, "every writer goes before its image");
    Status status = clean_ ? flushed_ : flush();
    control_->close();
    control_.reset();
    const Status stopped = daemon_->stop();
    daemon_.reset();
    if (status) status = stopped;
    // The daemon may have written something while it closed the image.
    if (status) status = file_.flush();
    file_.close();
    return status;
  }

  Status remove() override {
    CHECK(*writers_ == 0, "every writer goes before its image");
    if (control_) control_->close();
    control_.reset();
    daemon_.reset();  // kills it: nobody will read the image
    return file_.remove();
  }

 private:
  // Starts the daemon.
  Status begin() {
    StorageDaemonOptions options;
    options.image_fd = file_.fd();
    options.image = spec_.path;
    options.driver = "qcow2";
    options.writable = true;
    options.direct = direct_ = !spec_.cached && takes_direct(file_.fd());
    reads_storage_ = can_read_storage(file_.fd(), direct_);
    options.work_directory = spec_.work_directory;
    DROVER_ASSIGN(daemon_, StorageDaemon::start(options));
    // Process ids are used again.
    holder_ = fmt::format("{}-{}", daemon_->pid(), now().time_since_epoch().count());
    DROVER_ASSIGN(control_, daemon_->connect());
    if (control_->size() != spec_.size) {
      return fail(Code::Incompatible, fmt::format("{} has {} bytes instead of {}", spec_.path,
                                                  control_->size().bytes(), spec_.size.bytes()));
    }
    return {};
  }

  // A daemon that was killed leaks clusters at worst (qcow2 orders its own writes); more is damage.
  Status check() const {
    ProcessOptions options;
    options.descriptors = {file_.fd()};
    options.timeout = kCheckTimeout;
    DROVER_ASSIGN(const ProcessResult result,
                  run_process({"qemu-img", "check", "-q", "-f", "qcow2", "-r", "leaks",
                               fmt::format("/proc/self/fd/{}", file_.fd())},
                              options));
    if (result.exit_code == 0) return {};
    if (result.err.find("Failed to get \"") != std::string::npos) {  // ... lock
      return fail(Code::Busy,
                  fmt::format("the target image {} is in use: {}", spec_.path, result.err));
    }
    return fail(corrupt_image(
        spec_.path, fmt::format("qemu-img check ended with {}: {}", result.exit_code, result.err)));
  }

  Status format() {
    std::string layout = "preallocation=off";
    if (spec_.cluster_size != Length()) {
      layout += fmt::format(",cluster_size={}", spec_.cluster_size.bytes());
    }
    ProcessOptions options;
    options.descriptors = {file_.fd()};
    DROVER_ASSIGN(const ProcessResult result,
                  run_process({"qemu-img", "create", "-q", "-f", "qcow2", "-o", layout,
                               fmt::format("/proc/self/fd/{}", file_.fd()),
                               std::to_string(spec_.size.bytes())},
                              options));
    if (result.exit_code != 0) {
      // It says no more than this about a full disk.
      const bool full = result.err.find("No space left") != std::string::npos;
      return fail(full ? Code::NoSpace : Code::Io,
                  fmt::format("qemu-img could not format {}: {}", spec_.path, result.err));
    }
    return {};
  }

  const TargetSpec spec_;
  TargetFile file_;
  bool direct_ = false;
  bool reads_storage_ = true;
  std::shared_ptr<std::atomic<unsigned>> writers_;
  std::unique_ptr<StorageDaemon> daemon_;  // null: released
  std::shared_ptr<NbdConnection> control_;
  std::string holder_;
  Status flushed_;
  bool clean_ = false;  // nobody has written, nor could, since the last flush
};

}  // namespace

Result<std::unique_ptr<TargetImage>> create_qcow2_target(const TargetSpec& spec) {
  DROVER_ASSIGN(TargetFile file, TargetFile::create(spec.path));
  auto target = std::make_unique<Qcow2Target>(spec, std::move(file));
  if (const Status begun = target->begin_new(); !begun) {
    (void)target->remove();  // the first error is the one to tell
    return fail(begun.error());
  }
  return target;
}

Result<std::unique_ptr<TargetImage>> open_qcow2_target(const TargetSpec& spec,
                                                       const ImageIdentity& identity) {
  DROVER_ASSIGN(TargetFile file, TargetFile::open(spec.path, identity));
  auto target = std::make_unique<Qcow2Target>(spec, std::move(file));
  DROVER_TRY(target->begin_again());
  return target;
}

}  // namespace drover::blockcopy
