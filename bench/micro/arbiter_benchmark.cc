// SPDX-License-Identifier: Apache-2.0
//
// What the arbiter costs: steps (events that it is told) per second on one core, and the time and
// memory that a disk of 64 TiB takes before and after everything in it was copied.
#include <benchmark/benchmark.h>
#include <malloc.h>

#include <chrono>
#include <deque>
#include <memory>

#include "base/check.h"
#include "base/random.h"
#include "mirror/arbiter.h"

namespace drover::mirror {
namespace {

constexpr Length kDisk = 64_GiB;
constexpr Length kHuge = 65536_GiB;

double memory_in_use() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd) / (1 << 20);
}

Extent whole(Length disk) { return {Offset(0), disk}; }

// As after a copy: every chunk is on the target, and each may have something sent to it.
void copy_everything(Arbiter& arbiter, Actions& actions) {
  while (const auto ticket = arbiter.start_copy(Instant{})) {
    actions.clear();
    CHECK(arbiter.copy_read(ticket->id, actions), "no lane was lost");
    arbiter.copy_acked(ticket->id);
  }
}

// A guest's 4 KiB writes to chunks that are copied: each is forwarded, and applied 8 writes later.
void BM_ArbiterForwardedWrite(benchmark::State& state) {
  Arbiter arbiter({.disk_size = kDisk, .lanes = 2});
  Actions actions;
  Instant now{};
  copy_everything(arbiter, actions);
  arbiter.flush_done(arbiter.flush_begin());
  Random random(1);
  std::deque<PieceId> on_the_way;
  WriteId id = 0;
  std::int64_t steps = 0;
  for (auto _ : state) {
    actions.clear();
    now += std::chrono::microseconds(10);
    arbiter.guest_write(++id, WriteKind::Data, {Offset(random.below(kDisk / 4_KiB) * 4096), 4_KiB},
                        now, actions);
    for (const Action& action : actions) {
      if (action.kind == Action::Kind::Forward) on_the_way.push_back(action.piece);
    }
    ++steps;
    if (on_the_way.size() > 8) {
      arbiter.piece_acked(on_the_way.front(), actions);
      on_the_way.pop_front();
      ++steps;
    }
    if (id % 4096 == 0) arbiter.flush_done(arbiter.flush_begin());
  }
  state.SetItemsProcessed(steps);
}
BENCHMARK(BM_ArbiterForwardedWrite)->Name("arbiter/forwarded_write");

