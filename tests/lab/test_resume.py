# SPDX-License-Identifier: Apache-2.0
"""Moves that end in the middle, and what a person does then: resume, cancel. Each case ends with a guest that has
lost nothing, clean hosts and another move. What a move gets over by itself is in test_outages.py."""
from __future__ import annotations

import signal
from typing import Iterator

import pytest

from lab import Disk, Guest, Lab, wait_for
from moves import (HOLD, Move, Outcome, Running, assert_unharmed, disk_formats, jobs, move_comparing_at_barrier,
                   only_job)
from outages import (HELD, MIB, PHASES, SLOW, Seen, begin, is_dead, long, moved, resume, undone, wait_gone)

pytestmark = pytest.mark.usefixtures("drover")

CANCELLED = 130
NO_SPACE = 8
IN_THE_WAY = 7
NOT_FOUND = 3


def kill_runner(running: Running) -> None:
    running.interrupt(signal.SIGKILL)
    running.end()


# ------------------------------------------------------------------------------------ the runner is killed


@pytest.mark.parametrize("phase", PHASES)
def test_runner_killed(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase)
    job = running.job
    seen.outage_begins(small)
    kill_runner(running)
    assert is_dead(lab.a, job)
    resumed = Running(lab.a, "resume", job)
    resumed.wait_for_phase("copy")
    assert seen.outage_over(small) < 6000
    resumed.hurry()
    moved(lab, small, seen, resumed.end(), "resumed")
    assert jobs(lab.a) == []


# A disk of which 5 % is more than the 64 chunks around those that were being copied, all of which count as sent:
# mirror/group_record.h.
@pytest.mark.parametrize("size, rate", [(2048, 10), pytest.param(4096, 200, marks=long)])
def test_runner_killed_in_the_middle_of_a_copy(lab: Lab, seen: Seen, size: int, rate: int) -> None:
    """Issue 3, done when 3: what is on the target is not sent again, but for what the guest wrote lately."""
    guest = lab.guest("web1", [Disk(f"{size}M", data=f"{size}M")], memory="256M", rate=rate)
    running = Move(lab, guest, "--bandwidth", "100M")
    running.wait_for_copied(0.5)
    job = running.job
    seen.outage_begins(guest)
    kill_runner(running)
    outcome = resume(lab.a, job)
    seen.outage_over(guest)
    moved(lab, guest, seen, outcome, "resumed")
    assert outcome.summary["sent_again_bytes"] <= 0.05 * size * MIB
    # What was there already is not in what the second one read.
    assert outcome.summary["data_bytes"] <= 0.55 * size * MIB
    print(f"read by the second runner: {outcome.summary['data_bytes'] / MIB:.0f} of {size} MiB")


def at_the_barrier_equal(lab: Lab, guest: Guest, running: Running) -> Outcome:
    """The rest of a move that was begun with --hold-barrier."""
    formats, disks = disk_formats(guest), guest.disks()
    held = lab.a.path(HOLD)
    wait_for("the barrier", lambda: held.exists() or running.process.poll() is not None, 120)
    assert held.exists(), running.events[-3:]
    differences = {disk: lab.compare(lab.a, path, lab.b, path, formats[disk], formats[disk])
                   for disk, path in disks.items()}
    held.unlink()
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert not any(differences.values()), differences
    return outcome


def sent_for_disks(outcome: Outcome) -> int:
    return int(outcome.summary["wire_bytes"] - outcome.summary["memory_bytes"])


def test_journal_damaged(lab: Lab, small: Guest, seen: Seen) -> None:
    """Nobody knows what the target has: what it has is compared, not sent again."""
    running = Move(lab, small, *SLOW, "--hold-barrier", HOLD)
    running.wait_for_copied(0.5)
    job = running.job
    seen.outage_begins(small)
    kill_runner(running)
    for name in ("MANIFEST-*", "CURRENT"):
        lab.a.run(f"for f in /var/lib/drover/jobs/{job}/journal/{name}; do echo nonsense >$f; done")
    resumed = Running(lab.a, "resume", job)
    resumed.wait_for_phase("copy")
    resumed.hurry()
    outcome = at_the_barrier_equal(lab, small, resumed)
    assert any("journal is damaged" in e.get("text", "") for e in outcome.events), outcome.text()
    assert sent_for_disks(outcome) < 0.8 * 96 * MIB
    moved(lab, small, seen, outcome, "resumed, compared")


