// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/copy.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>

#include "base/buffer.h"
#include "base/check.h"
#include "blockcopy/throttle.h"

namespace drover::blockcopy {
namespace {

// What is zero is found in pieces of this size; a multiple of every alignment.
constexpr std::uint64_t kPiece = std::uint64_t{64} << 10;

// A limit may be changed, and the user may cancel, while it makes the copy wait.
constexpr auto kLongestPause = std::chrono::milliseconds(100);

bool is_zero(std::span<const std::byte> bytes) {
  return bytes.empty() || (bytes.front() == std::byte{0} &&
                           std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

class Copy {
 public:
  Copy(Loop& loop, ImageReader& reader, ImageWriter& writer, const CopyOptions& options)
      : loop_(loop),
        reader_(reader),
        writer_(writer),
        options_(options),
        pool_(kCopyChunk, options.in_flight + 1),  // the one whose callback begins the next
        end_(Offset(reader.size().bytes())) {
    CHECK(writer.size() >= reader.size(), "the target is as large as the source");
  }

  Status run() {
    count();
    loop_.run();
    loop_.cancel(timer_);
    return result_;
  }

 private:
  // First how much there is, for the progress.
  void count() {
    if (mapped_ == end_) {
      mapped_ = Offset();
      tell();
      go_on();
      return;
    }
    reader_.extents({mapped_, end_ - mapped_}, [this](Result<std::vector<MappedExtent>> found) {
      if (!found) return give_up(found.error());
      for (const MappedExtent& one : *found) {
        if (one.data) data_ += one.extent.length;
        mapped_ = one.extent.end();
      }
      count();
    });
  }

  void go_on() {
    while (result_ && running_ < options_.in_flight) {
      if (options_.stopped && options_.stopped()) {
        result_ = fail(Code::Cancelled, "the copy was cancelled");
        break;
      }
      if (ahead_.empty()) {
        if (!asking_ && mapped_ < end_) ask();
        break;
      }
      if (!take_next()) return;
    }
    if (running_ == 0 && !asking_ && (!result_ || (ahead_.empty() && mapped_ == end_))) {
      loop_.stop();
    }
  }

  void ask() {
    asking_ = true;
    reader_.extents({mapped_, end_ - mapped_}, [this](Result<std::vector<MappedExtent>> found) {
      asking_ = false;
      if (!found) return give_up(found.error());
      for (const MappedExtent& one : *found) {
        mapped_ = one.extent.end();
        if (one.data || !options_.target_zero) ahead_.push_back(one);
      }
      go_on();
    });
  }

  // False: the limit says that it must wait.
  bool take_next() {
    MappedExtent& next = ahead_.front();
    if (!next.data) {
      ++running_;
      writer_.write_zeroes(next.extent, [this](Status status) { done(std::move(status)); });
      ahead_.pop_front();
      return true;
    }
    if (options_.bandwidth) throttle_.set_rate(options_.bandwidth());
    if (!throttle_.may_start(loop_.now())) {
      if (timer_ == 0) {
        timer_ = loop_.at(std::min(throttle_.ready(), loop_.now() + kLongestPause), [this] {
          timer_ = 0;
          go_on();
        });
      }
      return false;
    }
    // Up to where a chunk ends, so that no two touch the same block.
    const std::uint64_t start = next.extent.offset.bytes();
    const std::uint64_t chunk_end = (start / kCopyChunk.bytes() + 1) * kCopyChunk.bytes();
    const Extent chunk{next.extent.offset,
                       Length(std::min(chunk_end, next.extent.end().bytes()) - start)};
    if (chunk.end() == next.extent.end()) {
      ahead_.pop_front();
    } else {
      next.extent = {chunk.end(), next.extent.end() - chunk.end()};
    }
    throttle_.take(loop_.now(), chunk.length);
    read(chunk);
    return true;
  }

  void read(const Extent& chunk) {
    ++running_;
    Buffer buffer = pool_.try_take();
    CHECK(buffer, "there is a buffer for each chunk in flight");
    const auto bytes = buffer.bytes().first(chunk.length.bytes());
    reader_.read(chunk.offset, bytes, [this, chunk, buffer](Status status) {
      if (!status) return done(std::move(status));
      write(chunk, buffer);
    });
  }

  // A run of pieces that are zero, or are not.
  struct Run {
    Extent extent;
    bool zero = false;
  };
  static std::vector<Run> runs_of(const Extent& chunk, std::span<const std::byte> bytes) {
    std::vector<Run> runs;
    for (std::uint64_t at = 0; at < bytes.size();) {
      // Pieces begin at their multiples on the disk.
      const std::uint64_t here = chunk.offset.bytes() + at;
      const std::uint64_t length =
          std::min<std::uint64_t>((here / kPiece + 1) * kPiece - here, bytes.size() - at);
      const bool zero = is_zero(bytes.subspan(at, length));
      if (runs.empty() || runs.back().zero != zero) {
        runs.push_back({{Offset(here), Length(length)}, zero});
      } else {
        runs.back().extent.length += Length(length);
      }
      at += length;
    }
    return runs;
  }

  void write(const Extent& chunk, const Buffer& buffer) {
    const auto bytes = buffer.bytes().first(chunk.length.bytes());
    struct Parts {
      std::size_t left = 1;  // this function's own
      Status status;
    };
    auto parts = std::make_shared<Parts>();
    const auto part_done = [this, chunk, buffer, parts](Status status) {
      if (!status && parts->status) parts->status = std::move(status);
      if (--parts->left != 0) return;
      if (parts->status) {
        copied_ += chunk.length;
        tell();
      }
      done(std::move(parts->status));
    };
    for (const Run& run : runs_of(chunk, bytes)) {
      if (run.zero && options_.target_zero) continue;
      ++parts->left;
      if (run.zero) {
        writer_.write_zeroes(run.extent, part_done);
      } else {
        writer_.write(
            run.extent.offset,
            bytes.subspan((run.extent.offset - chunk.offset).bytes(), run.extent.length.bytes()),
            part_done);
      }
    }
    part_done({});
  }

  void done(Status status) {
    --running_;
    if (!status && result_) result_ = std::move(status);
    go_on();
  }

  void give_up(const Error& error) {
    if (result_) result_ = fail(error);
    go_on();
  }

  void tell() const {
    if (options_.progress) options_.progress(copied_, data_);
  }

  Loop& loop_;
  ImageReader& reader_;
  ImageWriter& writer_;
  const CopyOptions& options_;
  BufferPool pool_;
  Throttle throttle_;
  const Offset end_;
  Offset mapped_;
  std::deque<MappedExtent> ahead_;  // what is to be copied next
  bool asking_ = false;
  Loop::Handle timer_ = 0;  // the throttle's
  unsigned running_ = 0;    // chunks and runs of zeroes
  Length data_;
  Length copied_;
  Status result_;
};

}  // namespace

Status copy_image(Loop& loop, ImageReader& reader, ImageWriter& writer,
                  const CopyOptions& options) {
  Copy copy(loop, reader, writer, options);
  return copy.run();
}

}  // namespace drover::blockcopy
