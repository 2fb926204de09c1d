# SPDX-License-Identifier: Apache-2.0
"""`drover rebalance` on three small filesystems of a host, of which one is filled to about 90 %."""
from __future__ import annotations

import json
import os
from typing import Any, Iterator

import pytest

from lab import Disk, Guest, Lab

pytestmark = pytest.mark.usefixtures("drover")

# docs/drover.1
OK, USAGE, NOT_FOUND, BLOCKED, IN_THE_WAY = 0, 2, 3, 4, 7

STORAGES = ["/mnt/a", "/mnt/b", "/mnt/c"]
MIB = 1 << 20


@pytest.fixture
def storages(lab: Lab) -> Iterator[list[str]]:
    """/mnt/a is filled to about 90 %, the others to about a third. One guest runs, the others are off."""
    for where, kind in zip(STORAGES, ["ext4", "xfs", "ext4"]):
        lab.a.mount_fs(kind, "512M", where)
    try:
        lab.guest("web1", [Disk("160M", data="160M", path="/mnt/a/web1.raw"),
                           Disk("96M", "qcow2", data="80M", path="/mnt/a/web1.qcow2")], memory="256M", rate=300)
        for name, size, where in [("web2", "110M", "/mnt/a"), ("web3", "70M", "/mnt/a"), ("db1", "130M", "/mnt/b"),
                                  ("db2", "130M", "/mnt/c")]:
            lab.guest(name, [Disk(size, data=size, path=f"{where}/{name}.raw")], memory="256M", start=False)
        lab.a.run(["sync"])
        yield STORAGES
    finally:
        for domain in lab.a.libvirt().listAllDomains():
            if domain.isActive():
                domain.destroy()
            domain.undefine()
        for where in STORAGES:
            lab.a.umount(where)


def rebalance(lab: Lab, *options: str, code: int = OK) -> dict[str, Any]:
    """The proposal (or the error) that it prints."""
    p = lab.a.run(["drover", "rebalance", "--json", *options], check=False)
    assert p.returncode == code, (p.returncode, p.stdout, p.stderr)
    events = [json.loads(line) for line in p.stdout.splitlines()]
    return next(e for e in events if e["event"] in ("proposal", "error"))


def refused(lab: Lab, *options: str, says: str, code: int) -> None:
    p = lab.a.run(["drover", "rebalance", *options], check=False)
    assert p.returncode == code, (p.returncode, p.stdout, p.stderr)
    assert says in p.stderr, p.stderr


def world(lab: Lab) -> dict[str, Any]:
    """Everything that a dry run must leave as it is."""
    definitions = {d.name(): d.XMLDesc(0) for d in lab.a.libvirt().listAllDomains()}
    files = {where: sorted(os.listdir(lab.a.path(where))) for where in STORAGES}
    return {"definitions": definitions, "files": files}


def fits(lab: Lab, proposal: dict[str, Any]) -> None:
    """No step fills a storage beyond what df says it has, while both copies exist."""
    free = {}
    for where in STORAGES:
        space = os.statvfs(lab.a.path(where))
        free[where] = space.f_bavail * space.f_frsize
    for move in proposal["moves"]:
        assert move["bytes"] <= free[move["target"]], move
        free[move["target"]] -= move["bytes"]
        free[move["source"]] += move["bytes"]


