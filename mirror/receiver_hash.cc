// SPDX-License-Identifier: Apache-2.0
#include "mirror/receiver_hash.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "base/buffer.h"
#include "base/check.h"
#include "base/loop.h"
#include "mirror/frame.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

// At once: enough to keep a disk busy, little beside what the lanes write.
constexpr std::size_t kReads = 4;

class Hashing {
 public:
  Hashing(Extent range, Length chunk)
      : range_(range),
        chunk_(chunk),
        hashes_((range.length.bytes() + chunk.bytes() - 1) / chunk.bytes()),
        has_data_(hashes_.size()),
        mapped_(range.offset),
        pool_(kMaxChunk, kReads) {}

  Result<std::vector<std::string>> run(blockcopy::TargetImage& image) {
    DROVER_ASSIGN(loop_, Loop::create());
    DROVER_ASSIGN(reader_, image.open_reader(*loop_));
    loop_->post([this] { map_next(); });
    loop_->run();
    reader_.reset();
    if (error_) return fail(*error_);
    return std::move(hashes_);
  }

 private:
  void map_next() {
    if (mapped_ == range_.end()) return read_more();
    reader_->extents({mapped_, range_.end() - mapped_},
                     [this](Result<std::vector<blockcopy::MappedExtent>> found) {
                       if (!found) return finish(found.error());
                       for (const blockcopy::MappedExtent& one : *found) mark(one);
                       map_next();
                     });
  }

  void mark(const blockcopy::MappedExtent& one) {
    mapped_ = one.extent.end();
    if (!one.data || one.extent.length == Length()) return;
    const std::uint64_t first = (one.extent.offset - range_.offset).bytes() / chunk_.bytes();
    const std::uint64_t last = ((one.extent.end() - range_.offset).bytes() - 1) / chunk_.bytes();
    for (std::uint64_t i = first; i <= last; ++i) has_data_.at(i) = true;
  }

  [[nodiscard]] Extent extent_of(std::size_t index) const {
    const Offset at = range_.offset + Length(index * chunk_.bytes());
    return {at, std::min(chunk_, range_.end() - at)};
  }

  void read_more() {
    for (; next_ < hashes_.size() && !error_; ++next_) {
      const Extent extent = extent_of(next_);
      if (!has_data_[next_]) {
        hashes_[next_] = hash_of_zeroes(extent.length);
        continue;
      }
      Buffer buffer = pool_.try_take();
      if (!buffer) return;
      const auto bytes = buffer.bytes().first(extent.length.bytes());
      auto kept = std::make_shared<Buffer>(std::move(buffer));
      ++reading_;
      reader_->read(extent.offset, bytes, [this, kept, bytes, index = next_](Status status) {
        if (status) {
          hashes_[index] = chunk_hash(bytes);
        } else if (!error_) {
          error_ = status.error();
        }
        kept->reset();
        --reading_;
        read_more();
      });
    }
    if (reading_ == 0) loop_->stop();
  }

  void finish(const Error& error) {
    error_ = error;
    loop_->stop();
  }

  std::string hash_of_zeroes(Length length) {
    if (zeroes_.size() != length.bytes()) {
      zeroes_.assign(length.bytes(), std::byte{0});
      hash_of_zeroes_ = chunk_hash(zeroes_);
    }
    return hash_of_zeroes_;
  }

  const Extent range_;
  const Length chunk_;
  std::vector<std::string> hashes_;
  std::vector<bool> has_data_;
  Offset mapped_;
  BufferPool pool_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<blockcopy::ImageReader> reader_;
  std::size_t next_ = 0;
  std::size_t reading_ = 0;
  std::optional<Error> error_;
  std::vector<std::byte> zeroes_;
  std::string hash_of_zeroes_;
};

}  // namespace

Result<std::vector<std::string>> hash_image(blockcopy::TargetImage& image, Extent range,
                                            Length chunk) {
  CHECK(range.length > Length() && range.end() <= Offset(image.spec().size.bytes()),
        "what is hashed lies on the disk");
  CHECK(chunk > Length() && chunk <= kMaxChunk, "a chunk fits a buffer");
  return Hashing(range, chunk).run(image);
}

}  // namespace drover::mirror
