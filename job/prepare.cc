// SPDX-License-Identifier: Apache-2.0
#include "job/prepare.h"

#include <future>
#include <thread>
#include <utility>

#include <unistd.h>

#include "memmig/libvirt_hypervisor.h"
#include "memmig/probe.h"

namespace drover::job {
namespace {

constexpr std::chrono::milliseconds kCancelPoll{100};

Result<memmig::ProbeAnswer> probe_target(Platform& platform, const std::string& host,
                                         const memmig::ProbeRequest& request, const Cancel& cancel) {
  DROVER_ASSIGN(const ProcessResult probed,
                platform.run_on_target(host, {.argv = {"drover", "receive", "--probe"},
                                              .input = memmig::to_json(request),
                                              .cancel = &cancel}));
  if (probed.exit_code == 127) {
    return fail(Code::NotFound, "drover is not installed on " + host,
                "install the same version there, so that `ssh " + host + " drover --version` finds it");
  }
  if (probed.exit_code != 0) {
    return fail(Code::Incompatible, "drover on " + host + " does not answer: " + probed.err,
                "is it the same version? `ssh " + host + " drover --version`");
  }
  return memmig::parse_probe_answer(probed.out);
}

// Nobody can take libvirt's call back: it has a thread that nobody waits for when there is nothing to wait for any more.
using Connecting = std::future<Result<std::unique_ptr<memmig::Hypervisor>>>;
Connecting begin_connecting(memmig::ConnectOptions options) {
  std::packaged_task<Result<std::unique_ptr<memmig::Hypervisor>>()> connect(
      [options = std::move(options)] { return memmig::connect_libvirt(options); });
  Connecting connecting = connect.get_future();
  std::thread(std::move(connect)).detach();
  return connecting;
}

memmig::MovePlan make_plan(const memmig::GuestInfo& guest, const MoveOptions& options) {
  memmig::PlanOptions wishes;
  for (const auto& [disk, path] : options.disk_paths) wishes.places.push_back({disk, path});
  return memmig::plan_move(guest, wishes);
}

// What people are shown of it.
Plan shown_plan(const memmig::GuestInfo& guest, const memmig::MovePlan& move_plan,
                const MoveOptions& options) {
  Plan plan;
  plan.guest = guest.name;
  plan.uuid = guest.uuid;
  plan.host = options.host;
  plan.memory = guest.memory;
  for (const memmig::PlannedDisk& disk : move_plan.disks) {
    DiskPlan one;
    one.disk = disk.disk;
    one.source_path = disk.source_path;
    one.source_format = disk.source_format;
    one.source_block_device = disk.source_block_device;
    one.target_path = disk.target_path;
    one.target_format = disk.target_format;
    one.target_block_device = disk.target_block_device;
    one.delete_source = disk.delete_source && !options.keep_source;
    one.virtual_size = disk.virtual_size;
    one.allocation = disk.allocation;
    plan.disks.push_back(std::move(one));
  }
  return plan;
}

}  // namespace

Result<Prepared> prepare(Platform& platform, const MoveOptions& options, Cancel& cancel) {
  if (::geteuid() != 0) {
    return fail(Code::Denied, "drover needs root: it reads the guests' disks and drives libvirt",
                "run it with sudo");
  }
  Prepared prepared;
  std::string uri = options.target_uri;
  if (uri.empty()) {
    DROVER_ASSIGN(uri, memmig::libvirt_uri_of(options.host));
  }
  Connecting connecting;
  if (!options.target_uri.empty()) connecting = begin_connecting({.uri = uri});
  DROVER_ASSIGN(prepared.source, platform.connect_libvirt(options.source_uri, {}));
  DROVER_ASSIGN(prepared.guest, prepared.source->describe(options.guest));
  if (const auto io = prepared.source->disk_io(prepared.guest.uuid)) {
    prepared.io = *io;
    prepared.io_at = platform.now();
  }
  prepared.move_plan = make_plan(prepared.guest, options);
  prepared.plan = shown_plan(prepared.guest, prepared.move_plan, options);
  // What already stops the move here needs no target.
  prepared.plan.findings = memmig::examine_source(prepared.guest, prepared.move_plan);
  if (memmig::blocked(prepared.plan.findings)) return prepared;
  if (cancel.requested()) return fail(Code::Cancelled, "cancelled; nothing was changed");

  DROVER_ASSIGN(const memmig::ProbeAnswer target_probe,
                probe_target(platform, options.host,
                             memmig::probe_request(prepared.guest, prepared.move_plan), cancel));
  // A login by SSH takes two processors a quarter of a second: the probe's leads to libvirt as well.
  if (!connecting.valid()) {
    connecting = begin_connecting({.uri = uri, .sockets = platform.libvirt_sockets(options.host)});
  }
  while (connecting.wait_for(kCancelPoll) != std::future_status::ready) {
    if (cancel.requested()) return fail(Code::Cancelled, "cancelled; nothing was changed");
  }
  DROVER_ASSIGN(prepared.target, connecting.get());
  memmig::settle_plan(prepared.move_plan, target_probe);
  prepared.plan = shown_plan(prepared.guest, prepared.move_plan, options);
  DROVER_ASSIGN(const memmig::ProbeAnswer source_probe, memmig::probe_here({}));
  const memmig::HostQuestion question = memmig::host_question(prepared.guest);
  DROVER_ASSIGN(const memmig::HostFacts source, prepared.source->facts(question));
  DROVER_ASSIGN(const memmig::HostFacts target, prepared.target->facts(question));
  prepared.cores = std::min(source.cores, target.cores);
  prepared.plan.findings = memmig::examine(
      {prepared.guest, source, source_probe, target, target_probe, prepared.move_plan});
  return prepared;
}

Result<Prepared> prepare_again(Platform& platform, const MoveOptions& options, const Plan& plan) {
  Prepared prepared;
  std::string uri = options.target_uri;
  if (uri.empty()) {
    DROVER_ASSIGN(uri, memmig::libvirt_uri_of(options.host));
  }
  DROVER_ASSIGN(prepared.source, platform.connect_libvirt(options.source_uri, {}));
  const auto connect_target = [&]() -> Result<std::unique_ptr<memmig::Hypervisor>> {
    if (!options.target_uri.empty()) return platform.connect_libvirt(uri, {});
    DROVER_TRY(platform.run_on_target(options.host, {.argv = {"true"}}));
    return platform.connect_libvirt(uri, platform.libvirt_sockets(options.host));
  };
  auto target = connect_target();
  if (!target) {
    Error error = target.error();
    error.hint = "the job goes on when " + options.host + " is in reach: try again then";
    return fail(std::move(error));
  }
  prepared.target = std::move(*target);
  prepared.plan = plan;
  auto guest = prepared.source->describe(plan.uuid);
  if (guest) {
    prepared.guest = std::move(*guest);
    prepared.move_plan = make_plan(prepared.guest, options);
    // What was decided then: the images are there by now.
    for (memmig::PlannedDisk& disk : prepared.move_plan.disks) {
      for (const DiskPlan& known : plan.disks) {
        if (known.disk != disk.disk) continue;
        disk.target_path = known.target_path;
        disk.target_format = known.target_format;
        disk.target_block_device = known.target_block_device;
      }
    }
    return prepared;
  }
  if (guest.error().code != Code::NotFound) return fail(guest.error());
  prepared.guest.name = plan.guest;
  prepared.guest.uuid = plan.uuid;
  return prepared;
}

}  // namespace drover::job
