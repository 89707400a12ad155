"""Training components and the training step without checkpoints, evaluation or Accelerate, for benchmarks."""

from __future__ import annotations

import contextlib

import torch

from hmdiff.body.body import load_body
from hmdiff.build import build_mesh, build_model, build_scheduler, build_source
from hmdiff.config import Config
from hmdiff.data.sample import Sample
from hmdiff.train.optimizer import build_optimizer
from hmdiff.train.step import Draws, keypoint_map, training_losses
from hmdiff.train.stream import TrainingStream


class BareTraining:
    """A config's training components and one training step. Pretrained backbones get random weights (no download)."""

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        config.model["pretrained"] = False
        self.body = load_body(config.body)
        self.mesh = build_mesh(config, self.body)
        self.model = build_model(config, self.body, self.mesh).to(self.device).train()
        if self.model.upsample_weight is not None:
            self.model.upsample_weight.requires_grad_(False)  # already fitted in closed form
        self.scheduler = build_scheduler(config)
        self.keypoints = keypoint_map(config.loss, self.model, self.body)
        self.stream = TrainingStream(build_source(config, self.body, self.mesh), config, 0, 1, self.model)
        self.optimizer = build_optimizer(self.model, config.training)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self, people: Sample, draws: Draws) -> None:
        values = self.config.training
        narrow = values.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if narrow else contextlib.nullcontext():
            loss = training_losses(
                self.model, self.scheduler, self.config.loss, people, draws, keypoints=self.keypoints
            )["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, values.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