def test_one_storage_at_90_percent(lab: Lab, storages: list[str]) -> None:
    before = world(lab)
    proposal = rebalance(lab, *storages)
    assert proposal["needed"] and proposal["reached"] and proposal["proven"]
    shares = [s["share"] for s in proposal["storages"]]
    assert 0.85 < shares[0] < 0.97 and max(shares[1:]) < 0.5, shares
    for s in proposal["storages"]:
        space = os.statvfs(lab.a.path(s["storage"]))
        used = (space.f_blocks - space.f_bfree) * space.f_frsize
        assert abs(s["used_bytes"] - used) < 2 * MIB, s  # the running guest may have written meanwhile
        assert abs(s["share_after"] - proposal["mean"]) <= 0.05 + 1e-9
    assert {m["source"] for m in proposal["moves"]} == {"/mnt/a"}
    assert sum(m["bytes"] for m in proposal["moves"]) == proposal["bytes"]
    assert all(m["reason"].startswith("/mnt/a is filled to ") for m in proposal["moves"])
    fits(lab, proposal)
    disks = {(d["guest"], d["disk"]): d for d in proposal["disks"]}
    assert set(disks) == {("web1", "vda"), ("web1", "vdb"), ("web2", "vda"), ("web3", "vda"), ("db1", "vda"),
                          ("db2", "vda")}
    assert disks["web2", "vda"]["allocated_bytes"] == lab.a.du("/mnt/a/web2.raw")
    assert all(d["stays"] is None for d in disks.values())
    assert world(lab) == before

    again = rebalance(lab, *storages)
    assert [(m["guest"], m["disk"], m["target"]) for m in again["moves"]] == \
        [(m["guest"], m["disk"], m["target"]) for m in proposal["moves"]]
    text = lab.a.run(["drover", "rebalance", *storages]).stdout
    assert "Nothing was changed; --apply carries it out." in text and "/mnt/a" in text


def test_pins_apart_and_max_moves(lab: Lab, storages: list[str]) -> None:
    moved = rebalance(lab, *storages)["moves"][0]
    pinned = rebalance(lab, *storages, "--tolerance", "25%", "--pin", f"{moved['guest']}:{moved['disk']}")
    assert all((m["guest"], m["disk"]) != (moved["guest"], moved["disk"]) for m in pinned["moves"])
    apart = rebalance(lab, *storages, "--tolerance", "50%", "--apart", "web1,web2")
    assert apart["reached"] and [m["guest"] for m in apart["moves"]] == ["web2"]
    one = rebalance(lab, *storages, "--max-moves", "1", "--tolerance", "1%", code=BLOCKED)
    assert len(one["moves"]) == 1 and one["obstacles"][0].startswith("it takes more than the 1 move")


def test_by_io_moves_the_load_of_running_guests(lab: Lab, storages: list[str]) -> None:
    proposal = rebalance(lab, *storages, "--by", "io", "--window", "3s", "--tolerance", "30%", code=BLOCKED)
    loads = {(d["guest"], d["disk"]): d["load"] for d in proposal["disks"]}
    for disk in ("vda", "vdb"):
        assert loads["web1", disk]["requests_per_second"] > 20
        assert loads["web1", disk]["latency_us"] > 0 and loads["web1", disk]["busy"] > 0
    assert loads["web2", "vda"]["requests_per_second"] == 0
    assert proposal["storages"][0]["share"] == 1.0
    assert {m["guest"] for m in proposal["moves"]} <= {"web1"}


def test_storages_by_pool_and_by_directory(lab: Lab, storages: list[str]) -> None:
    lab.a.run(["mkdir", "/mnt/a/images"])
    lab.a.virsh("pool-create-as", "second", "dir", "--target", "/mnt/b")
    try:
        proposal = rebalance(lab, "/mnt/a/images", "second", "/mnt/c")
        assert proposal["reached"]
        assert [s["mount_point"] for s in proposal["storages"]] == ["/mnt/a", "/mnt/b", "/mnt/c"]
        assert proposal["storages"][1]["pool"] == "second"
        refused(lab, "/mnt/a", "/mnt/a/images", says="/mnt/a and /mnt/a/images are one storage", code=USAGE)
        refused(lab, "second", "/mnt/b", says="second and /mnt/b are one storage", code=USAGE)
    finally:
        lab.a.virsh("pool-destroy", "second")


