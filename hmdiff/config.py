"""Configuration: dataclass defaults, YAML, then `key=value` overrides, merged by OmegaConf; unknown keys are errors.

`model` is a plain dictionary: its keys are the arguments of the model's constructor, checked by `build.build_model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file
from hmdiff.files.yaml_values import check_keys, first_line, read_yaml


@dataclasses.dataclass
class DiffusionConfig:
    """The forward process, and the defaults of the reverse process."""

    num_train_timesteps: int = 200  # K [recalled of the paper]
    schedule: str = "cosine"
    noise_shift: float = 4.0  # see hmdiff/diffusion/schedule.py
    prediction_type: str = "sample"  # "epsilon" is the paper's
    sampler: str = "ddim"
    num_inference_steps: int = 10
    eta: float = 0.0


@dataclasses.dataclass
class Augment:
    """Augmentation of crops in training."""

    flip: float = 0.5  # probability
    noise: float = 0.4  # each colour channel is multiplied by U(1 - noise, 1 + noise)
    rotation: float = 30.0  # degrees, standard deviation, clipped at twice that
    upright: float = 0.6  # probability of no rotation
    scale: float = 0.25  # standard deviation of the crop's relative size, clipped at 1 standard deviation
    # Synthetic occluders, at most one kind per person, see hmdiff/data/synthetic/occluders.py
    objects: float = 0.0  # probability of textured shapes
    people: float = 0.0  # probability of another person of the block
    cutouts: str = ""  # a folder of RGBA pictures to paste
    pasted: float = 0.5  # probability of a pasted cutout, if there is a folder


@dataclasses.dataclass
class HeatmapCorruption:
    """Corruption of synthetic keypoints as by a pose estimator, see hmdiff/data/synthetic/corruption.py.

    Lengths are in crop half-sides (1 = half the crop), rates are probabilities.
    """

    jitter: float = 0.014  # standard deviation: median over people, lognormal with sigma 0.5
    missing: float = 0.04  # per joint
    missing_hidden: float = 0.6  # per joint behind an occluder
    second_peak: float = 0.04  # per joint
    swap: float = 0.04  # per person: arms, legs or both exchanged, half of the time as double peaks
    narrowest: float = 1.4  # standard deviation of a person's peaks, heatmap pixels: uniform from `narrowest`
    widest: float = 3.2  # to `widest`
    hidden: float = 0.0  # standard deviation of the error of occluded joints, lognormal with sigma 0.3; 0: as visible
    exact: float = 0.15  # per person: as if labelled by hand, with little jitter; only occluded joints may be missing
    all_joints: bool = False  # True: all 26 joints for everyone
    few_joints: bool = False  # True: some people have only 12 limb joints, or BlazePose's joints


@dataclasses.dataclass
class DepthCorruption:
    """Corruption of synthetic depth maps as by a depth network, see hmdiff/data/synthetic/depth_corruption.py."""

    none: bool = False  # True: no corruption, the rendered depth
    scene: bool = True  # render wall, floor and occluders too; False: the body only, NaN elsewhere
    disparity: float = 0.5  # share of people with a negative disparity map, as from Depth Anything
    bend: float = 0.15  # standard deviation of a smooth error, relative to the map's standard deviation
    edges: float = 0.02  # standard deviation of the displacement of edges, crop half-sides
    blur: float = 0.03  # maximum standard deviation of the blur, crop half-sides
    grain: float = 0.02  # maximum pixel noise, relative to the map's standard deviation
    missing: float = 0.15  # share of people with unknown regions
    missing_map: float = 0.05  # share of people without a map
    affine: bool = True  # a random scale and shift per person


@dataclasses.dataclass
class DataConfig:
    """The training data: `synthetic` (no files needed), `recorded` (one prepared data set), or `mixture` (several)."""

    kind: str = "synthetic"
    # For `recorded` and `mixture`: {path: FOLDER, weight: 1, groups: [...], heatmaps: ..., same_body: false}, or
    # {kind: synthetic, weight: 1, seed: 7}; either with labels: all, keypoints or keypoints_2d; see hmdiff/build.py.
    sources: list[Any] = dataclasses.field(default_factory=list)
    splits: dict[str, Any] = dataclasses.field(default_factory=dict)  # val, test: as a source, a path, or "synthetic"
    augment: Augment = dataclasses.field(default_factory=Augment)
    block_size: int = 32  # people generated at once; the batch size must be a multiple
    image_size: int = 224  # of rendered pictures, if the model reads images
    pictures: bool = False  # render pictures for every model: silhouettes and depth maps are labels too
    map_size: int = 0  # size of silhouettes and depth maps, with or without pictures; 0: the pictures' size
    depth_faults: DepthCorruption = dataclasses.field(default_factory=DepthCorruption)
    faults: HeatmapCorruption = dataclasses.field(default_factory=HeatmapCorruption)
    label_noise: float = 0.0  # metres, noise added to training labels, see hmdiff/data/label_noise.py
    workers: int = 0  # data loading processes


@dataclasses.dataclass
class LossConfig:
    """Loss weights and the sampling of noise levels."""

    points: str = "l2"  # error of vertices and joints: "l2" squared, "l1" absolute, "euclidean" distance
    weighting: str = "truncated_snr"  # of noise levels, see hmdiff/diffusion/noising.py
    gamma: float = 5.0
    noise_levels: int = 4  # noise levels per image in a batch; the encoder runs once per image
    terminal_share: float = 0.2  # share of draws at t = T, where the network acts as a direct regressor
    joints: float = 1.0  # weight of a joint relative to a vertex in the common mean, `points`
    # L_v and L_3D as separate terms, each a mean over its own points (D2A-HMR's eq. 2); both 0: one mean over all
    vertices: float = 0.0
    joints_3d: float = 0.0
    # Labelled keypoints against the mesh and joints of x̂_0, see hmdiff/losses/keypoints.py
    keypoints_2d: float = 0.0  # L_2D through the predicted camera: trains the mesh from 2D labels alone
    keypoints_3d: float = 0.0  # L_3D of the keypoints regressed from the mesh
    camera: float = 0.1
    edges: float = 0.0
    # For optional modules, see hmdiff/losses/paths.py
    projection: float = 0.0  # D2A-HMR's L_2D, of the joints
    rle: float = 0.0  # D2A-HMR's L_RLE, of the outputs named in model.rle
    silhouette: float = 0.0  # D2A-HMR's L_silh
    estimates: float = 0.0  # JOTR's joints after each block; with model.coarse_to_fine also the meshes
    joint_contrast: float = 0.0  # JOTR's two contrastive losses, 0.1 each in its code
    non_joint_contrast: float = 0.0


@dataclasses.dataclass
class TrainingConfig:
    """The training loop. `steps` sets the length of the schedule; `minutes` only interrupts a run, to be resumed."""

    steps: int = 2000
    start_from: str = ""  # a saved pipeline to initialise the weights from; use another seed to see other people
    batch_size: int = 64  # people per process and micro-batch
    gradient_accumulation: int = 1
    optimizer: str = "adamw"  # or "muon": Muon for the hidden matrices, AdamW for the rest (hmdiff/train/optimizer.py)
    learning_rate: float = 5e-4
    muon_learning_rate: float = 0.02
    warmup_steps: int = 200
    schedule: str = "cosine"  # to zero over all steps, or "stable": constant, then linearly to zero over `decay_share`
    decay_share: float = 0.25  # of the steps; to extend a stable run, raise training.steps before its decay begins
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"  # or "bf16", "fp16"
    compile: bool = False
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    log_every: int = 20
    evaluate_every: int = 500
    picture_every: int = 0  # steps between pictures of validation people; 0: at every evaluation
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    minutes: float = 0.0  # 0: no limit
    threads: int = 0  # torch threads, 0: torch's default
    trackers: str = "tensorboard"  # accelerate's trackers, comma-separated: tensorboard,wandb; or none


@dataclasses.dataclass
class EvaluationConfig:
    """Evaluation on the validation split during training, and on the test split at its end."""

    people: int = 128
    num_hypotheses: int = 5
    num_inference_steps: int = 5
    test_people: int = 200  # of the test split, which selects nothing; 0: no test evaluation


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
    """Defaults, then the file, then the overrides. Raises `UserError` for an unknown key, naming the nearest."""
    merged = OmegaConf.structured(Config)
    if path is not None:
        merged = _merge(merged, (read_yaml(Path(path)), str(path)))
    given = []
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r} is not key=value, such as training.steps=100")
        try:
            values = OmegaConf.from_dotlist([text])
        except Exception as error:  # YAML's exceptions have no common base class
            raise UserError(f"{text!r}: not a value ({first_line(error)})") from None
        given.append((values, f"argument {text!r}"))
    merged = _merge(merged, *given)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # such as ${oc.env:X} with X unset
        raise UserError(f"{path or 'config'}: {getattr(error, 'full_key', None) or ''}: {first_line(error)}") from None
    assert isinstance(config, Config)
    _check_ranges(config, "")
    if not config.output.strip():
        raise UserError("output is empty; give a folder, such as output=runs/NAME")
    faults = config.data.faults
    if faults.narrowest > faults.widest:
        raise UserError(f"data.faults.narrowest {faults.narrowest} is above data.faults.widest {faults.widest}")
    if config.training.mixed_precision.lower() in ("false", "none"):
        config.training.mixed_precision = "no"  # YAML parses an unquoted no as false
    return config


# Allowed minimum and maximum of numbers: values outside are typos, or would hang or overflow.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "diffusion.num_train_timesteps": (2, 100_000),
    "diffusion.noise_shift": (1e-3, 1e3),
    "diffusion.num_inference_steps": (1, 100_000),
    "diffusion.eta": (0, 1),
    "data.block_size": (1, 100_000),
    "data.image_size": (8, 4096),
    "data.map_size": (0, 4096),
    "data.label_noise": (0, 0.5),
    **{f"data.augment.{name}": (0, 1) for name in ("flip", "noise", "upright", "objects", "people", "pasted")},
    **{f"data.faults.{name}": (0, 1) for name in ("missing", "missing_hidden", "second_peak", "swap", "exact")},
    **{f"data.faults.{name}": (0, 10) for name in ("jitter", "hidden")},
    **{f"data.faults.{name}": (0.1, 100) for name in ("narrowest", "widest")},
    "data.augment.rotation": (0, 90),
    "data.augment.scale": (0, 0.9),
    **{f"data.depth_faults.{name}": (0, 1) for name in ("disparity", "missing", "missing_map", "edges", "blur")},
    "data.depth_faults.bend": (0, 10),
    "data.depth_faults.grain": (0, 10),
    "data.workers": (0, 1024),
    "loss.noise_levels": (1, 1000),
    "loss.terminal_share": (0, 1),
    "training.batch_size": (1, 10**6),
    "training.steps": (1, 10**10),
    "training.gradient_accumulation": (1, 10**6),
    **{f"training.{name}_every": (1, 10**10) for name in ("log", "evaluate", "checkpoint")},
    "training.keep_checkpoints": (1, 10**6),
    "training.ema_decay": (0, 1),
    "training.decay_share": (0, 1),
    "training.threads": (0, 1024),
    "training.gradient_clip": (1e-12, 1e12),
    "evaluation.num_hypotheses": (1, 10_000),
    "evaluation.num_inference_steps": (1, 100_000),
    "evaluation.people": (0, 10**7),
}


def _check_ranges(section: Any, prefix: str) -> None:
    """Check all numbers of a section recursively: within `_RANGES`, by default 0 to 1e12."""
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name + ".")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least, most = _RANGES.get(name, (0, 1e12))
            if not least <= value <= most:
                raise UserError(f"{name} {value}: {least:g} to {most:g} is possible")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML for `load_config`."""
    with atomic_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _merge(base: Any, *layers: tuple[Any, str]) -> Any:  # layers: (values, origin); later layers win
    for values, where in layers:
        _check_section(OmegaConf.to_container(values), Config, where, "")
    try:
        return OmegaConf.merge(base, *(values for values, _ in layers))  # one call: each one copies the whole config
    except Exception:
        for values, where in layers:
            try:
                base = OmegaConf.merge(base, values)
            except Exception as error:  # a list in place of a mapping raises a TypeError or AssertionError
                key = getattr(error, "full_key", None)
                raise UserError(f"{where}: {key + ': ' if key else ''}{first_line(error)}") from None
        raise


def _check_section(values: Any, section: type, where: str, prefix: str) -> None:
    """Check the keys, suggesting the nearest; OmegaConf checks the types afterwards."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{where}: the key {name!r:.60} is not text")
    check_keys(values, fields, where + (f", section {prefix[:-1]!r}" if prefix else ""))
    for name, value in values.items():
        factory = fields[name].default_factory
        if factory is dataclasses.MISSING:
            continue
        # An interpolation such as ${oc.env:X} is a string here.
        wanted = list if factory is list else dict
        if not isinstance(value, (wanted, str)):
            words = "list" if wanted is list else "mapping of keys to values"
            raise UserError(f"{where}: {prefix}{name} is {value!r:.60}, a {words} was expected")
        if isinstance(value, dict) and isinstance(factory, type) and dataclasses.is_dataclass(factory):
            _check_section(value, factory, where, f"{prefix}{name}.")
