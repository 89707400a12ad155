"""Tables of results as text, for a terminal or a file, and as CSV; numbers with intervals."""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmdiff.files.storage import atomic_file

WIDTH = 140  # characters, if the output is not a terminal
NOTHING = "-"  # a missing value
Number = Mapping[str, float]  # value, optionally low and high


@dataclasses.dataclass(frozen=True)
class Table:
    """A row with an empty first cell belongs to the row above; with `ruled`, lines separate such groups."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    ruled: bool = False
    names: int = 1  # number of text columns; the others are numbers, right-aligned
    width: int = WIDTH

    def print(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        console = Console()
        if not console.is_terminal:
            console = Console(width=self.width, file=sys.stdout)
        parts = self._split_columns(console.width)
        for part in parts:
            first, last = part is parts[0], part is parts[-1]
            table = RichTable(title=escape(self.title) if first else None, title_justify="left")
            table.caption, table.caption_justify = (self.note or None) if last else None, "left"
            for number in part:
                justify: Any = "right" if number >= self.names else "left"
                table.add_column(escape(self.columns[number]), justify=justify, overflow="fold")
            for index, row in enumerate(self.rows):
                if index and self._starts_group(index):
                    table.add_section()
                table.add_row(*(escape(row[number]) for number in part))
            console.print(table)

    def _starts_group(self, index: int) -> bool:
        """Whether a line precedes this row: at the start and after the end of a group of several rows."""
        rows = self.rows
        several = not rows[index - 1][0] or (index + 1 < len(rows) and not rows[index + 1][0])
        return self.ruled and bool(rows[index][0]) and several

    def _split_columns(self, width: int) -> list[list[int]]:
        """Split the columns into tables that fit the width without breaking numbers; each repeats the name columns."""

        def needed(number: int) -> int:
            words = max(map(len, self.columns[number].split()), default=0)  # headers may wrap between words
            cells = max((len(row[number]) for row in self.rows), default=0)
            return 3 + max(words, min(cells, width // 3) if number < self.names else cells)

        names = list(range(self.names))
        parts, used = [list(names)], 1 + sum(map(needed, names))
        room = width - used
        for number in range(self.names, len(self.columns)):
            if needed(number) > room and len(parts[-1]) > len(names):
                parts.append(list(names))
                room = width - used
            parts[-1].append(number)
            room -= needed(number)
        return parts


def interval_text(number: Number | None, digits: int = 1, scale: float = 1.0) -> str:
    """`12.3 (11.0-13.6)`, or only the value if there is no interval."""
    if number is None:
        return NOTHING
    shown = {name: f"{number[name] * scale:.{digits}f}" for name in ("value", "low", "high") if name in number}
    return f"{shown['value']} ({shown['low']}-{shown['high']})" if "low" in shown else shown["value"]


def difference_text(number: Number | None, digits: int = 1, scale: float = 1.0) -> str:
    """`-1.2 (-2.0 to +0.4)`, or only the value if there is no interval."""
    if number is None:
        return NOTHING
    shown = {name: f"{number[name] * scale:+.{digits}f}" for name in ("value", "low", "high") if name in number}
    return f"{shown['value']} ({shown['low']} to {shown['high']})" if "low" in shown else shown["value"]


def duration_text(seconds: float | None) -> str:
    """In a suitable unit: 35 s, 12 min, 1.5 h, 2.3 days."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def save_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows atomically as CSV, with a column for every name in any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, names, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
