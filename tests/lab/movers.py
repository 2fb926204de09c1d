# SPDX-License-Identifier: Apache-2.0
"""Ways to move a guest with its disks to the other host, and one measured move. For the benchmarks.

Each move starts with cold caches. What is measured (`move()` returns a row with these, None where there is none):

total_s       wall clock of the command
freed_s       until the source's disks have been freed, too, for those who do that
bulk_s        of it, copying the disks: drover's copy phase; until libvirt's mirror is ready
blackout_ms   QEMU's STOP on the source to RESUME on the target
write_mean_ms, write_p99_ms, write_worst_ms   the guest's write latency while the command ran (`bulk_only`:
              while the disks were copied), by the guest's clock (which stands still during the blackout)
writes_per_s  the rate the guest reached meanwhile, by the same clock
wire_mib      what drover sent
gave_up       it did not come to an end within PATIENCE_S, and was ended; the guest has stayed
busy          share of `link_rate` that was in use in the bulk phase, with all headers
"""
from __future__ import annotations

import json
import subprocess
import threading
import time
from typing import Any, Callable, Optional

from lab import Guest, Host, Lab, LabError
from moves import Move

Row = dict[str, Any]
PATIENCE_S = 120


def felt(status: Row) -> Row:
    """The guest's columns, from an answer to `status`; none of a guest that wrote nothing."""
    if status["writes"] == 0:
        return {}
    latency = status["latency"]["since_reset"]
    return {"write_mean_ms": round(latency["mean_us"] / 1000, 2), "write_p99_ms": round(latency["p99_us"] / 1000, 1),
            "write_worst_ms": round(latency["max_us"] / 1000),
            "writes_per_s": round(status["writes"] * 1000 / max(status["since_reset_ms"], 1))}


def quiet_latency(guest: Guest) -> Row:
    """The same figures while nothing happens, for five reports."""
    guest.command("reset")
    first = guest.status()["n"]
    return {"mover": "(none)", **felt(guest.wait_report(after=first + 4))}


class _Bulk:
    """What happened while the disks were copied."""

    def __init__(self, lab: Lab, guest: Guest, target: Host, link_rate: Optional[int], bulk_only: bool) -> None:
        self.lab, self.guest, self.target = lab, guest, target
        self.link_rate, self.bulk_only = link_rate, bulk_only
        self.row: Row = {}
        self._begin = 0.0
        self._bytes = 0

    def begins(self) -> None:
        self._begin = time.monotonic()
        if self.link_rate:
            self._bytes = self.lab.link_bytes(self.target)
        if self.bulk_only:
            self.guest.command("reset")

    def ends(self) -> None:
        taken = time.monotonic() - self._begin
        self.row["bulk_s"] = round(taken, 2)
        if self.link_rate:
            self.row["busy"] = round((self.lab.link_bytes(self.target) - self._bytes) * 8 / self.link_rate / taken, 3)
        if self.bulk_only:
            self.row.update(felt(self.guest.command("status")))


def _prepare_nothing(_guest: Guest, _target: Host) -> None:
    pass


def _prepare_virsh(guest: Guest, target: Host) -> None:
    """Without a storage pool libvirt wants the target images to exist. Not counted as part of the time."""
    for path in guest.disks().values():
        info = json.loads(guest.host.run(["qemu-img", "info", "-U", "--output=json", path]).stdout)
        target.run(["qemu-img", "create", "-q", "-f", info["format"], path, str(info["virtual-size"])])


