# SPDX-License-Identifier: Apache-2.0
"""Many moves in a row, in alternating direction, of the reference guest; each is held at the barrier and
compared byte for byte, and after each the witness reads everything back.

    /usr/bin/python3 tests/lab/endurance.py --moves 20

The guest: raw 4 GiB with 2 GiB of data, qcow2 1 GiB with 256 MiB of it, 512 MiB of RAM, 1000 writes a second.
Exit code 0: no mismatch, no guest I/O error, images equal at every barrier, source files gone, the target's
images no more than 5 % larger or smaller than the source's, both agents under 256 MiB, nothing left behind.
"""
from __future__ import annotations

import argparse
import sys

from lab import Disk, Lab, why_not
from moves import assert_unharmed, move_comparing_at_barrier

AGENT_LIMIT = 256 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20)
    moves = parser.parse_args().moves
    reason = why_not()
    if reason:
        print(f"can't run here: {reason}", file=sys.stderr)
        return 2
    with Lab() as lab:
        guest = lab.guest("web1", [Disk("4G", data="2G"), Disk("1G", "qcow2", data="256M")], rate=1000)
        for number in range(1, moves + 1):
            source, paths = guest.host, guest.disks()
            before = {disk: source.du(path) for disk, path in paths.items()}
            outcome = move_comparing_at_barrier(lab, guest)
            du = {disk: guest.host.du(path) for disk, path in guest.disks().items()}
            verdict = assert_unharmed(guest)
            for path in paths.values():
                assert not source.path(path).exists(), f"{path} is still there"
            summary = outcome.summary
            for agent in ("runner_peak_memory_bytes", "receiver_peak_memory_bytes"):
                assert summary[agent] < AGENT_LIMIT, (agent, summary[agent])
            for disk, size in du.items():
                assert abs(size - before[disk]) <= before[disk] * 0.05, (disk, before[disk], size)
            print(f"{number:3} {source.name} -> {guest.host.name}: {summary['total_ms'] / 1000:.1f} s, equal at the "
                  f"barrier, {verdict['units']} blocks read back, {verdict['mismatches']} mismatches, "
                  f"{guest.status()['io_errors']} I/O errors, du {sum(du.values()) >> 20} MiB, agents "
                  f"{summary['runner_peak_memory_bytes'] >> 20} and "
                  f"{summary['receiver_peak_memory_bytes'] >> 20} MiB", flush=True)
        left = lab.leftovers()
        assert not left, left
    print(f"{moves} moves, nothing lost, nothing left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
