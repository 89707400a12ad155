"""What commands print: bars, durations, tables. On a terminal and in a file alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

TABLE_WIDTH = 140  # where the output is no terminal


class progress:
    """A bar over people on a terminal, one line elsewhere; gives the function to tell how many are done."""

    def __init__(self, what: str, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total or None, desc=what, unit="person", disable=None, leave=False)
        if self.bar.disable:
            print(f"{what} ...", flush=True)

    def __enter__(self) -> Any:
        return self.bar.update

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH, file=sys.stdout)
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
