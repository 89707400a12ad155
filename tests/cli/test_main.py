"""Exit of the command: system errors become one line; arguments that argparse would misread are handled."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from hmdiff.cli import main as cli
from hmdiff.cli.main import main


def ends_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    def run(options: Any) -> int:
        raise error

    monkeypatch.setattr("hmdiff.cli.info.run", run)
    # The parser holds the original function, so replace it in the parsed options.
    original = cli.Parser.parse_known_args

    def parse(self: Any, *arguments: Any, **named: Any) -> Any:
        options, rest = original(self, *arguments, **named)
        options.run = run
        return options, rest

    monkeypatch.setattr(cli.Parser, "parse_known_args", parse)
    assert main(["info"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "may not be read"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.ENOENT, "no such file"),
        (errno.ENOTDIR, "a file stands where"),
        (errno.ELOOP, "symbolic link"),
        (errno.ENOSPC, "no space left"),
        (errno.EIO, "cannot be read"),
        (errno.EROFS, "cannot be read"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    number: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ends_with(OSError(number, "as the system says", "/some/where"), monkeypatch, capsys)
    assert text.startswith("hmdiff: error: /some/where: ") and words in text and text.count("\n") == 1


def test_an_error_is_not_glued_to_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tqdm(total=5, desc="working") as bar:
        bar.update(1)
        bar.refresh()
        text = ends_with(OSError(errno.EACCES, "no", "/some/where"), monkeypatch, capsys)
    assert "\nhmdiff: error: " in text


def test_a_warning_stands_on_a_line_of_its_own_and_the_bar_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=5, desc="working", mininterval=0) as bar:
        bar.update(1)
        cli.warn("doubtful")
        cli.report("one photo of many")
        bar.update(1)
    text = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "hmdiff: warning: doubtful" in text and "hmdiff: error: one photo of many" in text
    assert "2/5" in text[-1]


@pytest.mark.parametrize(
    ("output", "words"), [(["--output", ""], "an argument is empty"), (["--output="], "--output= is empty")]
)
def test_an_empty_argument_is_named(output: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", "photo.jpg", *output])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_training_stopped_before_its_first_step_names_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped:
        folder, step, accelerator = tmp_path, 0, SimpleNamespace(is_main_process=True)
        __init__ = run = lambda *_: None

    monkeypatch.setattr("hmdiff.train.loop.Trainer", Stopped)
    command = ["train", f"output={tmp_path}", "training.steps=5"]
    assert main(command) == 0 and "; no model was saved yet" in capsys.readouterr().out
    (tmp_path / "pipeline").mkdir()
    assert main(command) == 0 and f"the model is in {tmp_path}/pipeline" in capsys.readouterr().out


def test_a_box_may_start_left_of_the_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._joined(["a", "--box", "-3,1,5,9", "--seed", "-1", "x=-3,4"]) == [
        "a",
        "--box=-3,1,5,9",
        "--seed",
        "-1",
        "x=-3,4",
    ]
    assert main(["sample", str(tmp_path / "none.jpg"), "--box", "-3,1,5,9", "--output", str(tmp_path / "out")]) == 2
    assert "none.jpg: no such picture" in capsys.readouterr().err
