# SPDX-License-Identifier: Apache-2.0
"""What `drover move` refuses: a clear error, an exit code, and nothing changed.

The lab has no device to pass through and no second kind of machine. So what a host cannot do is taken
from what its libvirt believes of its QEMU (`qemu_without`), and guests that could not be started here are
only defined. Every other rule of the pre-flight: tests/unit/preflight_test.cc.
"""
from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Iterator, Optional

import pytest

from lab import IMAGES, Disk, Guest, Host, Lab, LabError

pytestmark = pytest.mark.usefixtures("drover")

# docs/drover.1
NOT_FOUND, BLOCKED, UNREACHABLE, DENIED, IN_THE_WAY, INCOMPATIBLE = 3, 4, 5, 6, 7, 9


def started(lab: Lab, *disks: Disk, **options: Any) -> Guest:
    """A guest whose QEMU runs; nobody waits for it to boot."""
    disks = disks or (Disk("64M", data="4M"), Disk("64M", "qcow2", data="4M"))
    guest = lab.guest("web1", disks, memory=options.pop("memory", "256M"), rate=50, start=False, **options)
    lab.a.libvirt().lookupByName(guest.name).create()
    return guest


@pytest.fixture
def guest(lab: Lab) -> Guest:
    return started(lab)


def refused(lab: Lab, guest: Guest, *options: str, says: str, code: int = BLOCKED, host: str = "hostb",
            name: str = "") -> None:
    mark = lab.events.mark()
    disks = guest.disks()
    p = lab.a.run(["drover", "move", name or guest.name, host, *options], check=False)
    assert p.returncode == code, (p.returncode, p.stdout, p.stderr)
    assert says in p.stdout + p.stderr, (says, p.stdout, p.stderr)
    assert guest.host is lab.a
    assert guest.disks() == disks
    assert not [e for e in lab.events.since(mark) if e.name == "STOP"], "the guest was disturbed"
    assert guest.name not in lab.b.virsh("list", "--all", "--name").split()


# --- the command line ---


def test_unknown_guest(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, name="nobody", says="nobody", code=NOT_FOUND)


def test_disk_that_does_not_exist(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, "--disk", f"vdz={IMAGES}/z.raw", says="vdz")


def test_two_disks_to_one_path(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, "--disk", f"vda={IMAGES}/one.raw", "--disk", f"vdb={IMAGES}/one.raw", says="one.raw")


def test_not_root(lab: Lab, guest: Guest) -> None:
    p = lab.a.run(["setpriv", "--reuid=nobody", "--clear-groups", "drover", "move", guest.name, "hostb"], check=False)
    assert p.returncode == DENIED
    assert "root" in p.stderr


# --- the hosts ---


def test_unreachable_host(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, host="hostz", says="hostz", code=NOT_FOUND)
    refused(lab, guest, host="10.99.77.77", says="10.99.77.77", code=UNREACHABLE)  # nobody has this address


def test_ssh_refused(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, host="nosuchuser@hostb", says="hostb", code=DENIED)
    refused(lab, guest, host="ssh://hostb:9", says="hostb", code=UNREACHABLE)  # nobody listens


def test_the_same_host(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, host="hosta", says="hosta is this host")


@pytest.mark.parametrize("host, uri", [("hosta", "qemu:///system"), ("hostb", "qemu+ssh://hostb/system")])
def test_libvirt_unreachable(lab: Lab, guest: Guest, host: str, uri: str) -> None:
    lab[host].stop_libvirtd()
    try:
        p = lab.a.run(["drover", "move", guest.name, "hostb"], check=False)
    finally:
        lab[host].start_libvirtd()
    assert p.returncode == UNREACHABLE, (p.stdout, p.stderr)
    assert f"connecting to libvirt at {uri}" in p.stderr
    assert guest.host is lab.a


@contextlib.contextmanager
def instead_of_drover(host: Host, script: Optional[str]) -> Iterator[None]:
    """The host's `drover` is that shell script, in which `drover.real` is the real one; or missing."""
    where = "/usr/local/bin/drover"
    host.run(["mv", where, f"{where}.real"])
    try:
        if script is not None:
            host.run(f"cat >{where}; chmod 755 {where}", input=f"#!/bin/sh\n{script}\n")
        yield
    finally:
        host.run(["mv", f"{where}.real", where])


def test_drover_missing_there(lab: Lab, guest: Guest) -> None:
    with instead_of_drover(lab.b, None):
        refused(lab, guest, says="drover is not installed on hostb", code=NOT_FOUND)


