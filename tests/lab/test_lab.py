# SPDX-License-Identifier: Apache-2.0
"""The lab's own tests: what the other tests rely on."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lab import WORK, Disk, Guest, Host, Lab, LabError, build_tcg_fix, wait_for

SMALL = [Disk("64M", data="16M")]


def virsh_migrate(guest: Guest, target: Host) -> None:
    """libvirt's own move with all disks, to images made beforehand; removes the source's."""
    source = guest.host
    paths = guest.disks()
    for path in paths.values():
        info = json.loads(source.run(["qemu-img", "info", "-U", "--output=json", path]).stdout)
        target.run(["qemu-img", "create", "-q", "-f", info["format"], path, str(info["virtual-size"])])
    source.virsh("migrate", "--live", "--persistent", "--undefinesource", "--copy-storage-all", guest.name,
                 f"qemu+ssh://{target.name}/system")
    source.run(["rm", *paths.values()])


# ---------------------------------------------------------------------------------------------- hosts


def test_hosts_reach_each_other_by_ssh_and_libvirt(lab: Lab) -> None:
    for here, there in ((lab.a, lab.b), (lab.b, lab.a)):
        assert here.run(["ssh", there.name, "hostname"]).stdout.strip() == there.name
        assert here.virsh("-c", f"qemu+ssh://{there.name}/system", "hostname") == there.name
    assert lab.a.libvirt().getCapabilities() != lab.b.libvirt().getCapabilities()  # host UUID


def test_hosts_are_separate(lab: Lab) -> None:
    lab.a.run("echo a > /etc/only-here; echo a > /tmp/only-here; echo a > /root/only-here")
    for path in ("/etc/only-here", "/tmp/only-here", "/root/only-here"):
        assert lab.a.path(path).exists()
        assert not lab.b.path(path).exists()
        assert not Path(path).exists()
    lab.a.run("rm /etc/only-here /tmp/only-here /root/only-here")


def test_popen_is_the_command_itself(lab: Lab) -> None:
    p = lab.a.popen(["sleep", "1000"])
    wait_for("sleep", lambda: lab.a.processes().get(p.pid) == "sleep 1000")
    p.send_signal(signal.SIGINT)
    assert p.wait(10) == -signal.SIGINT


def test_the_program_under_test_is_found_by_name(lab: Lab) -> None:
    found = "readlink /usr/local/bin/drover"
    assert lab.a.run(found).stdout.strip() == str(lab.drover_inside)
    assert lab.b.run(["ssh", "hosta", found]).stdout.strip() == str(lab.drover_inside)


def test_link_can_be_pulled(lab: Lab) -> None:
    ping = ["timeout", "1", "bash", "-c", "</dev/tcp/hostb/22"]
    lab.set_link(lab.b, False)
    assert lab.a.run(ping, check=False).returncode != 0
    lab.set_link(lab.b, True)
    wait_for("hostb", lambda: lab.a.run(ping, check=False).returncode == 0)


def test_link_can_be_limited(lab: Lab) -> None:
    def seconds() -> float:
        begin = time.monotonic()
        lab.a.run("head -c 16000000 /dev/zero | ssh -o Compression=no hostb 'cat >/dev/null'")
        return time.monotonic() - begin

    lab.set_rate("100mbit")
    slow = seconds()
    assert 1.1 < slow < 4, slow  # 16 MB at 12.5 MB/s, less the burst
    lab.set_rate(None)
    assert seconds() < slow


def test_link_can_be_long(lab: Lab) -> None:
    connect = ("import socket, time; a = time.monotonic(); socket.create_connection(('hostb', 22)).close();"
               " print(time.monotonic() - a)")

    def round_trip() -> float:
        return min(float(lab.a.run(["python3", "-c", connect]).stdout) for _ in range(5))

    assert round_trip() < 0.04
    lab.set_delay(20)
    assert 0.04 <= round_trip() < 0.2
    lab.set_delay(None)
    assert round_trip() < 0.04


@pytest.mark.parametrize("kind", ["xfs", "ext4", "btrfs"])
def test_small_filesystem_gets_full(lab: Lab, kind: str) -> None:
    lab.a.mount_fs(kind, "400M" if kind == "xfs" else "120M", "/mnt/small")  # the smallest XFS is 300 MiB
    full = lab.a.run("dd if=/dev/zero of=/mnt/small/x bs=1M oflag=direct", check=False)
    assert "No space left" in full.stderr
    assert not Path("/mnt/small").exists()
    lab.a.run(["rm", "/mnt/small/x"])
    lab.a.umount("/mnt/small")


def test_libvirtd_can_be_restarted_under_a_guest(lab: Lab, guest: Guest) -> None:
    lab.a.restart_libvirtd()
    assert guest.host is lab.a
    guest.wait_report()


# ------------------------------------------------------------------------------------------- witness


def test_guest_runs_as_debian_runs_it(lab: Lab, guest: Guest) -> None:
    pid = guest.qemu_pid()
    owner = lab.a.run(["id", "-u", "libvirt-qemu"]).stdout.strip()
    assert os.stat(f"/proc/{pid}").st_uid == int(owner)
    assert "-sandbox on" in lab.a.processes()[pid]
    for path in guest.disks().values():
        assert os.stat(lab.a.path(path)).st_uid == int(owner)  # dynamic ownership
    assert os.stat(f"/proc/{pid}/ns/mnt").st_ino != os.stat(f"/proc/{lab.a.pid}/ns/mnt").st_ino


@pytest.mark.usefixtures("_shared_lab")  # skips where it does
def test_a_qemu_that_cannot_be_mended_does_not_start(tmp_path: Path) -> None:
    source, program = tmp_path / "qemu.c", tmp_path / "qemu"  # has what is replaced, and not what that needs
    source.write_text("void memory_global_after_dirty_log_sync(void) {}\nint main(void) { return 0; }\n")
    subprocess.run(["gcc", "-rdynamic", "-o", program, source], check=True)
    assert subprocess.run([program]).returncode == 0
    p = subprocess.run([program], env={"LD_PRELOAD": str(build_tcg_fix())}, text=True, capture_output=True)
    assert p.returncode == 1 and "does not fit this QEMU" in p.stderr


def test_witness_writes_and_reads_at_the_rate_asked_for(guest: Guest) -> None:
    guest.command("reset")
    first = guest.wait_report()
    later = guest.wait_report(after=first["n"] + 1)
    seconds = (later["uptime_ms"] - first["uptime_ms"]) / 1000
    assert later["writes"] - first["writes"] == pytest.approx(200 * seconds, rel=0.3)
    assert set(later["disks"]) == {"vda", "vdb"}
    assert later["disks"]["vda"]["writes"] > 0 and later["disks"]["vdb"]["writes"] > 0
    assert later["reads"] > first["reads"] and later["mismatches"] == 0 and later["io_errors"] == 0
    assert 0 < later["latency"]["recent"]["mean_us"] <= later["latency"]["since_reset"]["max_us"]


def test_witness_stops_and_goes_on(guest: Guest) -> None:
    guest.command("stop")
    before = guest.command("status")["writes"]
    assert guest.wait_report()["writes"] == before
    guest.command("start")
    guest.wait_report()
    assert guest.wait_report()["writes"] > before


def test_full_verify_covers_the_initial_data(guest: Guest) -> None:
    verdict = guest.verify()
    assert verdict["ok"] and verdict["bytes"] == (64 + 32) << 20


@pytest.mark.parametrize("damage, kind", [("zeroes", "zeroes"), ("older", "stale"), ("shifted", "other block")])
def test_witness_notices(lab: Lab, damage: str, kind: str) -> None:
    """A block that was changed behind the guest's back, in the three ways that copying goes wrong."""
    guest = lab.guest("web1", SMALL, memory="256M", rate=500, options="w.vda.region=0,1M w.mode=seq w.reads=0 w.report=200")
    image = lab.a.path(guest.disks()["vda"])
    with open(image, "rb") as f:
        old = f.read(1 << 20)
    wait_for("all blocks to be written again", lambda: guest.wait_report()["writes"] > 512)
    guest.command("stop")
    assert guest.verify()["ok"]
    wrong = {"zeroes": bytes(4096), "older": old[40960:45056], "shifted": old[4096:8192]}[damage]
    with open(image, "r+b") as f:
        f.seek(40960)
        f.write(wrong)
        os.fsync(f.fileno())
    verdict = guest.verify()
    assert verdict["mismatches"] == 1 and not verdict["ok"]
    found = guest.mismatches()
    assert [(m["disk"], m["offset"], m["kind"]) for m in found] == [("vda", 40960, kind)]


