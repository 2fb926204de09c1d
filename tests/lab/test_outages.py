# SPDX-License-Identifier: Apache-2.0
"""What a move gets over by itself: a link that is down, agents and libvirtds that die or stand still, a target that
restarts. Each case ends with a guest that has lost nothing, clean hosts and another move. What needs a person is in
test_resume.py.

DROVER_LAB_LONG=1 adds the cases that take minutes. A table of all cases is printed at the end."""
from __future__ import annotations

import os
import signal
import time

import pytest

from lab import Disk, Guest, Host, Lab, wait_for
from moves import HOLD, Move, Running, assert_unharmed, jobs, kill_all, receivers
from outages import (PHASES, Seen, begin, guest_moves_or_resumed, link_down, long, moved, outage_of,
                     share_sent_again, undone)

pytestmark = pytest.mark.usefixtures("drover")

STALL_MS = 1000  # what no guest's write may take, however slow the machine is
STRICT_STALL_MS = 6000  # in the handover a write waits for the target: mirror/arbiter.h, max_strict_wait


def bound(phase: str) -> int:
    return STALL_MS if phase in ("copy", "lead") else STRICT_STALL_MS


# --------------------------------------------------------------------------------------------- the link


@pytest.mark.parametrize("phase", PHASES)
def test_link_down_5_s(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase)
    seen.outage_begins(small)
    link_down(lab, 5)
    assert seen.outage_over(small) < bound(phase)
    running.hurry()
    moved(lab, small, seen, running.end())


@pytest.mark.parametrize("seconds, size, rate", [(45, 768, 50), pytest.param(45, 4096, 200, marks=long),
                                                 pytest.param(180, 4096, 100, marks=long)])
def test_link_down_in_the_middle_of_a_copy(lab: Lab, seen: Seen, seconds: int, size: int, rate: int) -> None:
    """Issue 3, done when 1. (What the guest writes meanwhile is sent again, too: the smaller disk's writes less.)"""
    guest = lab.guest("web1", [Disk(f"{size}M", data=f"{size}M")], memory="256M", rate=rate)
    lab.set_rate("1gbit")
    running = Move(lab, guest, "--bandwidth", "100M")
    running.wait_for_copied(0.5)
    seen.outage_begins(guest)
    link_down(lab, seconds)
    assert seen.outage_over(guest) < STALL_MS
    outcome = running.end()
    moved(lab, guest, seen, outcome)
    assert share_sent_again(outcome) <= 0.02


@long
@pytest.mark.parametrize("seconds", [45, 180])
@pytest.mark.parametrize("phase", ["synchronised", "memory"])
def test_link_down_for_long(lab: Lab, small: Guest, seen: Seen, phase: str, seconds: int) -> None:
    running = begin(lab, small, phase)
    seen.outage_begins(small)
    link_down(lab, seconds)
    assert seen.outage_over(small) < STRICT_STALL_MS
    moved(lab, small, seen, running.end())


@pytest.mark.parametrize("seconds", [5, pytest.param(45, marks=long), pytest.param(180, marks=long)])
def test_link_down_at_the_barrier(lab: Lab, small: Guest, seen: Seen, seconds: int) -> None:
    running = Move(lab, small, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 120)
    job = running.job
    lab.set_link(lab.b, False)
    held.unlink()
    outage_of(seconds)
    lab.set_link(lab.b, True)
    outcome, how = guest_moves_or_resumed(lab, running, job)
    if outcome.exit_code == 0:
        moved(lab, small, seen, outcome, how)
        return
    # The memory was not over there yet. What was out of reach is removed when it is in reach again.
    if jobs(lab.a):
        cancelled = Running(lab.a, "cancel", job).end()
        assert cancelled.exit_code == 0, cancelled.text()
        how = "undone, cancelled"
    wait_for("the end of SSH sessions that the outage cut", lambda: lab.leftovers() == [], 120)
    undone(lab, small, seen, outcome, outcome.exit_code, how)


