"""Ctrl-C and SIGTERM end a training after its current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGINT or SIGTERM. Outside the main thread, where signals cannot be handled, do nothing."""
    wanted = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, lambda *_: stop()) for number in wanted}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
