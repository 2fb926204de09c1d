# SPDX-License-Identifier: Apache-2.0
"""`drover relocate` on one host with two filesystems, under the witness."""
from __future__ import annotations

import json
import os
import signal

import pytest

from lab import Disk, Guest, Lab, wait_for
from moves import kill_all, only_job
from relocations import (A, B, SLOW, Relocation, defined_disks, files, is_on, relocate, relocate_ok, sound,
                         start_again, two_disks, two_filesystems)

pytestmark = pytest.mark.usefixtures("drover", "two_filesystems")

LONG = pytest.mark.skipif(not os.environ.get("DROVER_LAB_LONG"), reason="DROVER_LAB_LONG=1 runs it")

__all__ = ["two_filesystems"]


def there_and_back(lab: Lab, guest: Guest, times: int) -> None:
    du = {disk: lab.a.du(path) for disk, path in guest.disks().items()}
    owners = {disk: lab.a.path(path).stat().st_mode for disk, path in guest.disks().items()}
    for i in range(times):
        before = sorted(guest.disks().values())
        where = (B, A)[i % 2]
        outcome = relocate_ok(guest, where)
        assert sorted(outcome.summary["deleted"]) == before
        is_on(guest, where)
        for disk, path in guest.disks().items():
            assert lab.a.du(path) <= du[disk] * 1.1 + (2 << 20), "thin did not stay thin"
            assert lab.a.path(path).stat().st_mode == owners[disk]
        assert lab.leftovers() == []
    sound(guest)


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
def test_a_running_guests_raw_and_qcow2_disks_there_and_back(lab: Lab, discard: str) -> None:
    guest = lab.guest("web1", [Disk("256M", data="64M", path=f"{A}/web1.raw", discard=discard),
                               Disk("128M", "qcow2", data="32M", path=f"{A}/web1.qcow2", discard=discard)],
                      memory="128M", rate=500)
    there_and_back(lab, guest, 2)


def test_the_guest_starts_from_its_new_disks(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")  # or the witness would expect what it wrote before
    relocate_ok(guest, B)
    start_again(guest)
    is_on(guest, B)
    sound(guest)


@LONG
def test_ten_times_there_and_back(lab: Lab) -> None:
    guest = two_disks(lab, rate="max", options="w.size=4096-65536 w.zero=5 w.discard=5 w.fsync=50")
    there_and_back(lab, guest, 20)


# --- the guest is off ---


@pytest.mark.parametrize("keep", [False, True])
def test_a_guest_that_is_off(lab: Lab, keep: bool) -> None:
    guest = two_disks(lab, rate="idle")
    guest.domain().destroy()
    du = {disk: lab.a.du(path) for disk, path in defined_disks(guest).items()}
    outcome = relocate_ok(guest, B, *(["--keep-source"] if keep else []))
    expected = {f"{B}/web1.raw", f"{B}/web1.qcow2"}
    if keep:
        assert files(lab.a, A, B) == expected | {f"{A}/web1.raw", f"{A}/web1.qcow2"}
        assert not outcome.summary["deleted"]
        for name in ("web1.raw", "web1.qcow2"):
            lab.a.path(f"{A}/{name}").unlink()
    is_on(guest, B)
    for disk, path in defined_disks(guest).items():
        assert lab.a.du(path) <= du[disk] * 1.1 + (2 << 20), "thin did not stay thin"
    start_again(guest)
    sound(guest)


def test_on_the_same_filesystem_a_guest_that_is_off_only_has_its_files_renamed(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")
    guest.domain().destroy()
    inode = lab.a.path(f"{A}/web1.raw").stat().st_ino
    lab.a.run(["mkdir", f"{A}/sub"])
    outcome = relocate_ok(guest, f"{A}/sub")
    assert all(disk["renamed"] for disk in outcome.summary["disks"])
    assert files(lab.a, A, f"{A}/sub") == {f"{A}/sub", f"{A}/sub/web1.raw", f"{A}/sub/web1.qcow2"}
    assert lab.a.path(f"{A}/sub/web1.raw").stat().st_ino == inode
    start_again(guest)
    sound(guest)


def test_keeping_the_source_on_one_filesystem_shares_its_blocks(lab: Lab) -> None:
    guest = two_disks(lab, B, rate="idle")
    guest.domain().destroy()
    lab.a.run(["mkdir", f"{B}/sub"])
    free = os.statvfs(lab.a.path(B)).f_bavail
    relocate_ok(guest, f"{B}/sub", "--keep-source")
    assert (free - os.statvfs(lab.a.path(B)).f_bavail) * 4096 < 8 << 20, "XFS can clone"
    start_again(guest)
    sound(guest)
    lab.a.run(f"rm {B}/web1.*")


def test_a_guest_cannot_be_started_while_its_disks_are_copied(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")
    guest.domain().destroy()
    running = Relocation(guest, B, "--bandwidth", SLOW)
    running.wait_for_copied(0.1)
    started = lab.a.run(["virsh", "start", "web1"], check=False)
    assert started.returncode != 0 and "lock" in started.stderr, started
    running.hurry()
    assert running.end().exit_code == 0
    is_on(guest, B)
    start_again(guest)
    sound(guest)


def test_a_guest_that_is_shut_off_meanwhile_is_finished_cold(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")
    running = Relocation(guest, B, "--bandwidth", SLOW)
    running.wait_for_copied(0.1)
    guest.domain().destroy()
    running.hurry()
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    is_on(guest, B)
    start_again(guest)
    sound(guest)


@pytest.mark.parametrize("runs", [True, False])
def test_formats_change_and_backing_chains_become_flat(lab: Lab, runs: bool) -> None:
    guest = two_disks(lab, rate="idle", start=False)
    lab.a.run(f"mv {A}/web1.qcow2 {A}/base.qcow2 && cd {A} && "
              "qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 web1.qcow2")
    if runs:
        start_again(guest)
    outcome = relocate_ok(guest, f"vda={B}/first.qcow2", f"vdb={B}", "--format", "qcow2")
    assert {f["rule"] for e in outcome.events if e["event"] == "plan" for f in e["findings"]} == \
        {"disk-format", "disk-backing-chain"}
    assert files(lab.a, A) == {f"{A}/base.qcow2"}, "what lies below may be others'"
    assert defined_disks(guest) == {"vda": f"{B}/first.qcow2", "vdb": f"{B}/web1.qcow2"}
    info = json.loads(lab.a.run(["qemu-img", "info", "-U", "--output=json", f"{B}/web1.qcow2"]).stdout)
    assert "backing-filename" not in info
    lab.a.path(f"{A}/base.qcow2").unlink()
    start_again(guest)
    sound(guest)
    outcome = relocate_ok(guest, f"vda={A}/web1.raw", "--format", "raw")
    assert guest.disks()["vda"] == f"{A}/web1.raw"
    sound(guest)
