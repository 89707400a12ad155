"""Configuration: YAML values over dataclasses, `key=value` over both, merged by OmegaConf; a typo fails by name.

`model` is a free dictionary here: a model's own hyperparameters live in its constructor's signature alone, and
`check_keys` holds the dictionary against that signature where both are known.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hmdiff.errors import UserError
from hmdiff.files.reading import read_bytes
from hmdiff.files.storage import atomic_file

_MAX_YAML = 1 << 17  # bytes
_MAX_BRACKETS = 50  # within each other: PyYAML takes a time that grows with the square of their depth


@dataclasses.dataclass
class DiffusionConfig:
    """The forward process, and how it is reversed when nothing else is asked for."""

    num_train_timesteps: int = 200  # K [recalled of the paper]
    schedule: str = "cosine"
    noise_shift: float = 4.0  # see hmdiff/diffusion/schedule.py
    prediction_type: str = "sample"  # "epsilon" is the paper's
    sampler: str = "ddim"
    num_inference_steps: int = 10
    eta: float = 0.0


@dataclasses.dataclass
class DataConfig:
    """The training data: `synthetic` needs nothing; `recorded` is one prepared data set, `mixture` several."""

    kind: str = "synthetic"
    # Of `recorded` and `mixture`: {path: FOLDER, weight: 1, groups: [...], heatmaps: ..., same_body: false}, or
    # {kind: synthetic, weight: 1, seed: 7}; both: labels: all, keypoints or keypoints_2d; see hmdiff/build.py.
    sources: list[Any] = dataclasses.field(default_factory=list)
    splits: dict[str, Any] = dataclasses.field(default_factory=dict)  # val, test: as a source, a path, or "synthetic"
    augment: dict[str, Any] = dataclasses.field(default_factory=dict)  # of hmdiff.data.transforms.AugmentOptions
    block_size: int = 32  # people drawn at once; the batch is a whole number of blocks
    image_size: int = 224  # of the rendered pictures, drawn where the model reads images
    pictures: bool = False  # draw them for every model: their silhouettes and depths are labels too
    map_size: int = 0  # of silhouettes and depths, drawn at this size with or without pictures; 0: as the pictures
    depth_faults: dict[str, Any] = dataclasses.field(default_factory=dict)  # of data.synthetic.depth_faults.DepthFaults
    faults: dict[str, Any] = dataclasses.field(default_factory=dict)  # of data.synthetic.corruption.EstimatorFaults
    label_noise: float = 0.0  # metres by which training labels are displaced, see hmdiff/data/label_noise.py
    workers: int = 0  # processes that draw ahead of the training


@dataclasses.dataclass
class LossConfig:
    """Weights of the objective and how noise levels are drawn."""

    points: str = "l2"  # error of vertices and joints: "l2" squared, "l1" absolute, "euclidean" distance
    weighting: str = "truncated_snr"  # of noise levels, see hmdiff/diffusion/noising.py
    gamma: float = 5.0
    noise_levels: int = 4  # noise draws of every image in a batch: the encoder is run once for all
    terminal_share: float = 0.2  # of the draws at the last step, where the network is the direct regressor
    joints: float = 1.0  # weight of a joint point against a vertex point, where both are in one mean, `points`
    # L_v and L_3D as terms of their own, each a mean over its own points (D2A-HMR's eq. 2); both 0: one mean of all
    vertices: float = 0.0
    joints_3d: float = 0.0
    # Labelled keypoints against the predicted mesh and joints, of x̂_0, see hmdiff/losses/keypoints.py
    keypoints_2d: float = 0.0  # L_2D, through the predicted camera: people with 2D labels alone teach the mesh
    keypoints_3d: float = 0.0  # L_3D, of the keypoints regressed from the mesh
    camera: float = 0.1
    edges: float = 0.0
    # Of the optional paths, see hmdiff/losses/paths.py
    projection: float = 0.0  # D2A-HMR's L_2D, of the joints
    rle: float = 0.0  # D2A-HMR's L_RLE, of what model.rle names
    silhouette: float = 0.0  # D2A-HMR's L_silh
    estimates: float = 0.0  # JOTR's joints after each block, and the meshes where model.coarse_to_fine refines them
    joint_contrast: float = 0.0  # JOTR's two, 0.1 each there
    non_joint_contrast: float = 0.0


@dataclasses.dataclass
class TrainingConfig:
    """The loop. `steps` sets the length of the schedule; `minutes` only stops a call early, to be resumed."""

    steps: int = 2000
    start_from: str = ""  # a saved pipeline whose weights to start from; give another seed, for other people
    batch_size: int = 64  # people per process and micro-step
    gradient_accumulation: int = 1
    optimizer: str = "adamw"  # or "muon": Muon for the hidden matrices, AdamW for the rest (hmdiff/train/optimizer.py)
    learning_rate: float = 5e-4
    muon_learning_rate: float = 0.02
    warmup_steps: int = 200
    schedule: str = "cosine"  # to zero over all steps, or "stable": constant, then linearly to zero over `decay_share`
    decay_share: float = 0.25  # of the steps; a stable run is made longer by a larger training.steps before its decay
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"  # "bf16" where the processor has it
    compile: bool = False
    gradient_checkpointing: bool = False  # compute the blocks twice and keep less: for large models
    log_every: int = 20
    evaluate_every: int = 500
    picture_every: int = 0  # steps between pictures of validation people; 0: at every evaluation
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    minutes: float = 0.0  # 0: no limit
    threads: int = 0  # of torch, 0: its own choice
    trackers: str = "tensorboard"  # of accelerate, separated by commas: tensorboard,wandb; or none


@dataclasses.dataclass
class EvaluationConfig:
    """The look at the validation split during training, and at the test split when it has ended."""

    people: int = 128
    num_hypotheses: int = 5
    num_inference_steps: int = 5
    test_people: int = 200  # of the last look, which chooses nothing; 0: none


@dataclasses.dataclass
class Config:
    """One experiment."""

    name: str = "hmdiff"
    output: str = "runs/hmdiff"
    seed: int = 0
    body: str = "free"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),  # such as ["training.steps=100", "model.width=128"]
) -> Config:
    """Defaults, then the file, then the overrides. Raises `UserError` for a typo, naming the nearest key."""
    merged = OmegaConf.structured(Config)
    if path is not None:
        merged = _merge(merged, (_read_yaml(Path(path)), str(path)))
    given = []
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r} is not key=value, such as training.steps=100")
        try:
            values = OmegaConf.from_dotlist([text])
        except Exception as error:  # YAML's own errors have no common base
            raise UserError(f"{text!r}: not a value ({_first_line(error)})") from None
        given.append((values, f"argument {text!r}"))
    merged = _merge(merged, *given)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${oc.env:X} of a variable that is not set, for one
        raise UserError(f"{path or 'config'}: {getattr(error, 'full_key', None) or ''}: {_first_line(error)}") from None
    assert isinstance(config, Config)
    _check_ranges(config, "")
    if not config.output.strip():
        raise UserError("output is empty; give a folder, such as output=runs/NAME")
    if config.training.mixed_precision.lower() in ("false", "none"):
        config.training.mixed_precision = "no"  # YAML reads a bare no as false
    return config


# The smallest and the largest value of a number: beyond it is a slip of the pen, or what would hang or overflow.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (-math.inf, 2**63 - 1),
    "diffusion.num_train_timesteps": (2, 100_000),
    "diffusion.noise_shift": (1e-3, 1e3),
    "diffusion.num_inference_steps": (1, 100_000),
    "diffusion.eta": (0, 1),
    "data.block_size": (1, 100_000),
    "data.image_size": (8, 4096),
    "data.map_size": (0, 4096),
    "data.label_noise": (0, 0.5),
    "data.workers": (0, 1024),
    "loss.noise_levels": (-math.inf, 1000),
    "loss.terminal_share": (0, 1),
    "training.batch_size": (-math.inf, 10**6),
    "training.steps": (-math.inf, 10**10),
    "training.ema_decay": (0, 1),
    "training.threads": (0, 1024),
    "training.gradient_clip": (1e-12, 1e12),
    "evaluation.num_hypotheses": (1, 10_000),
    "evaluation.num_inference_steps": (1, 100_000),
    "evaluation.people": (0, 10**7),
}


def _check_ranges(section: Any, prefix: str) -> None:
    """Numbers of a section and those below it: within `_RANGES`, and else finite and from 0 on."""
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name + ".")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least, most = _RANGES.get(name, (-math.inf if isinstance(value, int) else 0, 1e12))
            if not least <= value <= most:
                wanted = f"{least:g} to {most:g}" if math.isfinite(least) else f"at most {most:g}"
                raise UserError(f"{name} {value}: {wanted} is possible")


def save_config(config: Config, path: str | Path) -> None:
    """The resolved values, as YAML that `load_config` reads back."""
    with atomic_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_keys(
    given: Iterable[str],
    allowed: Iterable[str],
    where: str,
) -> None:
    """Raise a `UserError` that names the nearest allowed key for the first one that is not allowed."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise UserError(f"{where}: there is no key {key!r}{_nearest(key, allowed)}")


