"""A z-buffer rasteriser in plain torch, on any device: silhouette, depth, normals, shaded colour of a batch of meshes.

Rendered images are data here (labels, synthetic photos, figures), so the visibility test has no gradient; barycentrics,
depth and interpolated attributes are differentiable in the vertices. Our choice throughout. Perspective correction is
the standard one: 1/z and attribute/z are affine on the screen (Blinn, IEEE CG&A 1992).
Fast without a loop over faces: faces whose bounding box contains no pixel centre are dropped first (most faces of a
13k-vertex body on a 128-pixel crop); the rest expand to (face, pixel) candidates, and one scatter-minimum of the key
``depth bits << 32 | face`` resolves every pixel, with ties going to the lower face index. `hmdiff.viz.renderer_numba`
is the same with loops, used on a CPU with numba installed.
Symbols: B images, V vertices, F faces, H x W pixels. Camera frame: x right, y down, z forward, metres.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 0.01  # metres; faces with a vertex nearer than this (or behind the camera) are dropped
EDGE_TOLERANCE = 1e-5  # in barycentrics: a pixel centre on a shared edge must belong to one of its two faces
CANDIDATES_AT_ONCE = 1 << 22  # (face, pixel) pairs per chunk, bounds the memory


@dataclasses.dataclass(frozen=True)
class Fragments:
    """The visible surface in each pixel."""

    face_index: Tensor  # (B, H, W) long, -1 for background
    barycentric: Tensor  # (B, H, W, 3) perspective-correct weights of the face's vertices, 0 for background
    depth: Tensor  # (B, H, W) metres along z, 0 for background


@dataclasses.dataclass(frozen=True)
class Lights:
    """Ambient light and L directional lights per image; radiance 1 is white paper at full light."""

    ambient: Tensor  # (B, 3)
    direction: Tensor  # (B, L, 3) from the surface towards the light, any length
    colour: Tensor  # (B, L, 3)


def rasterize(
    vertices: Tensor,  # (B, V, 3) metres, camera frame
    faces: Tensor,  # (F, 3) long, counter-clockwise seen from outside
    focal: Tensor,  # (B,) or (B, 2) for x and y, in crop half-sides
    principal_point: Tensor,  # (B, 2) crop coordinates
    size: int | tuple[int, int],  # H = W, or (H, W)
    cull: bool = False,  # drop back faces; safe for a closed mesh seen from outside
    backend: str = "auto",  # auto, torch or numba
) -> Fragments:
    """Rasterise meshes. Crop coordinates are -1..1 on both axes: pixel j of W has its centre at ``-1 + 2 (j + 0.5) /
    W``.

    Parts outside the crop are clipped; faces that reach behind the camera are dropped. The result is on the device of
    `vertices`.

    Raises:
        ValueError: the shapes do not agree, or the backend is unknown or unavailable.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if vertices.ndim != 3 or vertices.shape[-1] != 3 or faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(f"vertices {tuple(vertices.shape)}, faces {tuple(faces.shape)}: wanted (B, V, 3) and (F, 3)")
    batch = len(vertices)
    if len(focal) != batch or tuple(principal_point.shape) != (batch, 2):
        raise ValueError(f"focal must be ({batch},), principal_point ({batch}, 2)")
    with torch.no_grad():
        points, z = screen_points(vertices.detach(), focal, principal_point, height, width)
        points, z = points.float(), z.float()
        if _use_numba(backend, vertices.device):
            from hmdiff.viz.renderer_numba import visible_faces as visible_faces_numba

            arrays = [tensor.contiguous().numpy() for tensor in (points, z, faces.long())]
            limits = np.float32(NEAR), np.float32(-EDGE_TOLERANCE)
            drawn = visible_faces_numba(*arrays, height, width, cull, *limits)  # type: ignore[call-arg, arg-type]
            face_index = torch.from_numpy(drawn)
        else:
            face_index = visible_faces(points, z, faces, height, width, cull)
    return _fragments(face_index, vertices, faces, focal, principal_point)


def _use_numba(backend: str, device: torch.device) -> bool:
    if backend not in ("auto", "torch", "numba"):
        raise ValueError(f"backend {backend!r}: auto, torch or numba")
    if backend == "auto":
        return device.type == "cpu" and importlib.util.find_spec("numba") is not None
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"the numba backend runs on the cpu, the vertices are on {device}")
    return backend == "numba"


