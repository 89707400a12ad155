"""Tables fit the output width without breaking numbers."""

from __future__ import annotations

import pytest

from hmdiff.evaluate.table import Table

COLUMNS = ("split", "PVE", "MPJPE of the mean", "PA-MPJPE", "best of 25", "spread", "calibration error")
ROWS = [[f"test_{name}", *(f"{100 + n}.{n} ({90 + n}.0-{110 + n}.0)" for n in range(6))] for name in ("a", "occluded")]


@pytest.mark.parametrize("width", [60, 80, 140, 200])
def test_a_table_fits(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    Table("of 200 people", COLUMNS, ROWS, note="mm", width=width).print()
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for row in ROWS:
        assert all(any(cell in line for line in lines) for cell in row), "a cell is broken"
    assert text.count("of 200 people") == 1 and [line.strip() for line in lines].count("mm") == 1
    assert text.count("test_occluded") == {60: 3, 80: 2, 140: 2, 200: 1}[width]


def test_one_column_wider_than_the_width_is_still_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Table("t", ("name", "a", "b"), [["x", "1" * 50, "2"]], width=30).print()
    text = capsys.readouterr().out
    assert text.count("1") == 50 and "2" in text


def test_rows_go_on_where_ruled(capsys: pytest.CaptureFixture[str]) -> None:
    Table("t", ("name", "a"), [["x", "1"], ["", "2"], ["y", "3"]], ruled=True, width=40).print()
    lines = capsys.readouterr().out.splitlines()
    assert sum("├" in line or "┡" in line for line in lines) == 2
