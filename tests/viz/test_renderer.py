"""The renderer against geometry computed by hand; its backends and batch sizes against each other."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import trimesh

from hmdiff.geometry import perspective_projection
from hmdiff.viz.renderer import (
    Lights,
    interpolate,
    normals,
    rasterize,
    shade,
    silhouette,
    vertex_normals,
    visible_vertices,
)

TRIANGLE = torch.tensor([[-1.0, -1.0, 2.0], [1.0, -1.0, 2.0], [-1.0, 1.0, 4.0]])
BOTH = pytest.mark.parametrize("backend", ["torch", "numba"])


@pytest.fixture(autouse=True)
def _numba_or_skip(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "numba":
        pytest.importorskip("numba")


def draw(vertices, faces, size=64, focal=1.0, centre=(0.0, 0.0), **options):
    vertices = vertices[None] if vertices.ndim == 2 else vertices
    count = len(vertices)
    focal = torch.full((count,), focal) if isinstance(focal, float) else focal
    return rasterize(vertices, torch.as_tensor(faces), focal, torch.tensor([centre] * count), size, **options)


def sphere(radius=0.5, distance=3.0, subdivisions=4):
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    # (x, -y, -z) maps trimesh's y-up frame to the camera's without mirroring.
    points = torch.tensor(np.array(mesh.vertices), dtype=torch.float32) * torch.tensor([1.0, -1.0, -1.0])
    return points + torch.tensor([0.0, 0.0, distance]), torch.tensor(np.array(mesh.faces))


def soup(count=300, seed=0):
    """Random triangles of all sizes around the near plane, on and off the screen."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.rand(4, count, 1, 3, generator=generator) * torch.tensor([4.0, 4.0, 5.0]) - torch.tensor(
        [2.0, 2.0, 0.5]
    )
    size = torch.rand(4, count, 1, 1, generator=generator) ** 4 * 3
    corners = middle + size * torch.randn(4, count, 3, 3, generator=generator)
    return corners.flatten(1, 2), torch.arange(3 * count).view(count, 3)


@BOTH
def test_triangle_has_known_coverage_barycentrics_and_depth(backend):
    size = 16
    fragments = draw(TRIANGLE, [[0, 1, 2]], size, backend=backend)
    centre = (torch.arange(size) + 0.5) * (2 / size) - 1
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    # On the screen the corners are (-.5, -.5), (.5, -.5), (-.25, .25).
    b2 = (v + 0.5) / 0.75
    b1 = u + 0.5 - 0.25 * b2
    b0 = 1 - b1 - b2
    inside = (b0 > -1e-6) & (b1 > -1e-6) & (b2 > -1e-6)  # pixel centres on the long edge belong to the face
    assert torch.equal(fragments.face_index[0] == 0, inside)
    depth = 1 / (b0 / 2 + b1 / 2 + b2 / 4)  # 1/z is affine on the screen
    weights = torch.stack([b0 / 2, b1 / 2, b2 / 4], -1) * depth[..., None]
    torch.testing.assert_close(fragments.depth[0], torch.where(inside, depth, 0.0))
    torch.testing.assert_close(
        fragments.barycentric[0], torch.where(inside[..., None], weights, 0.0), atol=2e-6, rtol=0
    )


def test_interpolation_is_perspective_correct():
    """The position as a vertex attribute must give the point of the plane behind the pixel."""
    fragments = draw(TRIANGLE, [[0, 1, 2]], 32)
    points = interpolate(fragments, torch.tensor([[0, 1, 2]]), TRIANGLE[None])[0]
    row, column = (fragments.face_index[0] >= 0).nonzero(as_tuple=True)
    points = points[row, column]
    torch.testing.assert_close(points[:, 0] / points[:, 2], (column + 0.5) / 16 - 1)
    torch.testing.assert_close(points[:, 1] / points[:, 2], (row + 0.5) / 16 - 1)
    torch.testing.assert_close(points[:, 2], fragments.depth[0, row, column])


@BOTH
def test_sphere_silhouette_depth_and_normals(backend):
    radius, distance, size = 0.5, 3.0, 128
    points, faces = sphere(radius, distance)
    fragments = draw(points, faces, size, focal=3.0, backend=backend)
    # The outline of a sphere: half-angle asin(r / d), a circle of radius f tan(half-angle).
    outline = 3.0 * math.tan(math.asin(radius / distance)) * size / 2
    measured = math.sqrt(float(silhouette(fragments).sum()) / math.pi)
    assert abs(measured - outline) < 0.5
    middle = fragments.depth[0, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1]
    torch.testing.assert_close(middle, torch.full((2, 2), distance - radius), atol=2e-3, rtol=0)
    seen = normals(fragments, points[None], faces)[0]
    where = interpolate(fragments, faces, points[None])[0]
    mask = fragments.face_index[0] >= 0
    exact = torch.nn.functional.normalize(where - torch.tensor([0.0, 0.0, distance]), dim=-1)
    assert (seen[mask] * exact[mask]).sum(-1).min() > 0.999
    assert torch.equal(
        draw(points, faces, size, focal=3.0, backend=backend, cull=True).face_index, fragments.face_index
    )