def test_qemu_restarted(lab: Lab, small: Guest, seen: Seen) -> None:
    """Its bitmaps are gone. What the guest writes when it starts is among what differs."""
    running = Move(lab, small, *SLOW, "--hold-barrier", HOLD)
    running.wait_for_copied(0.5)
    job = running.job
    kill_runner(running)
    domain = small.domain()
    domain.destroy()
    domain.create()
    small.wait_ready()
    resumed = Running(lab.a, "resume", job)
    resumed.wait_for_phase("copy")
    resumed.hurry()
    outcome = at_the_barrier_equal(lab, small, resumed)
    assert any("QEMU was restarted" in e.get("text", "") for e in outcome.events), outcome.text()
    assert small.host is lab.b
    assert lab.leftovers() == []
    # Its witness knows nothing of what it wrote before it was restarted: the barrier has compared for it.
    seen.ended(small, outcome, "resumed, compared")


def test_verify_finds_what_the_target_did_not_keep(lab: Lab, small: Guest, seen: Seen) -> None:
    there = small.disks()["vda"]
    running = Move(lab, small, *SLOW, "--verify", "--hold-barrier", HOLD)
    running.wait_for_copied(0.5)
    seen.outage_begins(small)
    # Chunks that were copied; where the guest writes there itself, the damage is gone again.
    for mib in range(0, 30, 5):
        lab.b.run(f"head -c 4096 /dev/urandom | dd of={there} bs=4096 seek={mib * 256 + 17} conv=notrunc "
                  "oflag=direct status=none")
    job = running.job
    running.hurry()
    outcome = at_the_barrier_equal(lab, small, running)
    summary = outcome.summary
    assert summary["verified"]
    found = summary["damaged_chunks"]
    assert found > 0, outcome.text()
    assert summary["sent_again_bytes"] >= found * 4096, "at least a block of each"
    assert any("differed" in note for note in summary["notes"]), summary
    log = lab.a.path(f"/var/log/drover/{job}.log").read_text()
    assert log.count("on the target were not what was sent; they are sent again") == found, log
    moved(lab, small, seen, outcome, "verified, mended")


def test_verify_finds_nothing_where_nothing_is_wrong(lab: Lab, small: Guest, seen: Seen) -> None:
    outcome = Move(lab, small, "--verify").end()
    assert outcome.exit_code == 0, outcome.text()
    assert outcome.summary["verified"] and outcome.summary["damaged_chunks"] == 0, outcome.summary
    moved(lab, small, seen, outcome, "verified")


def test_runner_killed_at_the_barrier(lab: Lab, small: Guest, seen: Seen) -> None:
    mark = lab.events.mark()
    running = Move(lab, small, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 120)
    wait_for("the memory", lambda: any(e.name == "MIGRATION" and e.data.get("status") == "completed" and
                                       e.host == "hosta" for e in lab.events.since(mark)))
    job = running.job
    kill_runner(running)
    held.unlink()
    outcome = resume(lab.a, job)
    if outcome.exit_code == 0:
        moved(lab, small, seen, outcome, "resumed")
    else:  # libvirt has resumed the source when its client was gone: the move begins anew
        undone(lab, small, seen, outcome, outcome.exit_code)


@pytest.mark.parametrize("ran", [False, True])
def test_source_is_off_and_ran_or_not_while_nobody_watched(lab: Lab, small: Guest, seen: Seen, ran: bool) -> None:
    """The target waits with all of the guest, as it was when it left the source."""
    running = Move(lab, small, "--hold-barrier", HOLD)
    job = running.job
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 120)
    log = lab.a.path(f"/var/log/drover/{job}.log")
    wait_for("the source's end", lambda: "source event: stopped migrated" in log.read_text(), 60)
    kill_runner(running)
    held.unlink()
    if not ran:
        moved(lab, small, seen, resume(lab.a, job), "resumed")
        return
    image = lab.a.path(small.disks()["vda"])
    passed = image.stat().st_mtime_ns
    lab.a.virsh("start", small.name)
    wait_for("a write", lambda: image.stat().st_mtime_ns > passed)
    lab.a.virsh("destroy", small.name)
    outcome = resume(lab.a, job)
    assert outcome.exit_code == HELD, outcome.text()
    assert "was written to since" in outcome.text(), outcome.text()
    for host in lab.hosts:
        for path in small.disks().values():
            assert host.path(path).exists(), f"{path} is gone from {host.name}"
    # Its owner decides.
    lab.a.virsh("start", small.name)
    lab.b.virsh("destroy", small.name)
    asked = cancel(lab, job)
    assert asked.exit_code == 0, asked.text()
    assert lab.leftovers() == []
    seen.row["outcome"] = "held; cancelled when its owner had chosen"
    move_comparing_at_barrier(lab, small)


