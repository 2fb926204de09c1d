# SPDX-License-Identifier: Apache-2.0
"""memmig/ on real hosts: QMP and libvirt without the rest of drover. See memmig_driver.py for what stands in."""
from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest

from lab import Disk, Guest, Host, Lab, wait_for
from memmig_driver import (TOOL, Endpoint, Move, RpcRelay, Tool, ToolError, milliseconds)

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason=f"{TOOL} is not built")


@pytest.fixture
def guest(lab: Lab) -> Guest:
    return lab.guest("web1", [Disk("256M", data="64M"), Disk("128M", "qcow2", data="32M")], memory="256M", rate=200)


@pytest.fixture
def small(lab: Lab) -> Guest:
    return lab.guest("small", [Disk("64M", data="8M")], memory="256M", rate=200)


@pytest.fixture
def tool(lab: Lab) -> Iterator[Tool]:
    with Tool(lab.a) as tool:
        yield tool


@pytest.fixture
def endpoint(lab: Lab, small: Guest, tool: Tool) -> Iterator[Endpoint]:
    """A target for the mirror of `small`'s vda."""
    info = tool.call("describe", guest="small")
    lab.b.run(["qemu-img", "create", "-q", "-f", "raw", "/tmp/vda.raw", "64M"])
    endpoint = Endpoint(lab.a, f"{info['private_directory']}/drover-vda.sock", lab.b, "/tmp/vda.raw", "raw",
                        info["qemu_uid"], info["qemu_gid"], "vda")
    yield endpoint
    endpoint.close()
    lab.b.run(["rm", "-f", "/tmp/vda.raw"])


def attach(tool: Tool, endpoint: Endpoint) -> dict[str, Any]:
    info = tool.call("describe", guest="small")
    tool.call("attach", guest=info["uuid"], disk="vda", node=info["disks"]["vda"]["node"], socket=endpoint.socket,
              export="vda")
    return info


def nothing_of_drovers(host: Host, name: str) -> None:
    assert not [n for n in host.qmp(name, "query-named-block-nodes", flat=True)
                if n["node-name"].startswith("drover") or n.get("dirty-bitmaps")]
    assert host.qmp(name, "query-block-jobs") == [] and host.qmp(name, "query-block-exports") == []


# ------------------------------------------------------------------------------------------ description


def test_guest_is_described(lab: Lab, guest: Guest, tool: Tool) -> None:
    info = tool.call("describe", guest="web1")
    again = tool.call("describe", guest=info["uuid"])
    for disk in (*info["disks"].values(), *again["disks"].values()):
        disk["allocation"] >>= 20  # the guest writes
    assert info == again | {"live_xml": info["live_xml"]}
    assert (info["name"], info["state"], info["persistent"], info["vcpus"]) == ("web1", "running", True, 1)
    assert info["machine"] == "pc-q35-7.2" and info["emulator"] == "/usr/bin/qemu-system-x86_64"
    vda, vdb = info["disks"]["vda"], info["disks"]["vdb"]
    assert vda["path"] == guest.disks()["vda"] and vda["format"] == "raw" and vda["virtual_size"] == 256 << 20
    assert vdb["path"] == guest.disks()["vdb"] and vdb["format"] == "qcow2" and vdb["cluster_size"] == 64 << 10
    for disk in (vda, vdb):
        assert abs(disk["allocation"] - (lab.a.du(disk["path"]) >> 20)) <= 1
    nodes = {n["node-name"]: n["file"] for n in lab.a.qmp("web1", "query-named-block-nodes", flat=True)}
    assert vda["path"] in nodes[vda["node"]] and vdb["path"] in nodes[vdb["node"]]
    assert lab.a.path(info["private_directory"]).is_dir()
    assert info["qemu_uid"] == int(lab.a.run(["id", "-u", "libvirt-qemu"]).stdout)
    assert not any(info[k] for k in ("snapshots", "checkpoints", "backup_job", "other_job", "foreign_jobs",
                                     "migration_blockers", "nbd_exports", "host_devices"))


def test_guest_that_is_off_is_described(lab: Lab, tool: Tool) -> None:
    lab.guest("off", [Disk("64M", data="8M")], start=False)
    info = tool.call("describe", guest="off")
    assert info["state"] == "shut off" and info["id"] == -1 and info["live_xml"] == "" and info["inactive_xml"]
    assert info["disks"]["vda"]["virtual_size"] == 64 << 20
    assert tool.call("state", guest=info["uuid"]) == "shut off"
    lab.a.libvirt().lookupByName("off").undefine()
    lab.a.run(["rm", "/var/lib/libvirt/images/off-vda.raw"])


def test_unknown_guest_is_said_to_be_unknown(tool: Tool) -> None:
    with pytest.raises(ToolError, match="no guest is named nobody") as e:
        tool.call("describe", guest="nobody")
    assert e.value.code == "not-found" and "virsh" in e.value.hint


def test_jobs_and_exports_of_others_are_seen(lab: Lab, guest: Guest, tool: Tool) -> None:
    node = tool.call("describe", guest="web1")["disks"]["vdb"]["node"]
    lab.a.qmp("web1", "blockdev-add", driver="null-co", node_name="other", size=128 << 20)
    lab.a.qmp("web1", "blockdev-mirror", job_id="somebody", device=node, target="other", sync="none")
    lab.a.qmp("web1", "nbd-server-start", addr={"type": "unix", "data": {"path": "/var/lib/libvirt/qemu/other.sock"}})
    lab.a.qmp("web1", "block-export-add", type="nbd", id="somebodys", node_name=node)
    info = tool.call("describe", guest="web1")
    lab.a.qmp("web1", "nbd-server-stop")
    lab.a.qmp("web1", "block-job-cancel", device="somebody", force=True)
    wait_for("the job's end", lambda: not lab.a.qmp("web1", "query-jobs"))
    lab.a.qmp("web1", "blockdev-del", node_name="other")
    assert info["foreign_jobs"] == ["mirror job somebody"]
    assert info["nbd_exports"] == ["somebodys"]