def test_another_version_of_drover_there(lab: Lab, guest: Guest) -> None:
    version = """drover.real "$@" | sed 's/"drover-version":"[^"]*"/"drover-version":"99.1"/'"""
    with instead_of_drover(lab.b, version):
        refused(lab, guest, says="hostb has drover 99.1, this host has")


def test_a_drover_there_that_knows_nothing_of_this_one(lab: Lab, guest: Guest) -> None:
    with instead_of_drover(lab.b, "echo drover: receive: no such command >&2; exit 2"):
        refused(lab, guest, says="drover on hostb does not answer: drover: receive: no such command", code=INCOMPATIBLE)
    with instead_of_drover(lab.b, "cat >/dev/null; echo '{\"hello\": \"world\"}'"):
        refused(lab, guest, says="is the same version of drover installed there?", code=1)


# --- what the target lacks ---


def test_target_file_already_exists(lab: Lab, guest: Guest) -> None:
    path = guest.disks()["vda"]
    lab.b.run(f"echo mine > {path}")
    try:
        refused(lab, guest, says=f"{path} is there already")
        assert lab.b.path(path).read_text() == "mine\n"
    finally:
        lab.b.path(path).unlink()


def test_target_directory_missing(lab: Lab, guest: Guest) -> None:
    refused(lab, guest, "--disk", "vda=/no/such/place/web1.raw", says="/no/such/place")


def test_not_enough_space(lab: Lab, guest: Guest) -> None:
    lab.b.mount_fs("ext4", "64M", "/mnt/small")
    try:
        refused(lab, guest, "--disk", "vda=/mnt/small/web1.raw", says="to spare")
    finally:
        lab.b.umount("/mnt/small")


def test_not_enough_memory(lab: Lab) -> None:
    # As much as the machine has: more than is ever free, and just what Linux lets a process ask for. QEMU
    # takes it when the guest touches it, and this one uses the lab's own 256 MiB of it (Lab.guest).
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    guest = started(lab, edit=lambda xml: xml.replace(f"'b'>{256 << 20}<", f"'MiB'>{have}<"))
    refused(lab, guest, says="of memory free; guest web1 needs")


@contextlib.contextmanager
def qemu_without(host: Host, *changes: tuple[str, str]) -> Iterator[None]:
    """The host's libvirt takes its QEMU for one that has something else: what it found out about it, and
    remembers in a file, is changed."""
    folder = host.path("/var/cache/libvirt/qemu/capabilities")
    file = next(f for f in folder.iterdir() if "<emulator>/usr/bin/qemu-system-x86_64<" in f.read_text())
    known = file.read_text()
    other = known
    for old, new in changes:
        assert old in other, f"libvirt says it in other words now: {old}"
        other = other.replace(old, new)
    host.stop_libvirtd()
    try:
        file.write_text(other)
        host.start_libvirtd()
        yield
        assert file.read_text() == other, "libvirt asked its QEMU again"
    finally:
        with contextlib.suppress(OSError, LabError):  # it did not start
            host.stop_libvirtd()
        file.write_text(known)
        host.start_libvirtd()


def test_the_target_has_no_such_machine_type(lab: Lab, guest: Guest) -> None:
    with qemu_without(lab.b, ("name='pc-q35-7.2'", "name='pc-q35-9.9'")):
        refused(lab, guest, says="hostb has no machine type pc-q35-7.2")


def test_the_target_has_no_such_cpu(lab: Lab) -> None:
    guest = started(lab, edit=lambda xml: xml.replace("</model>", "</model><feature policy='require' name='avx2'/>", 1))
    with qemu_without(lab.b, ("name='avx2' type='boolean' value='true'", "name='avx2' type='boolean' value='false'")):
        refused(lab, guest, says="features: avx2")


def test_bridge_missing_there(lab: Lab) -> None:
    lab.a.run(["ip", "link", "add", "onlyhere", "type", "bridge"])
    guest = None
    try:
        guest = started(lab, devices="<interface type='bridge'><source bridge='onlyhere'/></interface>")
        refused(lab, guest, says="hostb has no bridge onlyhere")
    finally:
        if guest:
            guest.destroy()
        lab.a.run(["ip", "link", "del", "onlyhere"])


# Two kinds that need no dnsmasq: one with a bridge of libvirt's own, one that is a name for a host's bridge.
ISOLATED = "<network><name>lan</name><bridge name='virbr7'/></network>"
BRIDGED = "<network><name>lan</name><forward mode='bridge'/><bridge name='{}'/></network>"