@pytest.mark.parametrize("link", ["200mbit", "50mbit"])
def test_a_fast_writer_over_a_slow_link(lab: Lab, seen: Seen, link: str) -> None:
    """The witness writes 15 to 20 MB/s: less than 200 Mbit/s takes, and three times as much as 50 Mbit/s does."""
    guest = lab.guest("web1", [Disk("512M", data="256M")], memory="256M", rate="max", options="w.fsync=0")
    lab.set_rate(link)
    rates = [guest.wait_report()["rate"]]
    seen.outage_begins(guest)
    start = time.monotonic()
    running = Move(lab, guest)
    for phase in ("copy", "synchronised"):
        begun = running.wait_for(lambda e, phase=phase: e.get("phase") == phase, 600)["elapsed_ms"]  # type: ignore[misc]
        writes = guest.status()["writes"]
        over = running.wait_for(lambda e, begun=begun: e.get("elapsed_ms", 0) > begun + 3000 or  # type: ignore[misc]
                                e.get("phase") in ("barrier", "resume"))["elapsed_ms"]
        rates.append((guest.status()["writes"] - writes) * 1000 / (over - begun))
    outcome = running.end(600)
    took = time.monotonic() - start
    assert outcome.exit_code == 0, outcome.text()
    lab.set_rate(None)
    slow = outcome.summary
    assert slow["handover_writes"] > 0
    print(f"in the handover {slow['handover_writes']} writes waited {slow['handover_wait_us'] / 1000:.0f} ms in all, "
          f"{slow['handover_longest_wait_us'] / 1000:.0f} ms at most")
    how = f"{took:.0f} s; {' / '.join(f'{rate:.0f}' for rate in rates)} writes/s before / copy / handover"
    moved(lab, guest, seen, outcome, how)


# ------------------------------------------------------------------------------------------ the receiver


@pytest.mark.parametrize("phase", PHASES)
def test_receiver_killed(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase)
    seen.outage_begins(small)
    kill_all(lab.b, "drover receive")
    wait_for("another receiver", lambda: receivers(lab.b) or running.process.poll() is not None, 60)
    assert seen.outage_over(small) < bound(phase)
    running.hurry()
    moved(lab, small, seen, running.end())


@pytest.mark.parametrize("size, data", [(512, 384), pytest.param(4096, 4096, marks=long)])
def test_receiver_killed_in_the_middle_of_a_copy(lab: Lab, seen: Seen, size: int, data: int) -> None:
    """Issue 3, done when 3: what had arrived is not sent again."""
    guest = lab.guest("web1", [Disk(f"{size}M", data=f"{data}M")], memory="256M", rate=200)
    running = Move(lab, guest, "--bandwidth", "60M" if size < 4096 else "200M")
    running.wait_for_copied(0.5)
    seen.outage_begins(guest)
    kill_all(lab.b, "drover receive")
    outcome = running.end()
    assert seen.outage_over(guest) < STALL_MS
    moved(lab, guest, seen, outcome)
    assert share_sent_again(outcome) <= 0.05


def test_receiver_killed_at_the_barrier(lab: Lab, small: Guest, seen: Seen) -> None:
    """What it had is on stable storage: it no longer matters."""
    mark = lab.events.mark()
    running = Move(lab, small, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 120)
    # The memory passes through the receiver, too, and may be still on its way.
    wait_for("the memory", lambda: any(e.name == "MIGRATION" and e.data.get("status") == "completed" and
                                       e.host == "hosta" for e in lab.events.since(mark)))
    kill_all(lab.b, "drover receive")
    held.unlink()
    moved(lab, small, seen, running.end())


@pytest.mark.parametrize("size, data, bandwidth", [(256, 192, "30M"), pytest.param(4096, 4096, "100M", marks=long),
                                                   pytest.param(4096, 4096, "1G", marks=long)])
