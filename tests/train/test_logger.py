"""Training logs: log.csv and TensorBoard agree, also after a resume; unknown trackers are errors."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
from accelerate import Accelerator
from small import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from hmdiff.errors import UserError
from hmdiff.train.logger import read_log, run_log, tracker_options


def logged(folder: Path, name: str) -> dict[int, float]:
    found = EventAccumulator(str(folder / "tensorboard" / "hmdiff"))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(name)}


def test_a_resumed_run_leaves_one_value_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorBoard reads files in name order; names end in a per-process counter, so 10 comes before 9.
    monkeypatch.setattr(event_file_writer._global_uid, "get", itertools.count().__next__)
    config = small_config(tmp_path)
    accelerator = Accelerator(cpu=True, **tracker_options(config.training.trackers, tmp_path))
    with run_log(accelerator, tmp_path, config, 0, again=False) as log:
        for step in (2, 4, 6):
            log({"step": step, "loss": step / 10})
        log({"step": 4, "val_pve_mean": 7.0})
    with run_log(accelerator, tmp_path, config, 4, again=True) as log:  # killed after step 6, resumed from 4
        log({"step": 4, "val_pve_mean": 8.0})
        log({"step": 6, "loss": 0.9})
    with open(tmp_path / "log.csv", newline="") as handle:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(handle)]
    assert rows == [
        {"step": "2", "loss": "0.2"},
        {"step": "4", "loss": "0.4"},
        {"step": "4", "val_pve_mean": "8"},
        {"step": "6", "loss": "0.9"},
    ]
    assert logged(tmp_path, "loss") == pytest.approx({2: 0.2, 4: 0.4, 6: 0.9})


def test_trackers_that_cannot_be_had_are_named() -> None:
    with pytest.raises(UserError, match=r"training.trackers 'tensorbord' is not known; choose of .*tensorboard"):
        tracker_options("tensorbord", Path("x"))
    absent = next(name for name in ("wandb", "aim", "dvclive") if importlib.util.find_spec(name) is None)
    with pytest.raises(UserError, match=rf"'{absent}' is not installed; pip install {absent}"):
        tracker_options(f"tensorboard, {absent}", Path("x"))


def test_no_tracker_leaves_the_csv(tmp_path: Path) -> None:
    config = small_config(tmp_path, "training.trackers=none")
    accelerator = Accelerator(cpu=True, **tracker_options(config.training.trackers, tmp_path))
    with run_log(accelerator, tmp_path, config, 0, again=False) as log:
        log({"step": 1, "loss": 0.5})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,loss", "1,0.5"]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,loss\n2.7,1\n", r"line 2: step '2\.7' is not a whole number"),
        (b"step,loss\n1,1\nx\n", r"line 3: step 'x' is not a whole number"),
        (b"step,loss\n1,1,2,3\n", "line 2: 2 cells more than the header has"),
        (b"step,loss\n" + b"9" * 400 + b",1\n", "line 2: step .* is not a whole number"),
        (b"step,loss\n\xff\x00\xfe,1\n", "line 2: step .* is not a whole number"),
        (b'step,loss\n"' + b"a" * 200_000 + b"\n", "field larger than field limit"),
    ],
)
def test_an_odd_log_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"log\.csv, line \d+: ") as error:
        read_log(tmp_path / "log.csv")
    assert re.search(message, str(error.value)) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_rows_without_a_step_and_no_file_are_no_rows(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv") == []
    (tmp_path / "log.csv").write_text("step,loss,val\n1,0.5,\n,0.4,\n3,,0.1\n")
    assert read_log(tmp_path / "log.csv") == [{"step": "1", "loss": "0.5"}, {"step": "3", "val": "0.1"}]
    (tmp_path / "log.csv").write_text("")
    assert read_log(tmp_path / "log.csv") == []