@contextlib.contextmanager
def libvirt_network(host: Host, xml: str, start: bool = True) -> Iterator[None]:
    host.run(["virsh", "net-define", "/dev/stdin"], input=xml)
    try:
        if start:
            host.virsh("net-start", "lan")
        yield
    finally:
        if start:
            host.virsh("net-destroy", "lan", check=False)
        host.virsh("net-undefine", "lan")


@pytest.mark.parametrize("network", [ISOLATED, BRIDGED.format("br0")], ids=["isolated", "bridged"])
def test_libvirt_network_missing_there(lab: Lab, network: str) -> None:
    with libvirt_network(lab.a, network):
        guest = started(lab, devices="<interface type='network'><source network='lan'/></interface>")
        try:
            refused(lab, guest, says="hostb has no libvirt network lan")
            with libvirt_network(lab.b, network, start=False):
                refused(lab, guest, says="libvirt network lan on hostb is not active")
        finally:
            guest.destroy()


def test_libvirt_network_may_be_another_bridge_there(lab: Lab) -> None:
    lab.a.run(["ip", "link", "add", "onlyhere", "type", "bridge"])
    try:
        with libvirt_network(lab.a, BRIDGED.format("onlyhere")), libvirt_network(lab.b, BRIDGED.format("br0")):
            guest = started(lab, devices="<interface type='network'><source network='lan'/></interface>")
            try:
                p = lab.a.run(["drover", "check", guest.name, "hostb"], check=False)
                assert p.returncode == 0, p.stdout + p.stderr
            finally:
                guest.destroy()
    finally:
        lab.a.run(["ip", "link", "del", "onlyhere"])


# --- what cannot be taken along ---


def test_guest_not_running(lab: Lab, guest: Guest) -> None:
    lab.a.virsh("destroy", guest.name)
    try:
        p = lab.a.run(["drover", "move", guest.name, "hostb"], check=False)
        assert p.returncode == BLOCKED
        assert "guest web1 is not running" in p.stdout + p.stderr
    finally:
        guest.destroy()


# No device of this machine can be given to a guest of the lab (no IOMMU, no /dev/sg, no NVMe, no TPM): such
# guests can be defined, not started. That they are not running is only one more reason then.
PASSED_THROUGH = {
    "a device of this host": "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
                             "<address domain='0' bus='0x7f' slot='0x1f' function='0x7'/></source></hostdev>",
    "disk sda of guest web1 is a SCSI LUN that is passed through":
        "<disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/sdz'/>"
        "<target dev='sda' bus='scsi'/></disk><controller type='scsi' model='virtio-scsi'/>",
    "disk vdc of guest web1 is an NVMe device of this host":
        "<disk type='nvme' device='disk'><driver name='qemu' type='raw'/>"
        "<source type='pci' managed='yes' namespace='1'><address domain='0' bus='0x7f' slot='0x1f' function='0x6'/>"
        "</source><target dev='vdc' bus='virtio'/></disk>",
    "a TPM of this host": "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
}


def test_passthrough(lab: Lab) -> None:
    guest = lab.guest("web1", [Disk("64M")], memory="256M", start=False, devices="".join(PASSED_THROUGH.values()))
    try:
        p = lab.a.run(["drover", "move", guest.name, "hostb"], check=False)
        assert p.returncode == BLOCKED
        for says in PASSED_THROUGH:
            assert says in p.stdout
    finally:
        guest.destroy()


def test_shared_directory(lab: Lab) -> None:
    guest = started(lab, devices="<filesystem type='mount'><source dir='/srv'/><target dir='srv'/></filesystem>")
    refused(lab, guest, says="guest web1 has a shared directory")


def test_shareable_disk(lab: Lab) -> None:
    guest = started(lab, Disk("64M"), Disk("64M", xml="<shareable/>"))
    refused(lab, guest, says="disk vdb of guest web1 is shareable")


