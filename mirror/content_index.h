// SPDX-License-Identifier: Apache-2.0
//
// The content index of a host: which pieces (mirror/piece.h) its image files hold and where, in a
// RocksDB database (/var/lib/drover/index), so that a move to this host need not send what is here
// already. `drover index` makes it; where it exists, finished moves add their images.
//
//   DROVER_ASSIGN(auto index, IndexWriter::open(directory));       // one process at a time
//   DROVER_TRY(index->add("/srv/template.raw", {}));
//   DROVER_TRY(index->finish());                                   // a receiver sees it from here
//   on
//
//   DROVER_ASSIGN(auto index, IndexReader::open(directory));       // any number, beside a writer
//   auto known = index->open_content(loop);                        // an applier's
//
// It knows files, not formats: a piece is 64 KiB of the file at a multiple of 64 KiB. In a raw file
// these are the guest's; a qcow2 image with clusters of 64 KiB or more (not compressed) has the
// guest's data so aligned, too. What is all zero is left out.
//
// What it says are hints. An image is written, replaced or removed without the index being told;
// whoever takes bytes from one compares their hash first. So the index is never repaired: one that
// can't be read is put aside by the next writer, and a reader goes without.
//
// In the database:   v                      the version
//                    n                      the next image's number; none is used twice
//                    i NUMBER               an image, as JSON; the last thing of it to be written
//                    h HASH NUMBER          the offset of a piece
//                    F, f PART              the filter of all hashes: its size, its bytes
//                    u                      the filter is older than the images
// Pieces of images that are not listed (a writer was killed, an image was removed) mean nothing,
// and finish() clears them away.
//
// Memory: some 40 MiB whatever is in it, of which the filter up to 16. Threads: writers and readers
// belong to one each, a KnownContent to its loop's.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/loop.h"
#include "base/result.h"
#include "base/units.h"
#include "blockcopy/image.h"
#include "mirror/known_content.h"
#include "mirror/piece.h"

namespace drover::mirror {

inline constexpr const char* kIndexDirectory = "/var/lib/drover/index";

struct IndexedImage {
  std::uint32_t number = 0;
  std::string path;  // absolute, without links
  blockcopy::ImageIdentity identity;
  Length size;
  // In nanoseconds, of the file when it was begun to be read.
  std::int64_t modified = 0;
  std::int64_t changed = 0;
  std::uint64_t pieces = 0;  // that are not all zero
};

class IndexReader {
 public:
  // NotFound: there is none. Incompatible: of a newer drover. Protocol: damaged.
  static Result<std::unique_ptr<IndexReader>> open(const std::string& directory);
  virtual ~IndexReader() = default;  // after every KnownContent
  // In the order in which they were read.
  [[nodiscard]] virtual const std::vector<IndexedImage>& images() const = 0;
  // Null: nothing is in it.
  virtual Result<std::shared_ptr<const PieceFilter>> filter() = 0;
  // Reads images that the index lists, and no other files, if they are still the regular files that
  // they were.
  virtual std::unique_ptr<KnownContent> open_content(Loop& loop) = 0;
};

class IndexWriter {
 public:
  // 1 TiB of data.
  static constexpr std::uint64_t kMaxPieces = std::uint64_t{16} << 20;
  static constexpr std::size_t kMaxImages = 4096;

  // Makes it if there is none. Busy: another process writes it. Incompatible: of a newer drover. A
  // damaged one is renamed to DIRECTORY.damaged, with a warning, and made anew.
  static Result<std::unique_ptr<IndexWriter>> open(const std::string& directory);
  virtual ~IndexWriter() = default;  // without finish(): what was done shows with the next one's
  [[nodiscard]] virtual const std::vector<IndexedImage>& images() const = 0;

  struct Progress {
    Length done;
    Length size;
  };
  struct AddOptions {
    std::function<void(const Progress&)> progress;  // now and then
  };
  // Reads a regular file from its start to its end, in pieces, past the page cache where that
  // works. False: it is in the index as it is. What was known of another file of this name goes.
  // NotFound, InvalidArgument (no regular file), NoSpace (the index holds as much as it may), Io.
  virtual Result<bool> add(const std::string& path, const AddOptions& options) = 0;
  // False: it was not in it. `path` as it was given to add(), whether there still is such a file or
  // not.
  virtual Result<bool> remove(const std::string& path) = 0;
  // Takes out images whose file is gone or another one by now; which.
  virtual Result<std::vector<std::string>> remove_missing() = 0;
  // Makes the filter, and clears away what belongs to no image: looks at all pieces.
  virtual Status finish() = 0;
};

// After a move: adds the images to the index of this host and takes out what is gone, if there is
// an index; waits for another writer at most `patience`.
Status note_images(const std::string& directory, const std::vector<std::string>& paths,
                   std::chrono::milliseconds patience);

}  // namespace drover::mirror
