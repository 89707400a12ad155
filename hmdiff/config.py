"""Configuration: YAML values over dataclasses, `key=value` over both, merged by OmegaConf; a typo fails by name.

`model` is a free dictionary here: a model's own hyperparameters live in its constructor's signature alone, against
which `build.build_model` holds it.
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
    """The forward process, and how it is reversed when nothing else is asked for."""

    num_train_timesteps: int = 200  # K [recalled of the paper]
    schedule: str = "cosine"
    noise_shift: float = 4.0  # see hmdiff/diffusion/schedule.py
    prediction_type: str = "sample"  # "epsilon" is the paper's
    sampler: str = "ddim"
    num_inference_steps: int = 10
    eta: float = 0.0


@dataclasses.dataclass
class Augment:
    """How much a crop is changed in training."""

    flip: float = 0.5  # probability
    noise: float = 0.4  # each colour channel is multiplied by U(1 - noise, 1 + noise)
    rotation: float = 30.0  # degrees, standard deviation, cut at twice as much
    upright: float = 0.6  # probability of no rotation
    scale: float = 0.25  # standard deviation of the crop's side about 1, cut there
    # What is put in front, of one kind a person at most, see hmdiff/data/synthetic/in_front.py
    objects: float = 0.0  # probability of shapes with textures
    people: float = 0.0  # probability of another person of the block
    cutouts: str = ""  # a folder of RGBA pictures to paste
    pasted: float = 0.5  # probability of one of them, where there is a folder


@dataclasses.dataclass
class EstimatorFaults:
    """How bad a synthetic estimator is, see hmdiff/data/synthetic/corruption.py.

    Lengths are in crop half-sides (1 = half the crop), rates are probabilities.
    """

    jitter: float = 0.014  # median over people of the standard deviation; lognormal with sigma 0.5
    missing: float = 0.04  # per joint
    missing_hidden: float = 0.6  # per joint behind an occluder
    second_peak: float = 0.04  # per joint
    swap: float = 0.04  # per person: arms, legs or both exchanged, half of the time as double peaks
    narrowest: float = 1.4  # standard deviation of a person's peaks, heatmap pixels: uniform from here
    widest: float = 3.2  # to here
    hidden: float = 0.0  # standard deviation of a guess behind an occluder, lognormal with sigma 0.3; 0: hardly off
    exact: float = 0.15  # per person: a hand-labelled person, with little jitter and nothing missing but the hidden
    all_joints: bool = False  # True: every source has all 26 joints
    few_joints: bool = False  # True: also sources with the 12 joints of the limbs, and BlazePose's


@dataclasses.dataclass
class DepthFaults:
    """How bad a synthetic depth network is, see hmdiff/data/synthetic/depth_faults.py.

    `none` alone switches all faults off, `scene` says what there is besides the body.
    """

    none: bool = False  # True: the rendered depth as it is
    scene: bool = True  # a wall, a floor and the boxes in front; False: the body alone, NaN elsewhere
    disparity: float = 0.5  # share of people whose map is a negative disparity, as Depth Anything's becomes
    bend: float = 0.15  # standard deviation of a smooth error, of the map's own standard deviation
    edges: float = 0.02  # standard deviation of how far edges are displaced, crop half-sides
    blur: float = 0.03  # largest standard deviation of the blur, crop half-sides
    grain: float = 0.02  # largest noise of a pixel, of the map's standard deviation
    missing: float = 0.15  # share of people with unknown regions
    missing_map: float = 0.05  # share of people without a map
    affine: bool = True  # another unit and origin for each person


@dataclasses.dataclass
class DataConfig:
    """The training data: `synthetic` needs nothing; `recorded` is one prepared data set, `mixture` several."""

    kind: str = "synthetic"
    # Of `recorded` and `mixture`: {path: FOLDER, weight: 1, groups: [...], heatmaps: ..., same_body: false}, or
    # {kind: synthetic, weight: 1, seed: 7}; both: labels: all, keypoints or keypoints_2d; see hmdiff/build.py.
    sources: list[Any] = dataclasses.field(default_factory=list)
    splits: dict[str, Any] = dataclasses.field(default_factory=dict)  # val, test: as a source, a path, or "synthetic"
    augment: Augment = dataclasses.field(default_factory=Augment)
    block_size: int = 32  # people drawn at once; the batch is a whole number of blocks
    image_size: int = 224  # of the rendered pictures, drawn where the model reads images
    pictures: bool = False  # draw them for every model: their silhouettes and depths are labels too
    map_size: int = 0  # of silhouettes and depths, drawn at this size with or without pictures; 0: as the pictures
    depth_faults: DepthFaults = dataclasses.field(default_factory=DepthFaults)
    faults: EstimatorFaults = dataclasses.field(default_factory=EstimatorFaults)
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
        merged = _merge(merged, (read_yaml(Path(path)), str(path)))
    given = []
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r} is not key=value, such as training.steps=100")
        try:
            values = OmegaConf.from_dotlist([text])
        except Exception as error:  # YAML's own errors have no common base
            raise UserError(f"{text!r}: not a value ({first_line(error)})") from None
        given.append((values, f"argument {text!r}"))
    merged = _merge(merged, *given)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${oc.env:X} of a variable that is not set, for one
        raise UserError(f"{path or 'config'}: {getattr(error, 'full_key', None) or ''}: {first_line(error)}") from None
    assert isinstance(config, Config)
    _check_ranges(config, "")
    if not config.output.strip():
        raise UserError("output is empty; give a folder, such as output=runs/NAME")
    faults = config.data.faults
    if faults.narrowest > faults.widest:
        raise UserError(f"data.faults.narrowest {faults.narrowest} is above data.faults.widest {faults.widest}")
    if config.training.mixed_precision.lower() in ("false", "none"):
        config.training.mixed_precision = "no"  # YAML reads a bare no as false
    return config


# The smallest and the largest value of a number: beyond it is a slip of the pen, or what would hang or overflow.
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
    """Numbers of a section and those below it: within `_RANGES`, and else finite and from 0 on."""
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name + ".")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least, most = _RANGES.get(name, (0, 1e12))
            if not least <= value <= most:
                raise UserError(f"{name} {value}: {least:g} to {most:g} is possible")


def save_config(config: Config, path: str | Path) -> None:
    """The resolved values, as YAML that `load_config` reads back."""
    with atomic_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


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
                raise UserError(f"{where}: {key + ': ' if key else ''}{first_line(error)}") from None
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
