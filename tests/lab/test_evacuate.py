# SPDX-License-Identifier: Apache-2.0
"""`drover evacuate`: a storage of a host is emptied while its guests run, under the witness."""
from __future__ import annotations

import os
import signal
import xml.etree.ElementTree as ET
from typing import Any, Iterator

import pytest

from lab import Disk, Guest, Host, Lab
from moves import Outcome, Running, jobs, kill_all
from relocations import files, sound, start_again

pytestmark = pytest.mark.usefixtures("drover")

# docs/drover.1
OK, BLOCKED, IN_THE_WAY, NO_SPACE, CANCELLED = 0, 4, 7, 8, 130

A, B, C = "/mnt/a", "/mnt/b", "/mnt/c"
ISO, NVRAM = "debian.iso", "uefi1_VARS.fd"
CDROM = ("<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
         f"<source file='{A}/{ISO}'/><target dev='sda' bus='sata'/><readonly/></disk>")


class Evacuation(Running):
    def __init__(self, lab: Lab, *options: str, to: tuple[str, ...] = (B, C)) -> None:
        words = [word for where in to for word in ("--to", where)]
        super().__init__(lab.a, "evacuate", "--from", A, *words, *options)


def evacuate(lab: Lab, *options: str, code: int = OK, **more: Any) -> Outcome:
    outcome = Evacuation(lab, *options, **more).end()
    assert outcome.exit_code == code, (outcome.exit_code, outcome.text())
    return outcome


def event(outcome: Outcome, kind: str) -> dict[str, Any]:
    return next(e for e in outcome.events if e["event"] == kind)


def named(host: Host, guest: str) -> dict[str, set[str]]:
    """By "live" and "persistent": all files on /mnt that this definition of the guest names."""
    import libvirt
    domain = host.libvirt().lookupByName(guest)
    found = {}
    for which, flags in (("live", 0), ("persistent", libvirt.VIR_DOMAIN_XML_INACTIVE)):
        root = ET.fromstring(domain.XMLDesc(flags))
        paths = {source.get("file", "") for source in root.iterfind("devices/disk/source")}
        paths |= {nvram.text or "" for nvram in root.iterfind("os/nvram")}
        found[which] = {path for path in paths if path.startswith("/mnt/")}
    return found


def world(lab: Lab) -> dict[str, Any]:
    """Everything that is to stay as it is when nothing is changed."""
    return {"definitions": {d.name(): named(lab.a, d.name()) for d in lab.a.libvirt().listAllDomains()},
            "files": files(lab.a, A, B, C)}


def mode_of(lab: Lab, path: str) -> tuple[int, int, int]:
    status = lab.a.path(path).stat()
    return status.st_uid, status.st_gid, status.st_mode


@pytest.fixture
def storages(lab: Lab) -> Iterator[Lab]:
    lab.a.mount_fs("ext4", "768M", A)
    lab.a.mount_fs("xfs", "512M", B)
    lab.a.mount_fs("ext4", "512M", C)
    try:
        yield lab
    finally:
        import libvirt
        for domain in lab.a.libvirt().listAllDomains():
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
        for where in (A, B, C):
            lab.a.umount(where)


def make_iso(lab: Lab) -> bytes:
    content = os.urandom(12 << 20)
    lab.a.path(f"{A}/{ISO}").write_bytes(content)
    lab.a.path(f"{A}/{ISO}").chmod(0o640)
    return content


def with_nvram(xml: str) -> str:
    """SeaBIOS in the place of UEFI firmware: it leaves its NVRAM alone, and QEMU has it open all the same."""
    return xml.replace("<kernel>", "<loader readonly='yes' type='pflash'>/usr/share/seabios/bios-256k.bin</loader>"
                       f"<nvram template='/usr/share/template.fd'>{A}/{NVRAM}</nvram><kernel>")


def make_nvram(lab: Lab) -> bytes:
    content = os.urandom(540672)
    lab.a.path(f"{A}/{NVRAM}").write_bytes(content)
    lab.a.path(f"{A}/{NVRAM}").chmod(0o600)
    return content


