"""Checkpoints of the Hub by id, with a folder as a mock Hub; and cards that contain only measured figures."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from small import people_block, small_pipeline

from hmdiff.cli import arguments
from hmdiff.cli.main import main
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps
from hmdiff.evaluate.store import model_hash
from hmdiff.files.hub import is_repository_id
from hmdiff.pipeline import HMDiffPipeline


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one subfolder per repository, which receives what the client would upload."""
    place = tmp_path / "hub"

    def snapshot_download(repo_id: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        if not (place / repo_id).is_dir():
            raise LocalEntryNotFoundError("offline, and not in the cache")
        fetched = tmp_path / "cache" / repo_id
        for file in (place / repo_id).rglob("*"):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                (fetched / file.relative_to(place / repo_id)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, fetched / file.relative_to(place / repo_id))
        return str(fetched)

    class HfApi:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
            (place / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"hub/{repo_id}"

        def upload_folder(self, folder_path: Path, repo_id: str, allow_patterns: Any, commit_message: str) -> None:
            shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return place


def test_what_was_pushed_comes_back_the_same(hub: Path) -> None:
    pipe = small_pipeline()
    assert pipe.push_to_hub("somebody/mine", card="# mine\n") == "hub/somebody/mine"
    assert (hub / "somebody/mine/README.md").read_text() == "# mine\n"
    (hub / "somebody/mine/model/pytorch_model.bin").write_bytes(b"a pickle")
    again = HMDiffPipeline.from_pretrained("somebody/mine")
    maps = as_heatmaps(people_block())
    assert maps is not None
    first, second = (each(heatmaps=maps[[0]], num_hypotheses=2, num_inference_steps=2) for each in (pipe, again))
    assert torch.equal(first.vertices, second.vertices)
    folder = arguments.checkpoint_folder("somebody/mine")
    assert (folder / "hmdiff.json").is_file() and not list(folder.rglob("*.bin"))  # nothing that needs unpickling


def test_what_the_hub_has_not_is_one_line(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"somebody/else: no such folder, and it cannot be had .*offline"):
        HMDiffPipeline.from_pretrained("somebody/else")
    with pytest.raises(UserError, match="not a repository id; give OWNER/NAME"):
        small_pipeline().push_to_hub("no-owner")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not is_repository_id("runs/mine")  # a misspelt folder is not searched on the network
    assert not is_repository_id("../mine") and not is_repository_id("a/b/c") and is_repository_id("a/b")


def figures(pipe_hash: str) -> dict[str, Any]:
    kinds = {
        kind: {"value": value, "low": value - 5, "high": value + 5}
        for kind, value in (("first", 140.25), ("mean", 120.5), ("oracle", 96.125))
    }
    report = {
        "model": pipe_hash,
        "split": "test",
        "people": 200,
        "num_hypotheses": 25,
        "num_inference_steps": 3,
        "guided_by": None,
        "errors": {"pve": kinds, "mpjpe": kinds, "pa_mpjpe": kinds},
    }
    return {"reports": [report, {**report, "model": "other", "split": "test_ood"}, {"checkpoint": "mean mesh"}]}


def test_a_card_has_the_figures_of_these_weights_and_no_others(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_pipeline().save_pretrained(tmp_path / "mine")
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "all.json").write_text(json.dumps(figures(model_hash(tmp_path / "mine"))))
    command = ["card", str(tmp_path / "mine"), "--evaluation", str(evaluation), "--output", str(tmp_path / "card")]
    assert main([*command, "--push", "somebody/mine"]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| test | none | mean | 120.5 (115.5-125.5) |" in card and "test_ood" not in card
    assert card.startswith("---\nlicense: apache-2.0") and 'from_pretrained("somebody/mine")' in card
    assert (hub / "somebody/mine/README.md").read_text() == card
    capsys.readouterr()
    (evaluation / "all.json").write_text(json.dumps(figures("stale")))
    assert main(command) == 2
    assert "no figures of these weights" in capsys.readouterr().err
