# SPDX-License-Identifier: Apache-2.0
"""What goes over the link: compressed where the network is the limit, over several addresses of the target."""
from __future__ import annotations

import json

import pytest

from lab import Disk, Guest, Lab
from moves import Move, assert_unharmed, move_ok

pytestmark = pytest.mark.usefixtures("drover")

SECOND = ("10.98.0.1", "10.98.0.2")


@pytest.fixture(name="guest")
def compressible_guest(lab: Lab) -> Guest:
    """A third of its data is noise."""
    return lab.guest("web1", [Disk("256M", data="192M")], memory="128M", rate=100, entropy=33)


def test_a_slow_network_is_compressed_for(lab: Lab, guest: Guest) -> None:
    lab.set_rate("200mbit")
    outcome = move_ok(lab, guest)
    seen = {e["compression"] for e in outcome.events if e["event"] == "progress"}
    assert seen & {"lz4", "zstd:1", "zstd:3"}, seen
    summary = outcome.summary
    assert summary["saved_bytes"] > 0.3 * summary["data_bytes"], outcome.text()
    assert_unharmed(guest)


def test_compression_is_changed_while_the_move_runs(lab: Lab, guest: Guest) -> None:
    lab.set_rate("100mbit")
    running = Move(lab, guest, "--compress", "none")
    half = running.wait_for_copied(0.3)
    assert half["saved_bytes"] == 0 and half["compression"] == "none"
    said = lab.a.run(["drover", "set", guest.name, "--compress", "zstd:3", "--json"]).stdout
    assert json.loads(said) == {"job": running.job, "compress": "zstd:3"}
    running.wait_for(lambda e: e.get("compression") == "zstd:3" and e["saved_bytes"] > 0)
    outcome = running.end()
    assert outcome.exit_code == 0, outcome.text()
    assert_unharmed(guest)


def test_two_addresses_of_which_one_goes(lab: Lab, guest: Guest) -> None:
    for host, address in zip((lab.a, lab.b), SECOND):
        host.run(["ip", "addr", "add", f"{address}/24", "dev", "eth0"])
    try:
        running = Move(lab, guest, "--via", f"{lab.b.ip},{SECOND[1]}", "--bandwidth", "20M")
        running.wait_for_copied(0.2)
        connected = lab.b.run(["ss", "-Htn", "state", "established"]).stdout
        assert SECOND[1] in connected
        lab.b.run(["ip", "addr", "del", f"{SECOND[1]}/24", "dev", "eth0"])
        note = running.wait_for(lambda e: e["event"] == "note" and SECOND[1] in e["text"])
        assert "without one of its addresses" in note["text"]
        running.hurry()
        outcome = running.end()
        assert outcome.exit_code == 0, outcome.text()
        assert outcome.summary["reconnects"] >= 1
        assert_unharmed(guest)
    finally:
        for host, address in zip((lab.a, lab.b), SECOND):
            host.run(["ip", "addr", "del", f"{address}/24", "dev", "eth0"], check=False)
