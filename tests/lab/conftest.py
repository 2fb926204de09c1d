# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests on two hosts.

lab      the two hosts, shared by all tests (a new one is made after a test that left something behind)
small    another, for outages.py; seen: its row in the table of outages
guest    a small running guest on hosta: raw 256 MiB (64 MiB data) + qcow2 128 MiB (32 MiB data)
drover   the path of the program under test; skips the test when it is not built

After each test that uses `lab`: nothing may be left in the guests that still run, and, once they are
destroyed, nothing on the hosts. `@pytest.mark.leaves("*: file: /mnt/a/*")` names what a test may leave.
"""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Iterator, Optional

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lab import WORK, Disk, Guest, Lab, why_not  # noqa: E402
from moves import HOLD, Running  # noqa: E402
from outages import Seen  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves(*patterns): what the test may leave on the hosts")

    def terminated(_sig: int, _frame: Optional[FrameType]) -> None:
        raise KeyboardInterrupt("SIGTERM")  # pytest then runs the fixtures' teardown

    signal.signal(signal.SIGTERM, terminated)


class _Shared:
    """The session's lab, made when the first test wants it."""

    def __init__(self) -> None:
        self.lab: Optional[Lab] = None

    def get(self) -> Lab:
        if self.lab is None:
            self.lab = Lab().up()
        return self.lab

    def drop(self) -> None:
        lab, self.lab = self.lab, None
        if lab is not None:
            lab.close()


@pytest.fixture(scope="session")
def _shared_lab() -> Iterator[_Shared]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    shared = _Shared()
    try:
        yield shared
    finally:
        shared.drop()


