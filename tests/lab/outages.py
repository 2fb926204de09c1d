# SPDX-License-Identifier: Apache-2.0
"""What the tests of outages share: a move that dwells in a phase, what the guest sees of it, how it must end."""
from __future__ import annotations

import os
import time
from typing import Any, Callable

import pytest

from lab import Guest, Host, Lab, wait_for
from moves import Move, Outcome, Running, assert_unharmed, move_ok, only_job, worst_write_ms

MIB = 1 << 20
PHASES = ["copy", "lead", "synchronised", "memory"]  # "lead": the end of the copy, when QEMU is started on the target
SLOW = ("--bandwidth", "20M")  # makes each phase last for a second or more; Running.hurry() lifts it
HELD = 10  # cli/exit_codes.h
# One whose client has ended while the link was down: what ran in it has ended, too, and sshd hears of the client when TCP
# tries again, up to two minutes after the link is up (seen: 12 s after an outage of 45 s).
CUT_SESSION = "*: process: sshd: *"

long = pytest.mark.skipif(not os.environ.get("DROVER_LAB_LONG"), reason="takes minutes: DROVER_LAB_LONG=1 runs it")


class Seen:
    """A row of the table of outages (conftest.py prints it): what the guest and the link saw."""

    def __init__(self, case: str, record: Callable[[str, object], None]) -> None:
        self.row: dict[str, Any] = {"case": case, "outcome": "", "worst write in the outage, ms": "",
                                    "worst write in all, ms": "", "sent again, MiB": "", "of, MiB": "",
                                    "reconnects": ""}
        record("outage", self.row)

    def outage_begins(self, guest: Guest) -> None:
        guest.command("reset")

    def outage_over(self, guest: Guest) -> float:
        worst = worst_write_ms(guest)
        self.row["worst write in the outage, ms"] = f"{worst:.0f}"
        return worst

    def ended(self, guest: Guest, outcome: Outcome, how: str = "") -> None:
        names = {0: "moved", HELD: "held", 130: "cancelled"}
        self.row["outcome"] = how or names.get(outcome.exit_code, f"undone ({outcome.exit_code})")
        self.row["worst write in all, ms"] = f"{worst_write_ms(guest):.0f}"
        for event in outcome.events:
            if "sent_again_bytes" in event:
                self.row["sent again, MiB"] = f"{event['sent_again_bytes'] / MIB:.1f}"
                self.row["reconnects"] = event.get("reconnects", "")
            if event.get("data_bytes"):
                self.row["of, MiB"] = f"{event['data_bytes'] / MIB:.0f}"


def lead(lab: Lab, guest: Guest, *options: str) -> Move:
    """A slow move that copies, and QEMU has been started on the target (as otherwise near the copy's end only)."""
    running = Move(lab, guest, *SLOW, "--start-target-at-once", *options)
    wait_for("the incoming guest", lambda: any(f"guest={guest.name}," in line
                                               for line in running.target.processes().values()), 60)
    job = only_job(running.source)
    assert (job["state"], job["progress"]["phase"]) == ("moving-memory", "copy"), job
    return running


def begin(lab: Lab, guest: Guest, phase: str, *options: str) -> Move:
    """A slow move that is in the middle of its copy, near the end of it, or at the beginning of another phase."""
    if phase == "lead":
        return lead(lab, guest, *options)
    running = Move(lab, guest, *SLOW, *options)
    if phase == "copy":
        running.wait_for_copied(0.3)
    else:
        running.wait_for_phase(phase)
    return running


def outage_of(seconds: float) -> None:
    """An outage's own length: the one thing here that no event tells."""
    time.sleep(seconds)


def link_down(lab: Lab, seconds: float) -> None:
    lab.set_link(lab.b, False)
    try:
        outage_of(seconds)
    finally:
        lab.set_link(lab.b, True)


def ends_well(lab: Lab, guest: Guest, seen: Seen, outcome: Outcome, how: str = "") -> None:
    """Whatever became of the move: nothing is lost, nothing is left, and the next move works."""
    seen.ended(guest, outcome, how)
    assert_unharmed(guest)
    left = lab.leftovers([CUT_SESSION])
    left += [line for line in lab.leftovers(settle=150) if line not in left]
    assert not left, left
    move_ok(lab, guest)
    assert_unharmed(guest)


def moved(lab: Lab, guest: Guest, seen: Seen, outcome: Outcome, how: str = "") -> None:
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    ends_well(lab, guest, seen, outcome, how)


def undone(lab: Lab, guest: Guest, seen: Seen, outcome: Outcome, exit_code: int, how: str = "") -> None:
    assert outcome.exit_code == exit_code, outcome.text()
    assert guest.host is lab.a
    for path in guest.disks().values():
        assert not lab.b.path(path).exists(), f"{path} was left on the target"
    ends_well(lab, guest, seen, outcome, how)


def share_sent_again(outcome: Outcome) -> float:
    share = float(outcome.summary["sent_again_bytes"]) / outcome.summary["data_bytes"]
    print(f"sent again: {100 * share:.2f} %")
    return share


def resume(host: Host, job: str) -> Outcome:
    return Running(host, "resume", job).end()


def is_dead(host: Host, job: str) -> bool:
    """The job is there, and no process works on it."""
    found = only_job(host)
    return bool(found["job"] == job and not found["alive"])


def guest_moves_or_resumed(lab: Lab, running: Running, job: str) -> tuple[Outcome, str]:
    """The end of a move that may have stopped half-way, for a person to go on with."""
    outcome = running.end()
    if outcome.exit_code != HELD:
        return outcome, ""
    assert f"drover resume {job}" in outcome.text(), outcome.text()
    return resume(lab.a, job), "held, resumed"


def wait_gone(pid: int) -> None:
    wait_for(f"process {pid} to end", lambda: not os.path.exists(f"/proc/{pid}"))