def screen_points(
    vertices: Tensor,  # (B, V, 3)
    focal: Tensor,  # (B,) or (B, 2)
    principal_point: Tensor,  # (B, 2)
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # (B, V, 2) in pixels, the centre of pixel (i, j) at (x, y) = (j, i); (B, V) z
    """Projection to pixels. Points behind the camera are invalid: check z."""
    z = vertices[..., 2]
    focal = focal[..., None].expand(-1, 2) if focal.ndim == 1 else focal
    safe = vertices[..., :2] / torch.where(z > NEAR, z, torch.ones_like(z))[..., None]
    crop = safe * focal[:, None] + principal_point[:, None]
    half = torch.tensor([width / 2, height / 2], device=vertices.device, dtype=vertices.dtype)
    return (crop + 1) * half - 0.5, z


def visible_faces(
    points: Tensor,  # (B, V, 2) pixels, float32
    z: Tensor,  # (B, V) metres, float32
    faces: Tensor,  # (F, 3)
    height: int,
    width: int,
    cull: bool,
) -> Tensor:  # (B, H, W) long, -1 for background
    """The nearest face of every pixel, without attributes; see `hmdiff.viz.renderer_numba.visible_faces`."""
    batch, count = len(points), len(faces)
    face_points, face_z = points[:, faces].flatten(0, 1), z[:, faces].flatten(0, 1)  # (BF, 3, 2), (BF, 3)
    x0, y0 = face_points[:, 0, 0], face_points[:, 0, 1]
    x1, y1 = face_points[:, 1, 0] - x0, face_points[:, 1, 1] - y0
    x2, y2 = face_points[:, 2, 0] - x0, face_points[:, 2, 1] - y0
    area = x1 * y2 - x2 * y1
    low, high = face_points.amin(1), face_points.amax(1)
    left, top = low[:, 0].ceil().clamp(min=0), low[:, 1].ceil().clamp(min=0)
    right, bottom = high[:, 0].floor().clamp(max=width - 1), high[:, 1].floor().clamp(max=height - 1)
    # y points down, so front faces are clockwise on the screen: their area is negative.
    keep = (face_z.amin(1) > NEAR) & (left <= right) & (top <= bottom) & (area < 0 if cull else area != 0)
    kept = keep.nonzero()[:, 0]

    columns = (right[kept] - left[kept]).long() + 1
    counts = columns * ((bottom[kept] - top[kept]).long() + 1)
    left, top = left[kept].long(), top[kept].long()
    inverse_area = area[kept].reciprocal()
    inverse_z = face_z[kept].reciprocal()
    # One row per face, so that a candidate needs a single gather.
    table = torch.stack([x0[kept], y0[kept], x1[kept], y1[kept], x2[kept], y2[kept], inverse_area], 1)
    table = torch.cat([table, inverse_z], 1)
    integers = torch.stack([left, top, columns, torch.div(kept, count, rounding_mode="floor") * (height * width)], 1)
    face_of = kept % count

    empty = torch.iinfo(torch.int64).max
    nearest = torch.full((batch * height * width,), empty, dtype=torch.int64, device=points.device)
    ends = counts.cumsum(0)
    for first, last in _chunks(ends):
        owner = torch.repeat_interleave(torch.arange(first, last, device=points.device), counts[first:last])
        start = ends[first - 1] if first else 0
        position = torch.arange(len(owner), device=points.device) - ((ends - counts)[owner] - start)
        left_c, top_c, columns_c, image_c = integers[owner].unbind(1)
        row = torch.div(position, columns_c, rounding_mode="floor")
        column = position - row * columns_c + left_c
        row = row + top_c
        ax, ay, bx, by, cx, cy, scale, w0, w1, w2 = table[owner].unbind(1)
        dx, dy = column - ax, row - ay
        b1 = (dx * cy - dy * cx) * scale
        b2 = (bx * dy - by * dx) * scale
        b0 = 1 - b1 - b2
        inside = (b0 >= -EDGE_TOLERANCE) & (b1 >= -EDGE_TOLERANCE) & (b2 >= -EDGE_TOLERANCE)
        # The bits of positive floats have the order of the floats: the key sorts by depth, then by face.
        depth = (b0 * w0 + b1 * w1 + b2 * w2).reciprocal()
        key = (depth.view(torch.int32).long() << 32) | face_of[owner]
        hit = inside.nonzero()[:, 0]
        pixel = (image_c + row * width + column)[hit]
        nearest.scatter_reduce_(0, pixel, key[hit], "amin")
    face_index = torch.where(nearest == empty, -1, nearest & 0xFFFFFFFF)
    return face_index.view(batch, height, width)


def _chunks(
    ends: Tensor,  # (K,) running sum of the candidates per face
) -> list[tuple[int, int]]:  # ranges of faces with about CANDIDATES_AT_ONCE candidates
    if len(ends) == 0:
        return []
    total = int(ends[-1])
    if total <= CANDIDATES_AT_ONCE:
        return [(0, len(ends))]
    targets = torch.arange(CANDIDATES_AT_ONCE, total, CANDIDATES_AT_ONCE, device=ends.device)
    cuts = sorted({0, *(torch.searchsorted(ends, targets) + 1).tolist(), len(ends)})
    return list(itertools.pairwise(cuts))


def _fragments(
    face_index: Tensor,  # (B, H, W)
    vertices: Tensor,  # (B, V, 3)
    faces: Tensor,  # (F, 3)
    focal: Tensor,  # (B,) or (B, 2)
    principal_point: Tensor,  # (B, 2)
) -> Fragments:
    """Barycentrics and depth of the covered pixels: intersection of the pixel's ray with its face's plane.

    With P = [p0 p1 p2] and ray r = (x, y, 1), the weights solve P w ∝ r: w_k ∝ r · (p_{k+1} x p_{k+2}). The result is
    perspective-correct and differentiable in the vertices.
    """
    batch, height, width = face_index.shape
    image, row, column = (face_index >= 0).nonzero(as_tuple=True)
    corners = vertices[image[:, None], faces[face_index[image, row, column]]]  # (P, 3, 3)
    focal = focal[..., None].expand(-1, 2) if focal.ndim == 1 else focal
    crop = torch.stack([(column + 0.5) * (2 / width) - 1, (row + 0.5) * (2 / height) - 1], -1).to(vertices.dtype)
    ray = (crop - principal_point[image]) / focal[image]
    # Relative to the ray at each corner's depth, the products lose no precision for a distant camera.
    a, b, c = (corners[:, k, :2] - ray * corners[:, k, 2:] for k in range(3))
    weight = torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], -1)
    # Clamp against extrapolation: a pixel centre may lie EDGE_TOLERANCE outside its face, and edge-on faces have no
    # area.
    weight = (weight * torch.where(weight.sum(-1, keepdim=True) < 0, -1.0, 1.0)).clamp_min(0) + 1e-20
    weight = weight / weight.sum(-1, keepdim=True)
    barycentric = vertices.new_zeros(batch, height, width, 3).index_put((image, row, column), weight)
    depth = vertices.new_zeros(batch, height, width).index_put((image, row, column), (weight * corners[..., 2]).sum(-1))
    return Fragments(face_index, barycentric, depth)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def silhouette(
    fragments: Fragments,
    downsample: int = 1,  # average over blocks of this many pixels, for soft edges
) -> Tensor:  # (B, H // downsample, W // downsample) 0..1
    """The body's coverage of each pixel."""
    mask = (fragments.face_index >= 0).to(fragments.depth.dtype)
    return mask if downsample == 1 else F.avg_pool2d(mask[:, None], downsample)[:, 0]


