// SPDX-License-Identifier: Apache-2.0
#include "job/cold_copy.h"

#include <fcntl.h>

#include <memory>
#include <utility>

#include "base/log.h"
#include "base/loop.h"
#include "blockcopy/copy.h"
#include "blockcopy/storage_daemon.h"

namespace drover::job {

ColdCopy::ColdCopy(NewImages& images, std::vector<Disk> disks, Options options)
    : images_(images), disks_(std::move(disks)), options_(std::move(options)) {
  for (const Disk& disk : disks_) {
    progress_.push_back({.disk = disk.plan.disk, .size = disk.plan.virtual_size});
  }
  thread_ = std::thread([this] { options_.done(run()); });
}

ColdCopy::~ColdCopy() {
  stop();
  thread_.join();
}

std::vector<DiskProgress> ColdCopy::progress() const {
  const std::lock_guard lock(mutex_);
  return progress_;
}

Status ColdCopy::run() {
  for (const Disk& disk : disks_) {
    auto lock = memmig::lock_image(disk.plan.source_path);
    if (!lock && lock.error().code == Code::Busy) {
      return fail(
          Code::Busy,
          "a QEMU has " + disk.plan.source_path + " open, though libvirt takes the guest for off",
          "if it was started meanwhile, try again. If `virsh list` does not show it, libvirt "
          "has lost it: see to that process first, and do not start the guest");
    }
    if (!lock) return fail(std::move(lock).error());
    locks_.push_back(std::move(*lock));
  }
  for (std::size_t i = 0; i < disks_.size(); ++i) {
    if (Status copied = copy(i); !copied) {
      return fail(images_.in_its_own_name(disks_[i].plan, std::move(copied).error()));
    }
  }
  return {};
}

Status ColdCopy::copy(std::size_t index) {
  const Disk& disk = disks_[index];
  // What an earlier process, or QEMU, has left of it.
  DROVER_TRY(images_.remove(disk.plan));
  if (disk.plan.renamed || disk.clone) {
    Status done = disk.plan.renamed ? images_.link(disk.plan) : images_.clone(disk.plan);
    if (done || done.error().code != Code::Incompatible) return done;
    log_info("{}", done.error().to_string());
  }
  return copy_data(index);
}

Status ColdCopy::copy_data(std::size_t index) {
  const Disk& disk = disks_[index];
  DROVER_ASSIGN(const std::unique_ptr<Loop> loop, Loop::create());
  std::unique_ptr<blockcopy::StorageDaemon> daemon;
  std::unique_ptr<blockcopy::ImageReader> reader;
  if (disk.plain) {
    DROVER_ASSIGN(
        reader, blockcopy::open_raw_reader(*loop, {disk.plan.source_path, disk.plan.virtual_size}));
  } else {
    blockcopy::StorageDaemonOptions options;
    options.image = disk.plan.source_path;
    options.by_name = true;
    options.driver = disk.plan.source_format;
    options.protocol = disk.plan.source_block_device ? "host_device" : "file";
    options.work_directory = options_.work_directory;
    DROVER_ASSIGN(daemon, blockcopy::StorageDaemon::start(options));
    DROVER_TRY(daemon->connect());  // says why, if it can't read the image
    DROVER_ASSIGN(reader, blockcopy::open_nbd_reader(*loop, {daemon->address().unix_socket,
                                                             daemon->address().export_name, 4}));
  }
  DROVER_ASSIGN(const auto target, images_.begin(disk.plan, disk.cluster_size));
  Status copied;
  {
    DROVER_ASSIGN(const auto writer, target->open_writer(*loop));
    copied = blockcopy::copy_image(*loop, *reader, *writer,
                                   {.target_zero = target->initially_zero(),
                                    .bandwidth = options_.bandwidth,
                                    .stopped = [this] { return stopped_.load(); },
                                    .progress =
                                        [this, index](Length done, Length data) {
                                          const std::lock_guard lock(mutex_);
                                          progress_[index].copied = done;
                                          progress_[index].data = data;
                                          progress_[index].dirty = data - done;
                                        }});
  }
  reader.reset();
  if (!copied) {
    (void)target->remove();  // the first error is the one to tell
    return copied;
  }
  DROVER_TRY(target->release());
  if (daemon) DROVER_TRY(daemon->stop());
  return images_.finish(disk.plan);
}

}  // namespace drover::job