def test_witness_counts_io_errors(lab: Lab) -> None:
    device = lab.a.loop_disk("64M")
    guest = lab.guest("web1", [Disk(path=device, data="16M")], memory="256M", rate=100, options="w.report=200")
    os.truncate(lab.loops[device], 1 << 20)  # the device keeps its size; what is behind most of it is gone
    wait_for("an error", lambda: guest.wait_report()["io_errors"] > 0)
    assert not guest.verify()["ok"]


@pytest.mark.parametrize("unit, size", [(512, "512-64K"), (4096, "4K-1M")])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_witness_with_zeroes_discards_and_flushes(lab: Lab, unit: int, size: str, fmt: str) -> None:
    guest = lab.guest("web1", [Disk("64M", fmt, data="0:8M,32M:8M")], memory="256M", rate=400, unit=unit,
                      options=f"w.zero=20 w.discard=20 w.fsync=16 w.reads=200 w.region=0,48M w.size={size}")
    report = wait_for("each kind", lambda: (lambda r: r if min(
        r["zeroes"], r["discards"], r["flushes"], r["reads"], r["writes"]) > 20 else None)(guest.wait_report()))
    assert report["mismatches"] == 0 and report["discard_changes"] == 0 and report["io_errors"] == 0
    verdict = guest.verify()
    assert verdict["ok"], guest.mismatches()


