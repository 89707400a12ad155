"""Corrupt saved pipelines: refused with an error that names the fault, never a plausible wrong body."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_pipeline
from torch import Tensor

from hmdiff.body.body import load_named_body
from hmdiff.errors import UserError
from hmdiff.files.resources import asset_path
from hmdiff.models.limits import check_hyperparameters
from hmdiff.models.saved import WEIGHTS, load_model
from hmdiff.pipeline import HMDiffPipeline

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    small_pipeline().save_pretrained(folder)
    return folder


def spoiled(saved: Path, tmp_path: Path, checksums: bool = False) -> Path:
    """A corrupted copy; without checksums, as in older files, unless they are tested."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    if not checksums:
        edit(folder / "hmdiff.json", lambda about: about.pop("checksums"))
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        HMDiffPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_the_shipped_pipelines_have_checksums() -> None:
    for name in ("hmdiff_small", "direct_small"):
        about = json.loads((asset_path(name) / "hmdiff.json").read_text())
        assert set(about["checksums"]) == {"model/config.json", f"model/{WEIGHTS}", "scheduler/scheduler_config.json"}


def test_one_flipped_bit_is_noticed(saved: Path, tmp_path: Path) -> None:
    folder = spoiled(saved, tmp_path, checksums=True)
    HMDiffPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.rglob("*.*")):
        if path.name == "hmdiff.json":
            continue
        whole = bytearray(path.read_bytes())
        for place in torch.randint(len(whole), (5,), generator=generator).tolist():
            whole[place] ^= 16
            path.write_bytes(whole)
            refused(folder, f"{path.name}: not what was written, by its checksum")
            whole[place] ^= 16
        path.write_bytes(whole)
    (folder / "model" / "config.json").unlink()
    refused(folder, r"config\.json: missing")


def test_older_pipelines_without_checksums_are_read(saved: Path, tmp_path: Path) -> None:
    HMDiffPipeline.from_pretrained(spoiled(saved, tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", 10**9, r"depth 1000000000; 0 to 64 is possible"),
        ("stack", 10**9, r"stack 1000000000; 1 to 16"),
        ("width", 4096, "describes a larger model than"),
        ("encoder_depth", 9, "lacks the weight 'encoder.1"),
        ("width", 0, "width 0; 1 to"),
        ("patch_size", 0, "patch_size 0; 1 to"),
        ("heads", "2", "heads is '2', int expected"),
        ("depth", 1.5, "depth is 1.5, int expected"),
        ("depth", True, "depth is True, int expected"),
        ("rle", 5, "rle is 5, a list is expected"),
        ("mesh_scale", float("nan"), "mesh_scale nan"),
        ("mesh_scale", 1e30, "mesh_scale 1e\\+30"),
        ("num_vertices", 2**40, "num_vertices 1099511627776; 1 to"),
        ("backbone", "hf-hub:someone/evil", "backbone 'hf-hub:someone/evil' is not a name of timm's own"),
        ("backbone", "local-dir:/etc", "is not a name of timm's own"),
        ("masked", [1] * 5000, "float expected"),
        ("rle", [0] * 5000, "has 5000 entries"),
        ("_class_name", "UNet2DModel", "holds a 'UNet2DModel'"),
    ],
)
def test_hyperparameters_are_bounded(saved: Path, tmp_path: Path, name: str, value: object, message: str) -> None:
    folder = spoiled(saved, tmp_path)
    edit(folder / "model" / "config.json", lambda config: config.update({name: value}))
    refused(folder, message)


def test_nested_hyperparameters_are_bounded_too() -> None:
    check_hyperparameters({"denoiser": {"depth": 4, "names": ["a"]}}, "here", {})
    with pytest.raises(UserError, match="here: depth 1000; 0 to 64"):
        check_hyperparameters({"denoiser": {"depth": 1000}}, "here", {})
    deep: Any = 1
    for _ in range(20):
        deep = {"a": deep}
    with pytest.raises(UserError, match="nested too deeply"):
        check_hyperparameters(deep, "here", {})


def of_integers(state: State) -> None:
    state["camera_token"] = state["camera_token"].long()


def of_floats(state: State) -> None:
    state["coarse_ids"] = state["coarse_ids"].float()


def with_nan(state: State) -> None:
    state["to_camera.weight"][0, 0] = float("nan")


def all_zero(state: State) -> None:
    state["upsample_index"].zero_()


def out_of_range(state: State) -> None:
    state["upsample_index"][0, 0] = 10**6


def negative(state: State) -> None:
    state["coarse_ids"][0] = -1


def twice(state: State) -> None:
    state["coarse_ids"][0] = state["coarse_ids"][1]


def unequal(state: State) -> None:
    state["upsample_weight"][5] *= 3


def one_patch_twice(state: State) -> None:
    state["denoisers.0.patches"][0] = state["denoisers.0.patches"][1]


def other_places(state: State) -> None:
    state["denoisers.0.place"] = state["denoisers.0.place"].flip(0)


def other_shape(state: State) -> None:
    state["camera_token"] = state["camera_token"][:-1]


def one_less(state: State) -> None:
    del state["camera_token"]


