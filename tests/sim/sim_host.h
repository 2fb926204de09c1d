// SPDX-License-Identifier: Apache-2.0
//
// The hosts of the simulation: their files, what is written to them and what of that is on stable
// storage, and how reading and writing them goes wrong.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "blockcopy/image.h"
#include "tests/sim/sim_content.h"
#include "tests/sim/sim_world.h"

namespace drover::sim {

using Bytes = std::vector<std::byte>;

struct File {
  Bytes content;
  Bytes synced;              // what is left of it when the host restarts, at least
  std::vector<bool> loose;   // blocks of 4 KiB that were written since
  bool of_the_job = false;   // made by a receiver
  std::uint64_t number = 0;  // then none has another's
  std::uint64_t changes = 0;
  [[nodiscard]] bool all_synced() const;
  void write(std::size_t at, std::span<const std::byte> bytes);
  void zero(std::size_t at, std::size_t length);
  void sync();
  // Each block that was not synced is there or is not.
  void lose_unsynced(Random& random);
};
using FilePtr = std::shared_ptr<File>;

FilePtr new_file(std::size_t size);

struct Host {
  explicit Host(std::string its_name) : name(std::move(its_name)) {}
  std::string name;
  std::map<std::string, FilePtr> files;
  // Of its storage; each for as long as it is set.
  bool read_errors = false;
  bool write_errors = false;
  bool full = false;
  bool stalled = false;
  unsigned corrupts = 0;  // per mille of what is written is something else afterwards
};

// Requests that are under way. When their process dies, or the image goes, they end without effect.
class Requests {
 public:
  explicit Requests(World& world) : world_(world) {}
  ~Requests() { drop(); }
  Requests(const Requests&) = delete;
  Requests& operator=(const Requests&) = delete;
  // `act`, in parts at different times, then `done`. While the host's storage stalls nothing moves.
  void add(Host& host, std::vector<Task> parts, std::function<Status()> outcome,
           blockcopy::Done done);
  void drop();
  [[nodiscard]] bool idle() const { return pending_.empty(); }

 private:
  void advance(Host& host, std::uint64_t id);
  struct Request {
    std::vector<Task> parts;
    std::size_t next = 0;
    std::function<Status()> outcome;
    blockcopy::Done done;
  };
  World& world_;
  std::map<std::uint64_t, Request> pending_;
  std::uint64_t next_ = 1;
  std::shared_ptr<bool> here_ = std::make_shared<bool>(true);
};

// Reads are torn: each half sees the file at another moment.
class SimReader final : public blockcopy::ImageReader {
 public:
  // `reachable`: false while what the image is read through is gone.
  SimReader(World& world, Host& host, FilePtr file, std::function<bool()> reachable);
  [[nodiscard]] Length size() const override { return Length(file_->content.size()); }
  [[nodiscard]] Length alignment() const override { return Length(512); }
  void read(Offset offset, std::span<std::byte> buffer, blockcopy::Done done) override;
  void extents(Extent range, blockcopy::ExtentsDone done) override;
  void drop() { requests_.drop(); }

 private:
  World& world_;
  Host& host_;
  FilePtr file_;
  std::function<bool()> reachable_;
  Requests requests_;
};

class SimWriter final : public blockcopy::ImageWriter {
 public:
  SimWriter(World& world, Host& host, FilePtr file)
      : world_(world), host_(host), file_(std::move(file)), requests_(world) {}
  [[nodiscard]] Length size() const override { return Length(file_->content.size()); }
  [[nodiscard]] Length alignment() const override { return Length(512); }
  void write(Offset offset, std::span<const std::byte> buffer, blockcopy::Done done) override;
  void write_zeroes(Extent extent, blockcopy::Done done) override;
  blockcopy::Sharing share(int fd, Offset from, Extent extent) override {
    if (content_ == nullptr) return blockcopy::Sharing::Refused;
    const auto start = file_->content.begin() + static_cast<std::ptrdiff_t>(extent.offset.bytes());
    Bytes bytes(start, start + static_cast<std::ptrdiff_t>(extent.length.bytes()));
    const blockcopy::Sharing shared = content_->share(fd, from, bytes);
    if (shared != blockcopy::Sharing::Refused) file_->write(extent.offset.bytes(), bytes);
    return shared;
  }
  void share_with(const SimContent* content) { content_ = content; }
  void drop() { requests_.drop(); }

 private:
  const SimContent* content_ = nullptr;
  [[nodiscard]] std::function<Status()> outcome() const;
  World& world_;
  Host& host_;
  FilePtr file_;
  Requests requests_;
};

}  // namespace drover::sim
