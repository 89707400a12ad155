"""`hmdiff prepare estimator`: trains a small top-down pose estimator, built from mmpose, on synthetic people.

It lets experiments use the errors of a real network, besides the simulated ones of
`hmdiff.data.synthetic.corruption`. The batch of step s depends only on (seed, s): the same command resumes a killed run
from its last saved step and gives the same weights. No split is used for model selection.

    OUTPUT/config.py            the model, readable by mmpose's init_model
    OUTPUT/model.safetensors    EMA weights, half precision
    OUTPUT/pck.json             PCK of these files on the test splits
    OUTPUT/training/            state to resume from (removed at the end) and log.csv
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from hmdiff.body.body import load_body
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.data.synthetic.people import SyntheticHumans, block_generator
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.errors import UserError
from hmdiff.estimators.pose_network import CONFIG, WEIGHTS, SyntheticEstimator, build_network, network_input
from hmdiff.files.storage import atomic_file, make_folder
from hmdiff.train.estimator_config import estimator_config, write_config
from hmdiff.train.estimator_crops import jitter_crops, target_heatmaps
from hmdiff.train.estimator_figures import pck_figures

FIGURES, STATE = "pck.json", "training/state.safetensors"
SPLITS = ("test", "test_occluded")
_BLOCK = 32  # people per block of the splits: another block size gives other people
_NUM_COARSE = 432  # coarse vertices, which determine the crops; as in all experiments


@dataclasses.dataclass(frozen=True)
class EstimatorTraining:
    """Hyperparameters. They are saved with the training state; resuming requires the same values."""

    steps: int = 2000
    people: int = 16  # per step
    views: int = 2  # crops per person: rendering a picture costs about as much as a training step on it
    image_size: int = 96
    network: str = "hrnet"  # or resnet18, whose weights can initialise a mesh model's backbone (model.pretrained)
    width: int = 16  # see `estimator_config`
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 1e-2
    ema_decay: float = 0.998
    seed: int = 0


def prepare_estimator(
    output: str | Path,
    values: EstimatorTraining | None = None,
    device: torch.device | str = "cpu",
    people: int = 512,  # per test split
    save_every: int = 100,
    evaluate_every: int = 500,  # steps between evaluations on 64 people of the split `val`
) -> Mapping[str, Any]:
    """Train, save, and evaluate the saved files. Raises `UserError` if `output` holds a finished estimator."""
    output = Path(output)
    if (output / FIGURES).is_file() and not (output / STATE).is_file():
        raise UserError(f"{output}: a finished estimator is there; remove it or give another --output")
    values = values or EstimatorTraining()
    run = EstimatorRun(output, values, device)
    run.train(save_every, evaluate_every)
    estimator = save_estimator(output, run.config, run.averaged, device)
    report: dict[str, Any] = {
        "training": dataclasses.asdict(values),
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        "thresholds": "PCK: share of joints within 0.05 and 0.1 of the crop's side; PCKh: within half of top_head-neck",
        "splits": {split: pck_figures(estimator, test_people(values, device), split, people) for split in SPLITS},
    }
    with atomic_file(output / FIGURES) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    (output / STATE).unlink(missing_ok=True)
    size = (output / WEIGHTS).stat().st_size / 1e6
    return {"parameters": report["parameters"], "megabytes": size, **_flat(report["splits"])}


class EstimatorRun:
    """Network, EMA and optimiser, at step 0 or at the last saved step."""

    def __init__(self, output: Path, values: EstimatorTraining, device: torch.device | str = "cpu") -> None:
        for name in ("steps", "people", "views", "width", "warmup"):
            if getattr(values, name) < 1:
                raise UserError(f"{name} {getattr(values, name)}: at least 1 is needed")
        self.output, self.values, self.device = make_folder(output), values, torch.device(device)
        self.config = estimator_config(values.image_size, values.width, values.network)
        self.network: Any = build_network(self.config)
        _initialise(self.network, values.seed)
        self.network.to(self.device).to(memory_format=torch.channels_last).train()
        self.averaged = copy.deepcopy(self.network).eval()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), values.learning_rate, betas=(0.9, 0.99), weight_decay=values.weight_decay
        )
        self.step = 0
        self._resume()
        self.data = _people(values, values.people, self.device)

    def train(self, save_every: int = 100, evaluate_every: int = 500) -> None:
        """Train to the last step with a progress bar, a log and evaluations on a few validation people."""
        values, lately = self.values, []
        bar = tqdm(total=values.steps, initial=self.step, desc="pose estimator", unit="step")
        with bar:
            while self.step < values.steps:
                lately.append(self.one_step())
                bar.update(1)
                if self.step % 10 == 0:
                    bar.set_postfix(loss=f"{sum(lately) / len(lately):.3f}")
                last = self.step == values.steps
                if self.step % evaluate_every == 0 or last:
                    self._look(sum(lately) / len(lately))
                    lately.clear()
                if self.step % save_every == 0 or last:
                    self.save()

    def one_step(self) -> float:
        """One optimiser step on one block of people; the loss is mmpose's."""
        values = self.values
        images, points = self.batch(self.step)
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = values.learning_rate * _rate(self.step, values)
        inputs = network_input(self.network, images).contiguous(memory_format=torch.channels_last)
        loss = self.network.loss(inputs, self._answers(points))["loss_kpt"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self._average()
        return loss.item()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:  # images (P V, 3, N, N), points (P V, J, 2)
        """The crops of a step: `views` crops of every person in its block."""
        sample = self.data.block("train", step)
        assert sample.image is not None and sample.joints_2d is not None
        views = self.values.views
        images, points = sample.image.repeat(views, 1, 1, 1), sample.joints_2d.repeat(views, 1, 1)
        return jitter_crops(images, points, block_generator(self.values.seed, "estimator/crop", step))

    def _answers(self, points: Tensor) -> list[Any]:
        """Targets in mmpose's format: one data sample per picture."""
        from mmengine.structures import InstanceData, PixelData
        from mmpose.structures import PoseDataSample

        codec = self.network.head.decoder
        heatmaps, weights = target_heatmaps(points, codec.input_size[0], codec.heatmap_size[0], codec.sigma)
        samples = []
        for heatmap, weight in zip(heatmaps, weights, strict=True):
            sample = PoseDataSample()
            sample.gt_fields = PixelData(heatmaps=heatmap)
            sample.gt_instance_labels = InstanceData(keypoint_weights=weight[None])
            samples.append(sample)
        return samples

    @torch.no_grad()
    def _average(self) -> None:
        """EMA of the weights, with a lower decay at the start; batch-norm statistics are copied."""
        decay = min(self.values.ema_decay, self.step / (self.step + 9))
        for mine, other in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
            mine.lerp_(other, 1 - decay)
        for kept, new in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
            kept.copy_(new)

    def _look(self, loss: float) -> None:
        found = pck_figures(SyntheticEstimator(self.averaged), test_people(self.values, self.device), "val", 64)
        seen = found["visible"]
        tqdm.write(
            f"step {self.step}: loss {loss:.3f}; val PCK@0.05 {seen['pck@0.05']:.3f}, PCK@0.1 {seen['pck@0.1']:.3f} "
            f"(visible), {found['hidden']['pck@0.1']:.3f} (hidden)"
        )
        path = self.output / "training" / "log.csv"
        row = f"{self.step},{loss:.6g},{seen['pck@0.05']:.6g},{seen['pck@0.1']:.6g},{found['hidden']['pck@0.1']:.6g}"
        lines = path.read_text().splitlines() if path.is_file() else ["step,loss,visible_005,visible_01,hidden_01"]
        kept = [line for line in lines[1:] if int(line.split(",")[0]) < self.step]
        with atomic_file(path) as temporary:
            temporary.write_text("\n".join([lines[0], *kept, row]) + "\n")

    def save(self) -> None:
        """Save the whole training state in one file."""
        tensors = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"averaged/{name}": value for name, value in self.averaged.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in slots.items()}
        about = {"step": str(self.step), "training": json.dumps(dataclasses.asdict(self.values))}
        with atomic_file(self.output / STATE) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, about)

    def _resume(self) -> None:
        path = self.output / STATE
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as stored:
                about, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}
            step, training = int(about["step"]), json.loads(about["training"])
        except Exception as error:  # safetensors and JSON have no common exception
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path}: damaged ({reason}); remove it to train from the start") from None
        for name, value in dataclasses.asdict(self.values).items():
            if training.get(name) != value:
                raise UserError(
                    f"{path}: this training was begun with {name} {training.get(name)}, now {value} is asked for; "
                    "give the same values, or another --output"
                )
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                index, _, slot = rest.partition("/")
                slots.setdefault(int(index), {})[slot] = tensor
        for kind, network in (("network", self.network), ("averaged", self.averaged)):
            start = f"{kind}/"
            network.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.step = step
        tqdm.write(f"going on from step {step} of {path}")