def one_more(state: State) -> None:
    state["unknown"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_integers, "camera_token is of torch.int64, floats expected"),
        (of_floats, "coarse_ids is of torch.float32, integers expected"),
        (with_nan, "to_camera.weight holds values that are not finite"),
        (all_zero, "upsample_index does not point to each of the 432"),
        (out_of_range, "upsample_index does not point"),
        (negative, "coarse_ids are not 432 different vertices"),
        (twice, "coarse_ids are not 432 different vertices"),
        (unequal, "upsample_weight has rows that do not sum to 1"),
        (one_patch_twice, "patches is not an order of the 432"),
        (other_places, "place is not the order of its patches"),
        (other_shape, r"camera_token is \(31,\), \(32,\) expected"),
        (one_less, "lacks the weight 'camera_token'"),
        (one_more, "has, and the model has not, the weight 'unknown'"),
    ],
)
def test_weights_are_held_against_the_model(
    saved: Path, tmp_path: Path, change: Callable[[State], None], message: str
) -> None:
    folder = spoiled(saved, tmp_path)
    state = load_file(folder / "model" / WEIGHTS)
    change(state)
    save_file(state, folder / "model" / WEIGHTS)
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_inference_steps", "10", "num_inference_steps is '10'"),
        ("num_inference_steps", 0, "is 0"),
        ("eta", float("nan"), "eta is nan"),
        ("eta", -1, "eta is -1"),
        ("eta", None, "eta is None"),
        ("body", 5, "body is 5"),
        ("temperatures", {}, r"temperatures is \{\}"),
        ("temperatures", [3], "damaged"),
        ("temperatures", [{"num_inference_steps": 1e999, "sampler": "ddim", "temperature": 1}], "damaged"),
        ("format", "1", "format '1'"),
        ("sampler", "magic", "sampler 'magic'"),
        ("checksums", [], "its checksums"),
        ("checksums", {"../../x": "0"}, "which is not a file in it"),
    ],
)
def test_the_pipelines_own_values_are_checked(
    saved: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    folder = spoiled(saved, tmp_path)
    edit(folder / "hmdiff.json", lambda about: about.update({name: value}))
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trained_betas", None),
        ("trained_betas", [float("nan")] * 200),
        ("trained_betas", [0.5]),
        ("trained_betas", [2.0] * 200),
        ("num_train_timesteps", 10**12),
        ("prediction_type", "magic"),
    ],
)
def test_schedules_are_checked(saved: Path, tmp_path: Path, name: str, value: object) -> None:
    folder = spoiled(saved, tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", lambda config: config.update({name: value}))
    refused(folder, r"scheduler_config\.json: ")


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_a_checkpoint_names_its_body_and_no_file(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoiled(saved, tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HMDIFF_BODY_DIR", raising=False)
    for name, message in (
        (str(tmp_path / "evil.pkl"), "is not a name"),
        ("./evil.pkl", "is not a name"),
        ("", "is not a name"),
        ("evil.pkl", "'evil.pkl' is not here"),
        ("a\0b", "is not a name"),
        ("..\\evil.pkl", "is not a name"),
    ):
        edit(folder / "hmdiff.json", lambda about, name=name: about.update(body=name))
        refused(folder, message)
    assert "run" not in capsys.readouterr().out
    assert load_named_body("free").name == "free"


def test_mutants_of_the_weights(saved: Path, tmp_path: Path) -> None:
    """Mutated bytes of header and data, without checksums: a one-line error, or a finite model."""
    folder = spoiled(saved, tmp_path)
    path = folder / "model" / WEIGHTS
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    generator, refusals = torch.Generator().manual_seed(0), 0
    for number in range(30):
        content = bytearray(whole)
        within = header + 8 if number % 2 else len(whole)
        for place in torch.randint(within, (3,), generator=generator).tolist():
            content[place] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(content)
        try:
            model = HMDiffPipeline.from_pretrained(folder).model
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert refusals >= 12


def test_sizes_that_a_config_does_not_name_are_the_defaults(saved: Path, tmp_path: Path) -> None:
    """As in files that are older than the option: the model then has other shapes than the weights."""
    folder = spoiled(saved, tmp_path)
    for name in ("width", "depth", "stack", "encoder_depth", "encoder_width"):
        whole = (folder / "model" / "config.json").read_text()
        edit(folder / "model" / "config.json", lambda about, name=name: about.pop(name))  # type: ignore[misc]
        if name == "stack":  # the default is what the model has
            HMDiffPipeline.from_pretrained(folder)
        elif name == "encoder_depth":
            refused(folder, "lacks the weight 'encoder.1")
        elif name == "depth":
            refused(folder, "lacks the weight 'denoisers.0.blocks.1")
        else:
            refused(folder, "expected; save or copy the checkpoint again")
        (folder / "model" / "config.json").write_text(whole)


def test_what_is_no_hyperparameter_of_ours_is_not_checked() -> None:
    """diffusers' own entries, and `pretrained`, which may be a truth value or a file, and is not used on loading."""
    defaults = {"pretrained": False, "width": 192}
    check_hyperparameters({"pretrained": "weights.pth", "_version": 1e9, "width": 8}, "here", defaults)
    with pytest.raises(UserError, match="here: width is 'wide', int expected"):
        check_hyperparameters({"width": "wide"}, "here", defaults)


def test_a_loaded_model_is_ready_to_use(saved: Path) -> None:
    model = load_model(saved / "model")
    assert not any(module.training for module in model.modules()) and model.device.type == "cpu"