def test_block_device_scsi_iothread_and_sequential_writes(lab: Lab) -> None:
    device = lab.a.loop_disk("64M")
    guest = lab.guest("web1", [Disk(path=device, data="16M", driver={"iothread": "1"}),
                               Disk("64M", "qcow2", bus="scsi", data="16M")],
                      memory="256M", rate="max", options="w.mode=seq w.size=64K w.mem=16M w.memrate=1000")
    guest.wait_report()
    report = guest.wait_report()
    assert set(report["disks"]) == {"vda", "sda"} and min(d["writes"] for d in report["disks"].values()) > 0
    assert report["pages_touched"] > 0
    assert guest.verify()["ok"]


# --------------------------------------------------------------------------------------------- moves


def test_libvirt_moves_it_there_and_back(lab: Lab, guest: Guest) -> None:
    for target in (lab.b, lab.a):
        mark = lab.events.mark()
        before = guest.status()
        virsh_migrate(guest, target)
        assert guest.host is target
        after = guest.wait_report()
        assert after["n"] > before["n"] and after["writes"] > before["writes"]
        blackout = lab.events.blackout(guest.name, mark)
        assert blackout is not None and 0 < blackout < 10
    verdict = guest.verify()
    assert verdict["ok"] and verdict["mismatches"] == 0, guest.mismatches()


def test_command_is_answered_though_the_guest_moves_meanwhile(lab: Lab) -> None:
    guest = lab.guest("web1", [Disk("512M", data="384M")], memory="256M", rate=100)
    mover = lab.a.popen(["sh", "-c", "qemu-img --version >/dev/null; ssh hostb qemu-img create -q -f raw"
                         f" {guest.disks()['vda']} 512M && virsh migrate --live --persistent --undefinesource"
                         " --copy-storage-all web1 qemu+ssh://hostb/system"])
    answers = []
    while mover.poll() is None:
        answers.append(guest.verify())
    assert mover.wait() == 0 and guest.host is lab.b
    answers.append(guest.verify())
    assert all(a["ok"] for a in answers)
    lab.a.path(guest.disks()["vda"]).unlink()


def test_an_answer_is_found_behind_a_line_that_a_move_cut_short(lab: Lab) -> None:
    guest = lab.guest("web1", SMALL, memory="256M", options="w.report=0")
    with open(lab.a.path("/var/log/libvirt/qemu/lab-web1.log"), "a") as log:
        log.write('WITNESS {"type":"rep')
    assert guest.command("status", timeout=60)["type"] == "status"


def test_a_crashed_guest_is_not_waited_for(lab: Lab, guest: Guest) -> None:
    guest.domain().suspend()
    with open(lab.a.path("/var/log/libvirt/qemu/lab-web1.log"), "a") as log:
        log.write("[   12.7] BUG: kernel NULL pointer dereference, address: 0000000000000004\n")
    with pytest.raises(LabError, match="has crashed: BUG: kernel NULL pointer"):
        guest.verify()
    guest.domain().resume()