def test_subvolumes_of_a_btrfs_are_one_storage(lab: Lab) -> None:
    lab.a.mount_fs("btrfs", "256M", "/mnt/tree")
    try:
        for name in ("x", "y"):
            lab.a.run(["btrfs", "-q", "subvolume", "create", f"/mnt/tree/{name}"])
        refused(lab, "/mnt/tree/x", "/mnt/tree/y", says="are one storage: both are on the filesystem at /mnt/tree",
                code=USAGE)
    finally:
        lab.a.umount("/mnt/tree")


def test_refusals(lab: Lab, storages: list[str]) -> None:
    refused(lab, "/mnt/a", "/mnt/nothing", says="/mnt/nothing", code=NOT_FOUND)
    refused(lab, "/mnt/a", "nothing", says="there is no storage pool nothing", code=NOT_FOUND)
    refused(lab, "/mnt/a", "/mnt/b/db1.raw", says="/mnt/b/db1.raw is neither a directory nor a pool", code=USAGE)
    refused(lab, "/mnt/a", "/mnt/b", "--pin", "nobody:vda", says="no guest is named nobody", code=NOT_FOUND)
    refused(lab, "/mnt/a", "/mnt/b", "--pin", "web1:vdz", says="guest web1 has no disk vdz", code=NOT_FOUND)
    refused(lab, "/mnt/a", "/mnt/b", "--apart", "web1,nobody", says="no guest is named nobody", code=NOT_FOUND)
    refused(lab, "/dev/shm", "/tmp", says="no disk of a guest is on any of these storages", code=NOT_FOUND)
    lab.a.virsh("pool-define-as", "asleep", "dir", "--target", "/mnt/b")
    try:
        refused(lab, "/mnt/a", "asleep", says="storage pool asleep is not active", code=IN_THE_WAY)
    finally:
        lab.a.virsh("pool-undefine", "asleep")


def test_apply_does_what_the_dry_run_proposed(lab: Lab, storages: list[str]) -> None:
    def moves(events: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
        return [(m["guest"], m["disk"], m["source"], m["target"]) for m in events]

    # First those that are off stay on /mnt/a, so that the running guest's go.
    pins = [word for name in ("web2", "web3") for word in ("--pin", f"{name}:vda")]
    for options in (pins, []):
        proposal = rebalance(lab, *storages, *options, "--tolerance", "12%")
        p = lab.a.run(["drover", "rebalance", "--json", "--apply", *storages, *options, "--tolerance", "12%"])
        events = [json.loads(line) for line in p.stdout.splitlines()]
        done = [e for e in events if e["event"] == "move" and e["state"] == "done"]
        assert moves(done) == moves(proposal["moves"])
        assert [e["event"] for e in events].count("proposal") == 1, "it planned again"
        end = events[-1]
        assert end["event"] == "rebalanced" and end["reached"] and end["failed"] == 0
        for where, s in zip(storages, end["storages"]):
            space = os.statvfs(lab.a.path(where))
            used = space.f_blocks - space.f_bfree
            assert abs(used / (used + space.f_bavail) - end["mean"]) < 0.12 + 0.01, s
        for move in done:
            disks = Guest(lab, move["guest"]).disks(lab.a)
            assert disks[move["disk"]].startswith(move["target"] + "/"), disks
        if options:
            assert "web1" in {m["guest"] for m in done}, "a running guest's disk was to go"
    assert Guest(lab, "web1").verify()["ok"], Guest(lab, "web1").mismatches()
    assert "Nothing is to be moved." in lab.a.run(["drover", "rebalance", *storages, "--tolerance", "12%"]).stdout
    files = {name for where in storages for name in os.listdir(lab.a.path(where)) if name != "lost+found"}
    assert files == {"web1.raw", "web1.qcow2", "web2.raw", "web3.raw", "db1.raw", "db2.raw"}


def test_apply_reaches_the_default_tolerance(lab: Lab, storages: list[str]) -> None:
    p = lab.a.run(["drover", "rebalance", "--apply", *storages])
    assert "Each is within 5.0 points of the mean of" in p.stdout
    assert Guest(lab, "web1").verify()["ok"], Guest(lab, "web1").mismatches()
