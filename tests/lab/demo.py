# SPDX-License-Identifier: Apache-2.0
"""The demo: a live guest with a raw and a qcow2 disk goes to another host and back, and is asked whether it
missed anything. Exit code 0: it did not."""
from __future__ import annotations

import sys

from lab import Disk, Guest, Host, Lab, why_not


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def one_move(lab: Lab, guest: Guest, source: Host, target: Host) -> bool:
    say(f"{source.name}# drover move {guest.name} {target.name}")
    mark = lab.events.mark()
    guest.command("reset")
    process = source.popen(["drover", "move", guest.name, target.name])
    if process.wait() != 0:
        print(f"drover ended with exit code {process.returncode}")
        return False
    blackout = lab.events.blackout(guest.name, mark)
    slowest = guest.wait_report()["latency"]["since_reset"]["max_us"] / 1000
    print(f"The guest runs on {guest.host.name}; QEMU's events say it stood still for "
          f"{(blackout or 0) * 1000:.0f} ms; its slowest write took {slowest:.0f} ms.")
    return guest.host is target


def main() -> int:
    reason = why_not()
    if reason:
        print(f"The demo can't run here: {reason}", file=sys.stderr)
        return 2
    say("Two hosts: hosta and hostb, each with its own libvirt, SSH and disks")
    with Lab() as lab:
        say("A guest on hosta: a raw disk of 4 GiB (2 GiB of data), a qcow2 disk of 1 GiB, 1000 writes a second")
        guest = lab.guest("web1", [Disk("4G", data="2G"), Disk("1G", "qcow2", data="256M")], rate=1000)
        print(lab.a.virsh("list").rstrip())
        good = one_move(lab, guest, lab.a, lab.b) and one_move(lab, guest, lab.b, lab.a)
        say("The guest reads back every block it ever wrote")
        verdict = guest.verify()
        status = guest.status()
        left = lab.leftovers()
        for line in left:
            print("left behind:", line)
        print(f"{status['writes']} writes, {verdict['mismatches']} mismatches, {status['io_errors']} I/O errors, "
              f"{len(left)} things left behind")
        good = good and verdict["ok"] and status["io_errors"] == 0 and not left
    say("VERDICT: nothing was lost" if good else "VERDICT: FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
