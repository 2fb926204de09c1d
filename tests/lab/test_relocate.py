# SPDX-License-Identifier: Apache-2.0
"""`drover relocate` on one host with two filesystems, under the witness."""
from __future__ import annotations

import json
import os
import signal

import pytest

from lab import Disk, Guest, Lab, wait_for
from moves import Running, kill_all, only_job
from relocations import (A, B, SLOW, Relocation, defined_disks, files, is_on, relocate, relocate_ok, sound,
                         start_again, two_disks, two_filesystems)

pytestmark = pytest.mark.usefixtures("drover", "two_filesystems")

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


def test_ten_times_there_and_back(lab: Lab) -> None:
    guest = two_disks(lab, rate="max", options="w.size=4096-65536 w.zero=5 w.discard=5 w.fsync=50")
    there_and_back(lab, guest, 20)


def test_the_old_file_goes_only_when_the_new_one_outlives_a_power_cut(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")
    relocate_ok(guest, B)
    qemu = guest.qemu_pid()
    os.kill(qemu, signal.SIGKILL)
    wait_for("QEMU's end", lambda: not guest.lab.a.libvirt().lookupByName("web1").isActive())
    lab.a.power_cut(B)
    start_again(guest)
    is_on(guest, B)
    sound(guest)


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


# --- what goes wrong ---


def is_untouched(guest: Guest, lab: Lab) -> None:
    """Nothing is left of it, and the guest works on its old disks."""
    is_on(guest, A)
    assert lab.leftovers() == []
    sound(guest)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_undoes_it(lab: Lab, sig: int) -> None:
    guest = two_disks(lab)
    running = Relocation(guest, B, "--bandwidth", SLOW)
    running.wait_for_copied(0.1)
    running.interrupt(sig)
    outcome = running.end()
    assert outcome.exit_code == 130, outcome.text()
    is_untouched(guest, lab)
    relocate_ok(guest, B)
    is_on(guest, B)


def test_drover_cancel_undoes_it_and_status_shows_it(lab: Lab) -> None:
    guest = two_disks(lab)
    running = Relocation(guest, B, "--bandwidth", SLOW, "--detach")
    running.wait_for_copied(0.1)
    [job] = [json.loads(line) for line in lab.a.run(["drover", "jobs", "--json"]).stdout.splitlines()]
    assert (job["kind"], job["guest"], job["host"], job["alive"]) == ("relocate", "web1", B, True)
    assert job["progress"]["phase"] == "copy"
    lab.a.run(["drover", "cancel", "web1"])
    assert running.end().exit_code == 130
    is_untouched(guest, lab)
    history = json.loads(lab.a.run(["drover", "history", "--json"]).stdout.splitlines()[-1])
    assert (history["kind"], history["outcome"]) == ("relocate", "undone")


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_target_that_gets_full_in_the_middle(lab: Lab, form: str, runs: bool) -> None:
    guest = lab.guest("web1", [Disk("96M", form, data="64M", path=f"{A}/web1.{form}")], memory="128M",
                      rate=200 if runs else "idle")
    if not runs:
        guest.domain().destroy()
    running = Relocation(guest, B, "--bandwidth", SLOW)
    running.wait_for_copied(0.1)
    lab.a.run(f"cat /dev/zero >{B}/filler", check=False)
    outcome = running.end()
    lab.a.path(f"{B}/filler").unlink()
    assert outcome.exit_code == 8, outcome.text()
    assert f"{B}/web1.{form}" in outcome.error["message"], outcome.error
    assert "No space left on device" in outcome.error["message"], outcome.error
    assert files(lab.a, A, B) == {f"{A}/web1.{form}"}
    if runs:
        assert guest.disks() == {"vda": f"{A}/web1.{form}"}
        sound(guest)
    relocate_ok(guest, B)


def test_a_source_that_cannot_be_read(lab: Lab) -> None:
    # What lies behind the end of a loop device's file is an I/O error.
    lab.a.mount_fs("ext4", "192M", "/mnt/c")
    try:
        guest = lab.guest("web1", [Disk("96M", data="96M", path="/mnt/c/web1.raw")], memory="128M", rate="idle")
        lab.a.run(["sync"])
        image = lab.a._filesystems["/mnt/c"].image
        size = image.stat().st_size
        lab.drop_caches()
        os.truncate(image, size // 2)
        outcome = relocate(guest, B)
        os.truncate(image, size)
        assert outcome.exit_code == 1, outcome.text()
        assert "reading /mnt/c/web1.raw: Input/output error" in outcome.error["message"], outcome.error
        assert guest.disks() == {"vda": "/mnt/c/web1.raw"}
        assert files(lab.a, B) == set()
        assert lab.leftovers() == []
        guest.destroy()
    finally:
        lab.a.umount("/mnt/c")


def ends_on_b(lab: Lab, guest: Guest, running: Running) -> None:
    """Without a limit from here on."""
    running.hurry()
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    is_on(guest, B)
    assert lab.leftovers() == []
    sound(guest)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_libvirtd_is_restarted_while_disks_are_copied(lab: Lab, sig: int) -> None:
    guest = two_disks(lab)
    running = Relocation(guest, B, "--bandwidth", SLOW)
    running.wait_for_copied(0.1)
    lab.a.stop_libvirtd(sig)
    running.wait_for(lambda e: "libvirt" in (e.get("waiting_for") or ""))
    lab.a.start_libvirtd()
    ends_on_b(lab, guest, running)


def test_a_guest_that_libvirt_loses_keeps_all_its_images(lab: Lab) -> None:
    # As libvirt 9.0 was seen to do when it was killed while a guest changed over: its status can't be read again,
    # it takes the guest for off, and QEMU runs.
    guest = two_disks(lab, rate="idle")
    running = Relocation(guest, B, "--bandwidth", SLOW)
    running.wait_for_copied(0.1)
    qemu = guest.qemu_pid()
    lab.a.stop_libvirtd(signal.SIGKILL)
    status = lab.a.path("/run/libvirt/qemu/web1.xml")
    status.write_text(status.read_text().replace(" job='copy'", " job=''"))
    lab.a.start_libvirtd()
    outcome = running.end()
    assert outcome.exit_code == 7, outcome.text()
    assert "libvirt takes the guest for off" in outcome.error["message"], outcome.error
    opened = [os.readlink(f"/proc/{qemu}/fd/{fd}") for fd in os.listdir(f"/proc/{qemu}/fd")]
    images = {f"{where}/web1.{form}" for where in (A, B) for form in ("raw", "qcow2")}
    assert images <= set(opened), "none of them was deleted"
    assert files(lab.a, A, B) == images
    os.kill(qemu, signal.SIGKILL)
    wait_for("QEMU's end", lambda: not os.path.exists(f"/proc/{qemu}"))
    lab.a.run(["drover", "cancel", "web1"])
    is_on(guest, A)
    start_again(guest)
    sound(guest)


def killed_when_copied(lab: Lab, guest: Guest, share: float = 0.1, *options: str) -> str:
    running = Relocation(guest, B, "--bandwidth", SLOW, *options)
    running.wait_for_copied(share)
    job = running.job
    kill_all(lab.a, "drover relocate")
    running.end()
    assert not only_job(lab.a)["alive"]
    return job


def test_drover_is_killed_and_resume_takes_the_copies_up(lab: Lab) -> None:
    guest = two_disks(lab)
    job = killed_when_copied(lab, guest)
    before = lab.a.qmp("web1", "query-block-jobs")
    assert len(before) == 2, "QEMU copies on"
    for disk in ("vda", "vdb"):
        lab.a.virsh("blockjob", "web1", disk, "--bandwidth", "0")
    mark = lab.events.mark()
    lab.a.run(["drover", "resume", job])
    started = [e for e in lab.events.since(mark) if e.name == "JOB_STATUS_CHANGE" and e.data["status"] == "created"]
    assert not started, "nothing is copied again"
    is_on(guest, B)
    assert lab.leftovers() == []
    sound(guest)


def test_drover_is_killed_and_one_copy_has_ended_meanwhile(lab: Lab) -> None:
    guest = two_disks(lab)
    job = killed_when_copied(lab, guest)
    lab.a.virsh("blockjob", "web1", "vdb", "--abort")
    resumed = Running(lab.a, "resume", job)
    ends_on_b(lab, guest, resumed)


def test_drover_is_killed_and_the_guest_has_changed_over(lab: Lab) -> None:
    guest = two_disks(lab)
    job = killed_when_copied(lab, guest)
    for disk in ("vda", "vdb"):
        lab.a.virsh("blockjob", "web1", disk, "--bandwidth", "0")
        wait_for("the copy", lambda d=disk: "ready='yes'" in lab.a.virsh("dumpxml", "web1").split(f"dev='{d}'")[0])
        lab.a.virsh("blockjob", "web1", disk, "--pivot")
    lab.a.run(["drover", "resume", job])
    is_on(guest, B)
    sound(guest)


def test_drover_is_killed_and_the_guest_is_off_by_then(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")
    job = killed_when_copied(lab, guest)
    guest.domain().destroy()
    resumed = Running(lab.a, "resume", job)
    resumed.hurry()
    assert resumed.end().exit_code == 0
    is_on(guest, B)
    start_again(guest)
    sound(guest)


def test_a_killed_job_is_cancelled(lab: Lab) -> None:
    guest = two_disks(lab)
    job = killed_when_copied(lab, guest)
    refused = relocate(guest, B)
    assert refused.exit_code == 7 and job in refused.error["message"], refused.text()
    lab.a.run(["drover", "cancel", job])
    is_untouched(guest, lab)


def test_drover_is_killed_while_it_copies_a_guest_that_is_off(lab: Lab) -> None:
    guest = two_disks(lab, rate="idle")
    guest.domain().destroy()
    job = killed_when_copied(lab, guest)
    assert any("/.drover-" in name for name in files(lab.a, B)), "a hidden file, not half an image"
    assert files(lab.a, A) == {f"{A}/web1.raw", f"{A}/web1.qcow2"}
    resumed = Running(lab.a, "resume", job)
    resumed.hurry()
    assert resumed.end().exit_code == 0
    is_on(guest, B)
    start_again(guest)
    sound(guest)


# --- what it refuses, and what it keeps ---


def refusals(guest: Guest, *words: str) -> set[str]:
    """The rules of its blockers; nothing was changed."""
    before = files(guest.lab.a, A, B), defined_disks(guest)
    outcome = relocate(guest, *words)
    assert outcome.exit_code == 4, outcome.text()
    assert (files(guest.lab.a, A, B), defined_disks(guest)) == before
    assert "drover relocate" not in " ".join(guest.lab.a.processes().values())
    plan = next(e for e in outcome.events if e["event"] == "plan")
    for finding in plan["findings"]:
        print(finding)
    return {f["rule"] for f in plan["findings"] if f["severity"] == "blocker"}


def test_refusals(lab: Lab) -> None:
    iso = f"{A}/cd.iso"
    guest = two_disks(lab, devices=f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
                                   f"<source file='{iso}'/><target dev='sda' bus='sata'/><readonly/></disk>",
                      start=False)
    lab.a.run(["truncate", "-s", "1M", iso])
    start_again(guest)
    host = lab.a
    assert refusals(guest, A) == {"same-place"}
    assert refusals(guest, "/mnt/nowhere") == {"target-directory-missing"}
    assert refusals(guest, B, "--disk", "vdz") == {"disk-unknown"}
    assert refusals(guest, B, "--disk", "sda") == {"disk-cdrom"}
    assert refusals(guest, f"vda={B}/x", f"vdb={B}/x") == {"target-path-twice"}
    host.run(f"echo hello >{B}/web1.raw")
    assert refusals(guest, B) == {"target-file-exists"}
    assert host.path(f"{B}/web1.raw").read_text() == "hello\n"
    host.path(f"{B}/web1.raw").unlink()
    host.run(f"fallocate -l 350M {B}/filler")
    assert refusals(guest, B) == {"target-space"}
    host.path(f"{B}/filler").unlink()
    host.run(["chmod", "700", B])
    assert refusals(guest, B) == {"target-unreachable-for-qemu"}
    host.run(["chmod", "711", B])
    host.run(["mount", "-o", "remount,ro", B])
    assert refusals(guest, B) == {"target-directory-not-writable"}
    host.run(["mount", "-o", "remount,rw", B])
    host.virsh("snapshot-create-as", "web1", "before", "--disk-only", "--diskspec", "vda,snapshot=no",
               "--diskspec", f"vdb,file={A}/overlay.qcow2")
    assert refusals(guest, B) == {"snapshots"}
    host.virsh("snapshot-delete", "web1", "before", "--metadata")
    host.virsh("blockcommit", "web1", "vdb", "--active", "--pivot", "--wait")
    host.path(f"{A}/overlay.qcow2").unlink()
    host.run(["truncate", "-s", "256M", f"{B}/other.raw"])
    host.virsh("blockcopy", "web1", "vda", f"{B}/other.raw", "--transient-job", "--reuse-external", "--raw",
               "--bandwidth", "1")
    assert refusals(guest, B) == {"block-job-running"}
    host.virsh("blockjob", "web1", "vda", "--abort")
    host.path(f"{B}/other.raw").unlink()
    for words, code in (((["drover", "relocate", "nobody", B]), 3), (["drover", "relocate", "web1", "nopool"], 3),
                        (["drover", "relocate", "web1"], 2), (["drover", "relocate", "web1", A, B], 2),
                        (["setpriv", "--reuid", "65534", "drover", "relocate", "web1", B], 6)):
        assert host.run(words, check=False).returncode == code, words
    # The CD-ROM stays, and that is said.
    outcome = relocate_ok(guest, B)
    plan = next(e for e in outcome.events if e["event"] == "plan")
    assert {f["rule"] for f in plan["findings"]} == {"disk-cdrom"}
    assert guest.disks()["sda"] == iso
    host.path(iso).unlink()
    sound(guest)


def test_an_old_file_that_others_use_is_kept(lab: Lab) -> None:
    guest = two_disks(lab)
    host = lab.a
    host.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{A}/web1.raw", f"{A}/web2.qcow2"])
    host.libvirt().defineXML(f"""<domain type='qemu'><name>web2</name><memory unit='MiB'>64</memory>
        <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><devices><disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/><source file='{A}/web2.qcow2'/><target dev='vda' bus='virtio'/></disk>
        </devices></domain>""")
    outcome = relocate_ok(guest, B)
    assert outcome.summary["deleted"] == [f"{A}/web1.qcow2"]
    assert outcome.summary["kept"] == [f"{A}/web1.raw"]
    plan = next(e for e in outcome.events if e["event"] == "plan")
    assert [f["rule"] for f in plan["findings"]] == ["source-in-use"], "told before"
    assert "web2" in plan["findings"][0]["what"]
    sound(guest)
    host.virsh("undefine", "web2")
    host.run(f"rm {A}/web1.raw {A}/web2.qcow2")


def test_pools_and_volumes(lab: Lab) -> None:
    """A definition that names a pool's volume names the new file afterwards; both pools know what they have."""
    host = lab.a
    guest = two_disks(lab, rate="idle", start=False)
    for name, where in (("one", A), ("two", B)):
        host.virsh("pool-create-as", name, "dir", "--target", where)
    xml = host.virsh("dumpxml", "web1", "--inactive").replace("<disk type='file' device='disk'>",
                                                              "<disk type='volume' device='disk'>")
    for name in ("web1.raw", "web1.qcow2"):
        xml = xml.replace(f"<source file='{A}/{name}'/>", f"<source pool='one' volume='{name}'/>")
    host.libvirt().defineXML(xml)
    start_again(guest)
    outcome = relocate_ok(guest, "two")
    assert outcome.summary["host"] == "pool two"
    is_on(guest, B)
    assert "web1.raw" not in host.virsh("vol-list", "one")
    assert "web1.raw" in host.virsh("vol-list", "two")
    start_again(guest)
    sound(guest)
    for name in ("one", "two"):
        host.virsh("pool-destroy", name)


def test_block_devices(lab: Lab) -> None:
    device = lab.a.loop_disk("256M")
    guest = two_disks(lab)
    outcome = relocate_ok(guest, f"vda={device}")
    assert outcome.summary["deleted"] == [f"{A}/web1.raw"]
    assert guest.disks()["vda"] == device and defined_disks(guest)["vda"] == device
    sound(guest)
    outcome = relocate_ok(guest, A, "--disk", "vda")
    assert outcome.summary["kept"] == [device], "a block device is never deleted"
    assert guest.disks()["vda"] == f"{A}/web1-vda.raw"
    sound(guest)


def test_a_bandwidth_limit_holds_and_can_be_changed(lab: Lab) -> None:
    guest = lab.guest("web1", [Disk("96M", data="96M", path=f"{A}/web1.raw")], memory="128M", rate="idle")
    running = Relocation(guest, B, "--bandwidth", "8M")
    first = running.wait_for_copied(0.1)
    later = running.wait_for_copied(0.4)
    rate = (later["copied_bytes"] - first["copied_bytes"]) / (later["elapsed_ms"] - first["elapsed_ms"]) * 1000
    assert rate < 12 << 20, rate
    lab.a.run(["drover", "set", "web1", "--bandwidth", "none"])
    outcome = running.end()
    assert outcome.exit_code == 0 and outcome.summary["total_ms"] < 10_000