def save_estimator(
    output: Path, config: dict[str, Any], network: nn.Module, device: torch.device | str = "cpu"
) -> SyntheticEstimator:
    """Write the config and half-precision weights; return the estimator loaded from these files."""
    write_config(config, output / CONFIG)
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    half = {name: (v.half() if v.is_floating_point() else v).contiguous() for name, v in state.items()}
    with atomic_file(output / WEIGHTS) as temporary:
        save_file(half, temporary, {"format": "pt"})
    return SyntheticEstimator.load(output, device)


def test_people(values: EstimatorTraining, device: torch.device | str = "cpu") -> SyntheticHumans:
    """The people of the evaluation splits, the same in all experiments at this image size."""
    return _people(dataclasses.replace(values, seed=0), _BLOCK, device)


def _people(values: EstimatorTraining, block_size: int, device: torch.device | str) -> SyntheticHumans:
    body = load_body("free")
    coarse = load_mesh(body, _NUM_COARSE).coarse_ids
    return SyntheticHumans(
        body, PoseMixture(), coarse, block_size, values.seed, device=device, image_size=values.image_size
    )


def _initialise(network: Any, seed: int) -> None:
    """He initialisation of the convolutions; heatmaps start near zero. mmpose's default (std 0.001 everywhere) assumes
    a pretrained backbone."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(network.head.final_layer.weight, std=0.001)


def _rate(step: int, values: EstimatorTraining) -> float:
    """Linear warm-up, then cosine decay to zero; as a factor of the peak learning rate."""
    if step < values.warmup:
        return (step + 1) / values.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - values.warmup) / max(1, values.steps - values.warmup)))


def _flat(splits: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    return {
        f"{split} {kind} {name}": figures[name]
        for split, kinds in splits.items()
        for kind, figures in kinds.items()
        for name in ("pck@0.05", "pck@0.1")
    }
