# SPDX-License-Identifier: Apache-2.0
"""What the target has already is not sent: an earlier copy of the disk, with an index of it there."""
from __future__ import annotations

import json
import subprocess

import pytest

from lab import Disk, Guest, Host, IMAGES, Lab, wait_for
from moves import assert_unharmed, move_comparing_at_barrier, move_ok, receivers

pytestmark = pytest.mark.usefixtures("drover")


def indexed(host: Host) -> set[str]:
    listed = host.run(["drover", "index", "--list", "--json"]).stdout
    return {json.loads(line)["path"] for line in listed.splitlines()}


def copy_to_target(lab: Lab, guest: Guest, disk: str) -> str:
    """A copy of the running guest's disk on the other host, as a clone's template would be."""
    target = lab.other(guest.host)
    path = f"{IMAGES}/template.raw"
    subprocess.run(["cp", "--sparse=always", "--reflink=never", str(guest.host.path(guest.disks()[disk])),
                    str(target.path(path))], check=True)
    return path


def test_what_an_earlier_copy_holds_is_not_sent_and_moves_keep_the_index(lab: Lab) -> None:
    # Each write since the template was made spoils one of its pieces of 64 KiB, and each during the move is sent.
    guest = lab.guest("clone", [Disk("512M", data="384M")], memory="256M", rate=20)
    target = lab.other(guest.host)
    template = copy_to_target(lab, guest, "vda")
    said = target.run(["drover", "index", IMAGES]).stdout
    assert f"{template}: read" in said, said
    assert indexed(target) == {template}
    outcome = move_comparing_at_barrier(lab, guest)
    summary = outcome.summary
    assert summary["found_bytes"] > 300 << 20, summary
    assert summary["wire_bytes"] - summary["memory_bytes"] < 64 << 20, summary
    assert_unharmed(guest)
    # The receiver reads what came, after the move.
    image = guest.disks()["vda"]
    wait_for("the index", lambda: image in indexed(target) and not receivers(target), 60)
    # The template is a miss in the other direction, and no harm; without the index, nothing is asked.
    back = move_ok(lab, guest)
    assert back.summary["found_bytes"] == 0
    assert_unharmed(guest)
    target.run(["rm", template])
    again = move_ok(lab, guest, "--no-index")
    assert again.summary["found_bytes"] == 0
    wait_for("the index", lambda: indexed(target) == {image} and not receivers(target), 60)
    target.run(["rm", "-r", "/var/lib/drover/index"])
