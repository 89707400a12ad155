"""Progress output: a bar on a terminal, one line otherwise."""

from __future__ import annotations

from typing import Any


class progress:
    """Context manager: shows progress over people and yields a callback that takes the count."""

    def __init__(self, what: str, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total or None, desc=what, unit="person", disable=None, leave=False)
        if self.bar.disable:
            print(f"{what} ...", flush=True)

    def __enter__(self) -> Any:
        return self.bar.update

    def __exit__(self, *error: object) -> None:
        self.bar.close()
