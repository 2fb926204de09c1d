#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""drover against the tools that people use today, in the lab: a table, a chart and the raw figures.
bench/README.md says what is measured and how."""
from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests/lab"), str(REPO / "bench")]

import machine  # noqa: E402
from lab import WORK, LabError, why_not  # noqa: E402
from report import Result, chart, goals_table, medians, table  # noqa: E402
from scenarios import SCENARIOS, Bench  # noqa: E402


HEADING = "Shorter is better. In full colour: copying the disks"


def as_json(results: list[Result], described: dict[str, str], runs: int, quick: bool) -> str:
    return json.dumps({
        "machine": described, "runs": runs, "quick": quick,
        "scenarios": [{"name": r.name, "title": r.title, "rows": r.rows, "medians": medians(r.rows), "notes": r.notes,
                       "goals": [{**dataclasses.asdict(g), "reached": g.reached} for g in r.goals]}
                      for r in results]}, indent=1) + "\n"


def show(results: list[Result], described: dict[str, str], note: str) -> str:
    parts = [f"Machine: {', '.join(f'{k}: {v}' for k, v in described.items())}. {note}"]
    for result in results:
        parts.append(f"**{result.name}**: {result.title}")
        if result.rows:
            parts.append(table(result))
        parts += [text for text in result.notes if text]
    parts.append(goals_table(results))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="compare.sh", description=(__doc__ or "").splitlines()[0],
                                     epilog=f"scenarios: {', '.join(SCENARIOS)}")
    parser.add_argument("--quick", action="store_true", help="a quarter of the data, one run: does it work at all?")
    parser.add_argument("--runs", type=int, help="of each (default: 5; with --quick 1)")
    parser.add_argument("--only", metavar="SCENARIO,...", help="only these")
    parser.add_argument("--output", type=Path, default=REPO / "build/bench", metavar="DIR",
                        help="where compare.md, .svg and .json go (default: build/bench)")
    args = parser.parse_args()
    runs = args.runs if args.runs is not None else 1 if args.quick else 5
    names = args.only.split(",") if args.only else list(SCENARIOS)
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)} (there are {', '.join(SCENARIOS)})")
    if runs < 1:
        parser.error("--runs is at least 1")
    reason = why_not()
    if reason:
        print(f"compare.sh: {reason}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    described = machine.describe(WORK, REPO / "build/drover", 256 if args.quick else 1024)
    note = f"{'--quick: a quarter of the data. ' if args.quick else ''}Medians of {runs}."
    bench = Bench(runs, args.quick, say)
    results: list[Result] = []
    failed = False
    for name in names:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        try:
            results.append(SCENARIOS[name](bench))
        except (LabError, OSError, subprocess.SubprocessError) as e:
            failed = True
            results.append(Result(name, f"failed: {e}"))
            say(str(e))
        # After each: what was measured is not lost if a later one is interrupted.
        (args.output / "compare.json").write_text(as_json(results, described, runs, args.quick))
        (args.output / "compare.md").write_text(show(results, described, note))
        (args.output / "compare.svg").write_text(chart(results, HEADING))
    print(show(results, described, note))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
