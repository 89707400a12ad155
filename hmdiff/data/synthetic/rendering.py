"""Rendered images of synthetic people, with the same bodies, cameras and occluders as their keypoints (our choice).

Draws a coarser mesh of the body, 3,000 vertices of its hierarchy: at 128 pixels 1.7 times as fast as the free body's
12,410, and within a pixel of it. Appearance: `hmdiff.data.synthetic.appearance`. Where only silhouette and depth are
needed, `MapRenderer` draws them without the image, at a separate size. n people, O boxes, S pixels a side.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.mesh import MeshSampler
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.config import DepthCorruption
from hmdiff.data.synthetic.appearance import Clothing, render_photo
from hmdiff.data.synthetic.depth_corruption import estimate_depth
from hmdiff.data.synthetic.depth_scene import compose_depth
from hmdiff.data.synthetic.draws import grid
from hmdiff.errors import UserError
from hmdiff.viz.renderer import rasterize

RENDERED_VERTICES = 3000


@dataclasses.dataclass(frozen=True)
class OccluderBoxes:
    """Axis-aligned boxes in front of people. `enabled` masks them: unoccluded people have boxes that do not count."""

    center: Tensor  # (n, O, 2) crop coordinates
    half: Tensor  # (n, O, 2) half their sides
    enabled: Tensor  # (n,) bool: whether this person's boxes count

    def cover(
        self,
        points: Tensor,  # (n, J, 2) crop coordinates
    ) -> Tensor:  # (n, J) bool
        """Whether each point lies behind a box."""
        inside = ((points[:, :, None] - self.center[:, None]).abs() < self.half[:, None]).all(-1).any(-1)
        return inside & self.enabled[:, None]

    def mask(
        self,
        size: int,  # S
    ) -> Tensor:  # (n, S, S) 0..1, over 0.5 exactly where `cover` holds for the pixel's centre
        """The boxes as a mask with edges one pixel soft."""
        x, y = grid(size, size, self.center.device)
        box_center, half = self.center[..., None, None], self.half[..., None, None]
        margin = torch.minimum(
            half[:, :, 0] - (x - box_center[:, :, 0]).abs(), half[:, :, 1] - (y - box_center[:, :, 1]).abs()
        )
        alpha = (0.5 + margin * (size / 2)).clamp(0, 1).amax(1)
        return alpha * self.enabled[:, None, None]


@dataclasses.dataclass(frozen=True)
class RenderedImages:
    """Rendered people. The labels are the whole body's, including parts hidden by an occluder."""

    image: Tensor  # (n, 3, S, S) RGB 0..1
    silhouette: Tensor  # (n, S, S) 0 or 1
    depth: Tensor  # (n, S, S) metres along the optical axis, 0 where there is no body
    visible_fraction: Tensor  # (n,) fraction of the silhouette in the crop that no occluder covers; 0 where it is empty


class ImageRenderer:
    """Renders people from shape, pose and camera.

    Raises:
        UserError: the body has no faces.
    """

    def __init__(
        self,
        body: Body,
        size: int,  # S pixels
        device: torch.device | str = "cpu",
    ) -> None:
        if body.faces is None:
            raise UserError(f"body {body.name!r} has no faces, so no pictures can be drawn of it; leave image_size out")
        if size < 16:
            raise UserError(f"data.image_size {size}: at least 16 pixels are needed")
        self.size = size
        mesh = _render_mesh(body)
        self.body = body.select(mesh.coarse_ids.to(body.v_template.device)).to(device)
        self.faces = mesh.coarse_faces.to(device)
        self.clothing = Clothing(self.body.v_template, self.body.lbs_weights, body.joint_names)

    def __call__(
        self,
        betas: Tensor,  # (n, B)
        rotations: Tensor,  # (n, K, 3, 3)
        pelvis: Tensor,  # (n, 3) metres, camera frame
        focal: Tensor,  # (n,) crop half-sides
        principal_point: Tensor,  # (n, 2) crop coordinates
        boxes: OccluderBoxes,
        generator: torch.Generator,  # CPU, for the appearance only
    ) -> RenderedImages:
        output = self.body(betas, rotations)
        vertices = output.vertices + (pelvis - output.joints[:, 0])[:, None]
        photo = render_photo(
            generator,
            self.clothing,
            vertices,
            self.faces,
            focal,
            principal_point,
            self.size,
            occluder=boxes.mask(self.size),
        )
        body_pixels = photo.silhouette.sum((1, 2))
        visible_pixels = (photo.silhouette * ~photo.occlusion).sum((1, 2))
        return RenderedImages(
            photo.image, photo.silhouette, photo.fragments.depth, visible_pixels / body_pixels.clamp_min(1)
        )


@dataclasses.dataclass(frozen=True)
class RenderedMaps:
    """Silhouette and depth without the image. Labels are the whole body's; the input shows the occluded scene."""

    silhouette: Tensor  # (n, S, S) 0 or 1
    depth: Tensor  # (n, S, S) metres along the optical axis, 0 where there is no body
    visible_fraction: Tensor  # (n,) fraction of the silhouette in the crop that no occluder covers; 0 where it is empty
    occlusion: Tensor  # (n, S, S) bool: covered by a box, on the person or beside
    depth_input: Tensor  # (n, S, S) a depth network's estimate, NaN = unknown


class MapRenderer:
    """Draws silhouette and depth from shape, pose and camera, and a corrupted estimate of the depth.

    Raises:
        UserError: the body has no faces, or a size under 16.
    """

    def __init__(
        self,
        body: Body,
        size: int,  # S pixels
        corruption: DepthCorruption | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if body.faces is None:
            raise UserError(f"body {body.name!r} has no faces, so no depth can be drawn of it; give data.map_size=0")
        if size < 16:
            raise UserError(f"data.map_size {size}: 0, or at least 16 pixels, is expected")
        self.size, self.corruption = size, corruption or DepthCorruption()
        mesh = _render_mesh(body)
        self.body = body.select(mesh.coarse_ids.to(body.v_template.device)).to(device)
        self.faces = mesh.coarse_faces.to(device)

    def __call__(
        self,
        betas: Tensor,  # (n, B)
        rotations: Tensor,  # (n, K, 3, 3)
        pelvis: Tensor,  # (n, 3) metres, camera frame
        focal: Tensor,  # (n,) crop half-sides
        principal_point: Tensor,  # (n, 2) crop coordinates
        boxes: OccluderBoxes,
        generator: torch.Generator,  # CPU, for the scene and the corruptions only
    ) -> RenderedMaps:
        output = self.body(betas, rotations)
        vertices = output.vertices + (pelvis - output.joints[:, 0])[:, None]
        depth = rasterize(vertices, self.faces, focal, principal_point, self.size).depth
        body = depth > 0
        occlusion = boxes.mask(self.size) > 0.5
        visible_fraction = (body & ~occlusion).sum((1, 2)) / body.sum((1, 2)).clamp_min(1)
        scene = compose_depth(depth, occlusion, vertices, focal, principal_point, generator, self.corruption.scene)
        return RenderedMaps(
            body.to(depth.dtype), depth, visible_fraction, occlusion, estimate_depth(scene, self.corruption, generator)
        )


@functools.lru_cache(maxsize=2)
def _render_mesh(body: Body) -> MeshSampler:
    """Cached: takes a second or more, and training and validation data share it."""
    return load_mesh(body, min(RENDERED_VERTICES, body.num_vertices), fitted=False)
