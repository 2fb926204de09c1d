// SPDX-License-Identifier: Apache-2.0
//
// Drives memmig/ for tests/lab/test_memmig.py: requests as lines of JSON on standard input, answers
// and events as lines on standard output. Every request runs on a thread of its own. Not part of
// the product.
//
//   memmig_tool SOURCE-URI [TARGET-URI]
//   {"id":1,"do":"describe","guest":"web1"}  ->  {"id":1,"ok":true,"value":{...}}
//   {"id":2,"do":"state","on":"target","guest":UUID}
#include <atomic>
#include <condition_variable>
#include <iostream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "memmig/domain_xml.h"
#include "memmig/image_lock.h"
#include "memmig/libvirt_hypervisor.h"

namespace drover::memmig {
namespace {

using nlohmann::json;

std::mutex output_mutex;
const Instant begin = now();

double seconds_since_begin(Instant when) {
  return std::chrono::duration<double>(when - begin).count();
}

void print(const json& line) {
  const std::lock_guard lock(output_mutex);
  std::cout << line.dump(-1, ' ', false, json::error_handler_t::replace) << std::endl;
}

json to_json(const Error& error) {
  return {{"code", code_name(error.code)},
          {"message", error.message},
          {"hint", error.hint},
          {"retryable", error.retryable}};
}

json to_json(const GuestInfo& guest) {
  json out = {{"name", guest.name},
              {"uuid", guest.uuid},
              {"id", guest.id},
              {"state", state_name(guest.state)},
              {"persistent", guest.persistent},
              {"autostart", guest.autostart},
              {"managed_save", guest.managed_save},
              {"memory", guest.memory.bytes()},
              {"vcpus", guest.vcpus},
              {"arch", guest.arch},
              {"domain_type", guest.domain_type},
              {"machine", guest.machine},
              {"emulator", guest.emulator},
              {"loader", guest.firmware_loader},
              {"nvram", guest.firmware_nvram},
              {"cpu_mode", guest.cpu_mode},
              {"cpu_model", guest.cpu_model},
              {"cpu_xml", guest.cpu_xml},
              {"live_xml", guest.live_xml},
              {"inactive_xml", guest.inactive_xml},
              {"inactive_only_disks", guest.inactive_only_disks},
              {"networks", guest.networks},
              {"bridges", guest.bridges},
              {"interfaces", guest.interfaces},
              {"host_devices", guest.host_devices},
              {"filesystems", guest.filesystems},
              {"shared_memory", guest.shared_memory},
              {"vhost_user", guest.vhost_user},
              {"vdpa", guest.vdpa},
              {"snapshots", guest.snapshots},
              {"checkpoints", guest.checkpoints},
              {"backup_job", guest.backup_job},
              {"other_job", guest.other_job},
              {"foreign_jobs", guest.foreign_jobs},
              {"migration_blockers", guest.migration_blockers},
              {"nbd_exports", guest.nbd_exports},
              {"private_directory", guest.private_directory},
              {"qemu_uid", guest.qemu_uid},
              {"qemu_gid", guest.qemu_gid},
              {"qemu_pid", guest.qemu_pid}};
  for (const GuestDisk& disk : guest.disks) {
    out["disks"][disk.target] = {{"kind", kind_name(disk.kind)},
                                 {"device", device_name(disk.device)},
                                 {"path", disk.path},
                                 {"pool", disk.pool},
                                 {"format", disk.format},
                                 {"bus", disk.bus},
                                 {"cache", disk.cache},
                                 {"readonly", disk.readonly},
                                 {"shareable", disk.shareable},
                                 {"transient", disk.transient},
                                 {"encrypted", disk.encrypted},
                                 {"backing_chain", disk.backing_chain},
                                 {"throttled", disk.throttled},
                                 {"iothread", disk.iothread},
                                 {"node", disk.node},
                                 {"block_job", disk.block_job},
                                 {"virtual_size", disk.virtual_size.bytes()},
                                 {"allocation", disk.allocation.bytes()},
                                 {"cluster_size", disk.cluster_size.bytes()}};
  }
  return out;
}

json to_json(const HostFacts& facts) {
  return {{"hostname", facts.hostname},
          {"host_uuid", facts.host_uuid},
          {"libvirt_version", facts.libvirt_version},
          {"hypervisor_version", facts.hypervisor_version},
          {"free_memory", facts.free_memory.bytes()},
          {"cores", facts.cores},
          {"uuid_of_name", facts.uuid_of_name.value_or("")},
          {"name_of_uuid", facts.name_of_uuid.value_or("")},
          {"machine_supported", facts.machine_supported},
          {"machine_problem", facts.machine_problem},
          {"cpu", facts.cpu == CpuAnswer::Compatible     ? "compatible"
                  : facts.cpu == CpuAnswer::Incompatible ? "incompatible"
                                                         : "unknown"},
          {"cpu_problem", facts.cpu_problem},
          {"networks_missing", facts.networks_missing},
          {"networks_inactive", facts.networks_inactive}};
}

json to_json(const Attached& attached) {
  json out = {{"process", attached.process},
              {"exports", attached.exports},
              {"scratch", attached.scratch},
              {"nbd_socket", attached.nbd_socket},
              {"foreign_exports", attached.foreign_exports},
              {"nothing", attached.nothing()},
              {"mirrors", json::object()},
              {"bitmaps", json::array()}};
  for (const Attached::Mirror& mirror : attached.mirrors) {
    out["mirrors"][mirror.disk] = {{"job", mirror.job},       {"node", mirror.node},
                                   {"status", mirror.status}, {"error", mirror.error},
                                   {"alive", mirror.alive()}, {"socket", mirror.unix_socket}};
  }
  for (const Attached::Bitmap& bitmap : attached.bitmaps) {
    out["bitmaps"].push_back({{"disk", bitmap.disk},
                              {"node", bitmap.node},
                              {"generation", bitmap.generation},
                              {"recording", bitmap.recording},
                              {"busy", bitmap.busy},
                              {"granularity", bitmap.granularity.bytes()},
                              {"dirty", bitmap.dirty.bytes()}});
  }
  return out;
}

json to_json(const std::vector<Extent>& extents) {
  json out = json::array();
  for (const Extent& extent : extents) {
    out.push_back({extent.offset.bytes(), extent.length.bytes()});
  }
  return out;
}

json to_json(const MigrationProgress& progress) {
  return {{"elapsed_ms", progress.elapsed.count()},
          {"total", progress.memory_total.bytes()},
          {"remaining", progress.memory_remaining.bytes()},
          {"sent", progress.memory_sent.bytes()},
          {"rate", progress.rate.bytes()},
          {"iteration", progress.iteration},
          {"downtime_limit_ms", progress.downtime_limit.count()},
          {"throttle", progress.throttle_percent},
          {"downtime_ms", progress.downtime.count()}};
}

class Tool {
 public:
  Tool(std::unique_ptr<Hypervisor> source, std::unique_ptr<Hypervisor> target)
      : source_(std::move(source)), target_(std::move(target)) {}
  ~Tool() {
    for (std::thread& thread : threads_) thread.join();
    subscriptions_.clear();
  }

