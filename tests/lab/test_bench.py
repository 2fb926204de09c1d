# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic and drawing (bench/report.py, movers.in_turn); needs no lab."""
from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from movers import felt, in_turn  # noqa: E402
from report import Goal, Result, chart, goals_table, median, medians, movers, table  # noqa: E402

ROWS = [{"mover": "drover", "total_s": 4.0, "blackout_ms": None}, {"mover": "virsh", "total_s": 10.0, "blackout_ms": 150},
        {"mover": "drover", "total_s": 9.0, "blackout_ms": 70}, {"mover": "virsh", "total_s": 12.0, "blackout_ms": 90},
        {"mover": "drover", "total_s": 5.0, "blackout_ms": 60}]


def test_medians_are_by_mover_and_leave_out_what_was_not_measured() -> None:
    assert movers(ROWS) == ["drover", "virsh"]
    assert median(ROWS, "drover", "total_s") == 5.0
    assert median(ROWS, "drover", "blackout_ms") == 65
    assert median(ROWS, "virsh", "busy") is None
    assert median([], "virsh", "total_s") is None
    assert medians(ROWS) == [{"mover": "drover", "runs": 3, "total_s": 5.0, "blackout_ms": 65},
                             {"mover": "virsh", "runs": 2, "total_s": 11.0, "blackout_ms": 120}]


def test_a_ratio_needs_both() -> None:
    result = Result("x", "x", ROWS)
    assert result.ratio("drover", "total_s", "virsh") == pytest.approx(5 / 11)
    assert result.ratio("drover", "total_s", "cp") is None
    assert Result("y", "y", [{"mover": "a", "total_s": 1}, {"mover": "b", "total_s": 0}]).ratio("a", "total_s", "b") is None


def test_the_table_has_the_columns_that_were_measured() -> None:
    lines = table(Result("x", "x", ROWS)).splitlines()
    assert lines[0].split("|")[1:-1] == [" " * 8, " total s ", " blackout ms ", " runs "]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["drover", "5.00", "65", "3"]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert "| virsh (1 did not end) |" in table(Result("x", "x", [{"mover": "virsh", "total_s": 180, "gave_up": True}]))


@pytest.mark.parametrize("measured,at_most,reached", [(0.45, True, True), (0.46, True, False), (None, True, None),
                                                      (0.45, False, True), (0.44, False, False)])
def test_a_goal_is_reached_at_its_bound(measured: float, at_most: bool, reached: bool) -> None:
    assert Goal("g", 0.45, measured, at_most).reached is reached


def test_goals_say_why_they_were_not_measured() -> None:
    goals = [Goal("fast", 0.4, 0.35), Goal("busy", 0.9, 0.5, at_most=False, unit="%"), Goal("clone", 0.15, None, why="no index")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in goals_table([Result("x", "x", goals=goals)]).splitlines()]
    assert lines[2:] == [["fast", "<= 0.40", "0.35", "yes"], ["busy", ">= 90%", "50%", "NO"],
                         ["clone", "<= 0.15", "no index", "-"]]
    assert goals_table([]) == ""


def test_the_chart_is_well_formed_and_its_bars_are_to_scale() -> None:
    results = [Result("x", 'less < & "more"', ROWS), Result("none", "nothing measured"),
               Result("y", "nobody to compare with", ROWS[:1]), Result("z", "blackout", ROWS, charted="blackout_ms"),
               Result("t", "tiny", [{"mover": "cp", "total_s": 1e-4, "bulk_s": 1e-4}, {"mover": "drover", "total_s": 9}])]
    root = ElementTree.fromstring(chart(results, "A & B"))
    svg = "{http://www.w3.org/2000/svg}"
    bars = [(float(bar.get("width", 0)), bar.get("class")) for bar in root.iter(f"{svg}rect")]
    totals = [width for width, kind in bars if kind in ("drover rest", "other rest")]
    assert totals[0] / totals[1] == pytest.approx(5 / 11, abs=0.01)
    assert totals[2] / totals[3] == pytest.approx(65 / 120, abs=0.01)
    assert len(totals) == 6 and min(totals) == 1
    assert [width for width, kind in bars if kind in ("drover", "other")] == [0, 0, *totals[2:4], 0, 0]  # while copying
    texts = [text.text for text in root.iter(f"{svg}text")]
    assert 'less < & "more"' in texts and "nothing measured" not in texts and "nobody to compare with" not in texts
    assert "5.0 s" in texts and "65 ms" in texts
    assert float(root.get("height", 0)) >= max(float(bar.get("y", 0)) for bar in root.iter(f"{svg}rect"))
    assert ElementTree.fromstring(chart([], "nothing")) is not None


def test_each_mover_goes_as_often_in_either_direction() -> None:
    assert in_turn(["a", "b"], 2) == ["a", "b", "b", "a"]
    assert in_turn(["a", "b", "c"], 2) == ["a", "b", "c", "c", "b", "a"]
    for names in (["a", "b"], ["a", "b", "c"], ["a"]):
        order = in_turn(names, 4)
        for name in names:
            assert sum(1 for i, n in enumerate(order) if n == name and i % 2 == 0) == 2


def test_a_guest_that_wrote_nothing_has_no_latency() -> None:
    latency = {"since_reset": {"mean_us": 1500, "p99_us": 9000, "max_us": 20400}}
    assert felt({"writes": 0, "since_reset_ms": 10, "latency": latency}) == {}
    assert felt({"writes": 500, "since_reset_ms": 1000, "latency": latency}) == {
        "write_mean_ms": 1.5, "write_p99_ms": 9.0, "write_worst_ms": 20, "writes_per_s": 500}
