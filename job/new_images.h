// SPDX-License-Identifier: Apache-2.0
//
// The images that a relocation makes: each under a hidden name first, noted in the journal before
// it gets its own, and removed only while it is the same file. So nothing of theirs is left whoever
// is killed when, and nobody else's file is ever touched.
//
//   NewImages images(*journal, {.job = id, .work_directory = directory});
//   DROVER_TRY(images.make(disk, cluster_size));        // thin, of the disk's size, under its name
//   DROVER_TRY(images.remove(disk));                    // whatever there is of it
//
// Or, for one whose data are written first: begin(), finish(), later publish().
//
// Threads: one at a time. Everything blocks on the disk.
#pragma once

#include <memory>
#include <string>

#include "base/result.h"
#include "blockcopy/image_file.h"
#include "blockcopy//image.h"
#include "job/journal.h"
#include "job/move.h"

namespace drover::job {

class NewImages {
 public:
  struct Options {
    std::string job;             // its id
    std::string work_directory;  // for sockets
  };
  NewImages(Journal& journal, Options options) : journal_(journal), options_(std::move(options)) {}

  // Errors: as blockcopy::create_target(). A block device is only looked at.
  Status make(const DiskPlan& disk, Length cluster_size);

  // Under the hidden name; the caller writes it and releases it.
  Result<std::unique_ptr<blockcopy::TargetImage>> begin(const DiskPlan& disk, Length cluster_size);
  // It is complete: owner and mode are the source's.
  Status finish(const DiskPlan& disk);
  // Another name for the source, or a clone of it, instead of a copy. Incompatible: this filesystem
  // can't.
  Status link(const DiskPlan& disk);
  Status clone(const DiskPlan& disk);
  // What was finished, linked or cloned gets its name, if it has not got it yet.
  Status publish(const DiskPlan& disk);

  // The error with the image's own name instead of the hidden one.
  [[nodiscard]] Error in_its_own_name(const DiskPlan& disk, Error error) const;

  // Busy: a QEMU writes to it. Hidden or not, if it is still the file that was noted; one that is
  // not stays, which is fine. A block device stays.
  Status remove(const DiskPlan& disk);

  // Which file the source is, noted when the job begins: no other is ever deleted in its place.
  Status note_source(const DiskPlan& disk);
  Result<blockcopy::UnlinkedFile> remove_source(const DiskPlan& disk);

 private:
  [[nodiscard]] std::string staged(const DiskPlan& disk) const;
  Status note(const std::string& key, const blockcopy::ImageIdentity& identity);
  Result<std::optional<blockcopy::ImageIdentity>> noted(const std::string& key);

  Journal& journal_;
  const Options options_;
};

}  // namespace drover::job
