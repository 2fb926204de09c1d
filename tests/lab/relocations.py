# SPDX-License-Identifier: Apache-2.0
"""Relocations in the lab: two filesystems on one host, a guest on the first, `drover relocate`."""
from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any, Iterator, Optional

import pytest

from lab import Disk, Guest, Host, Lab
from moves import Outcome, Running

A, B = "/mnt/a", "/mnt/b"
SLOW = "8M"  # of bandwidth: the guest of two_disks() takes about 12 s


class Relocation(Running):
    """A `drover relocate`."""

    def __init__(self, guest: Guest, *words: str) -> None:
        self.guest = guest
        super().__init__(guest.lab.a, "relocate", guest.name, *words)


def relocate(guest: Guest, *words: str) -> Outcome:
    return Relocation(guest, *words).end()


def relocate_ok(guest: Guest, *words: str) -> Outcome:
    outcome = relocate(guest, *words)
    assert outcome.exit_code == 0, outcome.text()
    return outcome


def two_disks(lab: Lab, where: str = A, **more: Any) -> Guest:
    """Raw 256 MiB (64 MiB data) and qcow2 128 MiB (32 MiB data)."""
    return lab.guest("web1", [Disk("256M", data="64M", path=f"{where}/web1.raw"),
                              Disk("128M", "qcow2", data="32M", path=f"{where}/web1.qcow2")],
                     memory="128M", rate=more.pop("rate", 200), **more)


def defined_disks(guest: Guest, host: Optional[Host] = None) -> dict[str, str]:
    """Target -> path, by the persistent definition."""
    import libvirt
    xml = (host or guest.lab.a).libvirt().lookupByName(guest.name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    found = {}
    for disk in ET.fromstring(xml).iterfind("devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        if source is not None and target is not None:
            found[target.get("dev", "")] = source.get("file") or source.get("dev") or ""
    return found


def files(host: Host, *folders: str) -> set[str]:
    """What lies in them, hidden files too."""
    return {f"{folder}/{p.name}" for folder in folders for p in host.path(folder).iterdir() if p.name != "lost+found"}


def is_on(guest: Guest, where: str) -> None:
    """Both definitions say so, and nothing else lies on either filesystem."""
    expected = {"vda": f"{where}/web1.raw", "vdb": f"{where}/web1.qcow2"}
    assert defined_disks(guest) == expected
    if guest.lab.a.libvirt().lookupByName(guest.name).isActive():
        assert guest.disks() == expected
    assert files(guest.lab.a, A, B) == set(expected.values())


def sound(guest: Guest) -> None:
    verdict = guest.verify()
    assert verdict["ok"] and verdict["mismatches"] == 0, (verdict, guest.mismatches())


def start_again(guest: Guest) -> None:
    """From its definition."""
    domain = guest.lab.a.libvirt().lookupByName(guest.name)
    if domain.isActive():
        domain.destroy()
    guest._log(guest.lab.a).unlink(missing_ok=True)
    domain.create()
    guest.wait_ready()


@pytest.fixture
def two_filesystems(lab: Lab) -> Iterator[Lab]:
    lab.a.mount_fs("ext4", "512M", A)
    lab.a.mount_fs("xfs", "512M", B)
    yield lab
    for name in ("web1", "web2"):
        Guest(lab, name).destroy()
    for where in (A, B):
        lab.a.umount(where)