@pytest.fixture
def lab(_shared_lab: _Shared, request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = _shared_lab.get()
    yield lab
    for running in list(Running.running):  # its test has failed before its end
        running.host.path(HOLD).unlink(missing_ok=True)
        running.interrupt(signal.SIGCONT)
        running.interrupt(signal.SIGTERM)
        running.end()
    ignore: list[str] = []
    for mark in request.node.iter_markers("leaves"):
        ignore += mark.args
    try:
        left = lab.leftovers(ignore)
        for host in lab.hosts:
            for domain in host.libvirt().listAllDomains():
                Guest(lab, domain.name()).destroy()
        left += [line for line in lab.leftovers(ignore, settle=0.5) if line not in left]
        for host in lab.hosts:
            host.run("rm -rf /var/lib/drover/*")
        lab.set_rate(None)
        for host in lab.hosts:
            lab.set_link(host, True)
    except BaseException:
        _shared_lab.drop()  # not in a state to go on with
        raise
    if left or request.node.get_closest_marker("leaves"):
        _shared_lab.drop()
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture
def guest(lab: Lab) -> Guest:
    return lab.guest("web1", [Disk("256M", data="64M"), Disk("128M", "qcow2", data="32M")], memory="256M", rate=200)


@pytest.fixture
def small(lab: Lab) -> Guest:
    """A guest whose move takes about 10 s at outages.SLOW: 5 s to copy, the last 1.6 s of them synchronised."""
    return lab.guest("web1", [Disk("256M", data="64M"), Disk("128M", "qcow2", data="32M")], memory="256M", rate=200,
                     options="w.mem=48M w.memrate=100")


@pytest.fixture
def seen(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Seen:
    """The test's row in the table of outages, which is printed at the end."""
    return Seen(request.node.name.removeprefix("test_").replace("_", " "), record_property)


@pytest.fixture
def drover(lab: Lab) -> Path:
    if not lab.drover.exists():
        pytest.skip(f"{lab.drover} is not built")
    return lab.drover


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what its guest printed, and what the jobs logged."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" or not report.failed:
        return
    for used in getattr(item, "funcargs", {}).values():
        try:  # the report matters more than this addition to it
            if isinstance(used, Guest):
                report.sections.append((f"console of {used.name}", used.console()[-4000:]))
            elif isinstance(used, Lab):
                for host in used.hosts:
                    for log in [*host.path("/var/log/drover").glob("*.log"),
                                *host.path("/var/lib/drover/jobs").glob("*/receiver/log")]:
                        report.sections.append((f"{host.name}: {log.name}", log.read_text(errors="replace")[-8000:]))
        except Exception as e:
            report.sections.append(("more", str(e)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The rows that tests have made with the fixture `seen`, as a table for ARCHITECTURE.md."""
    rows = [value for reports in terminalreporter.stats.values() for report in reports
            if getattr(report, "when", "") == "call" for name, value in report.user_properties if name == "outage"]
    if not rows:
        return
    terminalreporter.section("outages")
    columns = list(rows[0])
    for line in [columns, ["---"] * len(columns)] + [[str(row[c]) for c in columns] for row in rows]:
        terminalreporter.write_line("| " + " | ".join(line) + " |")


# Of the outages, resumes, relocations and evacuations these stand for the others in an ordinary run; all of them take
# an hour more.
_QUICK = {"test_link_down_5_s[copy]", "test_source_is_off_and_ran_or_not_while_nobody_watched[True]",
          "test_runner_killed[copy]",
          "test_a_second_move_of_the_same_guest_is_refused",
          "test_a_running_guests_raw_and_qcow2_disks_there_and_back[unmap]",
          "test_the_guest_starts_from_its_new_disks", "test_a_guest_that_is_off[False]",
          "test_on_the_same_filesystem_a_guest_that_is_off_only_has_its_files_renamed",
          "test_a_target_that_gets_full_in_the_middle[raw-True]", "test_a_source_that_cannot_be_read",
          "test_drover_is_killed_and_resume_takes_the_copies_up", "test_refusals",
          "test_an_old_file_that_others_use_is_kept", "test_receiver_killed[lead]", "test_runner_killed[lead]",
          "test_what_was_copied_is_kept_as_long_as_no_memory_has_moved",
          "test_killed_after_a_copy_and_before_the_old_file_was_deleted"}
# What takes long, or has a like that runs.
_SLOW = {"test_a_link_that_is_lost_for_too_long_ends_the_move_cleanly[memory]",
         "test_a_link_that_is_lost_for_too_long_ends_the_move_cleanly[copy]", "test_a_killed_watchdog_is_replaced",
         "test_without_a_watchdog_the_guest_would_wait", "test_memory_that_changes_too_fast",
         "test_mirror_of_every_kind_of_disk",
         "test_a_qcow2_disk_whose_guest_discards_all_the_time", "test_somebody_cancels_the_mirror[memory]",
         "test_command_is_answered_though_the_guest_moves_meanwhile",
         "test_block_device_scsi_iothread_and_sequential_writes", "test_memory_is_compressed_on_a_slow_link",
         "test_two_addresses_of_which_one_goes", "test_guest_moves[tcp-1]", "test_guest_moves[tcp-3]",
         "test_memory_over_several_connections[1]", "test_memory_over_several_connections[2]",
         "test_ctrl_c_undoes_everything[attach]", "test_ctrl_c_undoes_everything[synchronised]",
         "test_a_connection_is_made_anew_where_libvirt_alone_finds_no_way[libvirtd]",
         "test_ctrl_c_undoes_everything[reserve]", "test_compression_is_changed_while_the_move_runs",
         "test_witness_with_zeroes_discards_and_flushes[raw-512-512-64K]",
         "test_witness_with_zeroes_discards_and_flushes[qcow2-4096-4K-1M]", "test_nothing_is_left_of_a_lab[exception]",
         "test_nothing_is_left_of_a_lab[SIGTERM]", "test_what_is_half_there_is_removed[bitmap]",
         "test_what_is_half_there_is_removed[node]", "test_mirror_is_attached_again_after_its_endpoint_died[idle]",
         "test_connection_is_made_again_after_libvirtd_restarted[source]",
         "test_source_is_not_resumed_while_the_target_may_run[False]",
         "test_a_target_that_gets_full_ends_the_move_cleanly[raw]", "test_small_filesystem_gets_full[xfs]",
         "test_small_filesystem_gets_full[btrfs]"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("DROVER_LAB_LONG"):
        return
    for item in items:
        long = item.path.name in ("test_outages.py", "test_resume.py", "test_relocate.py", "test_evacuate.py")
        if (long and item.name not in _QUICK) or item.name in _SLOW:
            item.add_marker(pytest.mark.skip(reason="takes minutes with its like: DROVER_LAB_LONG=1 runs it"))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Of `-n 2`, ended from outside: a worker that was killed while it took its lab down has left the directory."""
    if not hasattr(config, "workerinput") and os.geteuid() == 0 and WORK.exists():
        Lab.collect_garbage()
