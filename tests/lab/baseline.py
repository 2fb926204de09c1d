#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How long moving the reference guest takes, how long it stands still and what its writes feel.

    /usr/bin/python3 tests/lab/baseline.py                       # libvirt's own way, 5 times
    /usr/bin/python3 tests/lab/baseline.py --movers virsh,drover # both, in turn, on the same guest

The guest: raw 4 GiB with 2 GiB of data that cannot be compressed, qcow2 1 GiB with 256 MiB of it, 512 MiB
of RAM, 1000 writes of 4 KiB a second into that data. Each run starts with cold caches; direction
alternates; afterwards the witness has read back everything. The movers take turns, so that a machine
that gets slower or faster meanwhile does not favour one of them.

total     wall clock of the command
blackout  QEMU's STOP on the source to RESUME on the target
mean, p99, worst   the guest's write latency while the command ran, by the guest's clock (which stands
          still during the blackout)
writes/s  the rate the guest reached meanwhile, by the same clock
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parent))

from lab import Disk, Guest, Host, Lab  # noqa: E402


def prepare_nothing(_guest: Guest, _target: Host) -> None:
    pass


def virsh_prepare(guest: Guest, target: Host) -> None:
    """Without a storage pool libvirt wants the target images to exist. Not counted as part of the time."""
    for path in guest.disks().values():
        info = json.loads(guest.host.run(["qemu-img", "info", "-U", "--output=json", path]).stdout)
        target.run(["qemu-img", "create", "-q", "-f", info["format"], path, str(info["virtual-size"])])


def virsh_command(guest: Guest, target: Host) -> list[str]:
    return ["virsh", "migrate", "--live", "--persistent", "--undefinesource", "--copy-storage-all", guest.name,
            f"qemu+ssh://{target.name}/system"]


def virsh_synchronous_command(guest: Guest, target: Host) -> list[str]:
    return virsh_command(guest, target) + ["--copy-storage-synchronous-writes"]


def drover_command(guest: Guest, target: Host) -> list[str]:
    return ["drover", "move", guest.name, target.name]


MOVERS: dict[str, tuple[Callable[[Guest, Host], None], Callable[[Guest, Host], list[str]]]] = {
    "virsh": (virsh_prepare, virsh_command),
    "virsh-sync": (virsh_prepare, virsh_synchronous_command),
    "drover": (prepare_nothing, drover_command),
}


def move(lab: Lab, guest: Guest, mover: str) -> dict[str, Any]:
    """One measured move to the other host; removes what the mover leaves of the source's disks."""
    prepare, command = MOVERS[mover]
    source = guest.host
    target = lab.other(source)
    paths = guest.disks().values()
    prepare(guest, target)
    lab.drop_caches()
    guest.command("reset")
    mark = lab.events.mark()
    begin = time.monotonic()
    source.run(command(guest, target))
    total = time.monotonic() - begin
    status = guest.command("status")
    if guest.host is not target:
        raise SystemExit(f"{mover}: the guest is still on {source.name}")
    for path in paths:
        source.path(path).unlink(missing_ok=True)
    latency = status["latency"]["since_reset"]
    return {
        "mover": mover,
        "total_s": round(total, 2),
        "blackout_ms": round((lab.events.blackout(guest.name, mark) or 0) * 1000),
        "write_mean_ms": round(latency["mean_us"] / 1000, 2),
        "write_p99_ms": round(latency["p99_us"] / 1000, 1),
        "write_worst_ms": round(latency["max_us"] / 1000),
        "writes_per_s": round(status["writes"] * 1000 / status["since_reset_ms"]),
    }


def quiet_latency(guest: Guest) -> dict[str, Any]:
    """The same figures while nothing happens, for five reports."""
    guest.command("reset")
    first = guest.status()["n"]
    status = guest.wait_report(after=first + 4)
    latency = status["latency"]["since_reset"]
    return {"mover": "(none)", "write_mean_ms": round(latency["mean_us"] / 1000, 2),
            "write_p99_ms": round(latency["p99_us"] / 1000, 1), "write_worst_ms": round(latency["max_us"] / 1000),
            "writes_per_s": round(status["writes"] * 1000 / status["since_reset_ms"])}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures moves of the reference guest.")
    parser.add_argument("--movers", default="virsh", help=f"comma-separated: {', '.join(MOVERS)}")
    parser.add_argument("--runs", type=int, default=5, help="of each mover (default: %(default)s)")
    parser.add_argument("--rate", default="1000", help="guest writes per second (default: %(default)s)")
    parser.add_argument("--link", help="limit the network, e.g. 1gbit")
    parser.add_argument("--json", action="store_true", help="one JSON object per run")
    args = parser.parse_args()
    movers = args.movers.split(",")
    columns = ["mover", "total_s", "blackout_ms", "write_mean_ms", "write_p99_ms", "write_worst_ms", "writes_per_s"]

    def show(row: dict[str, Any], note: str = "") -> None:
        if args.json:
            print(json.dumps({**row, "note": note}), flush=True)
        else:
            print(" ".join(f"{row.get(c, ''):>14}" for c in columns), note, flush=True)

    runs: list[dict[str, Any]] = []
    with Lab() as lab:
        if args.link:
            lab.set_rate(args.link)
        guest = lab.guest("reference", [Disk("4G", data="2G"), Disk("1G", "qcow2", data="256M")], rate=args.rate)
        if not args.json:
            print(" ".join(f"{c:>14}" for c in columns))
        show(quiet_latency(guest))
        for _ in range(args.runs):
            for mover in movers:
                runs.append(move(lab, guest, mover))
                show(runs[-1])
        for mover in movers:
            mine = [r for r in runs if r["mover"] == mover]
            show({c: mover if c == "mover" else round(statistics.median(r[c] for r in mine), 2) for c in columns}, "median")
        verdict = guest.verify()
        print(f"witness: {verdict['units']} blocks read back, {verdict['mismatches']} mismatches,"
              f" {verdict['io_errors']} I/O errors", file=sys.stderr)
        return 0 if verdict["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
