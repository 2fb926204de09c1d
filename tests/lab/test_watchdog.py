# SPDX-License-Identifier: Apache-2.0
"""A drover that stands still or dies must not stall the guest: mirror/endpoint_watchdog.h."""
from __future__ import annotations

import os
import signal
from typing import Any, Iterator

import pytest

from lab import Disk, Guest, Lab, wait_for
from moves import Move, assert_unharmed, worst_write_ms

pytestmark = pytest.mark.usefixtures("drover")

STOPPED = 10  # of the witness's reports: seconds


@pytest.fixture
def moving(lab: Lab) -> Iterator[Move]:
    """A guest that writes all the time, in the middle of its copy."""
    guest = lab.guest("web1", [Disk("512M", data="384M"), Disk("128M", "qcow2", data="32M")], memory="256M", rate=200)
    lab.set_rate("100mbit")
    move = Move(lab, guest)
    move.wait_for_phase("copy")
    wait_for("both mirrors", lambda: len([j for j in guest.host.qmp("web1", "query-block-jobs")
                                          if j["status"] == "ready"]) == 2)
    guest.wait_report()
    guest.command("reset")
    yield move
    if move.process.poll() is None:
        move.interrupt(signal.SIGCONT)  # whatever failed, it shall hear the signal that ends it


def guard(move: Move) -> int:
    """The watchdog's process, as the machine sees it."""
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and open(f"/proc/{entry}/comm").read().strip() == "drover-guard":
                with open(f"/proc/{entry}/status") as f:
                    parent = next(line.split()[1] for line in f if line.startswith("PPid:"))
                if int(parent) == move.process.pid:
                    return int(entry)
        except OSError:
            continue
    raise AssertionError("drover has no watchdog")


def for_a_while(guest: Guest) -> None:
    for _ in range(STOPPED):
        guest.wait_report()


def test_a_stopped_runner_does_not_stall_the_guest(lab: Lab, moving: Move) -> None:
    guest = moving.guest
    moving.interrupt(signal.SIGSTOP)
    for_a_while(guest)
    worst = worst_write_ms(guest)
    jobs = guest.host.qmp("web1", "query-block-jobs")
    moving.interrupt(signal.SIGCONT)
    assert worst < 1000
    assert jobs == []
    lab.set_rate(None)
    outcome = moving.end()
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is lab.b
    assert_unharmed(guest)


@pytest.mark.leaves("*")
def test_a_killed_runner_does_not_stall_the_guest(lab: Lab, moving: Move) -> None:
    guest = moving.guest
    watchdog = guard(moving)
    moving.interrupt(signal.SIGKILL)
    for_a_while(guest)
    assert worst_write_ms(guest) < 1000
    wait_for("the watchdog's end", lambda: not os.path.exists(f"/proc/{watchdog}"))
    moving.end()
    assert_unharmed(guest)


def test_a_killed_watchdog_is_replaced(lab: Lab, moving: Move) -> None:
    guest = moving.guest
    first = guard(moving)
    os.kill(first, signal.SIGKILL)

    def second() -> Any:
        try:
            return guard(moving) != first
        except AssertionError:
            return False

    wait_for("another watchdog", second)
    moving.interrupt(signal.SIGSTOP)
    for_a_while(guest)
    worst = worst_write_ms(guest)
    moving.interrupt(signal.SIGCONT)
    assert worst < 1000
    outcome = moving.end()
    assert outcome.exit_code == 0, outcome.text()
    assert_unharmed(guest)


def test_without_a_watchdog_the_guest_would_wait(lab: Lab, moving: Move) -> None:
    """Both stopped: shows that the other tests measure what they say."""
    guest = moving.guest
    watchdog = guard(moving)
    os.kill(watchdog, signal.SIGSTOP)
    moving.interrupt(signal.SIGSTOP)
    for_a_while(guest)
    os.kill(watchdog, signal.SIGCONT)
    moving.interrupt(signal.SIGCONT)
    guest.wait_report()
    guest.wait_report()
    assert worst_write_ms(guest) > 5000
    moving.interrupt(signal.SIGINT)
    moving.end()
    assert_unharmed(guest)
