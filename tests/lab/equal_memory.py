# SPDX-License-Identifier: Apache-2.0
"""Many moves in a row; in each, the memory that the target's QEMU has loaded is compared page by page with what the
source's had when the guest stopped.

    /usr/bin/python3 tests/lab/equal_memory.py --moves 20
    /usr/bin/python3 tests/lab/equal_memory.py --moves 20 -- --memory-channels 1      # options of drover move

The target is held at the barrier, before it is resumed. The source's QEMU is kept from its end by stopping its host's
libvirtd (SIGSTOP) as soon as it has sent everything. Several of these at once find more, for the guest's CPU is taken
from it at bad moments then. Exit code 0: all equal.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Iterator

from lab import Disk, Guest, Host, Lab, LabError, parse_size, wait_for, why_not
from moves import HOLD, Move, assert_unharmed

MEMORY = "256M"
SIZE = parse_size(MEMORY)
PAGE = 4096
PIECE = 1 << 20


class Ram:
    """The guest's memory in a QEMU, read through /proc: that needs neither QEMU nor libvirt."""

    def __init__(self, guest: Guest, host: Host) -> None:
        pid = guest.qemu_pid(host)
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                begin, end = (int(x, 16) for x in line.split()[0].split("-"))
                if SIZE <= end - begin < SIZE + (4 << 20):  # rounded up to a huge page
                    self._begin = begin
                    self._file = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
                    return
        raise LabError(f"{host.name}: {guest.name}'s memory is not in its QEMU's map")

    def __enter__(self) -> "Ram":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, at: int, size: int) -> bytes:
        read = b""
        while len(read) < size:
            more = os.pread(self._file, size - len(read), self._begin + at + len(read))
            if not more:
                raise LabError("QEMU ended before its memory was read")
            read += more
        return read


def different_pages(a: Ram, b: Ram) -> Iterator[tuple[int, int]]:
    """Their physical addresses, and how many of their bytes differ: few in a page that is old."""
    for at in range(0, SIZE, PIECE):
        x, y = a.read(at, PIECE), b.read(at, PIECE)
        if x != y:
            for i in range(0, PIECE, PAGE):
                if bytes_differ := sum(p != q for p, q in zip(x[i:i + PAGE], y[i:i + PAGE])):
                    yield at + i, bytes_differ


def move_comparing_memory(lab: Lab, guest: Guest, *options: str) -> list[tuple[int, int]]:
    """Moves it; the pages that the target had otherwise than the source."""
    source, target = guest.host, lab.other(guest.host)
    libvirtd = source.machine_pid(int(source.path("/run/libvirtd.pid").read_text()))
    mark = lab.events.mark()
    with Ram(guest, source) as sent:
        running = Move(lab, guest, "--hold-barrier", HOLD, *options)

        def completed(host: Host) -> bool:
            if running.process.poll() is not None:
                raise LabError("drover has ended")
            return any(e.name == "MIGRATION" and e.data.get("status") == "completed" and e.host == host.name
                       for e in lab.events.since(mark))

        def until_completed(host: Host) -> None:
            wait_for(f"the memory, on {host.name}", lambda: completed(host), 120, interval=0.001)

        different, why = [], ""
        try:
            until_completed(source)
            os.kill(libvirtd, signal.SIGSTOP)
            until_completed(target)
            wait_for("the barrier", source.path(HOLD).exists, 60)
            with Ram(guest, target) as loaded:
                different = list(different_pages(sent, loaded))
        except LabError as e:
            why = f"{e}\n"
        finally:
            os.kill(libvirtd, signal.SIGCONT)
        source.path(HOLD).unlink(missing_ok=True)
    outcome = running.end()
    if why or outcome.exit_code != 0:
        raise LabError(why + outcome.text())
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("options", nargs="*", help="of drover move")
    args = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"can't run here: {reason}", file=sys.stderr)
        return 2
    bad = 0
    with Lab() as lab:
        guest = lab.guest("web1", [Disk("64M", data="16M"), Disk("32M", "qcow2", data="8M")], memory=MEMORY, rate=300,
                          options="w.mem=48M w.memrate=100")
        for number in range(1, args.moves + 1):
            different = move_comparing_memory(lab, guest, *args.options)
            bad += bool(different)
            pages = f"{len(different)} pages differ: " if different else "equal"
            pages += ", ".join(f"{at:#x} in {count} bytes" for at, count in different[:8])
            print(f"{number:3} to {guest.host.name}: {pages}", flush=True)
            assert_unharmed(guest)
    print(f"{args.moves} moves, {bad} of them with a page that differs")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
