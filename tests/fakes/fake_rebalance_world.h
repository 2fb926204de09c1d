// SPDX-License-Identifier: Apache-2.0
//
// Storages and disks that only exist as numbers, for tests of job/rebalance.h and of its command.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "job/rebalance.h"

namespace drover::job::testing {

class FakeRebalanceWorld final : public RebalanceWorld {
 public:
  struct Store {
    std::string name;
    Length capacity;
    Length other;
  };
  struct Disk {
    std::string guest;
    std::string disk;
    std::size_t storage = 0;
    Length allocated;
    std::uint64_t busy = 0;  // ns per second
    std::string stays;
  };
  std::vector<Store> stores;
  std::vector<Disk> disks;
  std::map<std::string, Error> blocked;  // by "guest:disk": what check() answers
  std::map<std::string, Error> broken;   // and carry_out()
  std::function<void()> after_move;      // what else happens in the world

  std::vector<std::string> log;  // "web1:vda > /mnt/b", what was carried out

  // /mnt/a at 90 %, /mnt/b and /mnt/c at 30 %.
  static void fill_one(FakeRebalanceWorld& world) {
    world.stores = {{"/mnt/a", 100_GiB, {}}, {"/mnt/b", 100_GiB, {}}, {"/mnt/c", 100_GiB, {}}};
    world.disks = {{"db1", "vda", 1, 30_GiB},
                   {"db2", "vda", 2, 30_GiB},
                   {"web1", "vda", 0, 50_GiB},
                   {"web2", "vda", 0, 20_GiB},
                   {"web3", "vda", 0, 20_GiB}};
  }

  static std::string uuid(const std::string& guest) { return "uuid-of-" + guest; }

  Result<memmig::StorageReport> look(const std::vector<std::string>& storages) override {
    memmig::StorageReport report;
    for (const std::string& name : storages) {
      for (std::size_t i = 0; i < stores.size(); ++i) {
        if (stores[i].name != name) continue;
        Length used = stores[i].other;
        for (const Disk& disk : disks) used += disk.storage == i ? disk.allocated : Length();
        report.storages.push_back({name, "", name, name, true, name, stores[i].capacity, used});
      }
    }
    for (const Disk& disk : disks) {
      if (report.guests.empty() || report.guests.back().name != disk.guest) {
        report.guests.push_back({disk.guest, uuid(disk.guest), true, {}});
      }
      memmig::GuestDisk its;
      its.target = disk.disk;
      report.guests.back().disks.push_back(its);
      for (std::size_t i = 0; i < report.storages.size(); ++i) {
        if (report.storages[i].name != stores[disk.storage].name) continue;
        report.disks.push_back({disk.guest, uuid(disk.guest), disk.disk,
                                stores[disk.storage].name + "/" + disk.guest, i, disk.allocated,
                                true, disk.stays});
      }
    }
    return report;
  }

  Result<std::vector<memmig::DiskLoad>> loads(std::chrono::milliseconds /*window*/,
                                              Cancel& cancel) override {
    if (cancel.requested()) return fail(Code::Cancelled, "cancelled");
    std::vector<memmig::DiskLoad> out;
    for (const Disk& disk : disks) {
      out.push_back({uuid(disk.guest), disk.disk, 100, 1000, std::chrono::milliseconds(1),
                     std::chrono::nanoseconds(disk.busy)});
    }
    return out;
  }

  Status check(const RebalanceMove& move, Cancel& /*cancel*/) override {
    return answer(blocked, move);
  }

  Status carry_out(const RebalanceMove& move, Observer& observer, Cancel& /*cancel*/) override {
    observer.note("copying " + move.disk);
    log.push_back(move.guest + ":" + move.disk + " > " + move.target);
    const Status status = answer(broken, move);
    if (status) {
      for (Disk& disk : disks) {
        if (disk.guest != move.guest || disk.disk != move.disk) continue;
        for (std::size_t i = 0; i < stores.size(); ++i) {
          if (stores[i].name == move.target) disk.storage = i;
        }
      }
    }
    if (after_move) after_move();
    return status;
  }

 private:
  static Status answer(const std::map<std::string, Error>& answers, const RebalanceMove& move) {
    const auto found = answers.find(move.guest + ":" + move.disk);
    if (found != answers.end()) return fail(found->second);
    return {};
  }
};

}  // namespace drover::job::testing
