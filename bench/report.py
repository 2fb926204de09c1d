# SPDX-License-Identifier: Apache-2.0
"""What compare.py makes of its measurements: medians, a table, which goals were reached, a chart. Pure functions.

A row is one run's figures, as tests/lab/movers.py describes them, under the name of who was measured ("mover").
"""
from __future__ import annotations

import dataclasses
import statistics
from typing import Any, Iterable, Optional
from xml.sax.saxutils import escape

Row = dict[str, Any]

# Key of a row, heading, how it is printed.
COLUMNS = [("total_s", "total s", "{:.2f}"), ("bulk_s", "bulk s", "{:.2f}"), ("blackout_ms", "blackout ms", "{:.0f}"),
           ("write_mean_ms", "write mean ms", "{:.2f}"), ("write_p99_ms", "p99 ms", "{:.1f}"),
           ("write_worst_ms", "worst ms", "{:.0f}"), ("writes_per_s", "writes/s", "{:.0f}"),
           ("wire_mib", "sent MiB", "{:.0f}"), ("busy", "link busy", "{:.0%}"), ("runner_mib", "runner MiB", "{:.0f}"),
           ("receiver_mib", "receiver MiB", "{:.0f}")]


@dataclasses.dataclass
class Goal:
    """A line that is to be reached. measured None: it could not be measured, `why` says why."""
    what: str
    wanted: float
    measured: Optional[float]
    at_most: bool = True
    unit: str = ""
    why: str = ""

    @property
    def reached(self) -> Optional[bool]:
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


@dataclasses.dataclass
class Result:
    """What one scenario has measured."""
    name: str
    title: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    goals: list[Goal] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    charted: str = "total_s"  # the column that the chart shows

    def median(self, mover: str, key: str) -> Optional[float]:
        return median(self.rows, mover, key)

    def ratio(self, mover: str, key: str, other: str, other_key: Optional[str] = None) -> Optional[float]:
        """The first one's median in the other one's; None if there is none of either."""
        mine, its = self.median(mover, key), self.median(other, other_key or key)
        return None if mine is None or not its else mine / its


def movers(rows: Iterable[Row]) -> list[str]:
    """Who was measured, in the order of first appearance."""
    return list(dict.fromkeys(row["mover"] for row in rows))


def median(rows: Iterable[Row], mover: str, key: str) -> Optional[float]:
    values = [row[key] for row in rows if row["mover"] == mover and row.get(key) is not None]
    return statistics.median(values) if values else None


def medians(rows: list[Row]) -> list[Row]:
    """A row for each mover: the medians of its columns, and of how many runs."""
    found = []
    for mover in movers(rows):
        row: Row = {"mover": mover, "runs": sum(1 for r in rows if r["mover"] == mover)}
        for key, _, _ in COLUMNS:
            value = median(rows, mover, key)
            if value is not None:
                row[key] = value
        found.append(row)
    return found


def _grid(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its heading. The first column is text, the others are figures."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def put(line: list[str]) -> str:
        cells = [line[0].ljust(widths[0])] + [text.rjust(width) for text, width in zip(line[1:], widths[1:])]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([put(lines[0]), "| " + " | ".join(rule) + " |"] + [put(line) for line in lines[1:]])


def table(result: Result) -> str:
    """The scenario's medians, with those columns that have a figure."""
    rows = medians(result.rows)
    used = [c for c in COLUMNS if any(c[0] in row for row in rows)]
    lines = [[""] + [heading for _, heading, _ in used] + ["runs"]]
    for row in rows:
        gave_up = sum(1 for r in result.rows if r["mover"] == row["mover"] and r.get("gave_up"))
        name = row["mover"] + (f" ({gave_up} did not end)" if gave_up else "")
        lines.append([name] + [form.format(row[key]) if key in row else "" for key, _, form in used] + [str(row["runs"])])
    return _grid(lines)


def _figure(value: float, unit: str) -> str:
    text = f"{value:.0%}" if unit == "%" else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return text if unit in ("", "%") else f"{text} {unit}"


def goals_table(results: Iterable[Result]) -> str:
    """Each line that is to be reached: wanted, measured, reached."""
    lines = [["goal", "wanted", "measured", "reached"]]
    for goal in (g for result in results for g in result.goals):
        bound = ("<= " if goal.at_most else ">= ") + _figure(goal.wanted, goal.unit)
        measured = goal.why or "not measured" if goal.measured is None else _figure(goal.measured, goal.unit)
        lines.append([goal.what, bound, measured, {True: "yes", False: "NO", None: "-"}[goal.reached]])
    return _grid(lines) if len(lines) > 1 else ""


# Both a light and a dark page can be behind the chart; a picture on its own asks which.
_STYLE = """
text { font: 13px sans-serif; fill: #1f2328; }
.title { font-weight: bold; }
.drover { fill: #1a7f37; } .other { fill: #6e7781; } .rest { opacity: 0.45; } .axis { stroke: #8c959f; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .drover { fill: #3fb950; } .other { fill: #8b949e; }
}
"""
_LEFT, _WIDTH, _LINE = 190, 480, 22  # where bars begin, how long the longest is, from one to the next


def _bar(row: Row, key: str, longest: float, y: int) -> list[str]:
    """A mover's name, its bar and its figure. Of a total time the part in which disks were copied is in full colour."""
    scale = _WIDTH / longest
    whole = max(1.0, row[key] * scale)
    part = min(whole, row.get("bulk_s", 0) * scale) if key == "total_s" else whole
    kind = "drover" if row["mover"] == "drover" else "other"
    figure = f"{row[key]:.1f} s" if key.endswith("_s") else f"{row[key]:.0f} ms"
    return [f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(row["mover"])}</text>',
            f'<rect class="{kind} rest" x="{_LEFT}" y="{y}" width="{whole:.1f}" height="{_LINE - 6}"/>',
            f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{part:.1f}" height="{_LINE - 6}"/>',
            f'<text x="{_LEFT + whole + 6:.1f}" y="{y + 12}">{figure}</text>']


def chart(results: Iterable[Result], heading: str) -> str:
    """An SVG picture: for each scenario in which something is compared a bar for each mover, as long as its median.
    The bars of one scenario are to one scale, the longest as wide as the picture has room for."""
    parts: list[str] = []
    y = 34
    for result in results:
        rows = [row for row in medians(result.rows) if row.get(result.charted)]
        if len(rows) < 2:
            continue
        longest = max(row[result.charted] for row in rows)
        parts.append(f'<text class="title" x="8" y="{y + 14}">{escape(result.title)}</text>')
        y += 26
        bottom = y + _LINE * len(rows) - 2
        parts.append(f'<line class="axis" x1="{_LEFT}" y1="{y - 4}" x2="{_LEFT}" y2="{bottom}"/>')
        for row in rows:
            parts += _bar(row, result.charted, longest, y)
            y += _LINE
        y += 12
    width = _LEFT + _WIDTH + 80
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}"'
            ' role="img">\n'
            f"<title>{escape(heading)}</title>\n<style>{_STYLE}</style>\n"
            f'<text class="title" x="8" y="20">{escape(heading)}</text>\n' + "\n".join(parts) + "\n</svg>\n")
