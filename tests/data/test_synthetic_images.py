"""Images of synthetic people: camera and occluders as of the keypoints, deterministic by seed; the shipped configs."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from hmdiff.body.body import load_body
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.build import build_data, build_mesh, build_model, build_scheduler
from hmdiff.config import Config, load_config
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.data.synthetic.rendering import ImageRenderer, OccluderBoxes
from hmdiff.errors import UserError
from hmdiff.lab.throughput import measure_throughput
from hmdiff.train.stream import TrainingStream

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SIZE = 96
PICTURE_FIELDS = ("image", "silhouette", "depth", "visible_fraction")


@pytest.fixture(scope="module")
def body():
    return load_body()


@pytest.fixture(scope="module")
def mesh(body):
    return load_mesh(body)


def people(body, mesh, **options):
    return SyntheticHumans(body, PoseMixture(), mesh.coarse_ids, 12, seed=1, **options)


@pytest.fixture(scope="module")
def drawn(body, mesh):
    torch.set_num_threads(1)
    return people(body, mesh, image_size=SIZE, full_mesh=True)


@pytest.fixture(scope="module")
def sample(drawn):
    return drawn.block("train", 0)


def projected(points, sample):
    """Crop coordinates of points relative to the pelvis, by the definition of the camera."""
    points = points + sample.pelvis[:, None]
    flat = points[..., :2] / points[..., 2:]
    return flat * sample.focal[:, None, None] + sample.principal_point[:, None]


def around(maps, points, largest=True):
    """The extreme value of the 3 x 3 pixels around points; NaN for points outside the crop."""
    maps = F.max_pool2d(maps[:, None], 3, 1, 1) if largest else -F.max_pool2d(-maps[:, None], 3, 1, 1)
    pixel = ((points + 1) * (maps.shape[-1] / 2)).floor().long()
    inside = ((pixel >= 0) & (pixel < maps.shape[-1])).all(-1)
    column, row = pixel.clamp(0, maps.shape[-1] - 1).unbind(-1)
    return torch.where(inside, maps.flatten(1).gather(1, row * maps.shape[-1] + column), torch.nan)


@pytest.mark.slow
@pytest.mark.parametrize("full_mesh", [False, True])
def test_people_are_the_same_with_pictures_as_without(body, mesh, full_mesh):
    plain, pictured = (people(body, mesh, full_mesh=full_mesh, image_size=size) for size in (None, 32))
    for stream in ("train", "test_occluded", "test_ood"):
        one, other = plain.block(stream, 3), pictured.block(stream, 3)
        for field in dataclasses.fields(one):
            values = getattr(one, field.name), getattr(other, field.name)
            if field.name in PICTURE_FIELDS:
                assert values[0] is None and values[1] is not None
            else:
                assert (values[0] is None and values[1] is None) or torch.equal(*values), field.name


@pytest.mark.slow
def test_a_block_is_a_function_of_seed_stream_and_number(drawn, sample):
    again, next_block, split = drawn.block("train", 0), drawn.block("train", 1), drawn.block("val", 0)
    assert torch.equal(again.image, sample.image) and torch.equal(again.depth, sample.depth)
    assert not torch.equal(next_block.image, sample.image) and not torch.equal(split.image, sample.image)
    assert sample.image.shape == (12, 3, SIZE, SIZE)
    assert sample.depth.shape == sample.silhouette.shape == (12, SIZE, SIZE)
    assert sample.image.min() >= 0 and sample.image.max() <= 1 and sample.image.std() > 0.1


@pytest.mark.slow
def test_training_people_and_those_with_the_full_mesh_look_alike(body, mesh, sample):
    assert torch.equal(people(body, mesh, image_size=SIZE).block("train", 0).image, sample.image)


def test_keypoints_fall_into_the_silhouette(sample):
    found = around(sample.silhouette, sample.joints_2d)
    found = found[found.isfinite()]
    assert len(found) > 200 and found.mean() > 0.99
    # Not for other people's keypoints: the silhouette does not simply cover everything.
    assert around(sample.silhouette, sample.joints_2d.roll(1, 0)).nanmean() < 0.9


def hands_and_feet(body):
    """Fingers and toes are thinner than a pixel, so some fall between pixel centres."""
    joints = [number for number, name in enumerate(body.joint_names) if name.endswith(("wrist", "hand", "foot"))]
    return body.lbs_weights[:, joints].sum(1) > 0.1


def test_the_silhouette_covers_the_projected_body_and_no_more(body, sample):
    points = projected(sample.vertices, sample)
    found = around(sample.silhouette, points)[:, ~hands_and_feet(body)]
    assert found[found.isfinite()].mean() > 0.999
    splat = torch.zeros_like(sample.silhouette)
    pixel = ((points + 1) * (SIZE / 2)).floor().long()
    for person in range(len(points)):
        inside = ((pixel[person] >= 0) & (pixel[person] < SIZE)).all(-1)
        column, row = pixel[person][inside].unbind(-1)
        splat[person, row, column] = 1
    near = F.max_pool2d(splat[:, None], 9, 1, 4)[:, 0]
    assert (sample.silhouette * (1 - near)).sum() < 0.002 * sample.silhouette.sum()


def test_depth_is_that_of_the_nearest_vertices(body, mesh, sample):
    points = projected(sample.coarse_vertices, sample)
    z = sample.coarse_vertices[..., 2] + sample.pelvis[:, None, 2]
    far = around(sample.depth, points)
    near = around(torch.where(sample.depth > 0, sample.depth, torch.inf), points, largest=False)
    inside = far.isfinite() & near.isfinite() & ~hands_and_feet(body)[mesh.coarse_ids]
    # Coarse vertices belong to the drawn mesh: about half are on the visible surface, the rest behind it. A tip that
    # points at the camera may fall between pixel centres, with nothing else in front.
    assert (z - near)[inside].quantile(0.003) > -0.005
    on_it = ((z >= near - 0.005) & (z <= far + 0.005))[inside]
    assert 0.35 < on_it.float().mean() < 0.95
    assert torch.equal(sample.depth > 0, sample.silhouette > 0.5)


def test_visible_is_what_the_painted_boxes_leave(body):
    """A centred body behind a box that covers the left half of the crop."""
    size, n = 64, 2
    photographer = ImageRenderer(body, size)
    turn = torch.eye(3).repeat(n, 24, 1, 1)
    turn[:, 0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    behind = torch.tensor([True, False])
    left_half = torch.tensor([[[-1.0, 0.0]], [[1.0, 1.5]]])
    boxes = OccluderBoxes(left_half[:1].repeat(n, 1, 1), left_half[1:].repeat(n, 1, 1), behind)
    place, focal = torch.tensor([[0.0, 0.0, 4.0]]).repeat(n, 1), torch.full((n,), 3.5)
    generator = torch.Generator().manual_seed(0)
    pictures = photographer(torch.zeros(n, 10), turn, place, focal, torch.zeros(n, 2), boxes, generator)
    assert float(pictures.visible_fraction[0]) == pytest.approx(0.5, abs=0.03)
    assert float(pictures.visible_fraction[1]) == 1
    points = torch.tensor([[-0.3, 0.0], [0.3, 0.0], [-0.01, 0.9], [0.01, 0.9]]).repeat(n, 1, 1)
    assert boxes.cover(points).tolist() == [[True, False, True, False], [False] * 4]
    body_alone = pictures.silhouette[0] - pictures.silhouette[1]
    assert body_alone.abs().max() == 0  # the label ignores the box


def test_mask_and_cover_agree_on_every_pixel():
    generator = torch.Generator().manual_seed(0)
    middle, half = torch.rand(2, 20, 3, 2, generator=generator)
    boxes = OccluderBoxes(1.6 * middle - 0.8, 0.5 * half, torch.arange(20) % 2 == 0)
    axis = (torch.arange(40) + 0.5) * (2 / 40) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x, y], -1).view(1, -1, 2).expand(20, -1, -1)
    covered = boxes.cover(pixels).view(20, 40, 40)
    mask = boxes.mask(40)
    assert torch.equal(mask > 0.5, covered) and 0.05 < covered.float().mean() < 0.9
    assert mask.min() == 0 and mask.max() == 1 and ((mask > 0) & (mask < 1)).any()


def test_painted_boxes_hide_keypoints_and_body(drawn):
    occluded = drawn.block("test_occluded", 0)
    hidden = ~occluded.visible & (occluded.joints_2d.abs() <= 1).all(-1)
    assert hidden.float().mean() > 0.2
    assert occluded.visible_fraction.mean() < 0.85 and (occluded.visible_fraction >= 0).all()
    share = occluded.visible.sum(1) / (occluded.joints_2d_confidence > 0).sum(1).clamp_min(1)
    assert torch.corrcoef(torch.stack([share, occluded.visible_fraction]))[0, 1] > 0.7


def training_stream():
    config = Config()
    config.model = {"inputs": "image", "backbone": "resnet18"}
    config.data.image_size, config.data.block_size = 32, 4
    config.training.batch_size, config.training.steps = 4, 4
    body = load_body()
    mesh = build_mesh(config, body)
    return TrainingStream(build_data(config, body, mesh), config, 0, 1, build_model(config, body, mesh))


@pytest.mark.slow
def test_workers_draw_the_same_people():
    stream = training_stream()
    alone = list(DataLoader(stream, batch_size=None))
    ahead = list(DataLoader(stream, batch_size=None, num_workers=2, prefetch_factor=2))
    assert len(alone) == len(ahead) == 4
    for (one, draws), (other, again) in zip(alone, ahead, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.heatmaps, other.heatmaps)
        assert torch.equal(draws.steps, again.steps) and torch.equal(draws.noise, again.noise)
        assert draws.shared_seed == again.shared_seed


def test_pictures_come_where_they_are_read_or_asked_for(body, mesh):
    config = Config()
    assert build_data(config, body, mesh).block("train", 0).image is None
    config.data.pictures, config.data.image_size, config.data.block_size = True, 24, 2
    assert build_data(config, body, mesh).block("train", 0).image.shape == (2, 3, 24, 24)
    config.data.pictures = False
    config.model = {"inputs": "both", "image_size": 40}
    assert build_data(config, body, mesh).image_size == 40


def test_bodies_and_sizes_that_cannot_be_drawn_are_named(body):
    with pytest.raises(UserError, match="no faces"):
        ImageRenderer(body.select(torch.arange(100)), 64)
    with pytest.raises(UserError, match="image_size 4"):
        ImageRenderer(body, 4)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_build(path, body):
    config = load_config(path)
    config.model.pop("pretrained", None)  # needs a download
    assert path.read_text().startswith("# "), "a config opens with what it is for"
    assert config.name == path.stem
    mesh = build_mesh(config, body)
    model = build_model(config, body, mesh)
    build_scheduler(config)
    data = build_data(config, body, mesh)
    assert (data.image_size is None) == (model.config.inputs == "heatmaps")
    TrainingStream(data, config, 0, 1, model)  # raises unless batches are whole blocks
    if path.stem.endswith("_paper"):
        patches = model.denoisers[0].patches
        assert model.num_points == 455 and patches.shape == (431, 1) and model.feature_backbone.num_tokens == 49
        full = model.upsample(body.v_template[mesh.coarse_ids])
        assert (full - body.v_template).norm(dim=-1).mean() < 0.01


@pytest.mark.slow
def test_throughput_is_measured():
    config = load_config(
        overrides=[
            "model.width=24",
            "model.depth=1",
            "model.heads=2",
            "model.encoder_width=24",
            "model.encoder_depth=1",
            "model.encoder_heads=2",
            "data.block_size=4",
            "training.batch_size=4",
            "training.threads=1",
        ]
    )
    found = measure_throughput(config, "cpu", repeats=1)
    rates = found["data_people_per_second"], found["step_people_per_second"]
    assert min(rates) > 0 and found["image_size"] is None and found["workers_needed"] >= 1
    assert found["data_share"] == pytest.approx(rates[1] / sum(rates))
