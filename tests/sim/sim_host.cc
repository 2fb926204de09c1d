// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_host.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace drover::sim {

using namespace std::chrono_literals;

constexpr std::size_t kLooseBlock = 4096;

FilePtr new_file(std::size_t size) {
  auto file = std::make_shared<File>();
  file->content.resize(size);
  file->synced.resize(size);
  file->loose.resize((size + kLooseBlock - 1) / kLooseBlock);
  return file;
}

bool File::all_synced() const {
  return std::ranges::none_of(loose, [](bool one) { return one; });
}

void File::write(std::size_t at, std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  ++changes;
  std::memcpy(content.data() + at, bytes.data(), bytes.size());
  for (std::size_t b = at / kLooseBlock; b <= (at + bytes.size() - 1) / kLooseBlock; ++b)
    loose[b] = true;
}

void File::zero(std::size_t at, std::size_t length) {
  if (length == 0) return;
  ++changes;
  std::memset(content.data() + at, 0, length);
  for (std::size_t b = at / kLooseBlock; b <= (at + length - 1) / kLooseBlock; ++b) loose[b] = true;
}

void File::sync() {
  for (std::size_t b = 0; b < loose.size(); ++b) {
    if (!loose[b]) continue;
    const std::size_t at = b * kLooseBlock;
    std::memcpy(synced.data() + at, content.data() + at,
                std::min(kLooseBlock, content.size() - at));
    loose[b] = false;
  }
}

void File::lose_unsynced(Random& random) {
  for (std::size_t b = 0; b < loose.size(); ++b) {
    if (!loose[b]) continue;
    loose[b] = false;
    const std::size_t at = b * kLooseBlock;
    const std::size_t size = std::min(kLooseBlock, content.size() - at);
    if (random.one_in(2)) {
      std::memcpy(content.data() + at, synced.data() + at, size);
    } else {
      std::memcpy(synced.data() + at, content.data() + at, size);
    }
  }
}

// --- requests ---

void Requests::add(Host& host, std::vector<Task> parts, std::function<Status()> outcome,
                   blockcopy::Done done) {
  const std::uint64_t id = next_++;
  pending_[id] = {std::move(parts), 0, std::move(outcome), std::move(done)};
  advance(host, id);
}

void Requests::advance(Host& host, std::uint64_t id) {
  world_.after(world_.between(10us, 150us), [this, here = here_, &host, id] {
    if (!*here) return;
    const auto found = pending_.find(id);
    if (found == pending_.end()) return;
    if (host.stalled) {
      world_.after(40ms, [this, here, &host, id] {
        if (*here) advance(host, id);
      });
      return;
    }
    Request& request = found->second;
    if (request.next < request.parts.size()) {
      const Status status = request.outcome();
      if (status) request.parts[request.next]();
      ++request.next;
      if (status && request.next < request.parts.size()) return advance(host, id);
      const blockcopy::Done done = std::move(request.done);
      pending_.erase(found);
      done(status);
    }
  });
}

void Requests::drop() {
  *here_ = false;
  here_ = std::make_shared<bool>(true);
  const auto dropped = std::exchange(pending_, {});
  for (const auto& [id, request] : dropped) {
    request.done(fail(Code::Cancelled, "the process is gone"));
  }
}

// --- reader ---

SimReader::SimReader(World& world, Host& host, FilePtr file, std::function<bool()> reachable)
    : world_(world),
      host_(host),
      file_(std::move(file)),
      reachable_(std::move(reachable)),
      requests_(world) {}

void SimReader::read(Offset offset, std::span<std::byte> buffer, blockcopy::Done done) {
  const std::size_t cut = world_.random.below(buffer.size() + 1);
  const auto take = [this, offset, buffer](std::size_t from, std::size_t to) {
    return [this, offset, buffer, from, to] {
      std::memcpy(buffer.data() + from, file_->content.data() + offset.bytes() + from, to - from);
    };
  };
  requests_.add(
      host_, {take(cut, buffer.size()), take(0, cut)},
      [this]() -> Status {
        if (!reachable_()) return fail(Code::Unreachable, "QEMU's export is gone");
        if (host_.read_errors) return fail(Code::Io, "reading the source: I/O error");
        return {};
      },
      std::move(done));
}

void SimReader::extents(Extent range, blockcopy::ExtentsDone done) {
  auto runs = std::make_shared<std::vector<blockcopy::MappedExtent>>();
  requests_.add(
      host_, {[this, range, runs] {
        for (Offset at = range.offset; at < range.end();) {
          const Offset next = std::min(range.end(), widen({at, Length(1)}, 4_KiB).end());
          const bool data =
              std::any_of(file_->content.begin() + static_cast<std::ptrdiff_t>(at.bytes()),
                          file_->content.begin() + static_cast<std::ptrdiff_t>(next.bytes()),
                          [](std::byte b) { return b != std::byte{0}; });
          runs->push_back({{at, next - at}, data});
          at = next;
        }
      }},
      [this]() -> Status {
        if (!reachable_()) return fail(Code::Unreachable, "QEMU's export is gone");
        return {};
      },
      [runs, done = std::move(done)](const Status& status) {
        if (status) return done(*runs);
        done(fail(status.error()));
      });
}

// --- writer ---

std::function<Status()> SimWriter::outcome() const {
  return [this]() -> Status {
    if (host_.write_errors) return fail(Code::Io, "writing the image: I/O error");
    if (host_.full) return fail(Code::NoSpace, "writing the image: no space left on device");
    return {};
  };
}

void SimWriter::write(Offset offset, std::span<const std::byte> buffer, blockcopy::Done done) {
  const std::size_t cut = world_.random.below(buffer.size() + 1);
  const auto put = [this, offset, buffer](std::size_t from, std::size_t to) {
    return [this, offset, buffer, from, to] {
      file_->write(offset.bytes() + from, buffer.subspan(from, to - from));
    };
  };
  // Storage that does not keep what it took, and says nothing.
  const auto corrupt = [this, offset, size = buffer.size()] {
    if (host_.corrupts == 0 || size == 0 || !world_.chance(host_.corrupts)) return;
    const std::size_t at = offset.bytes() + world_.random.below(size);
    const std::byte other =
        file_->content.at(at) ^ static_cast<std::byte>(1 + world_.random.below(255));
    world_.trace("{}: byte {} is corrupted", host_.name, at);
    file_->write(at, std::span(&other, 1));
  };
  const auto put_rest = [put = put(0, cut), corrupt] {
    put();
    corrupt();
  };
  requests_.add(host_, {put(cut, buffer.size()), put_rest}, outcome(), std::move(done));
}

void SimWriter::write_zeroes(Extent extent, blockcopy::Done done) {
  requests_.add(host_,
                {[this, extent] { file_->zero(extent.offset.bytes(), extent.length.bytes()); }},
                outcome(), std::move(done));
}

}  // namespace drover::sim
