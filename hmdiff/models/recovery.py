"""MeshRecoveryModel: the whole network. Its constructor is the architecture diagram.

    image, heatmaps -> backbones -> context tokens -> encoder -> Conditioning      once per image
    x_k, k, Conditioning -> denoiser -> prediction                                 K times, N hypotheses at once
    coarse mesh -> learned upsampling -> full mesh                                 once per hypothesis

    optional: depth map -> fused into the context tokens before the encoder        D2A-HMR (arXiv 2403.09063)
              context tokens -> silhouette; denoiser's tokens -> RLE's scale       D2A-HMR, in training
              feature map -> volume, which joints look into between blocks         JOTR (arXiv 2307.16377)

Source: HMDiff (arXiv 2308.13369) for the split, the block order and the direct baselines; what its paper leaves open
(backbone, sizes, camera head, joint tokens, patches) is ours. P points = C coarse vertices, then K body joints.
A path that is off has no parameter, and leaves every number of the others as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.body.body import Body
from hmdiff.body.lbs_basis import LBSBasis
from hmdiff.body.mesh import blend
from hmdiff.files.diffusers_parts import ConfigMixin, ModelMixin, register_to_config
from hmdiff.models.backbone import ConvHeatmapBackbone, ImageBackbone, JointHeatmapBackbone
from hmdiff.models.conditioning import Conditioning, LiftedVolume
from hmdiff.models.denoiser import SCALED, MeshDenoiser
from hmdiff.models.depth import DepthAtTokens, DepthFusion
from hmdiff.models.encoder import ENCODERS, MLPEncoder
from hmdiff.models.flow import RealNVP
from hmdiff.models.layers import EncoderBlock
from hmdiff.models.lifting import Lifting
from hmdiff.models.part_denoiser import PartDenoiser
from hmdiff.models.prediction import Denoised, Prediction
from hmdiff.models.silhouette import SilhouetteDecoder

INPUTS = ("heatmaps", "image", "both")
MODES = ("diffusion", "direct")
FRAMES = ("camera", "crop")
TOKENS = ("patches", "parts")


class MeshRecoveryModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own bases disagree
    """Encode once, denoise many times."""

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any
    config: Any  # the constructor's arguments as attributes; diffusers calls it a dict
    coarse_ids: Tensor
    upsample_index: Tensor

    if TYPE_CHECKING:  # the decorator that diffusers puts on it loses its signature

        def to(self, *args: Any, **kwargs: Any) -> MeshRecoveryModel: ...  # type: ignore[override]

    @register_to_config
    def __init__(
        self,
        mode: str = "diffusion",  # "direct": one step from a constant input, the paper's baseline A
        stack: int = 1,  # denoisers one after the other with weights of their own, the paper's baseline B when direct
        inputs: str = "heatmaps",  # "heatmaps", "image", or "both" fused early
        backbone: str = "joints",  # "joints" or "conv" for heatmaps alone; a timm name where there is an image
        pretrained: bool | str = False,  # weights that a timm backbone starts from: ImageNet's, or a file's; not saved
        image_size: int = 224,
        num_keypoints: int = 26,  # heatmap channels, in the order of HALPE26
        heatmap_size: int = 64,
        encoder_width: int = 192,
        encoder_depth: int = 3,
        encoder_heads: int = 6,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        feed_forward_ratio: float = 4.0,
        body: str = "free",  # name of the body whose mesh this predicts; a licensed body itself is never saved
        num_vertices: int = 0,  # of the full mesh
        num_coarse: int = 432,
        num_joints: int = 24,
        patch_size: int = 8,  # coarse vertices a token, where tokens are patches
        neighbour_mask: bool = False,  # vertex tokens attend to mesh neighbours alone, as in FastMETRO
        upsample_neighbours: int = 12,  # coarse vertices that a full vertex is blended from
        mesh_scale: float = 0.3,  # metres that make one unit inside the diffusion
        frame: str = "camera",  # of the predicted mesh; "crop" looks along the ray through the crop's centre
        depth_map: bool = False,  # D2A-HMR: read a (pseudo-)depth map
        depth_layers: int = 2,  # of its fusion
        depth_size: int = 64,  # pixels of its side
        rle: Sequence[str] = (),  # D2A-HMR: RLE's σ̂ and flow, of "joints", "vertices", "joints_2d"
        rle_variant: str = "exact",  # of hmdiff/losses/rle.py
        silhouette: bool = False,  # D2A-HMR: decode the silhouette, in training
        masked: float = 0.0,  # D2A-HMR: at most this share of the denoiser's tokens is hidden, in training
        lifting: bool = False,  # JOTR: lift the feature map to a volume that joints look into
        volume_width: int = 128,
        volume_size: int = 8,
        volume_exponent: float = 3.0,  # k at the start, JOTR's; 1 gives all depths the same layers (see LOG.md)
        coarse_to_fine: bool = False,  # JOTR: joints and mesh refined from block to block, the last one the result
        hybrid_position: bool = False,  # D2A-HMR: a learned code on the image tokens, beside their sinusoidal one
        tokens: str = "patches",  # of the denoiser: "patches" of vertices and joints, or "parts" in the LBS basis
        encoder_type: str = "transformer",  # or "mlp", for the backbone "joints" and part tokens alone
        encoder_hidden: int = 1024,  # width of the "mlp"
        encoder_ratio: float = 4.0,  # of the transformer's feed-forward layers
        qk_norm: bool = False,  # normalised queries and keys in every attention
    ) -> None:
        super().__init__()
        if mode not in MODES or inputs not in INPUTS:
            raise ValueError(f"mode {mode!r} must be one of {MODES}, inputs {inputs!r} one of {INPUTS}")
        if frame not in FRAMES:
            raise ValueError(f"frame {frame!r} must be one of {FRAMES}")
        if isinstance(rle, str) or not set(rle) <= set(SCALED):
            raise ValueError(f"rle {rle!r} must be a list of some of {', '.join(SCALED)}")
        self.register_to_config(rle=list(rle), pretrained=False)  # a list, as JSON gives it back; what starts is past
        if coarse_to_fine and not lifting:
            raise ValueError("coarse_to_fine refines between the looks into a volume: it needs lifting")
        if not 0 <= masked < 1:
            raise ValueError(f"masked {masked} is the largest share of hidden tokens: 0 to below 1")
        self.feature_backbone: nn.Module  # not "backbone": ModelMixin would answer with the config entry
        if inputs == "heatmaps":
            kind = {"joints": JointHeatmapBackbone, "conv": ConvHeatmapBackbone}.get(backbone)
            if kind is None:
                raise ValueError(f"backbone {backbone!r} reads images; with heatmaps alone it is 'joints' or 'conv'")
            self.feature_backbone = kind(num_keypoints, heatmap_size, encoder_width)
        else:
            channels = num_keypoints if inputs == "both" else 0
            self.feature_backbone = ImageBackbone(backbone, image_size, encoder_width, channels, pretrained)
        if tokens not in TOKENS or encoder_type not in ENCODERS:
            raise ValueError(f"tokens {tokens!r}: one of {TOKENS}; encoder_type {encoder_type!r}: one of {ENCODERS}")
        if encoder_type == "mlp" and (backbone != "joints" or tokens != "parts" or depth_map):
            raise ValueError("encoder_type 'mlp' needs backbone 'joints' and tokens 'parts', and takes no depth map")
        if tokens == "parts" and coarse_to_fine:
            raise ValueError("coarse_to_fine refines patches: it needs tokens 'patches'")
        self.camera_token: Tensor | None = None
        if encoder_type == "mlp":
            self.encoder: nn.Module = MLPEncoder(
                num_keypoints, encoder_width, num_joints, encoder_hidden, encoder_depth
            )  # fmt: skip
        else:
            self.camera_token = nn.Parameter(torch.randn(encoder_width) * 0.5)
            self.encoder = nn.ModuleList(
                EncoderBlock(encoder_width, encoder_heads, encoder_ratio, qk_norm) for _ in range(encoder_depth)
            )
        self.norm_context = nn.LayerNorm(encoder_width)
        self.to_camera = nn.Linear(encoder_width, 3)

        def denoiser(last: bool) -> MeshDenoiser:
            scaled = rle if last else ()
            volume = volume_width if lifting else 0
            if tokens == "parts":
                return PartDenoiser(
                    num_coarse, num_joints, width, depth, heads, encoder_width, feed_forward_ratio, scaled, masked > 0,
                    volume, mesh_scale, qk_norm, aligned_context=encoder_type == "mlp",
                )  # fmt: skip
            num_patches = num_coarse // patch_size
            patches = torch.arange(num_patches * patch_size).reshape(num_patches, patch_size)
            if patches.numel() != num_coarse:
                raise ValueError(f"{num_coarse} coarse vertices do not fall into patches of {patch_size}")
            neighbours = torch.ones(num_patches, num_patches, dtype=torch.bool) if neighbour_mask else None
            return MeshDenoiser(
                patches, num_joints, width, depth, heads, encoder_width, feed_forward_ratio, neighbours, scaled,
                masked > 0, volume, mesh_scale, coarse_to_fine, qk_norm,
            )  # fmt: skip

        self.denoisers = nn.ModuleList(denoiser(last=number == stack - 1) for number in range(stack))
        if tokens == "parts":  # the full mesh comes from the basis
            self.register_buffer("basis_full", torch.zeros(0), persistent=False)
            self.register_buffer("basis_from_coarse", torch.zeros(0), persistent=False)
        self.register_buffer("coarse_ids", torch.zeros(num_coarse, dtype=torch.long))
        self.upsample_weight: nn.Parameter | None = None
        if tokens == "patches":
            self.register_buffer("upsample_index", torch.zeros(num_vertices, upsample_neighbours, dtype=torch.long))
            self.upsample_weight = nn.Parameter(torch.zeros(num_vertices, upsample_neighbours))

        self.gradient_checkpointing = False
        # The optional paths come last: without them the first weights are those of a model that knows nothing of them.
        self.depth_fusion = DepthFusion(encoder_width, encoder_heads, depth_layers, depth_size) if depth_map else None
        self.depth_at_tokens = DepthAtTokens(encoder_width, depth_size) if depth_map else None
        self.flows = nn.ModuleDict({name: RealNVP(2 if name == "joints_2d" else 3) for name in rle})
        self.silhouette_decoder = SilhouetteDecoder(encoder_width, encoder_heads) if silhouette else None
        self.volume_lifting: Lifting | None = None  # not "lifting": ModelMixin would answer with the config entry
        if lifting:
            if not hasattr(self.feature_backbone, "grid"):
                raise ValueError(
                    f"lifting needs a feature map, which backbone {backbone!r} has not; take 'conv' or images"
                )
            self.volume_lifting = Lifting(encoder_width, volume_width, volume_size, exponent=volume_exponent)
        self.image_place: nn.Parameter | None = None  # zero at the start, so that it can join a trained model
        if hybrid_position:
            if not hasattr(self.feature_backbone, "grid"):
                raise ValueError(f"hybrid_position is of a grid of image tokens, which backbone {backbone!r} has not")
            backbone_tokens: Any = self.feature_backbone.num_tokens
            self.image_place = nn.Parameter(torch.zeros(backbone_tokens, encoder_width))

    def set_topology(
        self,
        coarse_ids: Tensor,  # (C,) full vertices that are kept in the coarse mesh
        patches: Tensor,  # (T_v, p) partition of the coarse vertices
        adjacency: Tensor,  # (C, C) bool
        upsample_index: Tensor,  # (V, k) coarse vertices
        upsample_weight: Tensor,  # (V, k) rows sum to 1: where learning starts from
    ) -> None:
        """Take over a body's mesh. A loaded checkpoint has it already."""
        self.coarse_ids.copy_(coarse_ids)
        assert self.upsample_weight is not None
        self.upsample_index.copy_(upsample_index)
        with torch.no_grad():
            self.upsample_weight.copy_(upsample_weight)
        for denoiser in self.denoisers:
            assert isinstance(denoiser, MeshDenoiser)
            denoiser.patches.copy_(patches)
            denoiser.place.copy_(patches.flatten().argsort())
            if denoiser.neighbours is not None:
                between = adjacency[patches.flatten()][:, patches.flatten()]
                between = between.reshape(len(patches), patches.shape[1], len(patches), patches.shape[1]).any(3).any(1)
                denoiser.neighbours[: len(patches), : len(patches)] = between

    def set_basis(self, basis: LBSBasis) -> None:
        """Take over a body's LBS basis, where tokens are parts. It is never saved: the body determines it."""
        for denoiser in self.denoisers:
            assert isinstance(denoiser, PartDenoiser)
            denoiser.set_basis(basis.points)
        device = self.coarse_ids.device
        self.basis_full, self.basis_from_coarse = basis.full.to(device), basis.from_coarse.to(device)

    @property
    def num_points(self) -> int:
        return self.config.num_coarse + self.config.num_joints

    def encode(
        self,
        image: Tensor | None = None,  # (B, 3, S, S) RGB 0..1
        heatmaps: Tensor | None = None,  # (B, J, h, w)
        heatmap_valid: Tensor | None = None,  # (B, J) bool
        depth: Tensor | None = None,  # (B, h, w) larger = farther, any scale and shift, NaN = not known; None: no map
        peaks: Tensor | None = None,  # (B, J, 2, 4) in place of heatmaps, see `JointHeatmapBackbone.from_peaks`
    ) -> tuple[Conditioning, Tensor]:  # and the camera (B, 3): scale (crop half-sides per metre), tx, ty
        """Run the heavy part, once per image."""
        if peaks is not None:
            assert isinstance(self.feature_backbone, JointHeatmapBackbone) and heatmap_valid is not None
            tokens, mask = self.feature_backbone.from_peaks(peaks, heatmap_valid)
        elif self.config.inputs == "heatmaps":
            tokens, mask = self.feature_backbone(heatmaps, heatmap_valid)
        else:
            tokens, mask = self.feature_backbone(image, heatmaps, heatmap_valid)
        features = tokens
        if self.image_place is not None:
            tokens = tokens + self.image_place.to(tokens.dtype)
        if self.depth_at_tokens is not None and depth is not None:
            places: Any = self.feature_backbone
            look = functools.partial(places.look, heatmaps=heatmaps, heatmap_valid=heatmap_valid)
            tokens = tokens + self.depth_at_tokens(depth, look) * mask[..., None]
        if isinstance(self.encoder, MLPEncoder):
            tokens = self.encoder(tokens, mask)
            mask = mask.new_ones(tokens.shape[:2])
        else:
            tokens, mask = self._encoded(tokens, mask, depth)
        tokens = self.norm_context(tokens)
        camera = self.to_camera(tokens[:, 0]).float()
        # A person fills about the crop: one metre is about one half-side. exp keeps the scale positive.
        camera = torch.cat([camera[:, :1].clamp(-3, 3).exp(), camera[:, 1:]], -1)
        volume = None
        if self.volume_lifting is not None:
            side = math.isqrt(features.shape[1])
            lifted = self.volume_lifting(features.mT.unflatten(2, (side, side)))
            # Where a joint is seen is the camera head's to learn from its own loss, not from what a volume holds there.
            volume = LiftedVolume(lifted, camera.detach(), self.volume_lifting.exponent)
        return self.with_keys_values(Conditioning(tokens, mask, volume=volume)), camera

    def _encoded(
        self, tokens: Tensor, mask: Tensor, depth: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (B, 1 + L, C), (B, 1 + L)
        """The camera's token before the others; depth fused; the transformer's blocks."""
        assert self.camera_token is not None and isinstance(self.encoder, nn.ModuleList)
        tokens = torch.cat([self.camera_token.expand(len(tokens), 1, -1).to(tokens.dtype), tokens], 1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], 1)
        if self.depth_fusion is not None and depth is not None:
            tokens = self.depth_fusion(tokens, mask, depth)
        for block in self.encoder:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, mask)
            else:
                tokens = block(tokens, mask)
        return tokens, mask

    def with_keys_values(self, conditioning: Conditioning) -> Conditioning:
        """Compute the denoisers' keys and values once, so that no hypothesis and no step does it again."""
        pairs = sum((denoiser.keys_values(conditioning.tokens) for denoiser in self.denoisers), ())  # type: ignore
        return dataclasses.replace(conditioning, keys_values=pairs)

    def predict(
        self,
        points: Tensor,  # (B, N, P, 3)
        step: Tensor,  # (B, N) fraction of the process, 1 = pure noise
        conditioning: Conditioning,
        hidden: Tensor | None = None,  # (B, N, T) bool: masked modelling's tokens
    ) -> Denoised:
        """One evaluation of the denoiser(s), with all that the optional paths say."""
        depth = self.config.depth
        found = Denoised(points)
        for index, denoiser in enumerate(self.denoisers):
            pairs = conditioning.keys_values[index * depth : (index + 1) * depth]
            found = denoiser(found.points, step, conditioning, pairs, hidden)
        return found

    def denoise(
        self,
        points: Tensor,  # (B, N, P, 3)
        step: Tensor,  # (B, N) fraction of the process, 1 = pure noise; or (1, 1), the same for all
        conditioning: Conditioning,
    ) -> Tensor:  # (B, N, P, 3)
        """One evaluation of the denoiser(s): what a sampler calls."""
        return self.predict(points, step, conditioning).points

    @property
    def num_tokens(self) -> int:
        """T, of the denoiser."""
        if self.config.tokens == "parts":
            return self.config.num_joints
        return self.config.num_coarse // self.config.patch_size + self.config.num_joints

    def flow_log_probs(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """RLE's log G by what it is of."""
        return {name: flow.log_prob for name, flow in self.flows.items() if isinstance(flow, RealNVP)}

    def regress(
        self,
        conditioning: Conditioning,  # of B images
    ) -> Tensor:  # (B, 1, P, 3)
        """The direct baseline: one evaluation at the last step, from a constant input."""
        return self.at_last_step(conditioning).points

    def at_last_step(
        self,
        conditioning: Conditioning,  # of B images
    ) -> Denoised:  # N = 1
        """One evaluation where only the image is known: its x̂_0 is a regressor, RLE's σ̂ that of p(x_0 | image).

        From a constant input, the mean of the noise, so that it is the same for every hypothesis and every seed.
        """
        constant = conditioning.tokens.new_zeros((len(conditioning.tokens), 1, self.num_points, 3), dtype=torch.float32)
        return self.predict(constant, constant.new_ones(len(constant), 1), conditioning)

    def to_coarse(self, points: Tensor) -> Tensor:
        """Points (..., P, 3) of the diffusion -> coarse vertices (..., C, 3) in metres."""
        return points[..., : self.config.num_coarse, :] * self.config.mesh_scale

    def to_joints(self, points: Tensor) -> Tensor:
        """Points (..., P, 3) of the diffusion -> body joints (..., K, 3) in metres."""
        return points[..., self.config.num_coarse :, :] * self.config.mesh_scale

    def to_points(
        self,
        coarse: Tensor,  # (..., C, 3) metres
        joints: Tensor,  # (..., K, 3) metres
    ) -> Tensor:  # (..., P, 3)
        return torch.cat([coarse, joints], -2) / self.config.mesh_scale

    def upsample(
        self,
        coarse: Tensor,  # (..., C, 3)
    ) -> Tensor:  # (..., V, 3)
        """Every full vertex is a learned blend of near coarse ones; kept vertices stay where they are.

        The weights are normalised to sum to 1, so that a translated coarse mesh gives the translated full mesh.
        """
        if self.config.tokens == "parts":
            # Coordinates as rows: one matrix product for all meshes, in place of one of three columns for each.
            coordinates = coarse.to(self.basis_full.dtype).mT @ self.basis_from_coarse.mT
            return F.linear(coordinates, self.basis_full).mT
        assert self.upsample_weight is not None
        weight = self.upsample_weight / self.upsample_weight.sum(-1, keepdim=True)
        coarse = coarse.to(weight.dtype)
        return blend(coarse, self.upsample_index, weight).index_copy(-2, self.coarse_ids, coarse)

    @torch.no_grad()
    def keypoint_regressor(
        self,
        body: Body,  # with keypoints
    ) -> Tensor:  # (J, C)
        """Upsampling and the body's keypoint regressor as one matrix: both are linear in the coarse mesh.

        Only the vertices that the regressor reads are upsampled.
        """
        support, device = body.keypoint_support().to(self.coarse_ids.device), self.coarse_ids.device
        if self.config.tokens == "parts":
            rows = self.basis_full[support] @ self.basis_from_coarse  # (S, C)
        else:
            assert self.upsample_weight is not None
            weight = self.upsample_weight[support]
            weight = weight / weight.sum(-1, keepdim=True)
            rows = weight.new_zeros(len(support), self.config.num_coarse)
            rows.scatter_add_(1, self.upsample_index[support], weight)
            kept = support[:, None] == self.coarse_ids  # a kept vertex stays where it is
            rows = torch.where(kept.any(1, keepdim=True), kept.to(rows), rows)
        return body.support_weights.to(device, rows.dtype) @ rows

    def forward(
        self,
        points: Tensor,  # (B, N, P, 3)
        step: Tensor,  # (B, N)
        image: Tensor | None = None,
        heatmaps: Tensor | None = None,
        heatmap_valid: Tensor | None = None,
        depth: Tensor | None = None,
        hidden: Tensor | None = None,  # (B, N, T) bool
        peaks: Tensor | None = None,  # (B, J, 2, 4)
    ) -> Prediction:
        """Encode and denoise in one call: what a training step runs (and torch.compile compiles)."""
        conditioning, camera = self.encode(image, heatmaps, heatmap_valid, depth, peaks)
        found = self.predict(points, step, conditioning, hidden)
        silhouette = None
        if self.silhouette_decoder is not None:
            silhouette = self.silhouette_decoder(conditioning.tokens, conditioning.mask)
        volume = conditioning.volume
        return Prediction(
            found.points, camera, found.scale, silhouette, found.estimates,
            None if volume is None else volume.features, None if volume is None else volume.exponent, found.meshes,
        )  # fmt: skip