def test_runner_killed_once_the_target_runs(lab: Lab, small: Guest, seen: Seen) -> None:
    mark = lab.events.mark()
    running = Move(lab, small)
    job = running.job
    lab.events.wait("RESUME", small.name, lab.b, mark, 120)
    running.interrupt(signal.SIGKILL)
    outcome = running.end()
    if jobs(lab.a):  # it was not quicker
        outcome = resume(lab.a, job)
        moved(lab, small, seen, outcome, "resumed")
    else:
        assert small.host is lab.b
        assert_unharmed(small)


# --------------------------------------------------------------------------------------------- no space


@pytest.fixture
def tight(lab: Lab) -> Iterator[str]:
    """A directory on the target where there is just space for the guest's disk."""
    lab.b.mount_fs("ext4", "192M", "/mnt/tight")
    yield "/mnt/tight"
    lab.b.umount("/mnt/tight")


def fill(lab: Lab, directory: str) -> str:
    lab.b.run(f"cat /dev/zero >{directory}/filler", check=False)
    return f"{directory}/filler"


def out_of_space(lab: Lab, guest: Guest, there: str, directory: str, *options: str) -> tuple[str, Outcome, str]:
    running = Move(lab, guest, *SLOW, "--disk", f"vda={there}", *options)
    running.wait_for_copied(0.2)
    job = running.job
    filler = fill(lab, directory)
    return job, running.end(), filler


def move_home(lab: Lab, guest: Guest, home: str) -> None:
    outcome = Move(lab, guest, "--disk", f"vda={home}").end()
    assert outcome.exit_code == 0, outcome.text()
    assert_unharmed(guest)


def test_target_full_in_the_middle(lab: Lab, seen: Seen, tight: str) -> None:
    guest = lab.guest("web1", [Disk("96M", data="64M")], memory="256M", rate=200)
    seen.outage_begins(guest)
    there = f"{tight}/web1.raw"
    _, outcome, filler = out_of_space(lab, guest, there, tight)
    assert there in outcome.error["message"], outcome.error
    assert outcome.error["hint"], outcome.error
    lab.b.path(filler).unlink()
    undone(lab, guest, seen, outcome, NO_SPACE)


def test_target_full_and_resumed_when_there_is_space(lab: Lab, seen: Seen, tight: str) -> None:
    guest = lab.guest("web1", [Disk("96M", data="64M")], memory="256M", rate=200)
    home = guest.disks()["vda"]
    seen.outage_begins(guest)
    there = f"{tight}/web1.raw"
    job, outcome, filler = out_of_space(lab, guest, there, tight, "--keep-partial")
    assert outcome.exit_code == NO_SPACE, outcome.text()
    assert f"drover resume {job}" in outcome.text(), outcome.text()
    assert lab.b.path(there).exists()
    assert guest.host is lab.a
    lab.b.path(filler).unlink()
    outcome = resume(lab.a, job)
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    seen.ended(guest, outcome, "no space, resumed")
    assert_unharmed(guest)
    assert lab.leftovers() == []
    move_home(lab, guest, home)


# ------------------------------------------------------------------------------------------------ cancel


def cancel(lab: Lab, job: str) -> Outcome:
    return Running(lab.a, "cancel", job).end()


@pytest.mark.parametrize("phase", ["reserve", "attach", *PHASES])
def test_cancelled_from_another_process(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase) if phase == "lead" else Move(lab, small, *SLOW)
    job = running.job
    if phase != "lead":
        running.wait_for_phase(phase)
    seen.outage_begins(small)
    asked = cancel(lab, job)
    outcome = running.end()
    if phase in ("synchronised", "memory") and outcome.exit_code == 0:
        assert asked.exit_code == 10, asked.text()  # it came too late
        moved(lab, small, seen, outcome)
        return
    assert asked.exit_code == 0, asked.text()
    undone(lab, small, seen, outcome, CANCELLED)


