"""Fixtures of the trainings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results are bit-equal only on one kind of device; accelerate's settings are global to the process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
