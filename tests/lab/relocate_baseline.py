#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How long relocating the reference guest's disks takes, and what its writes feel: drover and virsh in turn.

The guest: raw 4 GiB with 2 GiB of data that cannot be compressed, qcow2 1 GiB with 256 MiB of it, writes of
4 KiB into that data. Between two loop filesystems, ext4 and XFS, on this machine's disk; each run starts with
cold caches, and afterwards the witness has read back everything.

virsh: one `virsh blockcopy --wait --pivot` for each disk, at once, into images that it makes; then `rm` of
the old files, which drover does, too. (It checks less, and flushes nothing.)

total   wall clock until the old files are gone
mean, worst   the guest's write latency meanwhile
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).parent))

from lab import Disk, Guest, Lab  # noqa: E402

A, B = "/mnt/a", "/mnt/b"


def by_drover(guest: Guest, where: str) -> None:
    guest.host.run(["drover", "relocate", guest.name, where])


def by_virsh(guest: Guest, where: str) -> None:
    host, disks = guest.host, guest.disks()
    copies = [host.popen(["virsh", "blockcopy", guest.name, disk, f"{where}/{Path(path).name}", "--format",
                          path.rpartition(".")[2], "--wait", "--pivot", "--transient-job"],
                         stdout=subprocess.DEVNULL) for disk, path in disks.items()]
    if any(copy.wait() != 0 for copy in copies):
        raise SystemExit("virsh blockcopy failed")
    host.run(["rm", *disks.values()])


MOVERS: dict[str, Callable[[Guest, str], None]] = {"virsh": by_virsh, "drover": by_drover}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each (default: %(default)s)")
    parser.add_argument("--rate", default="200", help="guest writes per second (default: %(default)s)")
    args = parser.parse_args()
    totals: dict[str, list[float]] = {name: [] for name in MOVERS}
    print(f"{'':8} {'total s':>8} {'mean ms':>8} {'worst ms':>9}")
    with Lab(["hosta"]) as lab:
        lab.a.mount_fs("ext4", "6G", A)
        lab.a.mount_fs("xfs", "6G", B)
        guest = lab.guest("web1", [Disk("4G", data="2G", path=f"{A}/web1.raw"),
                                   Disk("1G", "qcow2", data="256M", path=f"{A}/web1.qcow2")], rate=args.rate)
        for run in range(2 * args.runs):
            # virsh, drover, drover, virsh: each goes as often in either direction.
            name = ("virsh", "drover", "drover", "virsh")[run % 4]
            where = (B, A)[run % 2]
            lab.drop_caches()
            guest.command("reset")
            start = time.monotonic()
            MOVERS[name](guest, where)
            totals[name].append(time.monotonic() - start)
            felt = guest.command("status")["latency"]["since_reset"]
            print(f"{name:8} {totals[name][-1]:8.2f} {felt['mean_us'] / 1000:8.2f} {felt['max_us'] / 1000:9.1f}",
                  flush=True)
            if not guest.verify()["ok"]:
                print(guest.mismatches())
                return 1
        for name, times in totals.items():
            print(f"{name:8} median {statistics.median(times):.2f} s")
        print(f"drover / virsh: {statistics.median(totals['drover']) / statistics.median(totals['virsh']):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