def _virsh(*options: str) -> Callable[[Guest, Host, _Bulk], None]:
    def run(guest: Guest, target: Host, bulk: _Bulk) -> None:
        events, mark, disks = bulk.lab.events, bulk.lab.events.mark(), len(guest.disks())

        def follow() -> None:
            def mirrors(state: str) -> int:
                return sum(1 for e in events.since(mark) if e.domain == guest.name and e.name == "JOB_STATUS_CHANGE" and
                           e.data["status"] == state)

            for state, then in (("running", bulk.begins), ("ready", bulk.ends)):
                while mirrors(state) < (1 if state == "running" else disks):
                    if over.wait(0.01):
                        return
                then()

        over = threading.Event()
        follower = threading.Thread(target=follow)
        follower.start()
        migration = guest.host.popen(["virsh", "migrate", "--live", "--persistent", "--undefinesource", *options,
                                      guest.name, f"qemu+ssh://{target.name}/system"], text=True,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            error = migration.communicate(timeout=PATIENCE_S)[1]
        except subprocess.TimeoutExpired:
            # A guest that writes faster than its disk is mirrored: libvirt would go on for ever.
            guest.host.virsh("domjobabort", guest.name)
            migration.communicate(timeout=60)
            bulk.row["gave_up"] = True
            return
        finally:
            over.set()
            follower.join()
        if migration.returncode != 0:
            raise LabError(f"virsh migrate: exit code {migration.returncode}: {error.strip()}")
    return run


def _drover(guest: Guest, target: Host, bulk: _Bulk) -> None:
    running = Move(bulk.lab, guest, host=target)
    try:
        if bulk.bulk_only or bulk.link_rate:
            running.wait_for_phase("copy")
            bulk.begins()
            # The guest's answer takes a moment: it is asked while there still is something to copy.
            share = 0.9 if bulk.bulk_only else 2
            running.wait_for(lambda e: e.get("phase") in ("synchronised", "memory") or
                             e.get("phase") == "copy" and e["copied_bytes"] >= share * e["data_bytes"] > 0, PATIENCE_S)
            bulk.ends()
    finally:
        outcome = running.end(timeout=2 * PATIENCE_S)
    if outcome.exit_code != 0:
        raise LabError(f"drover move: exit code {outcome.exit_code}: {outcome.text()}")
    summary = outcome.summary
    phases = {p["phase"]: p["ms"] for p in summary["phases"]}
    bulk.row.update(bulk_s=round(phases.get("copy", 0) / 1000, 2), wire_mib=round(summary["wire_bytes"] / 2**20),
                    phases_ms=phases, runner_mib=round(summary["runner_peak_memory_bytes"] / 2**20),
                    receiver_mib=round(summary["receiver_peak_memory_bytes"] / 2**20))


MOVERS: dict[str, tuple[Callable[[Guest, Host], None], Callable[[Guest, Host, _Bulk], None]]] = {
    "virsh": (_prepare_virsh, _virsh("--copy-storage-all")),
    "virsh-sync": (_prepare_virsh, _virsh("--copy-storage-all", "--copy-storage-synchronous-writes")),
    "virsh-memory": (_prepare_nothing, _virsh("--unsafe")),  # disks on storage that both hosts have
    "drover": (_prepare_nothing, _drover),
}


def move(lab: Lab, guest: Guest, mover: str, bulk_only: bool = False, link_rate: Optional[int] = None) -> Row:
    """One measured move to the other host; removes what the mover leaves of the source's disks."""
    prepare, run = MOVERS[mover]
    source = guest.host
    target = lab.other(source)
    paths = guest.disks().values()
    prepare(guest, target)
    lab.drop_caches()
    guest.command("reset")
    bulk = _Bulk(lab, guest, target, link_rate, bulk_only)
    mark = lab.events.mark()
    begin = time.monotonic()
    run(guest, target, bulk)
    row = {"mover": mover, "total_s": round(time.monotonic() - begin, 2)}
    if not bulk_only:
        row.update(felt(guest.command("status")))
    source.wait_freed()
    row["freed_s"] = round(time.monotonic() - begin, 2)
    if bulk.row.get("gave_up"):
        for path in paths:
            target.path(path).unlink(missing_ok=True)
        return {**row, **bulk.row}
    if guest.host is not target:
        raise LabError(f"{mover}: the guest is still on {source.name}")
    if mover != "virsh-memory":
        for path in paths:
            source.path(path).unlink(missing_ok=True)
    blackout = lab.events.blackout(guest.name, mark)
    return {**row, "blackout_ms": round(blackout * 1000) if blackout is not None else None, **bulk.row}


def in_turn(names: list[str], runs: int) -> list[str]:
    """Who goes when: in turn, every other round the other way about, so that with an even number of
    movers, too, each goes as often in either direction."""
    return [name for run in range(runs) for name in (names if run % 2 == 0 else names[::-1])]