def test_snapshots_checkpoints_and_block_jobs_are_seen(lab: Lab, tool: Tool) -> None:
    lab.guest("snap", [Disk("64M", "qcow2", data="8M")], memory="128M", rate="idle")
    lab.a.virsh("snapshot-create-as", "snap", "s1")
    assert tool.call("describe", guest="snap")["snapshots"] == 1
    lab.a.virsh("snapshot-delete", "snap", "s1")
    lab.a.virsh("checkpoint-create-as", "snap", "c1")
    assert tool.call("describe", guest="snap")["checkpoints"] == 1
    lab.a.virsh("checkpoint-delete", "snap", "c1")
    # A copy that waits for its end, and a backup that waits for a reader.
    lab.a.virsh("blockcopy", "snap", "vda", "/tmp/copy.qcow2", "--wait", "--transient-job")
    info = tool.call("describe", guest="snap")
    assert info["disks"]["vda"]["block_job"] == "copy" and info["foreign_jobs"] == []
    lab.a.virsh("blockjob", "snap", "vda", "--abort")
    lab.a.run(["rm", "/tmp/copy.qcow2"])
    lab.a.run("""cat >/tmp/b.xml <<X
<domainbackup mode='pull'><server transport='unix' socket='/var/lib/libvirt/qemu/b.sock'/>
<disks><disk name='vda' backup='yes' type='file'><scratch file='/tmp/scratch'/></disk></disks></domainbackup>
X
virsh backup-begin snap /tmp/b.xml && rm /tmp/b.xml""")
    info = tool.call("describe", guest="snap")
    assert info["backup_job"] and not info["other_job"] and info["nbd_exports"]
    lab.a.virsh("domjobabort", "snap")
    lab.a.run(["rm", "-f", "/tmp/scratch"])


def test_host_answers_questions(lab: Lab, guest: Guest, tool: Tool) -> None:
    info = tool.call("describe", guest="web1")
    facts = tool.call("facts", name="web1", uuid=info["uuid"], machine=info["machine"], cpu_xml=info["cpu_xml"],
                      networks=["nowhere"])
    assert facts["hostname"] == "hosta" and facts["name_of_uuid"] == "web1" and facts["uuid_of_name"] == info["uuid"]
    assert facts["machine_supported"] and facts["cpu"] == "compatible", facts
    assert facts["networks_missing"] == ["nowhere"]
    assert facts["libvirt_version"] >= 9000000 and facts["hypervisor_version"] >= 7002000
    assert facts["free_memory"] > 1 << 28 and facts["cores"] > 0
    with Tool(lab.a, "qemu+ssh://hostb/system?no_tty=1") as other:
        answer = other.call("facts", name="web1", uuid=info["uuid"], machine="pc-q35-99.9",
                            cpu_xml="<cpu mode='custom' match='exact'><model>no-such-cpu</model></cpu>")
    assert answer["hostname"] == "hostb" and answer["host_uuid"] != facts["host_uuid"]
    assert answer["name_of_uuid"] == "" and answer["uuid_of_name"] == ""
    assert not answer["machine_supported"] and "99.9" in answer["machine_problem"]
    assert answer["cpu"] != "compatible" and answer["cpu_problem"]


@pytest.mark.parametrize("uri, code", [("qemu+ssh://nowhere/system?no_tty=1", "unreachable"),
                                       ("qemu+ssh://hostb/system?no_tty=1&keyfile=/dev/null", "denied")])
def test_host_that_cannot_be_reached(lab: Lab, uri: str, code: str) -> None:
    if code == "denied":
        lab.b.run("mv /root/.ssh/authorized_keys /root/.ssh/away")
    try:
        with pytest.raises(ToolError) as e:
            Tool(lab.a, uri)
        assert e.value.code == code, str(e.value)
    finally:
        if code == "denied":
            lab.b.run("mv /root/.ssh/away /root/.ssh/authorized_keys")


# ----------------------------------------------------------------------------------- mirror and exports


def test_mirror_carries_writes_and_leaves_nothing(lab: Lab, small: Guest, tool: Tool, endpoint: Endpoint) -> None:
    info = attach(tool, endpoint)
    mirror = tool.mirror(info["uuid"], "vda")
    assert mirror["alive"] and mirror["bitmap"] and mirror["status"] == "ready" and mirror["socket"] == endpoint.socket
    # A filter lies above the disk now; the disk's node is still the same.
    again = tool.call("describe", guest="small")
    assert again["disks"]["vda"]["node"] == info["disks"]["vda"]["node"]
    assert again["disks"]["vda"]["block_job"] == "" and again["foreign_jobs"] == []
    wait_for("the bitmap to see writes", lambda: tool.mirror(info["uuid"], "vda")["dirty"] > 0)
    wait_for("the target to get them", lambda: lab.b.du("/tmp/vda.raw") > 0)
    with pytest.raises(ToolError) as e:
        tool.call("attach", guest=info["uuid"], disk="vda", node=info["disks"]["vda"]["node"], export="vda",
                  socket=endpoint.socket + "2")
    assert e.value.code == "busy"
    assert tool.mirror(info["uuid"], "vda")["alive"]
    tool.call("detach", guest=info["uuid"], disk="vda")
    assert tool.call("attached", guest=info["uuid"])["nothing"]
    nothing_of_drovers(lab.a, "small")
    tool.call("detach", guest=info["uuid"], disk="vda")
    assert small.verify()["ok"]


def test_bitmap_can_outlive_the_mirror(lab: Lab, small: Guest, tool: Tool, endpoint: Endpoint) -> None:
    info = attach(tool, endpoint)
    tool.call("detach", guest=info["uuid"], disk="vda", keep_bitmap=True)
    state = tool.mirror(info["uuid"], "vda")
    assert state["bitmap"] and not state["job"] and not state["node"]
    wait_for("the bitmap to see writes", lambda: tool.mirror(info["uuid"], "vda")["dirty"] > 0)
    attach(tool, endpoint)
    assert tool.mirror(info["uuid"], "vda")["dirty"] > 0  # the same one
    tool.call("detach", guest=info["uuid"], disk="vda")
    nothing_of_drovers(lab.a, "small")


def test_mirror_can_end_at_any_moment(lab: Lab, tool: Tool) -> None:
    """QEMU 7.2 frees what mirrored writes under way still use when the job is cancelled with "force"."""
    small = lab.guest("small", [Disk("64M", data="8M")], memory="256M", rate="max")
    info = tool.call("describe", guest="small")
    lab.b.run(["qemu-img", "create", "-q", "-f", "raw", "/tmp/vda.raw", "64M"])
    endpoint = Endpoint(lab.a, f"{info['private_directory']}/drover-vda.sock", lab.b, "/tmp/vda.raw", "raw",
                        info["qemu_uid"], info["qemu_gid"], "vda")
    try:
        for _ in range(60):
            attach(tool, endpoint)
            tool.call("detach", guest=info["uuid"], disk="vda")
        nothing_of_drovers(lab.a, "small")
        assert small.verify()["ok"]
    finally:
        endpoint.close()
        lab.b.run(["rm", "-f", "/tmp/vda.raw"])


@pytest.mark.parametrize("part", ["bitmap", "node", "both"])
def test_what_is_half_there_is_removed(lab: Lab, small: Guest, tool: Tool, endpoint: Endpoint, part: str) -> None:
    info = tool.call("describe", guest="small")
    if part in ("bitmap", "both"):
        lab.a.qmp("small", "block-dirty-bitmap-add", node=info["disks"]["vda"]["node"], name="drover-vda-3")
    if part in ("node", "both"):
        lab.a.qmp("small", "blockdev-add", driver="nbd", node_name="drover-vda", export="vda",
                  server={"type": "unix", "path": endpoint.socket})
    tool.call("detach", guest=info["uuid"], disk="vda")
    nothing_of_drovers(lab.a, "small")