def test_images_can_be_compared(lab: Lab, guest: Guest) -> None:
    guest.command("stop")
    source = guest.disks()
    lab.a.run(["qemu-img", "convert", "-U", "-O", "qcow2", "-f", "raw", source["vda"], "/tmp/copy.qcow2"])
    assert lab.compare(lab.a, source["vda"], lab.a, "/tmp/copy.qcow2", "raw", "qcow2") is None
    lab.a.run(["qemu-io", "-c", "write -P 7 1M 512", "/tmp/copy.qcow2"])
    different = lab.compare(lab.a, source["vda"], lab.a, "/tmp/copy.qcow2", "raw", "qcow2")
    assert different and str(1 << 20) in different
    lab.a.run(["rm", "/tmp/copy.qcow2"])


def test_tcp_connection_survives_a_move(lab: Lab) -> None:
    guest = lab.guest("web1", SMALL, memory="256M", rate=100, net="10.99.1.1/16")
    # The client is on the target host: its frames to the guest change their way with the move.
    client = lab.b.popen(["/usr/bin/python3", "-c", """
import socket, sys
s = socket.create_connection(("10.99.1.1", 7), 30)
f = s.makefile("rw")
n = 0
for line in sys.stdin:
    n += 1
    f.write(f"{n} {line}"); f.flush()
    assert f.readline() == f"{n} {line}"
    print(n, flush=True)
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin and client.stdout
    numbers = []
    for target in (lab.a, lab.b, lab.a):
        if target is not guest.host:
            virsh_migrate(guest, target)
        client.stdin.write("hello\n")
        client.stdin.flush()
        numbers.append(client.stdout.readline())
    client.stdin.close()
    assert client.wait(10) == 0 and numbers == ["1\n", "2\n", "3\n"]


# ----------------------------------------------------------------------------------------- leftovers


def test_leftovers_finds_what_was_planted_in_a_guest(lab: Lab, guest: Guest) -> None:
    assert lab.leftovers() == []

    def qmp(command: str, **arguments: Any) -> Any:
        return lab.a.qmp("web1", command, **arguments)

    node = next(n["node-name"] for n in qmp("query-named-block-nodes") if n["node-name"].endswith("-format"))

    def finds(kind: str) -> None:
        assert any(line.startswith(f"hosta: {kind}: web1: ") for line in lab.leftovers(settle=0)), kind

    qmp("blockdev-add", driver="null-co", node_name="drover-node", size=256 << 20)
    finds("node")
    top = next(n["node-name"] for n in qmp("query-named-block-nodes")
               if n["node-name"].endswith("-format") and n["image"]["virtual-size"] == 256 << 20)
    qmp("blockdev-mirror", job_id="drover-job", device=top, target="drover-node", sync="none")
    finds("job")
    qmp("block-job-cancel", device="drover-job", force=True)
    wait_for("the job's end", lambda: not qmp("query-jobs"))
    qmp("blockdev-del", node_name="drover-node")
    qmp("block-dirty-bitmap-add", node=node, name="drover-bitmap")
    finds("bitmap")
    qmp("block-dirty-bitmap-remove", node=node, name="drover-bitmap")
    qmp("nbd-server-start", addr={"type": "unix", "data": {"path": "/var/lib/libvirt/qemu/other.sock"}})
    finds("nbd server")
    qmp("block-export-add", type="nbd", id="drover-export", node_name=node)
    finds("export")
    qmp("nbd-server-stop")
    assert lab.leftovers() == []


def test_leftovers_finds_what_was_planted_on_a_host(lab: Lab) -> None:
    def finds(text: str, plant: str, remove: str) -> None:
        assert lab.leftovers() == []
        lab.b.run(plant)
        found = lab.leftovers(settle=0)
        lab.b.run(remove)
        assert len(found) == 1 and text in found[0], (plant, found)

    finds("file: /var/lib/libvirt/images/x.raw", "touch /var/lib/libvirt/images/x.raw", "rm /var/lib/libvirt/images/x.raw")
    finds("file: /var/lib/drover/jobs/1/log", "mkdir -p /var/lib/drover/jobs/1; touch /var/lib/drover/jobs/1/log",
          "rm -r /var/lib/drover/jobs")
    finds("file: /tmp/x", "touch /tmp/x", "rm /tmp/x")
    finds("mount: /mnt", "mount -t tmpfs none /mnt", "umount /mnt")
    process = lab.b.popen(["sleep", "1000"])
    wait_for("it to be found", lambda: any("process: sleep 1000" in line for line in lab.leftovers(settle=0)))
    process.kill()
    process.wait()
    listen = "import socket; s = socket.socket(); s.bind(('', 4711)); s.listen(); s.accept()"
    listener = lab.b.popen(["/usr/bin/python3", "-c", listen])
    wait_for("it to be found", lambda: any("listening: tcp port 4711" in line for line in lab.leftovers(settle=0)))
    listener.kill()
    listener.wait()
    assert lab.leftovers() == []


def test_leftovers_finds_a_paused_guest_and_a_definition(lab: Lab, guest: Guest) -> None:
    guest.domain().suspend()
    assert any("web1 is not running" in line for line in lab.leftovers(settle=0))
    guest.domain().resume()
    lab.b.libvirt().defineXML(guest.domain().XMLDesc())
    assert any("web1 is defined and not running" in line for line in lab.leftovers(settle=0))
    lab.b.libvirt().lookupByName("web1").undefine()


# ------------------------------------------------------------------------------------------ teardown

_CHILD = """
import sys; sys.path.insert(0, {folder!r})
import signal
import time
from lab import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
with Lab(name={name!r}) as lab:
    lab.a.mount_fs("ext4", "64M", "/mnt/small")
    lab.b.loop_disk("64M")
    lab.guest("web1", [Disk("64M", data="1M")], memory="256M")
    print(lab.a.pid, lab.b.pid, lab.switch, flush=True)
    {then}
"""


@pytest.mark.parametrize("end", ["normal", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_a_lab(lab: Lab, end: str) -> None:
    """(A second lab beside the fixture's: they do not collide.)"""
    name = f"lab-test-{os.getpid()}-{end}"
    then = {"normal": "pass", "exception": "raise LabError('on purpose')"}.get(end, "time.sleep(1000)")
    mounts = Path("/proc/mounts").read_text()
    script = _CHILD.format(folder=str(Path(__file__).parent), name=name, then=then)
    child = subprocess.Popen(["/usr/bin/python3", "-c", script],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        line = child.stdout.readline()
        assert line, child.communicate()[1]
        namespaces = set()
        for pid in map(int, line.split()):
            if end not in ("normal", "exception"):
                namespaces.add(os.stat(f"/proc/{pid}/ns/net").st_ino)
        if end.startswith("SIG"):
            child.send_signal(getattr(signal, end))
        child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()

    def in_namespaces() -> list[str]:
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino in namespaces:
                    found.append(entry)
            except OSError:
                pass
        return found

    wait_for("its processes to be gone", lambda: not in_namespaces())
    if end == "SIGKILL":  # what only has a file name is removed by the next lab
        assert name in Lab.collect_garbage()
    assert not (WORK / name).exists()
    assert Path("/proc/mounts").read_text() == mounts
    assert not [f for f in Path("/sys/block").glob("loop*/loop/backing_file") if name in f.read_text()]
    assert lab.a.run(["true"]).returncode == 0


def test_a_lab_that_cannot_start_leaves_nothing(lab: Lab) -> None:
    name = f"lab-test-{os.getpid()}-failed"
    with pytest.raises(LabError):
        Lab(["hosta", "a name with a slash / in it"], name).up()
    assert not (WORK / name).exists()


def test_command_line(tmp_path: Path) -> None:
    from lab import why_not
    if why_not():
        pytest.skip(why_not())
    name = f"lab-test-{os.getpid()}-cli"

    def cli(*args: str) -> str:
        p = subprocess.run(["/usr/bin/python3", str(Path(__file__).parent / "lab.py"), "--name", name, *args], text=True,
                           capture_output=True)
        assert p.returncode == 0, p.stderr
        return p.stdout

    program = tmp_path / "drover"
    program.write_text("#!/bin/sh\necho drover on $(hostname)\n")
    program.chmod(0o755)
    try:
        assert "nsenter" in cli("up", "--drover", str(program))
        assert cli("run", "hosta", "ssh", "hostb", "drover") == "drover on hostb\n"
        cli("guest", "g", "--disk", "64M,raw,1M", "--memory", "256M", "--rate", "50")
        assert json.loads(cli("command", "g", "full-verify"))["ok"]
        assert json.loads(cli("status", "g"))["host"] == "hosta"
        assert cli("leftovers") == "nothing\n"
        cli("destroy", "g")
    finally:
        cli("down")
    assert not (WORK / name).exists()
