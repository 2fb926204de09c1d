# SPDX-License-Identifier: Apache-2.0
"""Moves in the lab: run `drover move`, follow it, hold it at the barrier. For tests, benchmarks, the demo."""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
from typing import Any, Callable, Optional

from lab import Guest, Host, Lab, LabError, wait_for

HOLD = "/run/drover-hold-barrier"


@dataclasses.dataclass
class Outcome:
    """How a `drover move --json` ended."""
    exit_code: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        return next(e for e in self.events if e["event"] == "summary")

    @property
    def error(self) -> dict[str, Any]:
        return next(e for e in self.events if e["event"] == "error")

    def text(self) -> str:
        return "\n".join(json.dumps(e) for e in self.events[-5:]) + "\n" + self.stderr


class Running:
    """A drover command with --json under way: `events` grows as it reports."""

    running: list["Running"] = []  # what a failed test leaves to conftest.py

    def __init__(self, host: Host, *words: str) -> None:
        self.host = host
        self.words = words
        self.process = host.popen(["drover", *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  stdin=subprocess.DEVNULL, text=True)
        self.events: list[dict[str, Any]] = []
        self._stderr = ""
        self._changed = threading.Condition()
        self._over = False
        self._readers = [threading.Thread(target=self._read_events), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()
        Running.running.append(self)

    def _read_events(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr
        self._stderr = self.process.stderr.read()

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], timeout: float = 120) -> dict[str, Any]:
        """The first event that meets the condition."""
        with self._changed:
            found: list[dict[str, Any]] = []

            def there() -> bool:
                found.extend(e for e in self.events if condition(e))
                return bool(found) or self._over

            self._changed.wait_for(there, timeout)
            if not found:
                raise LabError(f"drover {' '.join(self.words)} never got there: {self.events[-3:]} {self._stderr}")
            return found[0]

    def wait_for_phase(self, phase: str) -> dict[str, Any]:
        return self.wait_for(lambda e: e.get("phase") == phase)

    def wait_for_copied(self, share: float) -> dict[str, Any]:
        """The target has acknowledged so much of the disks' data."""
        return self.wait_for(lambda e: e.get("phase") == "copy" and e.get("data_bytes", 0) > 0 and
                             e["copied_bytes"] >= share * e["data_bytes"])

    @property
    def job(self) -> str:
        return str(self.wait_for(lambda e: e["event"] == "started")["job"])

    def hurry(self) -> None:
        """Lifts the limit that made a phase long enough to do something in it."""
        self.host.run(["drover", "set", self.job, "--bandwidth", "none"])

    def interrupt(self, sig: int) -> None:
        self.process.send_signal(sig)

    def end(self, timeout: float = 300) -> Outcome:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise LabError(f"drover {' '.join(self.words)} did not end within {timeout:g} s: {self.events[-3:]}")
        finally:
            Running.running.remove(self)
            for reader in self._readers:
                reader.join()
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe
                pipe.close()
        return Outcome(self.process.returncode, self.events, self._stderr)


class Move(Running):
    """A `drover move`."""

    def __init__(self, lab: Lab, guest: Guest, *options: str, host: Optional[Host] = None) -> None:
        self.lab, self.guest = lab, guest
        self.source = guest.host
        self.target = host or lab.other(self.source)
        super().__init__(self.source, "move", guest.name, self.target.name, *options)


def jobs(host: Host) -> list[dict[str, Any]]:
    """`drover jobs --json`."""
    return [json.loads(line) for line in host.run(["drover", "jobs", "--json"]).stdout.splitlines()]


def only_job(host: Host) -> dict[str, Any]:
    [job] = jobs(host)
    return job


def move(lab: Lab, guest: Guest, *options: str) -> Outcome:
    """Moves the guest to the other host and waits for the end."""
    return Move(lab, guest, *options).end()


def move_ok(lab: Lab, guest: Guest, *options: str) -> Outcome:
    """The same; it must succeed, the guest must run there and the source be gone."""
    source, target = guest.host, lab.other(guest.host)
    paths = guest.disks()
    outcome = move(lab, guest, *options)
    assert outcome.exit_code == 0, outcome.text()
    assert guest.host is target, outcome.text()
    assert guest.name not in source.virsh("list", "--all", "--name").split()
    assert guest.name in target.virsh("list", "--persistent", "--name").split()
    for path in paths.values():
        if path.startswith("/dev/"):
            continue
        assert not source.path(path).exists(), f"{path} is still on the source"
    return outcome


def move_comparing_at_barrier(lab: Lab, guest: Guest, *options: str) -> Outcome:
    """Holds the move at the barrier and compares the images of both hosts, byte for byte."""
    source, target = guest.host, lab.other(guest.host)
    before = guest.disks()
    formats = disk_formats(guest)
    running = Move(lab, guest, "--hold-barrier", HOLD, *options)
    held = source.path(HOLD)
    wait_for("the barrier", lambda: held.exists() or running.process.poll() is not None, 300)
    differences = []
    if held.exists():
        chosen = dict(o.split("=", 1) for o, before_it in zip(options, ("",) + options) if before_it == "--disk")
        for disk, path in before.items():
            difference = lab.compare(source, path, target, chosen.get(disk, path), formats[disk], formats[disk])
            if difference:
                differences.append(f"{disk}: {difference}")
        held.unlink()
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert not differences, differences
    return outcome


def disk_formats(guest: Guest) -> dict[str, str]:
    """"vda" -> "raw", from the guest's definition."""
    import xml.etree.ElementTree as ElementTree
    root = ElementTree.fromstring(guest.domain().XMLDesc(0))
    found = {}
    for disk in root.findall("./devices/disk[@device='disk']"):
        target, driver = disk.find("target"), disk.find("driver")
        assert target is not None and driver is not None
        found[target.get("dev", "")] = driver.get("type", "raw")
    return found


def assert_unharmed(guest: Guest) -> dict[str, Any]:
    """The witness reads everything back: nothing lost, no I/O error."""
    verdict = guest.verify()
    assert verdict["ok"], (verdict, guest.mismatches()[:3])
    status = guest.status()
    assert status["io_errors"] == 0, status
    return verdict


def worst_write_ms(guest: Guest) -> float:
    """The longest that a write of the guest took since `reset`."""
    latency = guest.command("status")["latency"]["since_reset"]
    print(f"guest writes: {latency}")
    return float(latency["max_us"]) / 1000


def kill_all(host: Host, what: str) -> None:
    """kill -9 to the host's processes whose command line has this in it; there must be one."""
    pids = [pid for pid, line in host.processes().items() if what in line]
    assert pids, f"no {what} on {host.name}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def receivers(host: Host) -> list[int]:
    """The machine's ids of the host's receivers."""
    return [pid for pid, line in host.processes().items() if "drover receive" in line]