// Writes to chunks that are still to be copied: acknowledged at once, nothing else.
void BM_ArbiterPendingWrite(benchmark::State& state) {
  Arbiter arbiter({.disk_size = kDisk, .lanes = 2});
  Actions actions;
  Random random(2);
  WriteId id = 0;
  for (auto _ : state) {
    actions.clear();
    arbiter.guest_write(++id, WriteKind::Data, {Offset(random.below(kDisk / 4_KiB) * 4096), 4_KiB},
                        Instant{}, actions);
    benchmark::DoNotOptimize(actions.data());
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(BM_ArbiterPendingWrite)->Name("arbiter/pending_write");

// The copier alone, 8 chunks on their way: start, read, acknowledged.
void BM_ArbiterCopy(benchmark::State& state) {
  Arbiter arbiter({.disk_size = kDisk, .lanes = 2});
  Actions actions;
  std::deque<TicketId> on_the_way;
  std::int64_t steps = 0;
  for (auto _ : state) {
    auto ticket = arbiter.start_copy(Instant{});
    if (!ticket) {
      arbiter.mark_pending(whole(kDisk));
      ticket = arbiter.start_copy(Instant{});
    }
    actions.clear();
    CHECK(arbiter.copy_read(ticket->id, actions), "no lane was lost");
    on_the_way.push_back(ticket->id);
    steps += 2;
    if (on_the_way.size() >= 8) {
      arbiter.copy_acked(on_the_way.front());
      on_the_way.pop_front();
      ++steps;
    }
    if (ticket->chunk % 64 == 0) arbiter.flush_done(arbiter.flush_begin());
  }
  state.SetItemsProcessed(steps);
}
BENCHMARK(BM_ArbiterCopy)->Name("arbiter/copy");

// As in a move: 8 chunks on their way, four guest writes for each, all over the disk and therefore
// to chunks in every state, a tick for each write.
void BM_ArbiterMove(benchmark::State& state) {
  Arbiter arbiter({.disk_size = kDisk, .lanes = 2});
  Actions actions;
  Random random(3);
  std::deque<TicketId> copies;
  std::deque<PieceId> pieces;
  Instant now{};
  WriteId id = 0;
  std::int64_t steps = 0;
  for (auto _ : state) {
    auto ticket = arbiter.start_copy(now);
    if (!ticket) {
      arbiter.mark_pending(whole(kDisk));
      ticket = arbiter.start_copy(now);
    }
    actions.clear();
    for (int i = 0; i < 4; ++i) {
      now += std::chrono::microseconds(10);
      arbiter.guest_write(++id, WriteKind::Data,
                          {Offset(random.below(kDisk / 4_KiB) * 4096), 4_KiB}, now, actions);
      arbiter.tick(now, actions);
    }
    CHECK(arbiter.copy_read(ticket->id, actions), "no lane was lost");
    copies.push_back(ticket->id);
    steps += 10;
    if (copies.size() >= 8) {
      arbiter.copy_acked(copies.front());
      copies.pop_front();
      ++steps;
    }
    for (const Action& action : actions) {
      if (action.kind == Action::Kind::Forward) pieces.push_back(action.piece);
    }
    while (pieces.size() > 16) {
      arbiter.piece_acked(pieces.front(), actions);
      pieces.pop_front();
      ++steps;
    }
    if (ticket->chunk % 64 == 0) arbiter.flush_done(arbiter.flush_begin());
  }
  state.SetItemsProcessed(steps);
}
BENCHMARK(BM_ArbiterMove)->Name("arbiter/move");

// What a sparse disk of 64 TiB costs: an arbiter for it, one hole found, one write.
void BM_ChunkMapSetUp(benchmark::State& state) {
  double taken = 0;
  for (auto _ : state) {
    const double before = memory_in_use();
    Arbiter arbiter({.disk_size = kHuge, .lanes = 2});
    Actions actions;
    arbiter.scan_begin(whole(kHuge));
    arbiter.scan_hole(whole(kHuge));
    arbiter.guest_write(1, WriteKind::Data, {Offset(0), 4_KiB}, Instant{}, actions);
    taken = memory_in_use() - before;
    benchmark::DoNotOptimize(arbiter.wants_copy());
  }
  state.counters["MiB"] = taken;
}
BENCHMARK(BM_ChunkMapSetUp)->Name("chunk_map/64_TiB_sparse")->Unit(benchmark::kMillisecond);

// The same with 4 KiB of data in each 4 GiB, copied and not flushed yet, and then written to again.
void BM_ChunkMapScattered(benchmark::State& state) {
  double taken = 0;
  for (auto _ : state) {
    const double before = memory_in_use();
    Arbiter arbiter({.disk_size = kHuge, .lanes = 2});
    Actions actions;
    arbiter.scan_begin(whole(kHuge));
    arbiter.scan_hole(whole(kHuge));
    for (int round = 0; round < 2; ++round) {
      for (std::uint64_t at = 0; at < kHuge.bytes(); at += (4_GiB).bytes()) {
        arbiter.mark_pending({Offset(at), 4_KiB});
      }
      if (round == 0) copy_everything(arbiter, actions);
    }
    taken = memory_in_use() - before;
    benchmark::DoNotOptimize(arbiter.wants_copy());
  }
  state.counters["MiB"] = taken;
}
BENCHMARK(BM_ChunkMapScattered)
    ->Name("chunk_map/64_TiB_data_in_each_4_GiB")
    ->Unit(benchmark::kMillisecond);

void BM_ChunkMapNext(benchmark::State& state) {
  ChunkSet set(kHuge / 1_MiB);
  Random random(4);
  for (int i = 0; i < 10000; ++i) set.insert(random.below(set.size()));
  for (auto _ : state) benchmark::DoNotOptimize(set.next(random.below(set.size())));
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(BM_ChunkMapNext)->Name("chunk_map/next_of_10000_in_64_Mi");

void BM_ChunkMapChange(benchmark::State& state) {
  ChunkSet set(kDisk / 1_MiB);
  Random random(5);
  for (auto _ : state) {
    set.insert(random.below(set.size()));
    set.erase(random.below(set.size()));
  }
  state.SetItemsProcessed(2 * state.iterations());
}
BENCHMARK(BM_ChunkMapChange)->Name("chunk_map/insert_and_erase");

}  // namespace
}  // namespace drover::mirror
