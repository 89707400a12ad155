"""MeshRecoveryModel: the whole network. Its constructor is the architecture diagram.

    image, heatmaps -> backbones -> context tokens -> encoder -> Conditioning      once per image
    x_k, k, Conditioning -> denoiser -> prediction                                 K times, N hypotheses at once
    coarse mesh -> fixed upsampling, fitted on posed bodies -> full mesh            once per hypothesis

    optional: depth map -> fused into the context tokens before the encoder        D2A-HMR (arXiv 2403.09063)
              context tokens -> silhouette; denoiser's tokens -> RLE's scale       D2A-HMR, in training
              feature map -> volume, sampled at the joints between blocks          JOTR (arXiv 2307.16377)

Source: HMDiff (arXiv 2308.13369) for the split, the block order and the direct baselines; what is not published there
(backbone, sizes, camera head, joint tokens, patches) is ours. P points = C coarse vertices, then K body joints.
A module that is off has no parameters and does not change the numbers of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hmdiff.files.diffusers_parts import ConfigMixin, ModelMixin, register_to_config
from hmdiff.models.backbone import ConvHeatmapBackbone, ImageBackbone, JointHeatmapBackbone
from hmdiff.models.choices import check_choices
from hmdiff.models.conditioning import Conditioning, LiftedVolume
from hmdiff.models.denoiser import MeshDenoiser
from hmdiff.models.depth import DepthAtTokens, DepthFusion
from hmdiff.models.encoder import MLPEncoder
from hmdiff.models.flow import RealNVP
from hmdiff.models.layers import EncoderBlock
from hmdiff.models.lifting import Lifting
from hmdiff.models.mesh_points import MeshPoints
from hmdiff.models.part_denoiser import PartDenoiser
from hmdiff.models.prediction import Denoised, Prediction
from hmdiff.models.silhouette import SilhouetteDecoder


class MeshRecoveryModel(MeshPoints, ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own bases disagree
    """Encode once, denoise many times."""

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any
    config: Any  # the constructor's arguments as attributes; diffusers calls it a dict

    if TYPE_CHECKING:  # diffusers' decorator loses the signature

        def to(self, *args: Any, **kwargs: Any) -> MeshRecoveryModel: ...  # type: ignore[override]

    @register_to_config
    def __init__(
        self,
        mode: str = "diffusion",  # "direct": one step from a constant input, the paper's baseline A
        stack: int = 1,  # consecutive denoisers without shared weights; with "direct" the paper's baseline B
        inputs: str = "heatmaps",  # "heatmaps", "image", or "both" fused early
        backbone: str = "joints",  # "joints" or "conv" for heatmaps alone; a timm name with images
        pretrained: bool | str = False,  # initial weights of a timm backbone: ImageNet, or a file; not saved
        image_size: int = 224,
        num_keypoints: int = 26,  # heatmap channels, in HALPE26 order
        heatmap_size: int = 64,
        encoder_width: int = 192,
        encoder_depth: int = 3,
        encoder_heads: int = 6,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        feed_forward_ratio: float = 4.0,
        body: str = "free",  # name of the predicted body model; a licensed body itself is not saved
        num_vertices: int = 0,  # of the full mesh
        num_coarse: int = 432,
        num_joints: int = 24,
        patch_size: int = 8,  # coarse vertices per patch token
        neighbour_mask: bool = False,  # vertex tokens attend to mesh neighbours only, as in FastMETRO
        upsample_neighbours: int = 12,  # coarse vertices that a full vertex is interpolated from
        mesh_scale: float = 0.3,  # metres per unit of the diffusion
        frame: str = "camera",  # of the predicted mesh; "crop": its z axis is the ray through the crop's centre
        depth_map: bool = False,  # D2A-HMR: read a (pseudo-)depth map
        depth_layers: int = 2,  # of its fusion
        depth_size: int = 64,  # pixels per side
        rle: Sequence[str] = (),  # D2A-HMR: RLE's σ̂ and flow, of "joints", "vertices", "joints_2d"
        rle_variant: str = "exact",  # of hmdiff/losses/rle.py
        silhouette: bool = False,  # D2A-HMR: silhouette decoder, in training
        masked: float = 0.0,  # D2A-HMR: largest masking ratio of the denoiser's tokens, in training
        lifting: bool = False,  # JOTR: lift the feature map (backbone "joints": the heatmaps) to a feature volume
        volume_width: int = 128,
        volume_size: int = 8,
        volume_exponent: float = 3.0,  # initial k, 3 in JOTR; 1: layers of equal depth (see LOG.md)
        coarse_to_fine: bool = False,  # JOTR: joints and mesh are refined from block to block
        hybrid_position: bool = False,  # D2A-HMR: learned besides sinusoidal positional encoding of the image tokens
        tokens: str = "patches",  # of the denoiser: "patches" of vertices and joints, or "parts" in the LBS basis
        encoder_type: str = "transformer",  # or "mlp", which needs backbone "joints" and part tokens
        encoder_hidden: int = 1024,  # width of the "mlp"
        encoder_ratio: float = 4.0,  # of the transformer's feed-forward layers
        qk_norm: bool = False,  # normalise queries and keys in the attention of encoder and denoiser
    ) -> None:
        super().__init__()
        check_choices(self.config)
        self.register_to_config(rle=list(rle), pretrained=False)  # a list, as JSON returns
        self.feature_backbone: nn.Module  # not "backbone": ModelMixin would return the config entry
        if inputs == "heatmaps":
            kind = {"joints": JointHeatmapBackbone, "conv": ConvHeatmapBackbone}[backbone]
            self.feature_backbone = kind(num_keypoints, heatmap_size, encoder_width)
        else:
            channels = num_keypoints if inputs == "both" else 0
            self.feature_backbone = ImageBackbone(backbone, image_size, encoder_width, channels, pretrained)
        self.camera_token: Tensor | None = None
        if encoder_type == "mlp":
            self.encoder: nn.Module = MLPEncoder(
                num_tokens=num_keypoints,
                width=encoder_width,
                num_parts=num_joints,
                hidden=encoder_hidden,
                depth=encoder_depth,
            )
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
                    num_coarse=num_coarse,
                    num_parts=num_joints,
                    width=width,
                    depth=depth,
                    heads=heads,
                    context_width=encoder_width,
                    ratio=feed_forward_ratio,
                    scaled=scaled,
                    maskable=masked > 0,
                    volume_width=volume,
                    mesh_scale=mesh_scale,
                    qk_norm=qk_norm,
                    aligned_context=encoder_type == "mlp",
                )
            num_patches = num_coarse // patch_size
            patches = torch.arange(num_patches * patch_size).reshape(num_patches, patch_size)
            if patches.numel() != num_coarse:
                raise ValueError(f"{num_coarse} coarse vertices do not fall into patches of {patch_size}")
            neighbours = torch.ones(num_patches, num_patches, dtype=torch.bool) if neighbour_mask else None
            return MeshDenoiser(
                patches=patches,
                num_joints=num_joints,
                width=width,
                depth=depth,
                heads=heads,
                context_width=encoder_width,
                ratio=feed_forward_ratio,
                neighbours=neighbours,
                scaled=scaled,
                maskable=masked > 0,
                volume_width=volume,
                mesh_scale=mesh_scale,
                coarse_to_fine=coarse_to_fine,
                qk_norm=qk_norm,
            )

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
        # Optional modules come last, so that they do not change the initial weights of the others.
        self.depth_fusion: DepthFusion | None = None
        self.depth_at_tokens: DepthAtTokens | None = None
        if depth_map:
            self.depth_fusion = DepthFusion(
                width=encoder_width, heads=encoder_heads, layers=depth_layers, map_size=depth_size
            )
            self.depth_at_tokens = DepthAtTokens(width=encoder_width, map_size=depth_size)
        self.flows = nn.ModuleDict({name: RealNVP(2 if name == "joints_2d" else 3) for name in rle})
        self.silhouette_decoder = SilhouetteDecoder(encoder_width, encoder_heads) if silhouette else None
        self.volume_lifting: Lifting | None = None  # not "lifting": ModelMixin would return the config entry
        if lifting:
            # Joint tokens are not a feature map: lift the heatmaps instead (ours).
            features = encoder_width if hasattr(self.feature_backbone, "grid") else num_keypoints
            self.volume_lifting = Lifting(
                feature_width=features, volume_width=volume_width, size=volume_size, exponent=volume_exponent
            )
        self.image_place: nn.Parameter | None = None  # zero-initialised, so it can be added to a trained model
        if hybrid_position:
            if not hasattr(self.feature_backbone, "grid"):
                raise ValueError(f"hybrid_position is of a grid of image tokens, which backbone {backbone!r} has not")
            backbone_tokens: Any = self.feature_backbone.num_tokens
            self.image_place = nn.Parameter(torch.zeros(backbone_tokens, encoder_width))

    def encode(
        self,
        image: Tensor | None = None,  # (B, 3, S, S) RGB 0..1
        heatmaps: Tensor | None = None,  # (B, J, h, w)
        heatmap_valid: Tensor | None = None,  # (B, J) bool
        depth: Tensor | None = None,  # (B, h, w) larger = farther, any scale and shift, NaN = not known; None: no map
        peaks: Tensor | None = None,  # (B, J, 2, 4) in place of heatmaps, see `JointHeatmapBackbone.from_peaks`
    ) -> tuple[Conditioning, Tensor]:  # and the camera (B, 3): scale (crop half-sides per metre), tx, ty
        """Encode the image, once for all hypotheses and steps."""
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
            tokens = tokens + self.depth_at_tokens(depth, look)
        if isinstance(self.encoder, MLPEncoder):
            tokens = self.encoder(tokens, mask)
            mask = mask.new_ones(tokens.shape[:2])
        else:
            tokens, mask = self._encoded(tokens, mask, depth)
        tokens = self.norm_context(tokens)
        camera = self.to_camera(tokens[:, 0]).float()
        # The initial scale is 1: a person about fills the crop, so one metre is about one half-side.
        camera = torch.cat([camera[:, :1].clamp(-3, 3).exp(), camera[:, 1:]], -1)
        volume = None
        if self.volume_lifting is not None:
            if hasattr(self.feature_backbone, "grid"):
                side = math.isqrt(features.shape[1])
                features = features.mT.unflatten(2, (side, side))
            else:
                assert heatmaps is not None and heatmap_valid is not None
                features = heatmaps * heatmap_valid[..., None, None]
            lifted = self.volume_lifting(features)
            # Detached: the camera head learns from its own loss only.
            volume = LiftedVolume(lifted, camera.detach(), self.volume_lifting.exponent)
        return self.with_keys_values(Conditioning(tokens, mask, volume=volume)), camera

    def _encoded(
        self, tokens: Tensor, mask: Tensor, depth: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (B, 1 + L, C), (B, 1 + L)
        """Prepend the camera token, fuse depth, run the transformer blocks."""
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
        """Compute the denoisers' keys and values once for all hypotheses and steps."""
        pairs = sum((denoiser.keys_values(conditioning.tokens) for denoiser in self.denoisers), ())  # type: ignore
        return dataclasses.replace(conditioning, keys_values=pairs)

    def predict(
        self,
        points: Tensor,  # (B, N, P, 3)
        step: Tensor,  # (B, N) fraction of the process, 1 = pure noise
        conditioning: Conditioning,
        token_mask: Tensor | None = None,  # (B, N, T) bool token mask
    ) -> Denoised:
        """One evaluation of the denoiser(s), with the outputs of optional modules."""
        depth = self.config.depth
        found = Denoised(points)
        for index, denoiser in enumerate(self.denoisers):
            pairs = conditioning.keys_values[index * depth : (index + 1) * depth]
            found = denoiser(found.points, step, conditioning, pairs, token_mask)
        return found

    def denoise(
        self,
        points: Tensor,  # (B, N, P, 3)
        step: Tensor,  # (B, N) fraction of the process, 1 = pure noise; or (1, 1), the same for all
        conditioning: Conditioning,
    ) -> Tensor:  # (B, N, P, 3)
        """One evaluation of the denoiser(s), for a sampler."""
        return self.predict(points, step, conditioning).points

    @property
    def num_tokens(self) -> int:
        """T, tokens of the denoiser."""
        if self.config.tokens == "parts":
            return self.config.num_joints
        return self.config.num_coarse // self.config.patch_size + self.config.num_joints

    def flow_log_probs(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """RLE's log G by quantity."""
        return {name: flow.log_prob for name, flow in self.flows.items() if isinstance(flow, RealNVP)}

    def regress(
        self,
        conditioning: Conditioning,  # of B images
    ) -> Tensor:  # (B, 1, P, 3)
        """The direct baseline: one evaluation at k = K, from a constant input."""
        return self.at_last_step(conditioning).points

    def at_last_step(
        self,
        conditioning: Conditioning,  # of B images
    ) -> Denoised:  # N = 1
        """One evaluation at k = K, where x̂_0 is a direct regressor and RLE's σ̂ that of p(x_0 | image).

        The input is the mean of the noise, 0, so that the result does not depend on a seed.
        """
        constant = conditioning.tokens.new_zeros((len(conditioning.tokens), 1, self.num_points, 3), dtype=torch.float32)
        return self.predict(constant, constant.new_ones(len(constant), 1), conditioning)

    def forward(
        self,
        points: Tensor,  # (B, N, P, 3)
        step: Tensor,  # (B, N)
        image: Tensor | None = None,
        heatmaps: Tensor | None = None,
        heatmap_valid: Tensor | None = None,
        depth: Tensor | None = None,
        token_mask: Tensor | None = None,  # (B, N, T) bool
        peaks: Tensor | None = None,  # (B, J, 2, 4)
    ) -> Prediction:
        """Encode and denoise in one call, for training and torch.compile."""
        conditioning, camera = self.encode(image, heatmaps, heatmap_valid, depth, peaks)
        found = self.predict(points, step, conditioning, token_mask)
        silhouette = None
        if self.silhouette_decoder is not None:
            silhouette = self.silhouette_decoder(conditioning.tokens, conditioning.mask)
        volume = conditioning.volume
        return Prediction(
            points=found.points,
            camera=camera,
            scale=found.scale,
            silhouette=silhouette,
            estimates=found.estimates,
            volume=None if volume is None else volume.features,
            exponent=None if volume is None else volume.exponent,
            meshes=found.meshes,
        )