def test_mirror_that_cannot_be_made_is_undone(lab: Lab, small: Guest, tool: Tool) -> None:
    info = tool.call("describe", guest="small")
    with pytest.raises(ToolError) as e:
        tool.call("attach", guest=info["uuid"], disk="vda", node=info["disks"]["vda"]["node"],
                  socket=f"{info['private_directory']}/nobody.sock", export="vda")
    assert e.value.code == "io" and "nobody.sock" in str(e.value) and "disk vda of guest small" in str(e.value)
    nothing_of_drovers(lab.a, "small")
    with pytest.raises(ToolError) as e:
        tool.call("attach", guest=info["uuid"], disk="vdz", node="no-such-node", socket="/x", export="vda")
    assert e.value.code == "not-found"
    nothing_of_drovers(lab.a, "small")


def test_guest_does_not_notice_the_end_of_the_endpoint(lab: Lab, small: Guest, tool: Tool, endpoint: Endpoint) -> None:
    info = attach(tool, endpoint)
    tool.call("subscribe", guest=info["uuid"])
    endpoint.kill()
    ended = tool.event("mirror-ended")
    assert ended["disk"] == "vda" and ended["detail"]
    wait_for("the job to be gone", lambda: not tool.mirror(info["uuid"], "vda")["job"])
    state = tool.mirror(info["uuid"], "vda")
    assert state["bitmap"] and not state["alive"]
    wait_for("the bitmap to see writes", lambda: tool.mirror(info["uuid"], "vda")["dirty"] > 0)
    tool.call("detach", guest=info["uuid"], disk="vda")
    nothing_of_drovers(lab.a, "small")
    verdict = small.verify()
    assert verdict["ok"] and verdict["io_errors"] == 0


def test_mirror_of_a_guest_that_goes(lab: Lab, small: Guest, tool: Tool, endpoint: Endpoint) -> None:
    info = attach(tool, endpoint)
    tool.call("subscribe", guest=info["uuid"])
    tool.call("destroy", guest=info["uuid"])
    assert tool.event("stopped")["detail"] == "destroyed"
    tool.call("detach", guest=info["uuid"], disk="vda")
    tool.call("unexport", guest=info["uuid"], socket=f"{info['private_directory']}/drover-export.sock")
    tool.call("destroy", guest=info["uuid"])
    assert tool.call("state", guest=info["uuid"]) == "shut off"
    with pytest.raises(ToolError) as e:
        tool.call("attached", guest=info["uuid"])
    assert e.value.code == "not-found"
    tool.call("detach_all", guest=info["uuid"])
    tool.call("undefine", guest=info["uuid"])
    tool.call("undefine", guest=info["uuid"])
    tool.call("detach", guest=info["uuid"], disk="vda")
    lab.a.run(["rm", info["disks"]["vda"]["path"]])


def test_exports_are_the_disks(lab: Lab, guest: Guest, tool: Tool) -> None:
    guest.command("stop")
    info = tool.call("describe", guest="web1")
    path = f"{info['private_directory']}/drover-export.sock"
    nodes = {n: d["node"] for n, d in info["disks"].items()}
    tool.call("export", guest=info["uuid"], socket=path, disks=nodes)
    status = lab.a.path(path).stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o600)
    for name, disk in info["disks"].items():
        uri = f"nbd+unix:///{name}?socket={lab.a.path(path)}"
        extents = json.loads(subprocess.run(["qemu-img", "map", "--output=json", uri], capture_output=True,
                                            check=True).stdout)
        assert 0 < sum(e["length"] for e in extents if e["data"]) < disk["virtual_size"]  # thin is seen
        compared = subprocess.run(["qemu-img", "compare", "-U", "-f", "raw", "-F", disk["format"], uri,
                                   str(lab.a.path(disk["path"]))], capture_output=True, text=True)
        assert compared.returncode == 0, compared
        written = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, text=True)
        assert "Permission denied" in written.stdout + written.stderr or "read-only" in written.stdout + written.stderr
    with pytest.raises(ToolError) as e:
        tool.call("export", guest=info["uuid"], socket=path, disks=nodes)
    assert e.value.code == "already-exists"
    with pytest.raises(ToolError) as e:
        tool.call("export", guest=info["uuid"], socket=path + "2", disks=nodes)
    assert e.value.code == "busy" and "drover-vd" in str(e.value)
    tool.call("unexport", guest=info["uuid"], socket=path)
    assert not lab.a.path(path).exists()
    tool.call("unexport", guest=info["uuid"], socket=path)
    with pytest.raises(ToolError):
        tool.call("export", guest=info["uuid"], socket=path, disks={"vda": nodes["vda"], "vdz": "no-such-node"})
    nothing_of_drovers(lab.a, "web1")
    assert not lab.a.path(path).exists()
    guest.command("start")


@pytest.mark.parametrize("exporting", [True, False])
def test_nbd_server_that_somebody_else_has(lab: Lab, small: Guest, tool: Tool, exporting: bool) -> None:
    info = tool.call("describe", guest="small")
    node = info["disks"]["vda"]["node"]
    lab.a.qmp("small", "nbd-server-start", addr={"type": "unix", "data": {"path": "/var/lib/libvirt/qemu/other.sock"}})
    if exporting:
        lab.a.qmp("small", "block-export-add", type="nbd", id="backup", node_name=node, name="backup")
    with pytest.raises(ToolError) as e:
        tool.call("export", guest=info["uuid"], socket=f"{info['private_directory']}/drover.sock", disks={"vda": node})
    assert e.value.code == "busy" and ("backup" in str(e.value)) == exporting
    assert len(lab.a.qmp("small", "query-block-exports")) == exporting
    lab.a.qmp("small", "nbd-server-stop")  # it was left alone

# ---------------------------------------------------------------------- what is written, and coming back to it


def raw_copy(host: Host, disk: dict[str, Any], where: str) -> None:
    """The disk's content now; its guest must be quiet."""
    host.run(["qemu-img", "convert", "-U", "-f", disk["format"], "-O", "raw", disk["path"], where])


