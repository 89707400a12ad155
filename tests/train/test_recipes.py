"""Recipes of paper size: each loads, builds, documents its data, and trains a step on stand-ins for its data sets."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import standin_bodies as bodies
import standin_tables as tables
import standins as s
import torch
from accelerate import init_empty_weights

from hmdiff.body import mesh_cache
from hmdiff.body.body import load_body
from hmdiff.build import build_mesh, build_source
from hmdiff.config import Config, load_config
from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.readers import open_reader
from hmdiff.train.check import dry_run

pytestmark = pytest.mark.slow  # full-size networks, or mmpose

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = ("hmdiff_3dpw", "hmdiff_h36m", "hmdiff_freihand")
# Small enough for a step per second; everything that affects how modules fit together is unchanged.
TINY = (
    "model.backbone=resnet18",
    "model.encoder_width=32",
    "model.encoder_depth=1",
    "model.encoder_heads=2",
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "model.pretrained=false",
    "data.image_size=64",
    "data.block_size=2",
    "data.workers=0",
    "training.batch_size=2",
    "training.mixed_precision=no",
    "loss.noise_levels=1",
    "evaluation.people=2",
    "evaluation.num_hypotheses=2",
    "evaluation.num_inference_steps=2",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared/ as made by the recipes' first lines, and stand-ins for the licensed bodies."""
    folder = tmp_path_factory.mktemp("recipes")
    patch = pytest.MonkeyPatch()
    patch.setenv("HMDIFF_BODY_DIR", str(folder / "bodies"))
    patch.setenv("HMDIFF_CACHE_DIR", str(folder / "cache"))
    patch.setattr(mesh_cache, "FITTED_ON", 16)
    for gender in ("NEUTRAL", "MALE", "FEMALE"):
        bodies.write_pickle(folder / "bodies" / f"SMPL_{gender}.pkl", bodies.smpl_arrays())
    bodies.write_pickle(folder / "bodies" / "MANO_RIGHT.pkl", bodies.mano_arrays())
    raw = folder / "raw"
    s.make_3dpw(raw / "3dpw", tuple((split, f"{split}_street_00") for split in ("train", "validation", "test")))
    (raw / "coco").mkdir(parents=True)
    tables.make_hmr2(raw / "coco")
    (raw / "h36m").mkdir()
    tables.make_human36m(raw / "h36m", "json")
    s.make_freihand(raw / "freihand", load_body("mano_right"), rows=2)
    for name, source, split, out in (
        ("3dpw", "3dpw", "train", "3dpw_train"),
        ("3dpw", "3dpw", "validation", "3dpw_validation"),
        ("hmr2", "coco", "3dpw_test", "coco_fits"),
        ("human36m", "h36m", "train", "h36m_train"),
        ("freihand", "freihand", "training", "freihand_training"),
    ):
        prepare_dataset(open_reader(name, raw / source, split), folder / "prepared" / out)
    shutil.rmtree(raw)
    yield folder
    patch.undo()


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.fixture
def inside(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    return prepared


@pytest.mark.parametrize("name", RECIPES)
def test_a_step(name: str, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hmdiff.train.check._TIMED_STEPS", 1)
    result = dry_run(recipe(name, *TINY, "training.start_from=''"))
    assert not result.failures, result.failures
    found = {check.name: check.found for check in result.checks}
    assert result.numbers["loss"] > 0 and result.numbers["people_a_step"] == 2
    for source in recipe(name).data.sources:
        (line,) = (text for check, text in found.items() if check[:5] == "data " and text.startswith(source["path"]))
        assert re.search(r"mesh [12]\b", line) and "pictures of 64 px" in line, line
    assert "evaluation" in found and "whole run" in found
    assert not (inside / "runs").exists()


def test_the_second_stage_starts_from_the_first(inside: Path, tmp_path: Path) -> None:
    """Both recipes have the same model, so the weights fit."""
    from hmdiff.train.loop import Trainer

    first = Trainer(recipe("hmdiff_h36m", *TINY, f"output={tmp_path / 'first'}"))
    with torch.no_grad():
        first.plain.camera_token.fill_(0.25)
    first.pipeline.save_pretrained(tmp_path / "first" / "pipeline")
    start = f"training.start_from={tmp_path / 'first' / 'pipeline'}"
    second = Trainer(recipe("hmdiff_3dpw", *TINY, start, f"output={tmp_path / 'second'}"))
    assert second.plain.camera_token.eq(0.25).all()
    one, two = (recipe(name) for name in ("hmdiff_h36m", "hmdiff_3dpw"))
    assert {key: value for key, value in one.model.items() if key != "pretrained"} == two.model
    assert one.diffusion == two.diffusion and one.body == two.body
    assert two.training.start_from == f"{one.output}/pipeline"


def test_a_hand_is_about_one_unit_inside_the_diffusion(inside: Path) -> None:
    """The stand-in has a hand's size; with a body's mesh_scale its points would have a quarter of unit variance."""
    config = recipe("hmdiff_freihand", *TINY)
    body = load_body(config.body)
    mesh = build_mesh(config, body)
    sample = build_source(config, body, mesh).block("train", 0)
    assert sample.coarse_vertices is not None
    assert 0.4 < float(sample.coarse_vertices.std()) / config.model["mesh_scale"] < 2.5


@pytest.mark.parametrize("name", RECIPES)
def test_full_size(name: str, inside: Path) -> None:
    """Built at full size, including HRNet-W64, without allocating the weights."""
    config = recipe(name, "model.pretrained=false")
    body = load_body(config.body)
    mesh = build_mesh(config, body)
    started = time.perf_counter()
    with init_empty_weights():
        from hmdiff.models.recovery import MeshRecoveryModel

        values = config.model | {
            "image_size": 224,
            "body": body.name,
            "num_vertices": body.num_vertices,
            "num_joints": body.num_joints,
        }
        model = MeshRecoveryModel(**values)
    assert time.perf_counter() - started < 60
    assert mesh.num_coarse == config.model["num_coarse"] == model.num_points - body.num_joints
    count = sum(p.numel() for p in model.parameters())
    assert 150e6 < count < 190e6
    assert config.data.image_size == 224 and config.model["frame"] == "crop"
    values = config.training
    assert values.gradient_clip == 0.3 and values.weight_decay == 1e-4 and 4 * values.batch_size == 64


@pytest.mark.parametrize("name", RECIPES)
def test_what_it_says(name: str) -> None:
    """Each begins with the commands from raw data to results, and states what was never run."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text[: text.index("\nname:")]
    assert "NEVER TRAINED HERE" in head and "--dry-run" in head and "hmdiff evaluate --protocol" in head
    prepared = set(re.findall(r"prepared/\w+", head))
    if name == "hmdiff_3dpw":
        assert "after all of configs/hmdiff_h36m.yaml" in head
        prepared |= set(re.findall(r"prepared/\w+", (CONFIGS / "hmdiff_h36m.yaml").read_text()))
    config = recipe(name)
    used = [entry["path"] for entry in config.data.sources]
    used += [entry if isinstance(entry, str) else entry["path"] for entry in config.data.splits.values()]
    assert set(used) <= prepared  # all inputs are prepared by a command above
    for launcher in re.findall(r"configs/accelerate/\w+\.yaml", head):
        assert (CONFIGS.parent / launcher).is_file()
    assert f"runs/{name}/pipeline" in head and config.output == f"runs/{name}" and config.name == name
    assert not any(path.endswith(("_test", "_p2", "_evaluation")) for path in used)  # no training on test splits


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("ddp_4gpu", "MULTI_GPU", 4), ("ddp_8gpu", "MULTI_GPU", 8), ("fsdp", "FSDP", 8), ("deepspeed", "DEEPSPEED", 8)],
)
def test_launchers(name: str, kind: str, processes: int) -> None:
    """Parsed by accelerate, which rejects unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == kind
    assert config.num_processes == processes and not config.use_cpu
    layers = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "")
    if kind == "FSDP":
        from hmdiff.models import denoiser
        from hmdiff.models import layers as blocks

        for word in layers.split(","):
            assert hasattr(blocks, word) or hasattr(denoiser, word)
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if kind == "DEEPSPEED":
        clip = recipe("hmdiff_h36m").training.gradient_clip
        assert config.deepspeed_config["gradient_clipping"] == clip and config.mixed_precision == "no"