def interpolate(
    fragments: Fragments,
    faces: Tensor,  # (F, 3)
    attributes: Tensor,  # (B, V, C)
) -> Tensor:  # (B, H, W, C), 0 for background
    """A per-vertex attribute, interpolated to the pixels."""
    batch, height, width = fragments.face_index.shape
    image, row, column = (fragments.face_index >= 0).nonzero(as_tuple=True)
    corners = attributes[image[:, None], faces[fragments.face_index[image, row, column]]]  # (P, 3, C)
    values = (corners * fragments.barycentric[image, row, column][..., None].to(corners.dtype)).sum(1)
    return attributes.new_zeros(batch, height, width, attributes.shape[-1]).index_put((image, row, column), values)


def vertex_normals(
    vertices: Tensor,  # (B, V, 3)
    faces: Tensor,  # (F, 3)
) -> Tensor:  # (B, V, 3) unit length, outward; zero for a vertex without faces
    """Area-weighted mean of the normals of a vertex's faces."""
    points = vertices.transpose(0, 1)  # vertices first: gathers and sums then move contiguous rows, twice as fast
    first, second, third = (points[faces[:, corner]] for corner in range(3))  # (F, B, 3)
    normal = torch.cross(second - first, third - first, dim=-1)
    total = torch.zeros_like(points)
    for corner in range(3):
        total = total.index_add(0, faces[:, corner], normal)
    return F.normalize(total, dim=-1, eps=1e-20).transpose(0, 1)