def changed_blocks(before: Path, after: Path) -> set[int]:
    """The 4 KiB blocks that differ."""
    changed = set()
    with open(before, "rb") as a, open(after, "rb") as b:
        for base in range(0, before.stat().st_size, 1 << 20):
            x, y = a.read(1 << 20), b.read(1 << 20)
            if x != y:
                changed |= {(base + i) // 4096 for i in range(0, len(x), 4096) if x[i:i + 4096] != y[i:i + 4096]}
    return changed


def blocks_of(extents: list[list[int]]) -> set[int]:
    return {block for offset, length in extents for block in range(offset // 4096, -(-(offset + length) // 4096))}


def test_no_write_is_missed_by_alternating_bitmaps(lab: Lab, tool: Tool) -> None:
    """A guest that writes all the time, with an iothread, throttled, on qcow2; ten changes of generation."""
    throttled = "<iotune><total_bytes_sec>200000000</total_bytes_sec></iotune>"
    guest = lab.guest("writes", [Disk("96M", data="64M", driver={"iothread": "1"}),
                                 Disk("96M", "qcow2", data="64M", xml=throttled)], memory="256M", rate=1500,
                      options="w.report=250")
    guest.command("stop")
    info = tool.call("describe", guest="writes")
    uuid, nodes = info["uuid"], {n: d["node"] for n, d in info["disks"].items()}
    for name, disk in info["disks"].items():
        raw_copy(lab.a, disk, f"/tmp/{name}.before")
    tool.call("begin_bitmaps", guest=uuid, disks=nodes, generation=1)
    guest.command("start")
    read: dict[str, set[int]] = {name: set() for name in nodes}
    for generation in range(2, 12):
        guest.wait_report()
        tool.call("begin_bitmaps", guest=uuid, disks=nodes, generation=generation)
        for name in nodes:
            # As the next runner would: what the stopped one holds is read while the guest writes.
            stopped = [b for b in tool.call("attached", guest=uuid)["bitmaps"] if b["disk"] == name]
            assert [(b["generation"], b["recording"]) for b in sorted(stopped, key=lambda b: b["generation"])] == [
                (generation - 1, False), (generation, True)]
            read[name] |= blocks_of(tool.call("read_bitmaps", guest=uuid, disk=name))
        tool.call("end_bitmaps", guest=uuid, disks=list(nodes), older_than=generation)
    guest.command("stop")
    for name, disk in info["disks"].items():
        read[name] |= blocks_of(tool.call("read_bitmaps", guest=uuid, disk=name))
        raw_copy(lab.a, disk, f"/tmp/{name}.after")
        changed = changed_blocks(lab.a.path(f"/tmp/{name}.before"), lab.a.path(f"/tmp/{name}.after"))
        assert len(changed) > 500
        assert changed <= read[name], sorted(changed - read[name])[:10]
    left = tool.call("attached", guest=uuid)
    assert left["exports"] == [] and left["nbd_socket"] == "" and len(left["bitmaps"]) == 2, left
    tool.call("detach_all", guest=uuid)
    nothing_of_drovers(lab.a, "writes")
    lab.a.run("rm /tmp/*.before /tmp/*.after")
    guest.command("start")
    assert guest.verify()["ok"]


def test_generations_are_in_order(lab: Lab, small: Guest, tool: Tool) -> None:
    info = tool.call("describe", guest="small")
    uuid, disks = info["uuid"], {"vda": info["disks"]["vda"]["node"]}
    with pytest.raises(ToolError) as e:
        tool.call("read_bitmaps", guest=uuid, disk="vda")
    assert e.value.code == "not-found"
    tool.call("begin_bitmaps", guest=uuid, disks=disks, generation=5)
    tool.call("begin_bitmaps", guest=uuid, disks=disks, generation=5)  # it records: nothing to do
    tool.call("begin_bitmaps", guest=uuid, disks=disks, generation=7)
    for generation in (5, 6):
        with pytest.raises(ToolError) as e:
            tool.call("begin_bitmaps", guest=uuid, disks=disks, generation=generation)
        assert e.value.code == "already-exists"
    with pytest.raises(ToolError) as e:
        tool.call("begin_bitmaps", guest=uuid, disks=disks | {"vdz": "no-such-node"}, generation=8)
    assert e.value.code == "not-found"
    assert [(b["generation"], b["recording"], b["granularity"]) for b in tool.call("attached", guest=uuid)["bitmaps"]
            if b["recording"]] == [(7, True, 4096)]
    tool.call("end_bitmaps", guest=uuid, disks=["vda"], older_than=7)
    tool.call("end_bitmaps", guest=uuid, disks=["vda"], older_than=7)
    assert [b["generation"] for b in tool.call("attached", guest=uuid)["bitmaps"]] == [7]
    tool.call("detach_all", guest=uuid)
    nothing_of_drovers(lab.a, "small")


def test_bitmaps_are_read_beside_drovers_exports_and_not_beside_others(lab: Lab, small: Guest, tool: Tool) -> None:
    info = tool.call("describe", guest="small")
    uuid, nodes = info["uuid"], {"vda": info["disks"]["vda"]["node"]}
    exports = f"{info['private_directory']}/drover-export.sock"
    tool.call("begin_bitmaps", guest=uuid, disks=nodes, generation=1)
    tool.call("export", guest=uuid, socket=exports, disks=nodes)
    wait_for("writes", lambda: tool.call("read_bitmaps", guest=uuid, disk="vda"))
    there = tool.call("attached", guest=uuid)
    assert there["exports"] == ["drover-vda"] and there["nbd_socket"] == exports and not there["foreign_exports"]
    tool.call("unexport", guest=uuid, socket=exports)
    # Interrupted in the middle: what is left is removed by the next one.
    lab.a.qmp("small", "blockdev-add", driver="null-co", node_name="drover-bitmap-vda", size=64 << 20)
    lab.a.qmp("small", "block-dirty-bitmap-add", node="drover-bitmap-vda", name="drover-bitmap-vda")
    assert tool.call("attached", guest=uuid)["scratch"] == ["vda"]
    assert tool.call("read_bitmaps", guest=uuid, disk="vda")
    lab.a.qmp("small", "nbd-server-start", addr={"type": "unix", "data": {"path": "/var/lib/libvirt/qemu/other.sock"}})
    lab.a.qmp("small", "block-export-add", type="nbd", id="backup", node_name=nodes["vda"], name="backup")
    with pytest.raises(ToolError) as e:
        tool.call("read_bitmaps", guest=uuid, disk="vda")
    assert e.value.code == "busy"
    there = tool.call("attached", guest=uuid)
    assert there["foreign_exports"] and there["exports"] == [] and len(there["bitmaps"]) == 1
    tool.call("detach_all", guest=uuid)
    assert [e["id"] for e in lab.a.qmp("small", "query-block-exports")] == ["backup"]  # it was left alone
    lab.a.qmp("small", "nbd-server-stop")
    nothing_of_drovers(lab.a, "small")


@pytest.mark.parametrize("rate", ["max", "idle"])
def test_mirror_is_attached_again_after_its_endpoint_died(lab: Lab, tool: Tool, rate: str) -> None:
    """Twenty times; an idle guest's QEMU does not even know that its endpoint is gone."""
    small = lab.guest("small", [Disk("64M", data="8M")], memory="256M", rate=rate)
    info = tool.call("describe", guest="small")
    lab.b.run(["qemu-img", "create", "-q", "-f", "raw", "/tmp/vda.raw", "64M"])
    process = tool.call("attached", guest=info["uuid"])["process"]
    for _ in range(20):
        endpoint = Endpoint(lab.a, f"{info['private_directory']}/drover-vda.sock", lab.b, "/tmp/vda.raw", "raw",
                            info["qemu_uid"], info["qemu_gid"], "vda")
        try:
            attach(tool, endpoint)
            assert tool.mirror(info["uuid"], "vda")["alive"]
            endpoint.kill()
        finally:
            endpoint.close()
    there = tool.call("attached", guest=info["uuid"])
    assert [(b["generation"], b["recording"]) for b in there["bitmaps"]] == [(1, True)]
    assert there["process"] == process != ""
    tool.call("detach_all", guest=info["uuid"])
    nothing_of_drovers(lab.a, "small")
    verdict = small.verify()
    assert verdict["ok"] and verdict["io_errors"] == 0
    lab.b.run(["rm", "-f", "/tmp/vda.raw"])


def test_all_of_drovers_is_removed(lab: Lab, small: Guest, tool: Tool, endpoint: Endpoint) -> None:
    info = attach(tool, endpoint)
    uuid, node = info["uuid"], info["disks"]["vda"]["node"]
    tool.call("begin_bitmaps", guest=uuid, disks={"vda": node}, generation=2)
    tool.call("export", guest=uuid, socket=f"{info['private_directory']}/drover-export.sock", disks={"vda": node})
    there = tool.call("attached", guest=uuid)
    assert there["mirrors"]["vda"]["alive"] and len(there["bitmaps"]) == 2 and there["nbd_socket"] and not there["nothing"]
    tool.call("detach_all", guest=uuid, keep_bitmaps=True)
    there = tool.call("attached", guest=uuid)
    assert not there["mirrors"] and not there["exports"] and not there["nbd_socket"] and len(there["bitmaps"]) == 2
    for _ in range(2):
        tool.call("detach_all", guest=uuid)
        assert tool.call("attached", guest=uuid)["nothing"]
    nothing_of_drovers(lab.a, "small")
    assert small.verify()["ok"]


def test_another_qemu_is_told_from_the_one_before(lab: Lab, small: Guest, tool: Tool) -> None:
    info = tool.call("describe", guest="small")
    first = tool.call("attached", guest=info["uuid"])
    lab.a.restart_libvirtd()
    tool.call("reconnect")
    assert tool.call("attached", guest=info["uuid"]) == first
    lab.a.virsh("destroy", "small")
    lab.a.virsh("start", "small")
    assert tool.call("attached", guest=info["uuid"])["process"] not in ("", first["process"])


@pytest.mark.parametrize("side", ["source", "target"])
def test_connection_is_made_again_after_libvirtd_restarted(lab: Lab, small: Guest, endpoint: Endpoint, side: str) -> None:
    """The mirror goes on; subscriptions, too; also when it happens again."""
    host = lab.a if side == "source" else lab.b
    with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1") as tool:
        info = attach(tool, endpoint)
        tool.call("subscribe", guest=info["uuid"], on=side)
        for _ in range(2):
            mark = tool.mark()
            host.restart_libvirtd()
            tool.event("connection-lost", on=side, mark=mark)
            with pytest.raises(ToolError) as e:
                tool.call("state", guest=info["uuid"], on=side)
            assert e.value.code == "unreachable"
            tool.call("reconnect", on=side)
            tool.call("reconnect", on=side)  # nothing to do
            assert tool.mirror(info["uuid"], "vda")["alive"]
            if side == "source":
                tool.call("suspend", guest=info["uuid"])
                assert tool.event("suspended", mark=mark)
                tool.call("resume", guest=info["uuid"])
                assert tool.event("resumed", mark=mark)
            else:
                tool.call("facts", on="target")
        assert len([e for e in tool.events() if e["event"] == "connection-lost"]) == 2
        if side == "source":
            endpoint.kill()
            tool.event("mirror-ended")
        tool.call("detach_all", guest=info["uuid"])
    nothing_of_drovers(lab.a, "small")
    assert small.verify()["ok"]


def test_host_that_is_not_back_yet(lab: Lab) -> None:
    with Tool(lab.a) as tool:
        lab.a.stop_libvirtd()
        wait_for("the connection's end", lambda: not tool.answer(tool.start("facts"))["ok"])
        with pytest.raises(ToolError) as e:
            tool.call("reconnect")
        assert e.value.code == "unreachable"
        lab.a.start_libvirtd()
        tool.call("reconnect")
        tool.call("facts")



# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("scheme, connections", [("unix", 1), ("unix", 3), ("tcp", 1), ("tcp", 3)])
def test_guest_moves(lab: Lab, guest: Guest, scheme: str, connections: int) -> None:
    with Move(lab, guest, lab.b, scheme=scheme) as move:
        move.ready()
        mark = move.tool.mark()
        lab_mark = lab.events.mark()
        migration = move.migrate(connections=connections)
        paused = move.tool.event("suspended", "target", mark)
        # The barrier: the target stands still until it is told to go on, and has not opened its disks.
        assert move.tool.call("state", on="target", guest=move.uuid) == "paused"
        assert not [e for e in move.tool.events(mark) if e["event"] == "cpus-running" and e["on"] == "target"]
        move.release()
        for name, disk in move.info["disks"].items():
            assert lab.compare(lab.a, disk["path"], lab.b, move.paths[name], disk["format"], disk["format"]) is None
        move.tool.call("resume", on="target", guest=move.uuid)
        running = move.tool.event("cpus-running", "target", mark)
        move.tool.result(migration)
        stopped = move.tool.event("stopped", "source", mark)
        assert stopped["detail"] == "migrated" and paused["detail"] == "paused"
        names = [(e["event"], e["on"]) for e in move.tool.events(mark)]
        order = [("cpus-stopped", "source"), ("quiesced", "source"), ("suspended", "target"), ("cpus-running", "target")]
        assert [n for n in names if n in order] == order and names.index(("suspended", "source")) < names.index(order[2])
        assert move.relay is not None and move.relay.connections >= connections
        wait_for("QEMU's events", lambda: lab.events.blackout("web1", lab_mark) is not None, 30)
        assert milliseconds(paused, running) > 0
        assert guest.host is lab.b
        # The definition there is the new one and persists; the old one is still here.
        xml = lab.b.libvirt().lookupByName("web1").XMLDesc(2)
        assert all(path in xml for path in move.paths.values())
        assert not any(d["path"] in xml for d in move.info["disks"].values())
        assert move.tool.call("state", guest=move.uuid) == "shut off"
        move.finish()
        with pytest.raises(ToolError, match="no guest"):
            move.tool.call("state", guest=move.uuid)
    assert guest.verify()["ok"], guest.mismatches()


def test_resuming_from_the_event_shortens_the_blackout(lab: Lab, guest: Guest) -> None:
    """The migration's call returns when the source's QEMU has been ended, well after the target could run."""
    with Move(lab, guest, lab.b) as move:
        move.ready()
        migration = move.migrate()
        move.tool.event("suspended", "target")
        move.release()
        resume = move.tool.start("resume", on="target", guest=move.uuid)
        resumed, returned = move.tool.answer(resume), move.tool.answer(migration)
        assert resumed["ok"] and returned["ok"] and resumed["time"] < returned["time"]
        stopped = move.tool.event("cpus-stopped", "source")
        print(f"blackout {milliseconds(stopped, move.tool.event('cpus-running', 'target')):.0f} ms;"
              f" waiting for the call: {milliseconds(stopped, returned):.0f} ms and the resume")
        move.finish()


def test_guest_without_disks_moves(lab: Lab, guest: Guest) -> None:
    # (Its disks stay behind, idle: nothing is mirrored.)
    guest.command("stop")
    with Move(lab, guest, lab.b) as move:
        for path in guest.disks().values():
            info = json.loads(lab.a.run(["qemu-img", "info", "-U", "--output=json", path]).stdout)
            lab.b.run(["qemu-img", "create", "-q", "-f", info["format"], path, str(info["virtual-size"])])
        move.open_memory_path()
        migration = move.migrate()
        move.tool.event("suspended", "target")
        move.tool.result(migration)
        move.tool.call("resume", on="target", guest=move.uuid)
        assert guest.host is lab.b
        move.finish()


def test_migration_is_cancelled(lab: Lab, small: Guest) -> None:
    with Move(lab, small, lab.b) as move:
        move.attach()
        move.open_memory_path()
        before = lab.a.qmp("small", "query-migrate-parameters")["max-bandwidth"]
        migration = move.migrate(bandwidth=300_000)  # would take minutes
        move.tool.event("progress")
        wait_for("the limit", lambda: lab.a.qmp("small", "query-migrate-parameters")["max-bandwidth"] == 300_000, 30)
        move.tool.call("abort", guest=move.uuid)
        with pytest.raises(ToolError) as e:
            move.tool.result(migration)
        assert e.value.code == "cancelled", str(e.value)
        assert move.tool.call("state", guest=move.uuid) == "running"
        with pytest.raises(ToolError, match="no guest"):
            move.tool.call("state", on="target", guest=move.uuid)
        assert move.tool.mirror(move.uuid, "vda")["alive"]
        limits = lab.a.qmp("small", "query-migrate-parameters")
        assert (limits["downtime-limit"], limits["max-cpu-throttle"], limits["cpu-throttle-initial"]) == (300, 99, 20)
        assert limits["max-bandwidth"] == before
        move.tool.call("abort", guest=move.uuid)  # nothing to cancel: fine
        move.detach()
        lab.b.run(["rm", "-r", move.directory])
        lab.a.run(["rm", "-r", move.directory])
    assert small.verify()["ok"]


def test_bandwidth_is_changed(lab: Lab, guest: Guest) -> None:
    def limit_of_qemu() -> int:
        return int(lab.a.qmp("web1", "query-migrate-parameters")["max-bandwidth"])

    with Move(lab, guest, lab.b) as move:
        move.ready()
        mark = move.tool.mark()
        migration = move.migrate(bandwidth=300_000)  # would take minutes
        move.tool.event("progress")
        wait_for("less than libvirt's least limit", lambda: limit_of_qemu() == 300_000, 30)
        move.tool.call("set_bandwidth", bandwidth=600_000)
        wait_for("another limit", lambda: limit_of_qemu() == 600_000, 30)
        move.tool.call("set_bandwidth", bandwidth=0)
        move.hand_over(migration, mark)
    assert guest.verify()["ok"], guest.mismatches()


def test_memory_path_is_cut_then_the_migration_is_repeated(lab: Lab, guest: Guest) -> None:
    with Move(lab, guest, lab.b) as move:
        move.ready()
        assert move.relay is not None
        migration = move.migrate(bandwidth=8 << 20)
        move.tool.event("progress")
        move.relay.cut()
        with pytest.raises(ToolError):
            move.tool.result(migration)
        assert move.tool.call("state", guest=move.uuid) == "running"
        assert all(move.tool.mirror(move.uuid, d)["alive"] for d in move.info["disks"])
        move.relay.close()
        for host in (lab.a, lab.b):
            subprocess.run(["rm", "-r", str(host.path(move.memory_directory))], check=True)
        move.open_memory_path()
        mark = move.tool.mark()
        migration = move.migrate()
        move.hand_over(migration, mark)
    assert guest.verify()["ok"], guest.mismatches()


def test_memory_that_changes_too_fast(lab: Lab) -> None:
    """The allowed downtime is raised, then the guest throttled, then it is given up."""
    guest = lab.guest("web1", [Disk("16M")], memory="256M", rate="idle", options="w.mem=16M w.memrate=max")
    with Move(lab, guest, lab.b) as move:
        move.attach()
        move.open_memory_path()
        migration = move.migrate(bandwidth=16 << 20, initial_downtime=20, max_downtime=60, max_throttle=30,
                                 give_up_after=30)
        with pytest.raises(ToolError, match="faster than it can be sent") as e:
            move.tool.result(migration)
        assert e.value.code == "cancelled"
        progress = move.tool.progress()
        limits = [p["downtime_limit_ms"] for p in progress]
        assert limits[0] == 20 and max(limits) == 60 and limits == sorted(limits)
        assert 1 < max(p["throttle"] for p in progress) <= 30
        assert move.tool.call("state", guest=move.uuid) == "running"
        move.detach()
        for host in (lab.a, lab.b):
            host.run(["rm", "-r", move.directory])


def test_two_migrations_of_one_guest(lab: Lab, small: Guest) -> None:
    with Move(lab, small, lab.b) as move:
        move.attach()
        move.open_memory_path()
        first = move.migrate(bandwidth=1 << 20)
        move.tool.event("progress")
        with pytest.raises(ToolError) as e:
            move.tool.result(move.migrate())
        assert e.value.code == "busy"
        move.tool.call("abort", guest=move.uuid)
        with pytest.raises(ToolError):
            move.tool.result(first)
        move.detach()
        for host in (lab.a, lab.b):
            host.run(["rm", "-r", move.directory])


# ------------------------------------------------------------------------- invariant 6: never on two hosts


@pytest.mark.parametrize("guarded", [False, True])
def test_source_is_not_resumed_while_the_target_may_run(lab: Lab, guest: Guest, guarded: bool) -> None:
    """libvirt's client resumes the source when the target's answer to Finish is lost, though the target has the
    guest and was told to be ready. Only the guard on the source's images keeps it from running."""
    rpc = RpcRelay(lab.a, lab.b)
    try:
        with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1") as second, \
                Move(lab, guest, lab.b, target_uri=rpc.uri) as move:
            guest.command("stop")
            move.attach()
            move.copy()
            guest.command("start")
            move.open_memory_path()
            paths = [d["path"] for d in move.info["disks"].values()]
            with pytest.raises(ToolError) as e:  # its own QEMU writes to them
                move.tool.call("guard", paths=paths)
            assert e.value.code == "busy"
            # Held until the guard is there (or not): the relay loses the answer only then.
            hold = threading.Event()
            rpc.hold = hold
            rpc.lose_answer_to = RpcRelay.FINISH3_PARAMS
            migration = move.migrate()
            move.tool.event("suspended", "target")
            if guarded:
                move.tool.call("guard", paths=paths)
            hold.set()
            with pytest.raises(ToolError) as e:
                move.tool.result(migration)
            assert e.value.code == "unreachable" and rpc.lost.is_set()
            # It was the migration's own connection.
            assert move.tool.call("state", on="target", guest=move.uuid) == "paused"
            if not guarded:  # what would be the disaster
                assert second.call("state", on="source", guest=move.uuid) == "running"
                second.call("destroy", on="target", guest=move.uuid)
                second.call("undefine", on="target", guest=move.uuid)
                for name in move.info["disks"]:
                    second.call("detach", on="source", guest=move.uuid, disk=name)
                for host in (lab.a, lab.b):
                    host.run(["rm", "-r", move.directory])
            else:
                assert second.call("state", on="source", guest=move.uuid) == "paused"
                move.release()
                second.call("resume", on="target", guest=move.uuid)
                with pytest.raises(ToolError, match='Failed to get "write" lock'):
                    second.call("resume", on="source", guest=move.uuid)
                assert second.call("state", on="source", guest=move.uuid) == "paused"
                assert guest.host is lab.b
                second.call("destroy", on="source", guest=move.uuid)
                move.finish()
    finally:
        rpc.close()
    assert guest.verify()["ok"], guest.mismatches()


# ------------------------------------------------------------- who dies in the handover: docs/handover.md


def away(move: Move) -> None:
    """What a move that did not happen leaves in the guest and on the disks."""
    with Tool(move.source) as tool:
        for name in move.info["disks"]:
            tool.call("detach", guest=move.uuid, disk=name)
    for host in (move.source, move.target):
        host.run(["rm", "-r", move.directory])


def test_runner_dies_while_memory_moves(lab: Lab, small: Guest) -> None:
    with Move(lab, small, lab.b) as move:
        move.attach()
        move.open_memory_path()
        move.migrate(bandwidth=2 << 20)
        move.tool.event("progress")
        move.tool.kill()
        with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1") as second:
            def taken_back() -> bool:
                try:
                    second.call("state", on="target", guest=move.uuid)
                    return False
                except ToolError as e:
                    return e.code == "not-found"
            wait_for("the target's half guest to be ended", taken_back)
            wait_for("libvirt's job to end", lambda: not second.call("describe", guest=move.uuid)["other_job"])
            assert second.call("state", guest=move.uuid) == "running"
            assert second.mirror(move.uuid, "vda")["alive"]
        away(move)
    assert small.verify()["ok"]


def test_runner_dies_between_finish_and_confirm(lab: Lab, guest: Guest) -> None:
    """Both guests stand still: whoever comes next can go forward."""
    rpc = RpcRelay(lab.a, lab.b)
    rpc.hold = threading.Event()
    rpc.lose_answer_to = RpcRelay.FINISH3_PARAMS
    try:
        with Move(lab, guest, lab.b, target_uri=rpc.uri) as move:
            guest.command("stop")
            move.attach()
            move.copy()
            guest.command("start")
            move.open_memory_path()
            move.migrate()
            move.tool.event("suspended", "target")
            move.tool.kill()
            rpc.hold.set()
            with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1") as second:
                wait_for("libvirt's job to end", lambda: not second.call("describe", guest=move.uuid)["other_job"])
                assert second.call("state", guest=move.uuid) == "paused"
                assert second.call("state", on="target", guest=move.uuid) == "paused"
                second.call("guard", paths=[d["path"] for d in move.info["disks"].values()])
                move.release()
                second.call("resume", on="target", guest=move.uuid)
                second.call("destroy", guest=move.uuid)
                second.call("undefine", guest=move.uuid)
            for disk in move.info["disks"].values():
                lab.a.path(disk["path"]).unlink()
    finally:
        rpc.close()
    assert guest.host is lab.b and guest.verify()["ok"], guest.mismatches()


def test_source_libvirtd_restarts_while_memory_moves(lab: Lab, small: Guest) -> None:
    with Move(lab, small, lab.b) as move:
        move.attach()
        move.open_memory_path()
        migration = move.migrate(bandwidth=2 << 20)
        move.tool.event("progress")
        lab.a.restart_libvirtd()
        with pytest.raises(ToolError) as e:
            move.tool.result(migration)
        assert e.value.code == "unreachable", str(e.value)
        with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1") as second:
            assert second.call("state", guest=move.uuid) == "running"
            assert second.mirror(move.uuid, "vda")["alive"]
            with pytest.raises(ToolError, match="no guest"):
                second.call("state", on="target", guest=move.uuid)
        away(move)
    assert small.verify()["ok"]


def test_target_libvirtd_restarts_before_the_resume(lab: Lab, guest: Guest) -> None:
    with Move(lab, guest, lab.b) as move:
        move.ready()
        migration = move.migrate()
        move.tool.event("suspended", "target")
        move.tool.result(migration)
        lab.b.restart_libvirtd()
        move.tool.event("connection-lost", "target")
        move.release()
        with pytest.raises(ToolError) as e:
            move.tool.call("resume", on="target", guest=move.uuid)
        assert e.value.code == "unreachable"
        with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1") as second:
            assert second.call("state", on="target", guest=move.uuid) == "paused"
            second.call("resume", on="target", guest=move.uuid)
        move.finish()
    assert guest.host is lab.b and guest.verify()["ok"], guest.mismatches()


# -------------------------------------------------------------------------------------- events and life


def test_life(lab: Lab, small: Guest, tool: Tool) -> None:
    uuid = tool.call("describe", guest="small")["uuid"]
    tool.call("subscribe", guest=uuid)
    tool.call("suspend", guest=uuid)
    assert tool.event("suspended")["detail"] == "paused" and tool.call("state", guest=uuid) == "paused"
    tool.call("resume", guest=uuid)
    assert tool.event("resumed")["detail"] == "unpaused" and tool.event("cpus-running")["stamp"] > 0
    tool.call("resume", guest=uuid)
    tool.call("autostart", guest=uuid, value=True)
    assert tool.call("describe", guest=uuid)["autostart"]
    tool.call("autostart", guest=uuid, value=False)
    xml = tool.call("describe", guest=uuid)["inactive_xml"]
    tool.call("undefine", guest=uuid)
    tool.event("undefined")
    assert not tool.call("describe", guest=uuid)["persistent"]
    tool.call("define", xml=xml)
    tool.event("defined")
    assert tool.call("describe", guest=uuid)["persistent"]


def test_connection_that_breaks_is_noticed(lab: Lab, small: Guest) -> None:
    with Tool(lab.a) as tool:
        uuid = tool.call("describe", guest="small")["uuid"]
        tool.call("subscribe", guest=uuid)
        lab.a.restart_libvirtd()
        tool.event("connection-lost")
        with pytest.raises(ToolError) as e:
            tool.call("state", guest=uuid)
        assert e.value.code == "unreachable", str(e.value)
    with Tool(lab.a) as tool:  # a new connection works
        assert tool.call("state", guest=uuid) == "running"


def test_link_that_is_pulled_is_noticed(lab: Lab) -> None:
    with Tool(lab.a, "qemu+ssh://hostb/system?no_tty=1") as tool:
        tool.call("subscribe", guest="00000000-0000-4000-8000-000000000001")
        lab.set_link(lab.b, False)
        try:
            assert tool.event("connection-lost", timeout=60)["detail"] == "no answer to keepalive"
            with pytest.raises(ToolError) as e:
                tool.call("facts")
            assert e.value.code == "unreachable"
        finally:
            lab.set_link(lab.b, True)


def test_tool_leaves_no_ssh_behind(lab: Lab) -> None:
    def connections() -> list[str]:
        return [line for line in lab.a.processes().values() if re.match(r"ssh .*hostb", line)]
    before = connections()
    with Tool(lab.a, target="qemu+ssh://hostb/system?no_tty=1"):
        assert len(connections()) > len(before)
    wait_for("ssh to end", lambda: connections() == before)



# ------------------------------------------------------------------------------------ unusual definitions


def test_mirror_of_every_kind_of_disk(lab: Lab, tool: Tool) -> None:
    """With an iothread, on virtio-scsi, throttled, with copy-on-read, on a block device, with a backing chain."""
    device = lab.a.loop_disk("64M")
    lab.a.run("cd /var/lib/libvirt/images && qemu-img create -q -f raw base.raw 64M &&"
              " qemu-img create -q -f qcow2 -b $PWD/base.raw -F raw kinds-vde.qcow2")
    throttled = "<iotune><total_bytes_sec>50000000</total_bytes_sec></iotune>"
    guest = lab.guest("kinds", [Disk("64M", data="8M", driver={"iothread": "1"}),
                                Disk("64M", "qcow2", data="8M", driver={"iothread": "1"}),
                                Disk("64M", "qcow2", bus="scsi", data="8M"), Disk("64M", data="8M", xml=throttled),
                                Disk("64M", "qcow2", data="8M", driver={"copy_on_read": "on"}),
                                Disk(path=device, data="8M")],
                      memory="256M", rate=300)
    lab.a.run(["virsh", "attach-disk", "kinds", "/var/lib/libvirt/images/kinds-vde.qcow2", "vdz", "--subdriver", "qcow2",
               "--live"])
    info = tool.call("describe", guest="kinds")
    assert info["disks"]["vdz"]["backing_chain"] and len(info["disks"]) == 7
    endpoints = []
    try:
        for name, disk in info["disks"].items():
            lab.b.run(["qemu-img", "create", "-q", "-f", "raw", f"/tmp/{name}.raw", str(disk["virtual_size"])])
            endpoints.append(Endpoint(lab.a, f"{info['private_directory']}/drover-{name}.sock", lab.b, f"/tmp/{name}.raw",
                                      "raw", info["qemu_uid"], info["qemu_gid"], name))
            tool.call("attach", guest=info["uuid"], disk=name, node=disk["node"], socket=endpoints[-1].socket, export=name)
        again = tool.call("describe", guest="kinds")
        assert {n: d["node"] for n, d in again["disks"].items()} == {n: d["node"] for n, d in info["disks"].items()}
        export = f"{info['private_directory']}/drover-export.sock"
        tool.call("export", guest=info["uuid"], socket=export, disks={n: d["node"] for n, d in info["disks"].items()})
        for name in set(info["disks"]) - {"vdz"}:  # nobody writes to that one
            wait_for(f"writes to {name}", lambda n=name: lab.b.du(f"/tmp/{n}.raw") > 0)
        tool.call("unexport", guest=info["uuid"], socket=export)
        for name in info["disks"]:
            assert tool.mirror(info["uuid"], name)["alive"], name
            tool.call("detach", guest=info["uuid"], disk=name)
        nothing_of_drovers(lab.a, "kinds")
    finally:
        for endpoint in endpoints:
            endpoint.close()
    assert guest.verify()["ok"]
    lab.a.run(["virsh", "detach-disk", "kinds", "vdz", "--live"])
    wait_for("the disk to be gone", lambda: "vdz" not in tool.call("describe", guest="kinds")["disks"])
    guest.destroy()
    lab.a.run("rm /var/lib/libvirt/images/base.raw /var/lib/libvirt/images/kinds-vde.qcow2")
    lab.b.run("rm /tmp/*.raw")


def test_firmware_variables_move(lab: Lab) -> None:
    """QEMU migrates the content of its flash with the memory; libvirt makes the file on the target."""
    firmware, template = "/var/lib/libvirt/boot/firmware.fd", "/var/lib/libvirt/boot/variables.fd"
    nvram = "/var/lib/libvirt/qemu/nvram/uefi_VARS.fd"
    for host in (lab.a, lab.b):
        # SeaBIOS in flash: it boots, and knows nothing of variables.
        host.run(f"cp /usr/share/seabios/bios-256k.bin {firmware}; truncate -s 256K {template}")
    lab.a.run(f"head -c 256K /dev/urandom >{nvram}; chown libvirt-qemu {nvram}")

    def with_firmware(xml: str) -> str:
        return xml.replace("</type>", f"</type><loader readonly='yes' type='pflash'>{firmware}</loader>"
                                      f"<nvram template='{template}'>{nvram}</nvram>", 1)
    guest = lab.guest("uefi", [Disk("16M", data="4M")], memory="256M", rate=50, edit=with_firmware)
    content = lab.a.path(nvram).read_bytes()
    with Move(lab, guest, lab.b) as move:
        assert move.info["loader"] == firmware and move.info["nvram"] == nvram
        guest.command("stop")
        move.attach()
        move.copy()
        move.open_memory_path()
        migration = move.migrate()
        move.tool.event("suspended", "target")
        move.release()
        move.tool.call("resume", on="target", guest=move.uuid)
        move.tool.result(migration)
        wait_for("the variables", lambda: lab.b.path(nvram).read_bytes() == content)
        assert lab.a.path(nvram).exists()
        move.finish()
        assert not lab.a.path(nvram).exists()  # gone with the definition
    assert guest.verify()["ok"]
    lab.b.libvirt().lookupByName("uefi").destroy()
    lab.b.libvirt().lookupByName("uefi").undefineFlags(4)
    lab.b.run("rm -r /var/lib/libvirt/images/moved")
    for host in (lab.a, lab.b):
        host.run(["rm", firmware, template])