@BOTH
def test_nearer_triangle_hides_the_farther_in_either_order(backend):
    far = torch.tensor([[-2.0, -2.0, 3.0], [6.0, -2.0, 3.0], [-2.0, 6.0, 3.0]])
    near = torch.tensor([[-0.5, -0.5, 1.0], [0.5, -0.5, 1.0], [-0.5, 0.5, 1.0]])
    for order in ([[0, 1, 2], [3, 4, 5]], [[3, 4, 5], [0, 1, 2]]):
        fragments = draw(torch.cat([far, near]), order, 32, backend=backend)
        near_face = order.index([3, 4, 5])
        covered = fragments.face_index[0] == near_face
        assert float(covered.float().mean()) == pytest.approx(0.125, abs=0.02)
        assert torch.equal(covered, (fragments.depth[0] > 0) & (fragments.depth[0] < 2))


@BOTH
def test_faces_behind_the_camera_and_nan_are_dropped(backend):
    behind = TRIANGLE * torch.tensor([1.0, 1.0, -1.0])
    crossing = TRIANGLE - torch.tensor([0.0, 0.0, 3.0])
    for bad in (behind, crossing, TRIANGLE * math.nan):
        fragments = draw(torch.cat([bad, TRIANGLE]), [[0, 1, 2], [3, 4, 5]], 16, backend=backend)
        alone = draw(TRIANGLE, [[0, 1, 2]], 16, backend=backend)
        assert not (fragments.face_index == 0).any()
        torch.testing.assert_close(fragments.depth, alone.depth)


@BOTH
def test_face_larger_than_the_screen_covers_it_all(backend, monkeypatch):
    monkeypatch.setattr("hmdiff.viz.renderer.CANDIDATES_AT_ONCE", 700)  # several chunks
    huge = torch.tensor([[-50.0, -50.0, 1.0], [200.0, -50.0, 1.0], [-50.0, 200.0, 1.0]])
    pair = torch.cat([huge * 2, huge])
    fragments = draw(pair, [[0, 1, 2], [3, 4, 5]], (20, 30), backend=backend)
    assert (fragments.face_index == 1).all()
    torch.testing.assert_close(fragments.depth, torch.ones(1, 20, 30))


@BOTH
def test_shared_edges_leave_no_hole(backend):
    """A fan about the middle of the screen: pixel centres lie exactly on its edges, and none may be empty."""
    angles = torch.arange(8) * (math.pi / 4)
    ring = torch.stack([4 * angles.cos(), 4 * angles.sin(), torch.ones(8)], -1)
    points = torch.cat([torch.tensor([[0.0, 0.0, 1.0]]), ring])
    faces = [[0, 1 + k, 1 + (k + 1) % 8] for k in range(8)]
    for size in (15, 16, 64):
        assert (draw(points, faces, size, backend=backend).face_index >= 0).all()


@pytest.mark.parametrize("cull", [False, True])
def test_numba_draws_what_torch_draws(cull):
    pytest.importorskip("numba")
    points, faces = soup()
    for size in (48, (33, 70)):
        one, other = (draw(points, faces, size, backend=backend, cull=cull) for backend in ("torch", "numba"))
        assert (one.face_index >= 0).float().mean() > 0.3
        assert torch.equal(one.face_index, other.face_index)
        assert torch.equal(one.depth, other.depth)


@BOTH
def test_a_batch_is_its_images(backend):
    points, faces = soup(seed=1)
    focal = torch.tensor([0.5, 1.0, 1.5, 2.0])
    batch = draw(points, faces, 32, focal, backend=backend)
    for image in range(4):
        single = draw(points[image], faces, 32, focal[image : image + 1], backend=backend)
        assert torch.equal(single.face_index[0], batch.face_index[image])
        torch.testing.assert_close(single.depth[0], batch.depth[image])


