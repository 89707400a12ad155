"""What commands print on the way: a bar, on a terminal and in a file alike."""

from __future__ import annotations

from typing import Any


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