def test_network_disk(lab: Lab) -> None:
    image = f"{IMAGES}/served.raw"
    lab.a.run(["qemu-img", "create", "-q", "-f", "raw", image, "64M"])
    lab.a.run(["qemu-nbd", "--fork", "--persistent", "-f", "raw", "-b", "127.0.0.1", "-p", "10810",
               "--pid-file", "/root/nbd.pid", image])
    try:
        guest = started(lab, Disk("64M"), devices="<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
                        "<source protocol='nbd'><host name='127.0.0.1' port='10810'/></source>"
                        "<target dev='vdb' bus='virtio'/></disk>")
        try:
            refused(lab, guest, says="disk vdb of guest web1 is on a network storage")
        finally:
            guest.destroy()
    finally:
        lab.a.run("kill $(cat /root/nbd.pid); rm -f /root/nbd.pid")
        lab.a.path(image).unlink()


def test_snapshot(lab: Lab) -> None:
    guest = started(lab, Disk("64M", "qcow2"))
    below = guest.disks()["vda"]
    try:
        lab.a.virsh("snapshot-create-as", guest.name, "before", "--disk-only", "--diskspec", "vda,snapshot=external")
        refused(lab, guest, says="guest web1 has 1 snapshot(s)")
    finally:
        guest.destroy()
        lab.a.path(below).unlink(missing_ok=True)  # the guest's clean-up sees only the top


def test_checkpoint(lab: Lab) -> None:
    guest = started(lab, Disk("64M", "qcow2"))
    lab.a.virsh("checkpoint-create-as", guest.name, "before", "--diskspec", "vda")
    refused(lab, guest, says="guest web1 has 1 checkpoint(s)")


def test_backup_running(lab: Lab, guest: Guest) -> None:
    # In this mode libvirt waits for somebody to fetch the data.
    lab.a.run(["virsh", "backup-begin", guest.name, "/dev/stdin"], input="<domainbackup mode='pull'><server "
              "transport='unix' socket='/var/lib/libvirt/qemu/backup.sock'/></domainbackup>")
    try:
        refused(lab, guest, says="a backup of guest web1 is running")
    finally:
        lab.a.virsh("domjobabort", guest.name)


def node_of(guest: Guest, disk: str) -> str:
    path = guest.disks()[disk]
    return next(n["node-name"] for n in guest.host.qmp(guest.name, "query-named-block-nodes")
                if n["file"] == path and n["drv"] == "raw")


def test_block_job_running(lab: Lab, guest: Guest) -> None:
    lab.a.qmp(guest.name, "blockdev-add", driver="null-co", node_name="elsewhere", size=64 << 20)
    lab.a.qmp(guest.name, "blockdev-backup", device=node_of(guest, "vda"), target="elsewhere", sync="full", speed=1,
              job_id="somebody")
    try:
        refused(lab, guest, says="somebody")
    finally:
        lab.a.qmp(guest.name, "block-job-cancel", device="somebody", force=True)


def test_nbd_server_in_use(lab: Lab, guest: Guest) -> None:
    lab.a.qmp(guest.name, "nbd-server-start",
              addr={"type": "unix", "data": {"path": "/var/lib/libvirt/qemu/somebody.sock"}})
    try:
        lab.a.qmp(guest.name, "block-export-add", type="nbd", id="somebody", node_name=node_of(guest, "vda"))
        refused(lab, guest, says="QEMU's NBD server of guest web1 is in use")
    finally:
        lab.a.qmp(guest.name, "nbd-server-stop")


def test_nbd_server_that_serves_nothing_yet(lab: Lab, guest: Guest) -> None:
    # QEMU does not tell of it: only an attempt to start another one fails. Then this one must stay.
    lab.a.qmp(guest.name, "nbd-server-start",
              addr={"type": "unix", "data": {"path": "/var/lib/libvirt/qemu/somebody.sock"}})
    try:
        refused(lab, guest, says="QEMU's NBD server is in use by somebody else", code=IN_THE_WAY)
        lab.a.qmp(guest.name, "block-export-add", type="nbd", id="somebody", node_name=node_of(guest, "vda"))
    finally:
        with contextlib.suppress(LabError):
            lab.a.qmp(guest.name, "nbd-server-stop")


# --- `drover check` ---


def test_check_says_what_would_stop_a_move(lab: Lab, guest: Guest) -> None:
    assert lab.a.run(["drover", "check", guest.name, "hostb"], check=False).returncode == 0
    path = guest.disks()["vda"]
    lab.b.run(["touch", path])
    try:
        p = lab.a.run(["drover", "check", guest.name, "hostb", "--json"], check=False)
    finally:
        lab.b.path(path).unlink()
    assert p.returncode == BLOCKED
    plan = json.loads(p.stdout)
    assert plan["blocked"] and plan["findings"][0]["rule"] == "target-file-exists"
    assert path in plan["findings"][0]["what"]