def test_agrees_with_projection_and_crop_frame():
    """A small sphere must appear where its centre projects, with an off-centre principal point and an oblong image."""
    points, faces = sphere(radius=0.02, distance=2.0, subdivisions=2)
    points = points + torch.tensor([0.3, -0.2, 0.0])
    focal, centre = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.1, 0.25]])
    fragments = rasterize(points[None], faces, focal, centre, (100, 200))
    row, column = (fragments.face_index[0] >= 0).nonzero(as_tuple=True)
    expected = points.mean(0)[:2] / 2.0 * focal[0] + centre[0]
    assert float(column.float().mean() + 0.5) / 100 - 1 == pytest.approx(float(expected[0]), abs=0.01)
    assert float(row.float().mean() + 0.5) / 50 - 1 == pytest.approx(float(expected[1]), abs=0.02)
    same = perspective_projection(points[None], focal[:, 0], centre)[0].mean(0)
    assert float(same[0]) == pytest.approx(float(expected[0]), abs=1e-3)


def test_depth_and_barycentrics_have_the_right_gradient():
    faces = torch.tensor([[0, 1, 2]])

    def surface(points):
        fragments = rasterize(points, faces, points.new_ones(1), points.new_zeros(1, 2), 6)
        return fragments.depth, fragments.barycentric

    # Off the pixel grid: pixel centres on an edge would be unstable.
    points = TRIANGLE.double()[None] * 1.07 + torch.tensor([0.031, 0.047, 0.0], dtype=torch.float64)
    assert (surface(points)[0] > 0).sum() >= 3
    assert torch.autograd.gradcheck(surface, (points.requires_grad_(),))


def test_vertex_normals_of_a_sphere_point_outwards():
    points, faces = sphere(distance=0.0)
    found = vertex_normals(points.expand(2, -1, -1), faces)
    assert (found * torch.nn.functional.normalize(points, dim=-1)).sum(-1).min() > 0.999


def test_shading_follows_lambert_and_keeps_the_background():
    square = torch.tensor([[-1.0, -1.0, 2.0], [1.0, -1.0, 2.0], [1.0, 1.0, 2.0], [-1.0, 1.0, 2.0]])
    faces = torch.tensor([[0, 2, 1], [0, 3, 2]])  # counter-clockwise seen from the camera: the normal is -z
    fragments = draw(square, faces, 16)
    background = torch.rand(1, 3, 16, 16)
    colour = torch.tensor([0.8, 0.4, 0.2])
    tilt = math.radians(60)
    lights = Lights(
        torch.full((1, 3), 0.1), torch.tensor([[[math.sin(tilt), 0.0, -math.cos(tilt)]]]), torch.full((1, 1, 3), 0.6)
    )
    picture = shade(
        fragments,
        square[None],
        faces,
        torch.ones(1),
        torch.zeros(1, 2),
        colour.expand(1, 4, 3),
        lights,
        background,
        specular=0.0,
    )
    covered = fragments.face_index[0] >= 0
    assert covered[8, 8] and not covered[0, 0]
    torch.testing.assert_close(picture[0, :, 8, 8], colour * (0.1 + 0.6 * 0.5))
    assert torch.equal(picture[0][:, ~covered], background[0][:, ~covered])


def test_visible_vertices_of_a_sphere_are_those_that_face_the_camera():
    points, faces = sphere(distance=3.0)
    fragments = draw(points, faces, 128, focal=3.0)
    seen = visible_vertices(fragments, points[None], torch.tensor([3.0]), torch.zeros(1, 2))[0]
    normal = torch.nn.functional.normalize(points - torch.tensor([0.0, 0.0, 3.0]), dim=-1)
    facing = -(normal * torch.nn.functional.normalize(points, dim=-1)).sum(-1)
    # Between the two lies the rim, where a pixel covers more depth than the tolerance.
    assert seen[facing > 0.2].all() and not seen[facing < 0].any()
    hidden = torch.zeros(1, 128, 128, dtype=torch.bool)
    hidden[:, :, 64:] = True
    half = visible_vertices(fragments, points[None], torch.tensor([3.0]), torch.zeros(1, 2), hidden=hidden)[0]
    assert not half[points[:, 0] > 0.02].any() and torch.equal(half[points[:, 0] < -0.02], seen[points[:, 0] < -0.02])
    outside = visible_vertices(
        fragments, points[None] + torch.tensor([5.0, 0.0, 0.0]), torch.ones(1), torch.zeros(1, 2)
    )
    assert not outside.any()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="backend"):
        draw(TRIANGLE, [[0, 1, 2]], backend="opengl")
    with pytest.raises(ValueError, match="focal"):
        rasterize(TRIANGLE[None], torch.tensor([[0, 1, 2]]), torch.ones(2), torch.zeros(1, 2), 8)
    with pytest.raises(ValueError, match="wanted"):
        rasterize(TRIANGLE, torch.tensor([[0, 1, 2]]), torch.ones(1), torch.zeros(1, 2), 8)


@pytest.mark.slow
def test_import_is_light():
    heavy = "('numba', 'matplotlib', 'cv2', 'PIL')"
    code = f"import sys, hmdiff.viz.renderer; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
