"""Configs: layers in order, saved and read back, and a typo fails by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmdiff.config import Config, load_config, save_config
from hmdiff.errors import UserError
from hmdiff.files.yaml_values import check_keys


def test_defaults_then_file_then_arguments(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("name: one\nmodel: {width: 64, mode: direct}\ntraining: {steps: 7, learning_rate: 1.0e-3}\n")
    config = load_config(path, ["training.steps=9", "model.width=32", "data.faults.jitter=0.5"])
    assert (config.name, config.training.steps, config.training.learning_rate) == ("one", 9, 1e-3)
    assert config.model == {"width": 32, "mode": "direct"} and config.data.faults.jitter == 0.5
    assert config.training.batch_size == Config().training.batch_size
    assert load_config() == Config()


def test_saved_configs_read_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["seed=12345678901", "model.width=48", "training.learning_rate=3e-5", "output=there"])
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == config
    assert config.training.learning_rate == 3e-5 and config.seed == 12345678901


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.steps=3", "no key 'trainin'; did you mean 'training'"),
        ("training.step=3", "section 'training': there is no key 'step'; did you mean 'steps'"),
        ("loss.weigthing=x", "did you mean 'weighting'"),
        ("data.augment={flop: 1}", "section 'data.augment': there is no key 'flop'; did you mean 'flip'"),
        ("training.steps=many", "training.steps"),
        ("training.steps", "is not key=value"),
        ("training=3", "training"),
        ("training.steps=[1", "not a value"),
    ],
)
def test_bad_arguments_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="no such config; did you mean 'quickstart'"):
        load_config(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match="no such config"):
        load_config(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"latin\.yaml"):
        load_config(tmp_path / "latin.yaml")


def test_check_keys() -> None:
    check_keys(["width"], ["width", "depth"], "here")
    with pytest.raises(UserError, match="here: there is no key 'dept'; did you mean 'depth'"):
        check_keys(["width", "dept"], ["width", "depth"], "here")
    with pytest.raises(UserError, match="there are width, depth"):
        check_keys(["zzz"], ["width", "depth"], "here")


def test_every_shipped_config_is_valid() -> None:
    import inspect

    from hmdiff.build import build_scheduler
    from hmdiff.models.recovery import MeshRecoveryModel

    folder = Path(__file__).resolve().parent.parent / "configs"
    paths = sorted(folder.glob("*.yaml"))
    assert paths
    allowed = inspect.signature(MeshRecoveryModel.__init__).parameters
    for path in paths:
        config = load_config(path)
        check_keys(config.model, allowed, path.name)
        build_scheduler(config)
        assert config.training.batch_size % config.data.block_size == 0
        assert path.read_text().startswith("# "), f"{path.name} opens with what it is for"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.faults.narrowest=4", "data.faults.narrowest 4.0 is above data.faults.widest 3.2"),
        ("data.augment.flip=2", "data.augment.flip 2.0: 0 to 1 is possible"),
        ("data.augment={people: much}", "data.augment.people"),
        ("data.depth_faults.blur=-1", "data.depth_faults.blur -1.0: 0 to 1"),
        ("data.depth_faults.none=much", "data.depth_faults.none"),
        ("data.faults.jitter=inf", "data.faults.jitter inf"),
        ("training.ema_decay=2", r"training.ema_decay 2.0: 0 to 1 is possible"),
        ("loss.terminal_share=-1", r"loss.terminal_share -1.0: 0 to 1"),
        ("diffusion.noise_shift=-1", "noise_shift -1.0"),
        ("seed=18446744073709551616", "seed"),
        ("diffusion.eta=nan", "diffusion.eta nan"),
        ("diffusion.eta=2", "diffusion.eta 2"),
        ("output=''", "output is empty"),
        ("training.learning_rate=-1", "learning_rate -1.0"),
        ("training.warmup_steps=-5", "training.warmup_steps -5: 0 to"),
        ("evaluation.test_people=-1", "evaluation.test_people -1"),
        ("training.decay_share=1.5", r"training.decay_share 1.5: 0 to 1"),
        ("data.faults.swap=3", r"data.faults.swap 3.0: 0 to 1"),
        ("data.faults.narrowest=0", r"data.faults.narrowest 0.0: 0.1 to 100"),
        ("training.learning_rate=inf", "learning_rate inf"),
        ("diffusion.num_train_timesteps=0", "num_train_timesteps 0"),
        ("data.image_size=0", "image_size 0"),
        ("data.block_size=0", "block_size 0"),
        ("evaluation.num_hypotheses=0", "num_hypotheses 0"),
        ("training=[1,2]", "training"),
        ("data.sources={a: 1}", "sources"),
        ("seed=${oc.env:NOT_SET_ANYWHERE}", "seed"),
        ("loss.gamma=1e400", "gamma inf"),
    ],
)
def test_values_out_of_range_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traning: {steps: 3}", "no key 'traning'; did you mean 'training'"),
        ("training: {steps: [1]}", "training.steps"),
        ("a: b: c", "not valid YAML"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "YAML aliases"),
        ("seed: ${oc.env:NOT_SET_ANYWHERE}", "seed"),
        ("[" * 100_000, "not valid YAML"),
        ("[" * 1500, "not valid YAML"),
        ("training: [steps, 5]", "training"),
        ("seed: [1]", "seed"),
        ("data: 5", "data"),
        ("model: [1, 2]", "model"),
        ("- 1", "mapping of keys"),
        ("\x00", "not valid YAML"),
        ("? {a: b}\n: c", "a.yaml"),
        ("1: 2", "the key 1 is not text"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(tmp_path / "a.yaml")
    assert "a.yaml" in str(error.value) and "\n" not in str(error.value)