  void request(json line) {
    threads_.emplace_back([this, line = std::move(line)] {
      const Instant start = now();
      json answer = {{"id", line.value("id", 0)}, {"ok", true}};
      try {
        if (auto result = carry_out(line)) {
          answer["value"] = std::move(*result);
        } else {
          answer["ok"] = false;
          answer["error"] = to_json(result.error());
        }
      } catch (const json::exception& e) {
        answer["ok"] = false;
        answer["error"] = {{"code", "invalid-argument"}, {"message", e.what()}};
      }
      answer["time"] = seconds_since_begin(now());
      answer["took"] = std::chrono::duration<double>(now() - start).count();
      print(answer);
    });
  }

 private:
  Hypervisor& on(const json& line) {
    return line.value("on", "source") == "target" ? *target_ : *source_;
  }

  static Result<json> done(Status status) {
    if (!status) return fail(std::move(status).error());
    return json(nullptr);
  }
  template <class T>
  static Result<json> value(Result<T> result) {
    if (!result) return fail(std::move(result).error());
    return to_json(*result);
  }

  Result<json> carry_out(const json& line) {
    const std::string what = line.at("do");
    const std::string guest = line.value("guest", "");
    const std::string disk = line.value("disk", "");
    if (what == "describe") return value(on(line).describe(guest));
    if (what == "state") {
      DROVER_ASSIGN(const GuestState state, on(line).state(guest));
      return json(state_name(state));
    }
    if (what == "facts") {
      HostQuestion question;
      question.guest_name = line.value("name", "");
      question.guest_uuid = line.value("uuid", "");
      question.arch = line.value("arch", "x86_64");
      question.domain_type = line.value("domain_type", "qemu");
      question.machine = line.value("machine", "");
      question.cpu_xml = line.value("cpu_xml", "");
      question.networks = line.value("networks", std::vector<std::string>());
      return value(on(line).facts(question));
    }
    if (what == "attach") {
      return done(on(line).attach_mirror(
          guest, {disk, line.at("node"), line.at("socket"), line.value("export", ""),
                  line.value("generation", std::uint64_t{1})}));
    }
    if (what == "detach") {
      return done(on(line).detach_mirror(guest, disk, line.value("keep_bitmap", false)));
    }
    if (what == "begin_bitmaps") {
      std::vector<BitmapSpec> disks;
      for (const auto& [name, node] : line.at("disks").items()) disks.push_back({name, node});
      return done(on(line).begin_bitmaps(guest, disks, line.at("generation")));
    }
    if (what == "end_bitmaps") {
      return done(on(line).end_bitmaps(guest, line.at("disks"), line.at("older_than")));
    }
    if (what == "read_bitmaps") return value(on(line).read_bitmaps(guest, disk));
    if (what == "attached") return value(on(line).attached(guest));
    if (what == "detach_all") {
      return done(on(line).detach_all(guest, line.value("keep_bitmaps", false)));
    }
    if (what == "reconnect") return done(on(line).reconnect());
    if (what == "export") {
      std::vector<ExportSpec> disks;
      for (const auto& [name, node] : line.at("disks").items()) {
        disks.push_back({name, node, name});
      }
      return done(on(line).start_exports(guest, line.at("socket"), disks));
    }
    if (what == "unexport") return done(on(line).stop_exports(guest, line.value("socket", "")));
    if (what == "abort") return done(on(line).abort_migration(guest));
    if (what == "suspend") return done(on(line).suspend(guest));
    if (what == "resume") return done(on(line).resume(guest));
    if (what == "destroy") return done(on(line).destroy(guest));
    if (what == "define") return done(on(line).define(line.at("xml")));
    if (what == "undefine") return done(on(line).undefine(guest));
    if (what == "autostart") return done(on(line).set_autostart(guest, line.at("value")));
    if (what == "subscribe") return subscribe(line.value("on", "source"), guest);
    if (what == "guard") {
      std::vector<ImageLock> locks;
      for (const std::string& path : line.at("paths").get<std::vector<std::string>>()) {
        DROVER_ASSIGN(ImageLock lock, lock_image(path));
        locks.push_back(std::move(lock));
      }
      const std::lock_guard lock(mutex_);
      locks_ = std::move(locks);
      return json(nullptr);
    }
    if (what == "unguard") {
      const std::lock_guard lock(mutex_);
      locks_.clear();
      return json(nullptr);
    }
    if (what == "rewrite") {
      Rewrite rewrite;
      rewrite.live = line.value("live", true);
      rewrite.eject = line.value("eject", std::vector<std::string>());
      for (const auto& [name, path] : line.at("paths").items()) {
        rewrite.disks.push_back({name, path, "", false});
      }
      DROVER_ASSIGN(std::string xml, rewrite_definition(line.at("xml"), rewrite));
      return json(std::move(xml));
    }
    if (what == "migrate") {
      MigrateOptions options;
      options.guest = guest;
      options.target = target_.get();
      options.live_xml = line.at("live_xml");
      options.persistent_xml = line.value("persistent_xml", "");
      options.memory_uri = line.at("uri");
      options.connections = line.value("connections", 1U);
      bandwidth_ = line.value("bandwidth", std::uint64_t{0});
      options.bandwidth = [this] { return Length(bandwidth_.load()); };
      auto& limits = options.convergence;
      limits.initial_downtime = std::chrono::milliseconds(
          line.value("initial_downtime", limits.initial_downtime.count()));
      limits.max_downtime = std::chrono::milliseconds(line.value("max_downtime", 500));
      limits.auto_converge = line.value("auto_converge", true);
      limits.max_throttle_percent = line.value("max_throttle", 90U);
      limits.give_up_after = std::chrono::seconds(line.value("give_up_after", 0));
      return done(source_->migrate(options, [](const MigrationProgress& progress) {
        json out = to_json(progress);
        out["event"] = "progress";
        print(out);
      }));
    }
    if (what == "set_bandwidth") {
      bandwidth_ = line.at("bandwidth");
      return json(nullptr);
    }
    return fail(Code::InvalidArgument, "unknown request " + what);
  }