def _nearest(key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(allowed)}"


def _read_yaml(path: Path) -> Any:
    if not os.path.lexists(path):
        shipped = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config{_nearest(path.stem, shipped) if shipped else ''}")
    content = read_bytes(path, _MAX_YAML)
    try:
        text = content.decode("utf-8")
        depths = itertools.accumulate((letter in "[{") - (letter in "]}") for letter in text)
        if max(depths, default=0) > _MAX_BRACKETS:
            raise ValueError(f"more than {_MAX_BRACKETS} brackets within each other")
        # A dozen lines of anchors, each naming the one before ten times, unfold to 10^12 values.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{path}: has YAML aliases (*name), which are not read; write the values out")
        values = OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    except Exception as error:  # YAML's own errors have no common base
        raise UserError(f"{path}: not valid YAML ({_first_line(error)})") from None
    if not OmegaConf.is_dict(values):
        raise UserError(f"{path}: a config is a mapping of keys to values, such as 'seed: 0'")
    return values


def _merge(base: Any, *layers: tuple[Any, str]) -> Any:  # of values and where they are from, the last one wins
    for values, where in layers:
        _check_section(OmegaConf.to_container(values), Config, where, "")
    try:
        return OmegaConf.merge(base, *(values for values, _ in layers))  # at once: each call copies the whole config
    except Exception:
        for values, where in layers:
            try:
                base = OmegaConf.merge(base, values)
            except Exception as error:  # a list for a mapping comes out as a TypeError or an assertion
                key = getattr(error, "full_key", None)
                raise UserError(f"{where}: {key + ': ' if key else ''}{_first_line(error)}") from None
        raise


def _check_section(values: Any, section: type, where: str, prefix: str) -> None:
    """Names first, with the nearest key; OmegaConf then checks the types."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{where}: the key {name!r:.60} is not text")
    check_keys(values, fields, where + (f", section {prefix[:-1]!r}" if prefix else ""))
    for name, value in values.items():
        factory = fields[name].default_factory
        if factory is dataclasses.MISSING:
            continue
        # An interpolation such as ${oc.env:X} is text here.
        wanted = list if factory is list else dict
        if not isinstance(value, (wanted, str)):
            words = "list" if wanted is list else "mapping of keys to values"
            raise UserError(f"{where}: {prefix}{name} is {value!r:.60}, a {words} was expected")
        if isinstance(value, dict) and isinstance(factory, type) and dataclasses.is_dataclass(factory):
            _check_section(value, factory, where, f"{prefix}{name}.")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
