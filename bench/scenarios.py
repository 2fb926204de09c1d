# SPDX-License-Identifier: Apache-2.0
"""The named scenarios of compare.py: what is measured in each, and which goals it decides.

Each has a lab of its own, so nothing of one is in another's way. In a scenario all that are compared go in
turn on the same guest, every other round the other way about, each with cold caches; afterwards the witness
has read everything back.
"""
from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Callable, Optional

from lab import CACHE, IMAGES, REPO, Disk, Guest, Host, Lab, LabError, parse_size, wait_for
from movers import MOVERS, Row, in_turn, move, quiet_latency
from os_image import NoImage, os_image
from report import Goal, Result

NBD_PORT = 10809
GBIT = 10**9


class Bench:
    """How much is to be measured, and where it is told."""

    def __init__(self, runs: int, quick: bool, say: Callable[[str], None]) -> None:
        self.runs, self.quick, self.say = runs, quick, say

    def size(self, text: str) -> str:
        """With --quick a quarter of it."""
        return str(parse_size(text) // (4 if self.quick else 1))

    def series(self, result: Result, lab: Lab, guest: Guest, names: list[str], bulk_only: bool = False,
               link_rate: Optional[int] = None) -> None:
        """Measures them all, in turn; not again what did not come to an end, for that takes minutes."""
        for name in in_turn(names, self.runs):
            if any(row["mover"] == name and row.get("gave_up") for row in result.rows):
                continue
            rows = ([move(lab, guest, name, bulk_only, link_rate)] if name in MOVERS else COPIERS[name](lab, guest))
            for row in rows:
                result.rows.append(row)
                self.say(json.dumps(row))

    def verify(self, guest: Guest) -> None:
        verdict = guest.verify()
        if not verdict["ok"]:
            raise LabError(f"{guest.name}: {verdict}: {guest.mismatches()[:3]}")


# ------------------------------------------------------------------------ the bulk part alone, by others


def _timed(host: Host, command: list[str]) -> float:
    begin = time.monotonic()
    host.run(command)
    return round(time.monotonic() - begin, 2)


def _only_disk(guest: Guest) -> str:
    [path] = guest.disks().values()
    return path


def _cp(lab: Lab, guest: Guest) -> list[Row]:
    """On the source's own filesystem: as fast as the disk lets data be copied. Without and with its way from the
    page cache to the disk."""
    host, path = guest.host, _only_disk(guest)
    lab.drop_caches()
    taken = _timed(host, ["cp", "--reflink=never", path, f"{path}.copy"])
    synced = _timed(host, ["sync", f"{path}.copy"])
    host.run(["rm", f"{path}.copy"])
    return [{"mover": "cp", "total_s": taken, "bulk_s": taken},
            {"mover": "cp, sync", "total_s": round(taken + synced, 2), "bulk_s": round(taken + synced, 2)}]


def _over_nbd(name: str, command: Callable[[str, str], list[str]]) -> Callable[[Lab, Guest], list[Row]]:
    def copy(lab: Lab, guest: Guest) -> list[Row]:
        source, path = guest.host, _only_disk(guest)
        target = lab.other(source)
        size = source.path(path).stat().st_size
        target.run(["truncate", "-s", str(size), f"{path}.copy"])
        server = target.popen(["nbdkit", "-f", "-p", str(NBD_PORT), "file", f"{path}.copy"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for("nbdkit", lambda: f"tcp port {NBD_PORT}" in target._listening())
            lab.drop_caches()
            taken = _timed(source, command(path, f"nbd://{target.name}:{NBD_PORT}/"))
        finally:
            server.terminate()
            server.wait()
        target.run(["rm", f"{path}.copy"])
        return [{"mover": name, "total_s": taken, "bulk_s": taken}]
    return copy


COPIERS: dict[str, Callable[[Lab, Guest], list[Row]]] = {
    "alone": lambda _lab, guest: [{**quiet_latency(guest), "mover": "alone"}],  # nothing is copied
    "cp": _cp,
    "nbdcopy": _over_nbd("nbdcopy", lambda path, uri: ["nbdcopy", path, uri]),
    "qemu-img convert": _over_nbd(
        "qemu-img convert", lambda path, uri: ["qemu-img", "convert", "-U", "-n", "-f", "raw", "-O", "raw", path, uri]),
}


# ---------------------------------------------------------------------------------------- scenarios


def raw(bench: Bench) -> Result:
    result = Result("raw", "2 GiB that can't be compressed, idle guest, unlimited link")
    size = bench.size("2G")
    with Lab() as lab:
        guest = lab.guest("raw", [Disk(size, data=size)], rate="idle")
        bench.series(result, lab, guest, ["drover", "virsh", "virsh-sync", "cp", "nbdcopy", "qemu-img convert"])
        bench.verify(guest)
    result.goals = [
        Goal("incompressible 2 GiB, unlimited link: total / virsh's", 0.45, result.ratio("drover", "total_s", "virsh")),
        Goal("  its bulk phase / cp on one filesystem", 1.25, result.ratio("drover", "bulk_s", "cp"))]
    return result


def _same_as(guest: Guest, image: Path) -> None:
    """An idle guest's disk still is what it was made from."""
    p = subprocess.run(["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", str(image),
                        str(guest.host.path(_only_disk(guest)))], text=True, capture_output=True)
    if p.returncode != 0:
        raise LabError(f"{guest.name}: its disk is not what it was made from: {p.stdout}{p.stderr}")


def installed_os(bench: Bench) -> Result:
    result = Result("os", "an installed OS, idle guest, 1 Gbit/s")
    goal = Goal("OS image, 1 Gbit/s: total / virsh's", 0.4, None)
    result.goals = [goal]
    try:
        image = os_image(CACHE)
    except NoImage as e:
        goal.why = f"no OS image: {e}"
        return result
    with Lab() as lab:
        lab.set_rate("1gbit")
        guest = lab.guest("os", [Disk(image=image)], rate="idle", options="w.reads=0")
        bench.series(result, lab, guest, ["drover", "virsh", "virsh-sync"], link_rate=GBIT)
        _same_as(guest, image)
    goal.measured = result.ratio("drover", "total_s", "virsh")
    return result


def clone(bench: Bench) -> Result:
    result = Result("clone", "a second clone of that OS, the first one is on the target, 1 Gbit/s")
    goal = Goal("second clone, 1 Gbit/s: total / virsh's", 0.15, None)
    result.goals = [goal]
    try:
        image = os_image(CACHE)
    except NoImage as e:
        goal.why = f"no OS image: {e}"
        return result
    with Lab() as lab:
        if "unknown command" in lab.a.run(["drover", "index"], check=False).stderr:
            goal.why = "this drover has no index"
            return result
        lab.set_rate("1gbit")
        first = f"{IMAGES}/first.raw"
        for host in lab.hosts:
            subprocess.run(["cp", "--sparse=always", str(image), str(host.path(first))], check=True)
            host.run(["drover", "index", first])
        guest = lab.guest("second", [Disk(image=image)], rate="idle", options="w.reads=0")
        bench.series(result, lab, guest, ["drover", "virsh"], link_rate=GBIT)
        _same_as(guest, image)
    goal.measured = result.ratio("drover", "total_s", "virsh")
    return result


def delay(bench: Bench) -> Result:
    result = Result("delay", "2 GiB that can't be compressed, idle guest, 1 Gbit/s, 20 ms each way")
    size = bench.size("2G")
    with Lab() as lab:
        guest = lab.guest("far", [Disk(size, data=size)], rate="idle")
        lab.set_rate("1gbit")
        lab.set_delay(20)
        bench.series(result, lab, guest, ["drover", "virsh"], link_rate=GBIT)
        lab.set_delay(None)
        bench.verify(guest)
    result.goals = [Goal("1 Gbit/s, 20 ms each way: link in use while copying", 0.9, result.median("drover", "busy"),
                         at_most=False, unit="%")]
    return result


def writes(bench: Bench) -> Result:
    result = Result("writes", "2 GiB, 1000 writes/s (latencies: while the disks are copied), unlimited link")
    size = bench.size("2G")
    with Lab() as lab:
        guest = lab.guest("busy", [Disk(size, data=size)], rate=1000)
        bench.series(result, lab, guest, ["alone", "drover", "virsh", "virsh-sync"], bulk_only=True)
        bench.verify(guest)
    result.goals = [
        Goal("1000 writes/s, while copying: mean / idle mean", 1.5,
             result.ratio("drover", "write_mean_ms", "alone")),
        Goal("  worst write", 50, result.median("drover", "write_worst_ms"), unit="ms")]
    return result


def fastest(bench: Bench) -> Result:
    result = Result("fastest", "1 GiB, writes as fast as possible, unlimited link")
    size = bench.size("1G")
    with Lab() as lab:
        guest = lab.guest("fast", [Disk(size, data=size)], rate="max")
        bench.series(result, lab, guest, ["drover", "virsh", "virsh-sync"])
        bench.verify(guest)
    return result


def qcow2(bench: Bench) -> Result:
    result = Result("qcow2", "qcow2 with 1 GiB that can't be compressed, idle guest, unlimited link")
    with Lab() as lab:
        guest = lab.guest("qcow2", [Disk("2G", "qcow2", data=bench.size("1G"))], rate="idle")
        bench.series(result, lab, guest, ["drover", "virsh", "virsh-sync"])
        bench.verify(guest)
    return result


def sparse(bench: Bench) -> Result:
    result = Result("sparse", "10 GiB, 90 % of it holes, idle guest, unlimited link")
    piece = parse_size(bench.size("64M"))
    with Lab() as lab:
        data = ",".join(f"{i * parse_size('640M')}:{piece}" for i in range(16))
        guest = lab.guest("sparse", [Disk("10G", data=data)], rate="idle")
        bench.series(result, lab, guest, ["drover", "virsh", "nbdcopy", "qemu-img convert"])
        bench.verify(guest)
    return result


def slow(bench: Bench) -> Result:
    result = Result("slow", "512 MiB that can't be compressed, idle guest, 200 Mbit/s")
    size = bench.size("512M")
    with Lab() as lab:
        lab.set_rate("200mbit")
        guest = lab.guest("slow", [Disk(size, data=size)], rate="idle")
        bench.series(result, lab, guest, ["drover", "virsh"], link_rate=200 * 10**6)
        bench.verify(guest)
    return result


def blackout(bench: Bench) -> Result:
    """Two like guests: one's disk is on storage that both hosts have, so libvirt moves its memory alone. Only one
    of them runs at a time."""
    result = Result("blackout", "how long the guest stands still: 256 MiB disk, 200 writes/s, unlimited link",
                    charted="blackout_ms")
    shared = "/mnt/shared"

    def no_relabelling(xml: str) -> str:
        """The one libvirt would take the file back from the other one's QEMU."""
        return re.sub(r"<source (file='/mnt/shared/[^']*')/>",
                      r"<source \1><seclabel model='dac' relabel='no'/></source>", xml)

    with Lab() as lab:
        lab.a.mount_shared_fs("ext4", "1G", shared)
        lab.a.run(["chmod", "777", shared])
        own = lab.guest("own", [Disk("256M", data="256M")], rate=200)
        own.domain().suspend()
        image = f"{shared}/memory.raw"
        lab.a.run(["sh", "-c", f": >{image} && chmod 666 {image}"])
        memory = lab.guest("memory", [Disk("256M", data="256M", path=image)], rate=200, edit=no_relabelling)
        memory.domain().suspend()
        guests = {"drover": own, "virsh-memory": memory}
        for name in in_turn(list(guests), bench.runs):
            guests[name].domain().resume()
            result.rows.append(move(lab, guests[name], name))
            bench.say(json.dumps(result.rows[-1]))
            guests[name].domain().suspend()
        for guest in guests.values():
            guest.domain().resume()
            bench.verify(guest)
    result.goals = [Goal("blackout / that of libvirt moving memory alone", 1.2,
                         result.ratio("drover", "blackout_ms", "virsh-memory"))]
    return result


def memory(bench: Bench) -> Result:
    """The 64 TiB disk hangs on SATA, for which the witness has no driver: it would want to remember each block."""
    result = Result("memory", "four disks, one of them sparse and 64 TiB, 200 writes/s")
    with Lab() as lab:
        for host in lab.hosts:
            host.mount_fs("xfs", "4G", "/mnt/big")
        disks = [Disk("1G", data=bench.size("512M")), Disk("512M", "qcow2", data="128M"), Disk("256M", data="64M"),
                 Disk("64T", data="0:64M,32768G:64M,65535G:64M", path="/mnt/big/huge.raw", bus="sata", target="sda")]
        guest = lab.guest("four", disks, rate=200, edit=lambda xml: xml.replace("w.disks=4 ", "w.disks=3 "))
        bench.series(result, lab, guest, ["drover"])
        bench.verify(guest)
    for who in ("runner", "receiver"):
        result.goals.append(Goal(f"four disks, one of 64 TiB: the {who}'s memory", 256,
                                 result.median("drover", f"{who}_mib"), unit="MiB"))
    return result


def micro(bench: Bench) -> Result:
    """Those of the micro-benchmarks that are goals."""
    result = Result("micro", "micro-benchmarks")
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        p = subprocess.run([str(REPO / "bench/micro.sh"), "--benchmark_filter=arbiter/|nbd/write_4_KiB_(round|on)",
                            f"--benchmark_out={out.name}", "--benchmark_out_format=json"], text=True,
                           capture_output=True)
        bench.say(p.stdout)
        measured: dict[str, Row] = {}
        if p.returncode == 0:
            measured = {b["name"]: b for b in json.loads(Path(out.name).read_text())["benchmarks"]}
        else:
            result.notes = [f"bench/micro.sh failed: {p.stderr[-500:]}"]

    def median(name: str, key: str) -> Optional[float]:
        found = measured.get(f"{name}_median")
        return float(found[key]) if found else None

    for where, name in (("", "round_trip"), (", both on one processor", "on_one_processor")):
        for what, key in (("median", "p50_us"), ("mean", "real_time")):
            mine, its = (median(f"nbd/write_4_KiB_{name}/{who}/real_time", key) for who in ("drover", "nbdkit"))
            result.goals.append(Goal(f"NBD write of 4 KiB, {what} round trip / nbdkit's{where}", 1.0,
                                     mine / its if mine and its else None))
    for case in ("move", "copy", "forwarded_write", "pending_write"):
        steps = median(f"arbiter/{case}", "items_per_second")
        result.goals.append(Goal(f"arbiter, {case.replace('_', ' ')}: million steps/s/core", 5,
                                 steps / 1e6 if steps else None, at_most=False))
    return result


SCENARIOS: dict[str, Callable[[Bench], Result]] = {
    "raw": raw, "os": installed_os, "clone": clone, "delay": delay, "writes": writes, "blackout": blackout,
    "micro": micro, "memory": memory, "qcow2": qcow2, "sparse": sparse, "fastest": fastest, "slow": slow}
