// SPDX-License-Identifier: Apache-2.0
//
// Disk images behind one small interface. What is read and written is what the guest sees: the
// same bytes for a raw file, a block device or a qcow2 image.
//
//   DROVER_ASSIGN(auto reader, open_raw_reader(loop, {.path = "/srv/web1.raw"}));
//   reader->read(extent, buffer, [](Status status) { ... });
//
// Threads: a reader or writer belongs to the thread of the Loop it was opened with; every call and
// every callback is on that thread. A TargetImage belongs to one thread too (the receiver's control
// thread); its calls block. Opening a reader or writer may be done on another thread, before the
// Loop's thread first uses it.
//
// Buffers must stay valid until the callback has run. Destroy a reader or writer only when no
// request is outstanding (checked), and before its Loop; a callback may destroy it. Callbacks never
// run from inside the call that issued them.
//
// Errors: Io with the image's name, the extent and the system's reason; NoSpace when a write finds
// no room; Unreachable when the QEMU process behind an image is gone. After an error the image is
// still usable; the extent's content is undefined.
//
// A disk of zero bytes is refused (InvalidArgument): no guest can have one. Sizes need not be
// multiples of anything for raw files; qcow2 wants multiples of 512.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/loop.h"
#include "base/result.h"
#include "base/units.h"

