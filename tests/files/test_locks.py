"""A folder for one process at a time: a second one is refused in one line, and no lock outlives its process."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hmdiff.errors import UserError
from hmdiff.files.locks import LOCK, claim

pytest.importorskip("fcntl")


def holder(folder: Path, name: str | None) -> int:
    """A child that holds the folder until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            with claim(folder, "wait", name):
                (folder.parent / "held").touch()
                time.sleep(60)
        finally:
            os._exit(0)
    for _ in range(500):
        if (folder.parent / "held").exists():
            return child
        time.sleep(0.01)
    raise AssertionError("the child got no lock")


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
@pytest.mark.parametrize("name", [LOCK, None])
def test_a_second_process_is_refused_until_the_first_ends_however(tmp_path: Path, name: str | None) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    child = holder(folder, name)
    try:
        number = rf" \(number {child}\)" if name else ""
        with (
            pytest.raises(UserError, match=rf"out: another process{number} works in it; give another$"),
            claim(folder, "give another", name),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with claim(folder, "give another", name):
        pass
    assert [path.name for path in folder.iterdir()] == ([LOCK] if name else [])  # locking the folder: no file


def test_sample_claims_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hmdiff.cli.main import main

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"not a photo")
    with claim(tmp_path, "wait", None):
        assert main(["sample", str(tmp_path / "photos" / "a.jpg"), "--output", str(tmp_path)]) == 2
    assert "another process works in it; wait for it, or give another --output" in capsys.readouterr().err
