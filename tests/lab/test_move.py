# SPDX-License-Identifier: Apache-2.0
"""`drover move` between two hosts, under the witness."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import pytest

from lab import IMAGES, SSHD_LOG, Disk, Guest, Host, Lab, wait_for
from moves import HOLD, Move, assert_unharmed, kill_all, move, move_comparing_at_barrier, move_ok

pytestmark = pytest.mark.usefixtures("drover")


def test_there_and_back_with_raw_and_qcow2(lab: Lab, guest: Guest) -> None:
    for _ in range(2):
        source = guest.host
        du = {disk: source.du(path) for disk, path in guest.disks().items()}
        outcome = move_comparing_at_barrier(lab, guest)
        assert_unharmed(guest)
        for disk, path in guest.disks().items():
            assert guest.host.du(path) <= du[disk] * 1.05 + (1 << 20), "thin did not stay thin"
        assert sorted(outcome.summary["deleted"]) == sorted(guest.disks().values())
        for agent in ("runner_peak_memory_bytes", "receiver_peak_memory_bytes"):
            assert 0 < outcome.summary[agent] < 256 << 20, agent


def test_writes_into_the_very_region_being_copied(lab: Lab) -> None:
    guest = lab.guest("hot", [Disk("256M", data="192M")], memory="256M", rate="max",
                      options="w.size=4096-65536 w.mode=seq w.zero=5 w.discard=5 w.fsync=50")
    move_comparing_at_barrier(lab, guest)
    assert_unharmed(guest)
    move_comparing_at_barrier(lab, guest)
    assert_unharmed(guest)


def test_a_qcow2_disk_whose_guest_discards_all_the_time(lab: Lab) -> None:
    guest = lab.guest("trims", [Disk("256M", "qcow2", data="128M")], memory="256M", rate=500,
                      options="w.size=4096-262144 w.discard=50 w.zero=10")
    for _ in range(3):
        move_comparing_at_barrier(lab, guest)
        assert_unharmed(guest)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_memory_over_several_connections(lab: Lab, guest: Guest, channels: int) -> None:
    outcome = move_ok(lab, guest, "--memory-channels", str(channels))
    assert_unharmed(guest)
    parts = outcome.summary["blackout"]
    whole = parts["quiesce_us"] + max(parts["disks_us"], parts["memory_us"]) + sum(
        parts[name] for name in ("wait_us", "guard_us", "resume_us"))
    assert abs(whole - outcome.summary["blackout_us"]) < 2000, parts
    assert parts["drain_us"] + parts["compare_us"] + parts["flush_us"] + parts["release_us"] <= parts["disks_us"] + 1000


def test_memory_is_compressed_on_a_slow_link(lab: Lab, guest: Guest) -> None:
    lab.set_rate("100mbit")
    try:
        outcome = move_ok(lab, guest)
    finally:
        lab.set_rate(None)
    assert_unharmed(guest)
    fast = move_ok(lab, guest)
    assert_unharmed(guest)
    assert outcome.summary["memory_bytes"] < 0.8 * fast.summary["memory_bytes"]


def test_four_disks(lab: Lab) -> None:
    guest = lab.guest("four", [Disk("128M", data="64M"), Disk("128M", "qcow2", data="64M"),
                               Disk("96M", data="16M", bus="scsi"), Disk("65537K", "raw", data="8M")],
                      memory="256M", rate=400)
    move_comparing_at_barrier(lab, guest)
    assert_unharmed(guest)


def sshd_said(host: Host, words: str) -> int:
    return host.path(SSHD_LOG).read_text().count(words)


def set_up_sshd(host: Host, config: str) -> None:
    listened = sshd_said(host, "Server listening")
    host.path("/etc/ssh/sshd_config").write_text(config)
    host.run(["sh", "-c", "kill -HUP $(cat /run/sshd.pid)"])
    wait_for("sshd", lambda: sshd_said(host, "Server listening") > listened)


@pytest.mark.parametrize("forwarding", ["yes", "no"])
def test_one_login_by_ssh_is_enough_where_sshd_leads_to_sockets(lab: Lab, guest: Guest, forwarding: str) -> None:
    before = lab.b.path("/etc/ssh/sshd_config").read_text()
    try:
        set_up_sshd(lab.b, before + f"AllowStreamLocalForwarding {forwarding}\n")
        accepted = sshd_said(lab.b, "Accepted publickey")
        move_ok(lab, guest)
    finally:
        set_up_sshd(lab.b, before)
    assert_unharmed(guest)
    # Beside libvirt's two, drover's own: again if it was not used for 2 s, which here depends on the machine.
    now = sshd_said(lab.b, "Accepted publickey") - accepted
    assert now == 1 if forwarding == "yes" else now >= 3


@pytest.mark.parametrize("broken", ["libvirtd", "ssh"])
def test_a_connection_is_made_anew_where_libvirt_alone_finds_no_way(lab: Lab, guest: Guest, broken: str) -> None:
    login = lab.b.path("/root/.bashrc")
    login.write_text("echo Welcome\n")  # libvirt's own connection by SSH takes that for an answer, and fails
    try:
        assert lab.a.run(["virsh", "-c", f"qemu+ssh://{lab.b.name}/system", "list"], check=False).returncode != 0
        running = Move(lab, guest, "--bandwidth", "20M")
        running.wait_for(lambda e: e.get("phase") == "copy" and e.get("copied_bytes", 0) > 0)
        if broken == "libvirtd":
            lab.b.restart_libvirtd()
        else:
            kill_all(lab.a, "ssh: /run/drover-ssh")
        outcome = running.end()
    finally:
        login.unlink()
    assert outcome.exit_code == 0, outcome.text()
    assert_unharmed(guest)


def test_a_disk_gets_the_path_that_was_asked_for(lab: Lab, guest: Guest) -> None:
    lab.b.run(["mkdir", "-p", f"{IMAGES}/elsewhere"])
    path = f"{IMAGES}/elsewhere/renamed.img"
    outcome = move(lab, guest, "--disk", f"vda={path}")
    assert outcome.exit_code == 0, outcome.text()
    assert guest.disks()["vda"] == path
    assert_unharmed(guest)


def test_block_devices(lab: Lab) -> None:
    source, target = lab.a.loop_disk("128M"), lab.b.loop_disk("128M")
    guest = lab.guest("blocks", [Disk("128M", data="64M", path=source)], memory="256M", rate=200)
    outcome = move_comparing_at_barrier(lab, guest, "--disk", f"vda={target}")
    assert outcome.summary["kept"], "a block device can't be deleted"
    assert_unharmed(guest)


def autostarts(host: Host, guest: Guest) -> bool:
    return "Autostart:      enable" in host.virsh("dominfo", guest.name)


def test_keep_source_keeps_files_and_definition(lab: Lab, guest: Guest) -> None:
    source, paths = guest.host, guest.disks()
    source.virsh("autostart", guest.name)
    outcome = move(lab, guest, "--keep-source")
    assert outcome.exit_code == 0, outcome.text()
    assert autostarts(guest.host, guest)
    assert not autostarts(source, guest), "the next boot would start it a second time"
    for path in paths.values():
        assert source.path(path).exists()
    assert guest.name in source.virsh("list", "--all", "--inactive", "--name").split()
    assert_unharmed(guest)
    source.virsh("undefine", guest.name)
    for path in paths.values():
        source.path(path).unlink()


def test_the_guest_keeps_autostart_and_its_place_in_the_world(lab: Lab, guest: Guest) -> None:
    guest.host.virsh("autostart", guest.name)
    move_ok(lab, guest)
    assert autostarts(guest.host, guest)
    move_ok(lab, guest)


def test_dry_run_changes_nothing(lab: Lab, guest: Guest) -> None:
    outcome = move(lab, guest, "--dry-run")
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.a
    assert {d["disk"] for d in outcome.events[0]["disks"]} == {"vda", "vdb"}
    assert not any(lab.b.path(path).exists() for path in guest.disks().values())


@pytest.mark.parametrize("phase", ["reserve", "attach", "copy", "synchronised", "memory"])
def test_ctrl_c_undoes_everything(lab: Lab, phase: str) -> None:
    guest = lab.guest("web1", [Disk("512M", data="384M"), Disk("128M", "qcow2", data="32M")],
                      memory="256M", rate=200)
    lab.a.virsh("autostart", guest.name)
    running = Move(lab, guest, "--bandwidth", "200M")
    running.wait_for_phase(phase)
    running.interrupt(signal.SIGINT)
    outcome = running.end()
    if phase in ("synchronised", "memory") and outcome.exit_code == 0:
        # The request came when the source had already stopped: then the move is finished.
        assert guest.host is lab.b
    else:
        assert outcome.exit_code == 130, outcome.text()
        assert guest.host is lab.a
        for path in guest.disks().values():
            assert not lab.b.path(path).exists(), f"{path} was left on the target"
        assert lab.leftovers() == []
    assert autostarts(guest.host, guest)
    assert_unharmed(guest)
    move_ok(lab, guest)
    assert_unharmed(guest)


@pytest.mark.leaves("hostb: process: sshd: *")  # the other end of a connection that was cut, until TCP notices
@pytest.mark.parametrize("phase", ["copy", "memory"])
def test_a_link_that_is_lost_for_too_long_ends_the_move_cleanly(lab: Lab, guest: Guest, phase: str) -> None:
    running = Move(lab, guest, "--bandwidth", "20M", "--link-timeout", "2s")
    running.wait_for(lambda e: e.get("phase") == phase and e.get("copied_bytes", 0) > 0)
    lab.set_link(lab.b, False)
    outcome = running.end()
    lab.set_link(lab.b, True)
    assert outcome.exit_code not in (0, 130), outcome.text()
    assert guest.host is lab.a
    # The target was out of reach: what is there is cleared up later.
    lab.a.run(["drover", "cancel", guest.name])
    for path in guest.disks().values():
        assert not lab.b.path(path).exists(), f"{path} was left on the target"
    assert_unharmed(guest)
    move_ok(lab, guest)
    assert_unharmed(guest)


def test_a_receiver_that_is_killed_after_the_barrier_no_longer_matters(lab: Lab, guest: Guest) -> None:
    mark = lab.events.mark()
    running = Move(lab, guest, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 300)
    # The memory passes through the receiver, too, and may be still on its way.
    wait_for("the memory", lambda: any(e.name == "MIGRATION" and e.data.get("status") == "completed" and
                                       e.host == "hosta" for e in lab.events.since(mark)))
    kill_all(lab.b, "drover receive")
    held.unlink()
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    assert lab.leftovers() == []
    assert_unharmed(guest)
    move_ok(lab, guest)


def test_a_limit_can_be_lifted_while_memory_moves(lab: Lab) -> None:
    guest = lab.guest("web1", [Disk("16M", data="256K")], memory="256M", rate=10, options="w.mem=64M")
    running = Move(lab, guest, "--bandwidth", "300K")  # its memory would take minutes
    running.wait_for_phase("memory")
    wait_for("QEMU to know the limit",
             lambda: lab.a.qmp("web1", "query-migrate-parameters")["max-bandwidth"] < 1 << 20, 60)
    running.hurry()
    log = lab.a.path(f"/var/log/drover/{running.job}.log")
    wait_for("QEMU to know of none", lambda: "bandwidth of the memory: no limit" in log.read_text(), 60)
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    assert_unharmed(guest)


@pytest.mark.parametrize("phase", ["copy", "memory"])
def test_somebody_cancels_the_mirror(lab: Lab, guest: Guest, phase: str) -> None:
    """From then on the target misses the guest's writes: another is attached, and those are copied."""
    running = Move(lab, guest, "--bandwidth", "20M")
    running.wait_for_phase(phase)
    lab.a.qmp(guest.name, "block-job-cancel", device="drover-vda")
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    assert lab.leftovers() == []
    assert_unharmed(guest)
    move_ok(lab, guest)


