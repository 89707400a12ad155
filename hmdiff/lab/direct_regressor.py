"""A direct mesh regressor of the size of FastMETRO-L (arXiv 2207.13820), for timing.

HRNet-W64 (timm), then two stages of an encoder over the image tokens and a decoder over 431 vertex and 14 joint tokens,
512 channels wide and then 128, three layers each, eight heads, and dense upsampling to 6,890 vertices. Own
implementation with random weights; its forward pass is the denominator of the ratios in `hmdiff bench`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

VERTICES, JOINTS = 431, 14
WIDTHS = (512, 128)
MESHES = (431, 1723, 6890)  # vertices from coarse to full
LAYERS, HEADS = 3, 8
IMAGE_SIZE = 224
_FEATURES = 2048


class Stage(nn.Module):
    """Encoder over the image and camera tokens, decoder over the mesh tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, HEADS, **settings) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(width, HEADS, **settings) for _ in range(LAYERS))

    def forward(
        self,
        image: Tensor,  # (B, L, C)
        mesh: Tensor,  # (B, T, C)
    ) -> tuple[Tensor, Tensor]:
        for layer in self.encoder:
            image = layer(image)
        for layer in self.decoder:
            mesh = layer(mesh, image)
        return image, mesh


class DirectRegressor(nn.Module):
    """One image to one mesh, in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        first, second = WIDTHS
        self.backbone = timm.create_model("hrnet_w64", pretrained=False, num_classes=0)
        self.project = nn.Linear(_FEATURES, first)
        self.camera_token = nn.Parameter(torch.zeros(1, 1, first))
        self.mesh_tokens = nn.Parameter(torch.zeros(1, VERTICES + JOINTS, first))
        self.stages = nn.ModuleList([Stage(first), Stage(second)])
        self.narrow = nn.ModuleList([nn.Linear(first, second), nn.Linear(first, second)])
        self.to_points, self.to_camera = nn.Linear(second, 3), nn.Linear(second, 3)
        self.upsampling = nn.ModuleList(
            nn.Linear(coarse, fine, bias=False) for coarse, fine in itertools.pairwise(MESHES)
        )

    def forward(
        self,
        images: Tensor,  # (B, 3, S, S)
    ) -> tuple[Tensor, Tensor]:  # vertices (B, 6890, 3), camera (B, 3)
        look: Any = self.backbone
        features = look.forward_features(images).flatten(2).mT  # (B, 49, 2048)
        tokens = torch.cat([self.camera_token.expand(len(images), -1, -1), self.project(features)], 1)
        tokens, mesh = self.stages[0](tokens, self.mesh_tokens.expand(len(images), -1, -1))
        tokens, mesh = self.stages[1](self.narrow[0](tokens), self.narrow[1](mesh))
        vertices = self.to_points(mesh)[:, JOINTS:].mT
        for matrix in self.upsampling:
            vertices = matrix(vertices)
        return vertices.mT, self.to_camera(tokens[:, 0])


def direct_regressor(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DirectRegressor:
    """Weights are copies of one small noise block: drawing 150 million numbers would take longer than the timing."""
    with torch.device("meta"):
        model = DirectRegressor()
    model = model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for parameter in model.parameters():
        count = parameter.numel()
        parameter.data.copy_(noise.repeat(-(-count // len(noise)))[:count].view_as(parameter))
    for buffer in model.buffers():
        buffer.fill_(1)  # batch norm mean and variance
    return model