namespace drover::blockcopy {

using Done = std::function<void(Status)>;

// A run of a disk: `data` false means that it reads as zeroes and takes no space worth copying.
struct MappedExtent {
  Extent extent;
  bool data = true;
  bool operator==(const MappedExtent&) const = default;
};
using ExtentsDone = std::function<void(Result<std::vector<MappedExtent>>)>;

// What a copier reads from. Never writes to the image (invariant 3).
class ImageReader {
 public:
  virtual ~ImageReader() = default;
  [[nodiscard]] virtual Length size() const = 0;
  // Reads need not be aligned, but aligned ones (offset, length and memory) are faster. A power of
  // two, at most 64 KiB.
  [[nodiscard]] virtual Length alignment() const = 0;
  // Fills all of `buffer` from `offset` on; the range lies within size().
  virtual void read(Offset offset, std::span<std::byte> buffer, Done done) = 0;
  // How `range` is mapped, from its start on, without gaps or overlap, in order; may stop early
  // (never empty) where the source limits one answer. What a write changes after this call was
  // issued may or may not be seen.
  virtual void extents(Extent range, ExtentsDone done) = 0;
};

enum class Sharing {
  Refused,  // this image, or these two, can't; nothing has changed
  Shared,
  Failed,  // in the middle: some of it may be shared
};

// What a receiver writes to. Requests may complete in any order; of two that overlap after
// widening to alignment(), issue the second only when the first is done.
class ImageWriter {
 public:
  virtual ~ImageWriter() = default;
  [[nodiscard]] virtual Length size() const = 0;
  // A power of two, at most 64 KiB. Writes need not be aligned, but aligned ones (offset, length
  // and memory) are faster.
  [[nodiscard]] virtual Length alignment() const = 0;
  virtual void write(Offset offset, std::span<const std::byte> buffer, Done done) = 0;
  // The extent reads as zeroes afterwards; its space is given back where the image can.
  virtual void write_zeroes(Extent extent, Done done) = 0;
  // The extent shares its blocks with those of the file `fd` from `from` on (FICLONERANGE), and
  // reads as they do at this moment. Blocks, not for long. Nothing else may be under way in the
  // extent.
  virtual Sharing share(int /*fd*/, Offset /*from*/, Extent /*extent*/) { return Sharing::Refused; }
};

struct RawSource {
  std::string path;     // a regular file or a block device
  Length size;          // of the disk as QEMU reports it; zero: the file's. A shorter file reads as
                        // zeroes beyond its end.
  bool cached = false;  // through the page cache even where O_DIRECT would work
};
// O_DIRECT where the filesystem takes it, buffered otherwise; takes no image lock, opens read-only.
// extents() asks the filesystem (SEEK_DATA) and may block for as long as that takes to read its
// metadata; of a block device, and where the filesystem doesn't know, all is data.
Result<std::unique_ptr<ImageReader>> open_raw_reader(Loop& loop, const RawSource& source);

struct NbdSource {
  std::string unix_socket;  // where QEMU's own NBD server listens
  std::string export_name;
  unsigned connections = 4;
};
// Any format that QEMU reads, through its NBD export (base:allocation for extents).
// Blocks while it connects (10 s at most). When a connection breaks, the requests on it fail with
// Unreachable; when none is left, all further ones do.
Result<std::unique_ptr<ImageReader>> open_nbd_reader(Loop& loop, const NbdSource& source);

enum class Format { Raw, Qcow2 };

struct TargetSpec {
  std::string path;  // absolute
  Format format = Format::Raw;
  bool block_device = false;   // an existing device is written over; never created or removed
  Length size;                 // of the disk, as the guest sees it
  Length cluster_size;         // qcow2 only; zero: qemu-img's default
  std::string work_directory;  // for the sockets of qemu-storage-daemon; exists, mode 0700
  bool cached = false;         // through the page cache even where O_DIRECT would work
};

// Which file or device an image is, so that another one in its place is noticed. A file: its file
// system's device number and its inode; a block device: its own number, and 0.
struct ImageIdentity {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  bool operator==(const ImageIdentity&) const = default;
};

// A target disk, from its creation to the moment QEMU takes over. Order of life: create_target() or
// open_target() -> open_writer() for each thread that writes -> (writers destroyed) -> flush() ->
// release(). After release() only spec() and remove() are left, and release() again, which does
// nothing.
class TargetImage {
 public:
  virtual ~TargetImage() = default;  // releases if release() was not called; removes nothing
  [[nodiscard]] virtual const TargetSpec& spec() const = 0;
  // True for images that create_target() made, also when they are opened again: all that was never
  // written reads as zeroes.
  [[nodiscard]] virtual bool initially_zero() const = 0;
  [[nodiscard]] virtual ImageIdentity identity() const = 0;
  // Names what holds writes that were completed but not flushed, besides the host's kernel: with
  // that process they are lost. Empty: nothing else does.
  [[nodiscard]] virtual std::string holder() const { return {}; }
  // False: that process is gone, or a flush has failed. Only release(), remove() and destruction
  // are left then; open_target() may help.
  [[nodiscard]] virtual bool alive() { return true; }
  // Reads what is on stable storage; flush() first, for what is not flushed may be read from a
  // cache. With O_DIRECT, or by having the page cache of this host written back and dropped before
  // each read. Caches further down (of the device, of a server) are not looked behind: what a flush
  // has put there they answer for. Destroy it before release().
  virtual Result<std::unique_ptr<ImageReader>> open_reader(Loop& loop) = 0;
  // False: its filesystem allows neither (tmpfs), and open_reader() reads memory.
  [[nodiscard]] virtual bool reads_storage() const { return true; }
  // Every lane has a writer of its own (at most 32 per image). Destroy it before release().
  virtual Result<std::unique_ptr<ImageWriter>> open_writer(Loop& loop) = 0;
  // Which runs of `range`, from its start on and as ImageReader::extents(), were never written or
  // read as zeroes; what is not known is data. Nobody writes meanwhile.
  virtual std::vector<MappedExtent> map(Extent range) { return {{range, true}}; }
  // Everything whose write was completed before is on stable storage afterwards. Once it failed it
  // never succeeds again: the kernel reports a lost write only once.
  virtual Status flush() = 0;
  // flush(), then lets go of the image: no lock, no process, no open descriptor is left, also when
  // it returns an error. Every writer must be gone (checked).
  virtual Status release() = 0;
  // For a failed move: lets go of the image (without flushing) and deletes the file that
  // create_target() made, also after release(); something else of that name is left alone (Busy).
  // Devices stay.
  virtual Status remove() = 0;
};

// Creates the image exclusively (AlreadyExists if anything is there: invariant 8), thin, of the
// disk's size, readable by its owner only. For a block device: checks that it is large enough and
// that no filesystem, volume manager or QEMU holds it (Busy).
// qcow2: starts a process that ends with the calling thread, so that must live until release().
Result<std::unique_ptr<TargetImage>> create_target(const TargetSpec& spec);

// Opens an image that create_target() made before, with this spec, in this or another process; what
// was flushed is there. NotFound if it is gone; Busy if another file (or device) has taken its
// place or QEMU holds it; Incompatible if its size is another; an error that is_corrupt() knows if
// its format's check finds it damaged, which a qcow2 image may be after its process was killed:
// then only creating it anew helps. Threads as create_target().
Result<std::unique_ptr<TargetImage>> open_target(const TargetSpec& spec,
                                                 const ImageIdentity& identity);
// Whether an error of open_target() says that the image is damaged.
bool is_corrupt(const Error& error);

}  // namespace drover::blockcopy
