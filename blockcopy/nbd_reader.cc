// SPDX-License-Identifier: Apache-2.0
//
// Images of any format as a source, through QEMU's NBD export. QEMU serves at most 16 requests per
// connection at a time, so several connections share the work; it does not matter whether the
// server calls itself "multi-conn", which is about flushes.
#include <algorithm>
#include <iterator>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "blockcopy/image.h"
#include "blockcopy/nbd_connection.h"

namespace drover::blockcopy {
namespace {

constexpr unsigned kMaxConnections = 64;

class NbdReader final : public ImageReader {
 public:
  NbdReader(std::string image, std::vector<std::shared_ptr<NbdConnection>> connections)
      : image_(std::move(image)), connections_(std::move(connections)) {}
  ~NbdReader() override {
    CHECK(ops_.empty() && asked_ == 0, "a reader goes when its requests are done");
    for (const auto& connection : connections_) connection->close();
  }

  [[nodiscard]] Length size() const override { return connections_.front()->size(); }
  [[nodiscard]] Length alignment() const override { return connections_.front()->alignment(); }

  void read(Offset offset, std::span<std::byte> buffer, Done done) override {
    CHECK(offset.bytes() <= size().bytes() && buffer.size() <= size().bytes() - offset.bytes(),
          "a read stays inside the disk");
    const std::uint64_t limit = connections_.front()->max_transfer().bytes();
    Op* const op = &ops_.emplace_back();
    op->self = std::prev(ops_.end());
    op->whole = Extent{offset, Length(buffer.size())};
    op->done = std::move(done);
    // Counted before the first is issued; an empty read is one request too, for the callback's
    // sake.
    op->pieces = std::max<std::size_t>(1, (buffer.size() + limit - 1) / limit);
    if (buffer.empty()) {
      loop_->post([this, op] { piece_done(op, 0); });
      return;
    }
    while (!buffer.empty()) {
      const std::span<std::byte> piece = buffer.first(std::min<std::size_t>(buffer.size(), limit));
      pick().read(offset, piece, [this, op](int error) { piece_done(op, error); });
      offset += Length(piece.size());
      buffer = buffer.subspan(piece.size());
    }
  }

  void extents(Extent range, ExtentsDone done) override {
    CHECK(range.length > Length() && range.end().bytes() <= size().bytes(),
          "extents are asked for inside the disk");
    ++asked_;
    auto op = std::make_shared<ExtentsOp>();
    op->done = std::move(done);
    pick().extents(range, op->found, [this, op, range](int error) {
      --asked_;
      if (const Status status = nbd_status(error, "asking for the extents of", image_, range)) {
        op->done(std::move(op->found));
      } else {
        op->done(tl::unexpected(status.error()));
      }
    });
  }

  void attach(Loop& loop) {
    loop_ = &loop;
    for (const auto& connection : connections_) connection->attach(loop);
  }

 private:
  struct Op {
    Extent whole;
    Done done;
    std::size_t pieces = 0;
    int error = 0;
    std::list<Op>::iterator self;
  };
  struct ExtentsOp {
    std::vector<MappedExtent> found;
    ExtentsDone done;
  };

  // The connection with the least to do; a broken one only when all are.
  NbdConnection& pick() {
    NbdConnection* best = nullptr;
    for (const auto& connection : connections_) {
      if (best == nullptr || std::pair(!connection->alive(), connection->in_flight()) <
                                 std::pair(!best->alive(), best->in_flight())) {
        best = connection.get();
      }
    }
    return *best;
  }

  void piece_done(Op* op, int error) {
    if (op->error == 0) op->error = error;
    if (--op->pieces != 0) return;
    const Done done = std::move(op->done);
    Status status = nbd_status(op->error, "reading", image_, op->whole);
    ops_.erase(op->self);
    done(std::move(status));  // may destroy this
  }

  const std::string image_;
  const std::vector<std::shared_ptr<NbdConnection>> connections_;
  Loop* loop_ = nullptr;
  std::list<Op> ops_;      // reads under way
  std::size_t asked_ = 0;  // extents() under way
};

}  // namespace

Result<std::unique_ptr<ImageReader>> open_nbd_reader(Loop& loop, const NbdSource& source) {
  if (source.connections == 0 || source.connections > kMaxConnections) {
    return fail(Code::InvalidArgument, "an image is read through 1 to " +
                                           std::to_string(kMaxConnections) + " connections");
  }
  const std::string image = source.export_name + " (" + source.unix_socket + ")";
  std::vector<std::shared_ptr<NbdConnection>> connections;
  const Instant deadline = now() + std::chrono::seconds(10);
  for (unsigned i = 0; i < source.connections; ++i) {
    NbdOpenOptions options;
    options.image = image;
    options.extents = true;
    options.timeout = std::max(deadline - now(), Duration::zero());
    DROVER_ASSIGN(auto connection,
                  NbdConnection::open({source.unix_socket, source.export_name}, options));
    if (!connections.empty() && connection->size() != connections.front()->size()) {
      return fail(Code::Busy, "the size of " + image + " is changing");
    }
    connections.push_back(std::move(connection));
  }
  auto reader = std::make_unique<NbdReader>(image, std::move(connections));
  reader->attach(loop);
  return reader;
}

}  // namespace drover::blockcopy