  Result<json> subscribe(const std::string& where, const std::string& guest) {
    Hypervisor& hypervisor = where == "target" ? *target_ : *source_;
    DROVER_ASSIGN(auto subscription, hypervisor.subscribe(guest, [where](const GuestEvent& event) {
      json out = {{"event", event_name(event.kind)},
                  {"on", where},
                  {"detail", event.detail},
                  {"disk", event.disk},
                  {"time", seconds_since_begin(event.received)}};
      if (event.stamped) {
        out["stamp"] = std::chrono::duration<double>(event.stamped->time_since_epoch()).count();
      }
      print(out);
    }));
    const std::lock_guard lock(mutex_);
    subscriptions_.push_back(std::move(subscription));
    return json(nullptr);
  }

  std::unique_ptr<Hypervisor> source_;
  std::unique_ptr<Hypervisor> target_;
  std::atomic<std::uint64_t> bandwidth_{0};  // of the migration, per second
  std::mutex mutex_;
  std::vector<std::unique_ptr<Subscription>> subscriptions_;
  std::vector<ImageLock> locks_;
  std::vector<std::thread> threads_;
};

int run(int argc, char** argv) {
  std::vector<std::unique_ptr<Hypervisor>> hypervisors;
  for (int i = 1; i < 3; ++i) {
    if (i >= argc) {
      hypervisors.emplace_back();
      continue;
    }
    auto hypervisor = connect_libvirt({.uri = argv[i]});
    if (!hypervisor) {
      print({{"ok", false}, {"error", to_json(hypervisor.error())}});
      return 1;
    }
    // What a migration will need.
    if (const auto ready = (*hypervisor)->reconnect(); !ready) {
      print({{"ok", false}, {"error", to_json(ready.error())}});
      return 1;
    }
    hypervisors.push_back(std::move(*hypervisor));
  }
  Tool tool(std::move(hypervisors[0]), std::move(hypervisors[1]));
  print({{"ok", true}});
  for (std::string line; std::getline(std::cin, line);) {
    tool.request(json::parse(line, nullptr, false));
  }
  return 0;
}

}  // namespace
}  // namespace drover::memmig

int main(int argc, char** argv) { return drover::memmig::run(argc, argv); }
