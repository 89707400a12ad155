"""Fixtures of all tests: one thread, fixed seeds, and the data folder that only some machines have."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from other_processor import OtherProcessor

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--other-processor",
        action="store_true",
        help="matrix products whose last bit depends on their shapes: finds bits compared across batch sizes",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--other-processor"):
        for item in items:
            if "processes" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="its own processes round as this processor does"))


@pytest.fixture(scope="session", autouse=True)
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the whole session: what a module's fixtures computed must agree with what its tests compute."""
    with OtherProcessor() if request.config.getoption("--other-processor") else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state and computes on one thread, so that results repeat."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The recordings and photos that are not part of the repository; `HMDIFF_SHARED_DATA` names another place."""
    folder = Path(os.environ.get("HMDIFF_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine: it holds the photos and recordings that are not redistributed")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