def make_guests(lab: Lab) -> list[Guest]:
    """Eight: five run, some have two disks; two share an ISO image, one of them running; one is UEFI and off."""
    def guest(name: str, *disks: tuple[str, str], start: bool = True, **more: Any) -> Guest:
        made = [Disk("64M", kind, data=data, path=f"{A}/{name}-{i}.{kind}") for i, (kind, data) in enumerate(disks)]
        return lab.guest(name, made, memory="128M", rate=60, start=start, **more)

    running = [guest("web1", ("raw", "40M"), ("qcow2", "16M")), guest("web2", ("raw", "24M"), devices=CDROM),
               guest("web3", ("qcow2", "16M")), guest("db1", ("raw", "24M")),
               guest("db2", ("qcow2", "16M"), ("raw", "8M"))]
    guest("off1", ("raw", "16M"), start=False, devices=CDROM)
    guest("off2", ("qcow2", "16M"), ("raw", "16M"), start=False)
    guest("uefi1", ("raw", "8M"), start=False, edit=with_nvram)
    return running


def leftovers(lab: Lab) -> list[str]:
    """Beside guests that are off, and the files of theirs and of nobody's."""
    return lab.leftovers(["*is defined and not running", "*/notes.txt", f"*/{NVRAM}"])


def is_empty(lab: Lab, everything: set[str]) -> None:
    """Nothing is left on the storage, and every definition names only files that are there."""
    assert os.listdir(lab.a.path(A)) == ["lost+found"]
    there = files(lab.a, B, C)
    assert {os.path.basename(path) for path in there} == everything
    seen = set()
    for domain in lab.a.libvirt().listAllDomains():
        for paths in named(lab.a, domain.name()).values():
            assert paths <= there, (domain.name(), paths)
            seen |= paths
    assert seen == there
    assert jobs(lab.a) == []
    assert leftovers(lab) == []


def test_eight_guests_and_drover_is_killed_in_between(storages: Lab) -> None:
    lab = storages
    content, nvram, running = make_iso(lab), make_nvram(lab), make_guests(lab)
    before = world(lab)
    everything = {os.path.basename(path) for path in before["files"]}
    assert len(everything) == 13
    modes = {name: mode_of(lab, f"{A}/{name}") for name in (ISO, NVRAM)}

    plan = event(evacuate(lab, "--dry-run"), "evacuation")
    assert plan["room"] and plan["stay"] == [] and plan["others"] == [] and len(plan["steps"]) == 10
    assert [s["bytes"] for s in plan["steps"]] == sorted((s["bytes"] for s in plan["steps"]), reverse=True)
    assert {f["storage"] for s in plan["steps"] for f in s["files"]} == {B, C}
    assert world(lab) == before

    first = Evacuation(lab, "--bandwidth", "16M")
    first.wait_for(lambda e: e["event"] == "step" and e["state"] == "done")
    third = first.wait_for(lambda e: e["event"] == "step" and e["state"] == "begun" and e["number"] == 3)["guests"][0]
    first.wait_for(lambda e: e["event"] == "progress" and any(d["disk"].startswith(f"{third}:") for d in e["disks"]))
    kill_all(lab.a, "drover evacuate")
    first.end()
    left = jobs(lab.a)
    assert left and all(not job["alive"] for job in left)

    second = evacuate(lab, "--parallel", "3")
    assert {e["job"] for e in second.events if e["event"] == "resume" and e["state"] == "done"} == \
        {job["job"] for job in left}
    end = event(second, "evacuated")
    assert end["empty"] and end["failed"] == 0 and end["resumed"] == len(left) and end["steps"] > 0
    is_empty(lab, everything)
    for name, mode in modes.items():
        [path] = [path for path in files(lab.a, B, C) if path.endswith("/" + name)]
        assert mode_of(lab, path) == mode
    [iso] = {path for path in files(lab.a, B, C) if path.endswith(ISO)}
    assert lab.a.path(iso).read_bytes() == content
    for guest in ("web2", "off1"):
        assert all(iso in paths for paths in named(lab.a, guest).values()), guest
    [vars_file] = {path for path in files(lab.a, B, C) if path.endswith(NVRAM)}
    assert lab.a.path(vars_file).read_bytes() == nvram
    assert vars_file in named(lab.a, "uefi1")["persistent"]
    for guest in running:
        sound(guest)
        errors = lab.a.libvirt().lookupByName(guest.name).diskErrors()
        assert not errors, errors
    evacuate(lab)  # nothing is left to do