def normals(
    fragments: Fragments,
    vertices: Tensor,  # (B, V, 3)
    faces: Tensor,  # (F, 3)
) -> Tensor:  # (B, H, W, 3) unit length, camera frame, 0 for background
    """Interpolated vertex normals (Phong)."""
    return F.normalize(interpolate(fragments, faces, vertex_normals(vertices, faces)), dim=-1, eps=1e-20)


def shade(
    fragments: Fragments,
    vertices: Tensor,  # (B, V, 3)
    faces: Tensor,  # (F, 3)
    focal: Tensor,  # (B,) or (B, 2)
    principal_point: Tensor,  # (B, 2)
    colours: Tensor,  # (B, V, 3) RGB 0..1
    lights: Lights,
    background: Tensor,  # (B, 3, H, W) RGB 0..1
    specular: float = 0.08,
    shininess: float = 24.0,
) -> Tensor:  # (B, 3, H, W) RGB 0..1
    """Lambert plus slight Blinn-Phong gloss, over a background. Directional lights cast no shadow."""
    covered = fragments.face_index >= 0
    image, row, column = covered.nonzero(as_tuple=True)
    height, width = covered.shape[1:]
    attributes = torch.cat([colours, vertex_normals(vertices, faces)], -1)
    albedo, normal = interpolate(fragments, faces, attributes)[image, row, column].split(3, -1)
    normal = F.normalize(normal, dim=-1, eps=1e-20)
    focal = focal[..., None].expand(-1, 2) if focal.ndim == 1 else focal
    crop = torch.stack([(column + 0.5) * (2 / width) - 1, (row + 0.5) * (2 / height) - 1], -1).to(vertices.dtype)
    ray = (crop - principal_point[image]) / focal[image]
    to_eye = -F.normalize(F.pad(ray, (0, 1), value=1.0), dim=-1)
    # The inside of an open mesh is lit as if facing the viewer.
    normal = torch.where((normal * to_eye).sum(-1, keepdim=True) < -0.2, -normal, normal)
    direction = F.normalize(lights.direction, dim=-1)[image]  # (P, L, 3)
    colour = lights.colour[image]
    lambert = (direction * normal[:, None]).sum(-1, keepdim=True).clamp_min(0)
    half = F.normalize(direction + to_eye[:, None], dim=-1)
    gloss = (half * normal[:, None]).sum(-1, keepdim=True).clamp_min(1e-6).pow(shininess) * (lambert > 0)
    radiance = albedo * (lights.ambient[image] + (lambert * colour).sum(1)) + specular * (gloss * colour).sum(1)
    picture = background.permute(0, 2, 3, 1).index_put((image, row, column), radiance.clamp(0, 1).to(background.dtype))
    return picture.permute(0, 3, 1, 2).contiguous()


def visible_vertices(
    fragments: Fragments,
    vertices: Tensor,  # (B, V, 3) metres, camera frame; the mesh's vertices or other points such as joints
    focal: Tensor,  # (B,) or (B, 2)
    principal_point: Tensor,  # (B, 2)
    tolerance: float = 0.02,  # metres behind the rendered surface that still count as visible
    hidden: Tensor | None = None,  # (B, H, W) bool: pixels occluded by something in front of the body
) -> Tensor:  # (B, V) bool
    """Whether points lie inside the crop and are not occluded, by the depth of the four pixels around each.

    The farthest of the four counts, since on a slanted surface the point lies between them; within a pixel of an edge
    the result is therefore lenient. A point over background is not occluded. Joints lie inside the body: use a
    tolerance of a limb's thickness.
    """
    height, width = fragments.depth.shape[1:]
    points, z = screen_points(vertices, focal, principal_point, height, width)
    x, y = points.unbind(-1)
    inside = (z > NEAR) & (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)

    def pixel(column: Tensor, row: Tensor) -> Tensor:  # (B, V) index into the flattened image
        place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        return torch.where(inside, place, torch.zeros_like(place)).long()

    depth = fragments.depth.flatten(1)
    corners = [pixel(x.floor() + right, y.floor() + down) for right in (0, 1) for down in (0, 1)]
    surface = torch.stack([depth.gather(1, corner) for corner in corners]).amax(0)
    visible = inside & ((surface == 0) | (z <= surface + tolerance))
    return visible if hidden is None else visible & ~hidden.flatten(1).gather(1, pixel(x.round(), y.round()))
