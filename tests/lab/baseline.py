#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How long moving the reference guest takes, how long it stands still and what its writes feel.

    /usr/bin/python3 tests/lab/baseline.py                       # libvirt's own way, 5 times
    /usr/bin/python3 tests/lab/baseline.py --movers virsh,drover # both, in turn, on the same guest

The guest: raw 4 GiB with 2 GiB of data that cannot be compressed, qcow2 1 GiB with 256 MiB of it, 512 MiB
of RAM, 1000 writes of 4 KiB a second into that data. Each run starts with cold caches; direction
alternates; afterwards the witness has read back everything. The movers take turns, so that a machine
that gets slower or faster meanwhile does not favour one of them. The columns: movers.py.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lab import Disk, Lab  # noqa: E402
from movers import MOVERS, Row, in_turn, move, quiet_latency  # noqa: E402


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

    def show(row: Row, note: str = "") -> None:
        if args.json:
            print(json.dumps({**row, "note": note}), flush=True)
        else:
            print(" ".join(f"{row.get(c, ''):>14}" for c in columns), note, flush=True)

    runs: list[Row] = []
    with Lab() as lab:
        if args.link:
            lab.set_rate(args.link)
        guest = lab.guest("reference", [Disk("4G", data="2G"), Disk("1G", "qcow2", data="256M")], rate=args.rate)
        if not args.json:
            print(" ".join(f"{c:>14}" for c in columns))
        show(quiet_latency(guest))
        for mover in in_turn(movers, args.runs):
            runs.append(move(lab, guest, mover))
            show(runs[-1])
        for mover in movers:
            mine = [r for r in runs if r["mover"] == mover]
            show({"mover": mover, **{c: round(statistics.median(r[c] for r in mine), 2) for c in columns[1:]
                                     if all(c in r for r in mine)}}, "median")
        verdict = guest.verify()
        print(f"witness: {verdict['units']} blocks read back, {verdict['mismatches']} mismatches,"
              f" {verdict['io_errors']} I/O errors", file=sys.stderr)
        return 0 if verdict["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