def test_target_restarted_and_its_unsynced_data_lost(lab: Lab, seen: Seen, size: int, data: int,
                                                     bandwidth: str) -> None:
    """The same of a power cut: what the target had on stable storage is not sent again. (The small disk's flushes are
    fewer for its size: job/checkpoint.h, FlushPlan.)"""
    guest = lab.guest("web1", [Disk(f"{size}M", data=f"{data}M")], memory="256M", rate=200)
    lab.b.mount_fs("ext4", f"{size + size // 2 + 256}M", "/mnt/target")
    try:
        there = "/mnt/target/web1.raw"
        home = guest.disks()["vda"]
        running = Move(lab, guest, "--bandwidth", bandwidth, "--disk", f"vda={there}")
        running.wait_for_copied(0.5)
        seen.outage_begins(guest)
        lab.set_link(lab.b, False)  # so that no other receiver is started in the middle of it
        kill_all(lab.b, "drover receive")
        wait_for("the receiver's end", lambda: not receivers(lab.b))
        lab.b.power_cut("/mnt/target")
        lab.b.new_boot_id()
        lab.set_link(lab.b, True)
        outcome = running.end()
        assert outcome.exit_code == 0, outcome.text()
        assert guest.host is lab.b
        seen.outage_over(guest)
        seen.ended(guest, outcome)
        share = share_sent_again(outcome)
        assert share <= (0.05 if size >= 4096 else 0.2)
        assert_unharmed(guest)
        assert lab.leftovers() == []
        back = Move(lab, guest, "--disk", f"vda={home}").end()
        assert back.exit_code == 0, back.text()
        assert_unharmed(guest)
    finally:
        lab.b.old_boot_id()
        lab.b.umount("/mnt/target")


@pytest.mark.parametrize("phase", ["copy", "memory"])
def test_receiver_stopped_for_10_s(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase)
    [pid] = receivers(lab.b)
    seen.outage_begins(small)
    os.kill(pid, signal.SIGSTOP)
    outage_of(10)
    os.kill(pid, signal.SIGCONT)
    assert seen.outage_over(small) < bound(phase)
    running.hurry()
    moved(lab, small, seen, running.end())


@pytest.mark.parametrize("phase", ["copy", "memory"])
def test_runner_stopped_for_10_s(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase)
    job = running.job
    seen.outage_begins(small)
    running.interrupt(signal.SIGSTOP)
    outage_of(10)
    running.interrupt(signal.SIGCONT)
    assert seen.outage_over(small) < bound(phase)
    if phase == "copy":
        running.hurry()
    outcome, how = guest_moves_or_resumed(lab, running, job)
    moved(lab, small, seen, outcome, how)


# ------------------------------------------------------------------------------------- libvirt and QEMU


def kill_libvirtd(host: Host) -> None:
    host.stop_libvirtd(signal.SIGKILL)
    host.start_libvirtd()


@pytest.mark.parametrize("phase", ["copy", "lead", pytest.param("synchronised", marks=long), "memory"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_libvirtd_killed(lab: Lab, small: Guest, seen: Seen, side: str, phase: str) -> None:
    running = begin(lab, small, phase)
    job = running.job
    seen.outage_begins(small)
    kill_libvirtd(lab.a if side == "source" else lab.b)
    assert seen.outage_over(small) < bound(phase)
    if phase == "lead":
        running.hurry()
    outcome, how = guest_moves_or_resumed(lab, running, job)
    moved(lab, small, seen, outcome, how)


def test_target_qemu_killed_in_memory(lab: Lab, small: Guest, seen: Seen) -> None:
    running = begin(lab, small, "memory")
    job = running.job
    wait_for("the incoming guest", lambda: any("guest=web1," in line for line in lab.b.processes().values()))
    seen.outage_begins(small)
    kill_all(lab.b, "guest=web1,")
    outcome, how = guest_moves_or_resumed(lab, running, job)
    assert seen.outage_over(small) < STRICT_STALL_MS
    if outcome.exit_code == 0:
        moved(lab, small, seen, outcome, how)
    else:
        undone(lab, small, seen, outcome, outcome.exit_code)