def test_ctrl_c_a_target_that_is_too_small_and_a_file_of_nobodys(storages: Lab) -> None:
    lab = storages
    make_iso(lab)
    web1 = lab.guest("web1", [Disk("64M", data="40M", path=f"{A}/web1.raw"),
                              Disk("64M", "qcow2", data="24M", path=f"{A}/web1.qcow2")], memory="128M", rate=60)
    lab.guest("off1", [Disk("64M", data="40M", path=f"{A}/off1.raw")], memory="128M", start=False, devices=CDROM)
    lab.a.path(f"{A}/notes.txt").write_text("mine")
    before = world(lab)

    lab.a.run(["fallocate", "-l", "330M", f"{C}/ballast"])
    refused = evacuate(lab, to=(C,), code=NO_SPACE)
    assert refused.error["message"] == f"there is not room for all that is on {A}; nothing was changed"
    assert "there is no room for it" in refused.events[-2]["stay"][0]["why"]
    lab.a.path(f"{C}/ballast").unlink()
    assert world(lab) == before

    for sig in (signal.SIGINT, signal.SIGTERM):
        stopped = Evacuation(lab, "--bandwidth", "8M")
        stopped.wait_for(lambda e: e["event"] == "progress" and e["copied_bytes"] > 4 << 20)
        assert "another drover empties" in evacuate(lab, code=IN_THE_WAY).error["message"]
        stopped.interrupt(sig)
        outcome = stopped.end()
        assert outcome.exit_code == CANCELLED, outcome.text()
        assert "the same command again" in outcome.error["hint"]
        assert world(lab) == before
        assert jobs(lab.a) == [] and leftovers(lab) == []

    end = event(evacuate(lab), "evacuated")
    assert end["empty"] and end["others"] == [f"{A}/notes.txt"]
    assert files(lab.a, A) == {f"{A}/notes.txt"}
    sound(web1)


def test_what_cannot_go_stays_and_is_named(storages: Lab) -> None:
    lab = storages
    make_iso(lab)
    lab.guest("off1", [Disk("32M", data="8M", path=f"{A}/off1.raw")], memory="128M", start=False, devices=CDROM)
    lab.guest("off2", [Disk("32M", "qcow2", data="8M", path=f"{A}/off2.qcow2")], memory="128M", start=False)
    lab.a.virsh("snapshot-create-as", "off2", "before")
    lab.a.run(["cp", "-a", f"{A}/{ISO}", f"{B}/{ISO}"])  # somebody else's
    lab.a.virsh("pool-create-as", "old", "dir", "--target", A)
    try:
        outcome = Running(lab.a, "evacuate", "--from", "old", "--to", B).end()
    finally:
        lab.a.virsh("pool-destroy", "old")
    assert outcome.exit_code == BLOCKED, outcome.text()
    [left] = event(outcome, "evacuated")["stay"]
    assert left["path"] == f"{A}/off2.qcow2" and "snapshot" in left["why"]
    assert files(lab.a, A) == {f"{A}/off2.qcow2"}
    assert named(lab.a, "off1")["persistent"] == {f"{B}/off1.raw", f"{B}/off1-sda.iso"}
    lab.a.virsh("snapshot-delete", "off2", "before", "--metadata")