def test_ctrl_c_at_the_barrier_comes_too_late(lab: Lab, guest: Guest) -> None:
    running = Move(lab, guest, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 300)
    running.interrupt(signal.SIGINT)
    held.unlink()
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    assert_unharmed(guest)


def test_a_guest_that_cannot_be_resumed_is_held_and_nothing_is_deleted(lab: Lab, guest: Guest) -> None:
    before = guest.disks()
    running = Move(lab, guest, "--hold-barrier", HOLD)
    held = lab.a.path(HOLD)
    wait_for("the barrier", held.exists, 300)
    # Somebody has the target's image open for writing: QEMU would have to share it.
    reader = lab.b.popen(["qemu-io", "-f", "raw", before["vda"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin and reader.stdout
    reader.stdin.write(b"read 0 4k\n")
    reader.stdin.flush()
    assert b"read 4096" in reader.stdout.readline() + reader.stdout.readline()
    held.unlink()
    outcome = running.end()
    reader.communicate(b"quit\n")
    assert outcome.exit_code == 10, outcome.text()
    for path in before.values():
        assert path in outcome.error["hint"], outcome.text()
        assert lab.a.path(path).exists() and lab.b.path(path).exists()
    assert lab.b.virsh("domstate", guest.name).strip() == "paused"
    assert lab.a.virsh("domstate", guest.name).strip() == "shut off"
    # A person sees to it, and the job goes on.
    lab.b.virsh("resume", guest.name)
    resumed = lab.a.run(["drover", "resume", guest.name], check=False)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert guest.host is lab.b
    for path in before.values():
        assert not lab.a.path(path).exists()
    assert_unharmed(guest)
    assert lab.leftovers() == []


def test_a_disk_that_is_plugged_during_the_move_ends_it_cleanly(lab: Lab, guest: Guest) -> None:
    extra = f"{IMAGES}/web1-extra.raw"
    lab.a.run(["qemu-img", "create", "-q", "-f", "raw", extra, "16M"])
    running = Move(lab, guest, "--bandwidth", "40M")
    running.wait_for_phase("copy")
    lab.a.virsh("attach-disk", guest.name, extra, "vdx", "--targetbus", "virtio", check=False)
    assert "vdx" in guest.disks(), "this guest has no free slot to plug a disk into"
    outcome = running.end()
    assert outcome.exit_code not in (0, 130), outcome.text()
    assert "disks were changed" in outcome.text()
    assert guest.host is lab.a
    assert not lab.b.path(guest.disks()["vda"]).exists()
    assert_unharmed(guest)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_target_that_gets_full_ends_the_move_cleanly(lab: Lab, form: str) -> None:
    guest = lab.guest("web1", [Disk("96M", form, data="64M")], memory="256M", rate=200)
    there = f"/mnt/full/web1.{form}"
    lab.b.mount_fs("ext4", "192M", "/mnt/full")
    try:
        running = Move(lab, guest, "--bandwidth", "20M", "--disk", f"vda={there}")
        running.wait_for(lambda e: e.get("phase") == "copy" and e.get("copied_bytes", 0) > 0)
        lab.b.run("cat /dev/zero >/mnt/full/filler", check=False)
        outcome = running.end()
        assert outcome.exit_code == 8, outcome.text()
        assert there in outcome.error["message"], outcome.error
        assert "No space left on device" in outcome.error["message"], outcome.error
        assert guest.host is lab.a
        assert lab.leftovers(ignore=["hostb: file: /mnt/full/filler"]) == []
        assert_unharmed(guest)
    finally:
        lab.b.umount("/mnt/full")
    move_ok(lab, guest)
    assert_unharmed(guest)


# What those may send who don't have the key. Prints how many bytes came back to each before the receiver closed
# the connection. `wrong` knows the job's name, and uses another key.
STRANGERS = r"""
import json, random, socket, ssl, subprocess, sys
port, job = sys.argv[1:]
hello = ssl.MemoryBIO()
try:
    ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="hostb").do_handshake()
except ssl.SSLWantReadError:
    hello = hello.read()
talk = {
    "garbage": random.Random(1).randbytes(5000),
    "http": b"GET / HTTP/1.1\r\nHost: hostb\r\n\r\n",
    "zeroes": bytes(100000),
    "keyless": hello,
    "short": hello[:60],
}
silent = [socket.create_connection(("hostb", port)) for _ in range(40)]
links = {name: socket.create_connection(("hostb", port)) for name in talk}
answers = {}
for name, link in links.items():
    answers[name] = 0
    try:
        link.sendall(talk[name])
    except OSError:
        pass  # closed already
wrong = subprocess.run(["openssl", "s_client", "-connect", "hostb:" + port, "-tls1_3", "-psk_identity", job,
                        "-psk", "00" * 32, "-ciphersuites", "TLS_AES_128_GCM_SHA256"],
                       stdin=subprocess.DEVNULL, capture_output=True, text=True)
for name, link in links.items():
    link.settimeout(30)
    try:
        while piece := link.recv(65536):
            answers[name] += len(piece)
    except ConnectionResetError:
        pass
print(json.dumps({"answers": answers, "wrong": wrong.stderr}))
"""


def test_strangers_at_the_receivers_port_do_not_matter(lab: Lab) -> None:
    guest = lab.guest("web1", [Disk("96M", data="64M")], memory="256M", rate=200)
    running = Move(lab, guest, "--bandwidth", "20M")
    running.wait_for(lambda e: e.get("phase") == "copy" and e.get("copied_bytes", 0) > 0)
    listening = lab.b.run(["ss", "-Hltnp"]).stdout
    port = re.search(r":(\d+) .*\"drover\"", listening)
    assert port, listening
    job = os.listdir(lab.b.path("/var/lib/drover/jobs"))[0]
    said = json.loads(lab.a.run(["/usr/bin/python3", "-c", STRANGERS, port[1], job], timeout=60).stdout)
    assert "alert" in said["wrong"], said
    # A TLS alert at most; to `keyless` a ServerHello, and an alert then.
    assert max(said["answers"].values()) < 200, said
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    assert_unharmed(guest)