def test_cancelled_at_the_barrier_is_too_late(lab: Lab, small: Guest, seen: Seen) -> None:
    running = Move(lab, small, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 120)
    asking = Running(lab.a, "cancel", running.job)
    asking.wait_for(lambda e: True)
    held.unlink()
    outcome = running.end()
    asked = asking.end()
    assert asked.exit_code == 10, asked.text()
    moved(lab, small, seen, outcome)


def test_what_was_copied_is_kept_as_long_as_no_memory_has_moved(lab: Lab, seen: Seen) -> None:
    # It writes so little that what it wrote meanwhile is next to nothing, for minutes.
    guest = lab.guest("web1", [Disk("256M", data="64M"), Disk("128M", "qcow2", data="32M")], memory="256M", rate=10)
    running = begin(lab, guest, "lead", "--keep-partial")
    job = running.job
    copied = running.wait_for_copied(0.4)["copied_bytes"]
    seen.outage_begins(guest)
    running.interrupt(signal.SIGINT)
    assert running.end().exit_code == CANCELLED
    resumed = Running(lab.a, "resume", job)
    resumed.wait_for_phase("copy")
    resumed.hurry()
    moved(lab, guest, seen, resumed.end(), "resumed")
    # Not the summary's: of a chunk it counts what lies between two blocks that are to be copied as well.
    to_copy = max(event.get("data_bytes", 0) for event in resumed.events if event["event"] == "progress")
    assert 0 < to_copy < (64 + 32) * MIB - copied / 2, "what had been copied is copied again"


@pytest.mark.parametrize("phase", ["copy", "memory"])
def test_a_dead_job_is_cancelled(lab: Lab, small: Guest, seen: Seen, phase: str) -> None:
    running = begin(lab, small, phase)
    job = running.job
    seen.outage_begins(small)
    kill_runner(running)
    asked = cancel(lab, job)
    assert asked.exit_code == 0, asked.text()
    assert jobs(lab.a) == []
    undone(lab, small, seen, asked, 0, "cancelled")


def test_the_terminal_is_closed(lab: Lab, small: Guest, seen: Seen) -> None:
    running = begin(lab, small, "copy")
    running.interrupt(signal.SIGHUP)
    undone(lab, small, seen, running.end(), CANCELLED)


def test_a_detached_move_outlives_its_command(lab: Lab, small: Guest, seen: Seen) -> None:
    running = Move(lab, small, *SLOW, "--detach")
    running.wait_for_copied(0.3)
    job = running.job
    runner = lab.a.machine_pid(only_job(lab.a)["pid"])
    running.interrupt(signal.SIGKILL)
    running.end()
    assert only_job(lab.a)["alive"]
    watching = Running(lab.a, "watch", job)
    running.host.run(["drover", "set", job, "--bandwidth", "none"])
    outcome = watching.end()
    wait_gone(runner)
    moved(lab, small, seen, outcome)


# ---------------------------------------------------------------------------------- twice at the same time


def test_resumed_twice(lab: Lab, small: Guest, seen: Seen) -> None:
    running = begin(lab, small, "copy")
    job = running.job
    kill_runner(running)
    first = Running(lab.a, "resume", job)
    first.wait_for_phase("copy")
    second = resume(lab.a, job)
    assert second.exit_code == IN_THE_WAY, second.text()
    assert job in second.error["message"], second.text()
    first.hurry()
    moved(lab, small, seen, first.end(), "resumed")
    third = resume(lab.a, job)
    assert third.exit_code == NOT_FOUND, third.text()
    assert "has ended" in third.error["message"], third.text()


def test_a_second_move_of_the_same_guest_is_refused(lab: Lab, small: Guest, seen: Seen) -> None:
    running = begin(lab, small, "copy")
    job = running.job
    again = Move(lab, small).end()
    assert again.exit_code == IN_THE_WAY, again.text()
    assert job in again.text(), again.text()
    running.hurry()
    moved(lab, small, seen, running.end())