def test_nvram_of_a_running_guest_waits_until_it_is_off(storages: Lab) -> None:
    lab = storages
    content = make_nvram(lab)
    guest = lab.guest("uefi1", [Disk("32M", data="8M", path=f"{A}/uefi1.raw")], memory="128M", rate="idle",
                      edit=with_nvram)
    first = evacuate(lab, code=BLOCKED)
    [left] = event(first, "evacuated")["stay"]
    assert left == {"path": f"{A}/{NVRAM}", "why": "guest uefi1 runs with it: shut the guest down and run the same "
                                                   "command again"}
    sound(guest)
    guest.domain().destroy()
    assert event(evacuate(lab), "evacuated")["empty"]
    [nvram] = {path for path in files(lab.a, B, C) if path.endswith(NVRAM)}
    assert lab.a.path(nvram).read_bytes() == content
    start_again(guest)
    assert nvram in named(lab.a, "uefi1")["live"]
    sound(guest)


def test_overlays_become_one_image_and_what_is_below_is_left(storages: Lab) -> None:
    lab = storages
    guest = lab.guest("web1", [Disk("32M", "qcow2", data="8M", path=f"{A}/web1.qcow2")], memory="128M", rate=60,
                      start=False)
    lab.a.run(f"cd {A} && mv web1.qcow2 base.qcow2 && "
              "qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 web1.qcow2")
    plan = event(evacuate(lab, "--dry-run"), "evacuation")
    base = lab.a.du(f"{A}/base.qcow2")
    assert [s["bytes"] for s in plan["steps"]] == [base + lab.a.du(f"{A}/web1.qcow2")], "its copy holds both"
    assert plan["others"] == [f"{A}/base.qcow2"] and "below disk vda of guest web1" in plan["notes"][0]
    end = event(evacuate(lab), "evacuated")
    assert end["empty"] and end["others"] == [f"{A}/base.qcow2"]
    lab.a.path(f"{A}/base.qcow2").unlink()
    start_again(guest)
    sound(guest)


def test_killed_after_a_copy_and_before_the_old_file_was_deleted(storages: Lab) -> None:
    """It is known by its note: it is taken, not made again, and only such a copy lets an old file go."""
    lab = storages

    def copy_noted(name: str) -> None:
        lab.a.run(["cp", "-a", f"{A}/{name}", f"{B}/{name}"])
        status = lab.a.path(f"{A}/{name}").stat()
        note = (f"{status.st_ino} {status.st_size} {status.st_mtime_ns // 10**9}."
                f"{status.st_mtime_ns % 10**9:09} {A}/{name}")
        os.setxattr(lab.a.path(f"{B}/{name}"), "trusted.drover.copy-of", note.encode())

    make_iso(lab)
    for name in ("off1", "off2"):
        lab.guest(name, [], memory="128M", start=False, devices=CDROM)
    copy_noted(ISO)
    copied = lab.a.path(f"{B}/{ISO}").stat().st_ino
    iso = lab.a.path(f"{A}/{ISO}").stat()
    lab.a.path(f"{B}/.drover-evacuate-{iso.st_dev:x}-{iso.st_ino}").write_bytes(b"half a copy, of another run")
    lab.a.virsh("change-media", "off2", "sda", f"{B}/{ISO}", "--update", "--config")
    assert event(evacuate(lab), "evacuated")["steps"] == 1
    assert files(lab.a, A, B, C) == {f"{B}/{ISO}"} and lab.a.path(f"{B}/{ISO}").stat().st_ino == copied
    assert "trusted.drover.copy-of" not in os.listxattr(lab.a.path(f"{B}/{ISO}"))

    # All guests have changed over; a file of nobody's beside it has a copy without a note, or unused.
    make_iso(lab)
    lab.a.path(f"{B}/{ISO}").unlink()
    copy_noted(ISO)
    lab.a.path(f"{A}/mine.iso").write_bytes(b"mine")
    copy_noted("mine.iso")
    end = event(evacuate(lab), "evacuated")
    assert end["empty"] and end["steps"] == 1 and end["others"] == [f"{A}/mine.iso"]
    assert files(lab.a, A) == {f"{A}/mine.iso"}
    for name in ("off1", "off2"):
        assert named(lab.a, name)["persistent"] == {f"{B}/{ISO}"}
