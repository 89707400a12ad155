"""L_2D and L_3D of labelled keypoints: known values, gradients, and that off equals absent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small import awaken, free_body, people_block, small_config
from torch import Tensor

from hmdiff.build import build_model, build_scheduler
from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.geometry import crop_rotation
from hmdiff.losses.keypoints import KeypointMap, keypoint_terms, labelled_mean, project_to_crop
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.train.step import Draws, keypoint_map, training_losses

BOTH = LossConfig(keypoints_2d=1.0, keypoints_3d=1.0)
PEOPLE = 4


@pytest.fixture(scope="module")
def model() -> MeshRecoveryModel:
    return make_model()


def make_model(*overrides: str) -> MeshRecoveryModel:
    body, mesh = free_body()
    model = build_model(small_config("unused", *overrides), body, mesh)
    weight = model.upsample_weight.detach().clone()
    awaken(model, 0.3)
    with torch.no_grad():
        model.upsample_weight.copy_(weight)
    return model


def the_map(model: MeshRecoveryModel) -> KeypointMap:
    found = keypoint_map(BOTH, model, free_body()[0])
    assert found is not None
    return found


def photo(frame: str) -> tuple[Sample, Tensor, Tensor, Tensor]:
    """Samples whose labels are pinhole projections of their coarse meshes, by numpy loops; off-centre crops.

    Returns also the mesh (B, 1, C, 3), joints in the frame, and the camera.
    """
    sample = people_block().map(lambda tensor: tensor[:PEOPLE])
    assert sample.coarse_vertices is not None and sample.joints_3d is not None
    keypoints = the_map(make_model())
    found = keypoints.regressor @ sample.coarse_vertices
    # Joints at their keypoints, so that both sets have no error.
    joints = sample.joints_3d.clone()
    joints[:, keypoints.joints] = found[:, keypoints.places]
    focal, principal = np.array([3.0, 4, 5, 6]), np.array([[0.9, 0.0], [0.0, -0.9], [0.5, 0.5], [0.0, 0.0]])
    pelvis = np.array([[0.1, 0.2, 3.0], [-0.2, 0.0, 4.0], [0.0, 0.3, 5.0], [0.0, 0.0, 6.0]])
    seen, cameras = np.zeros((PEOPLE, 26, 2)), np.zeros((PEOPLE, 3))
    for person in range(PEOPLE):
        for joint in range(26):
            x, y, z = found[person, joint].double().numpy() + pelvis[person]
            seen[person, joint] = focal[person] * x / z, focal[person] * y / z
        seen[person] += principal[person]
        scale = focal[person] / pelvis[person, 2]
        cameras[person] = scale, *(pelvis[person, :2] * scale + principal[person])
    sample = Sample(
        joints_2d=torch.from_numpy(seen).float(),
        joints_2d_confidence=torch.ones(PEOPLE, 26),
        keypoints_3d=found,
        has_keypoints_3d=torch.ones(PEOPLE, 26, dtype=torch.bool),
        focal=torch.from_numpy(focal).float(),
        principal_point=torch.from_numpy(principal).float(),
        pelvis=torch.from_numpy(pelvis).float(),
        has_perspective=torch.ones(PEOPLE, dtype=torch.bool),
    )
    mesh = people_block().coarse_vertices
    assert mesh is not None and sample.principal_point is not None and sample.focal is not None
    mesh = mesh[:PEOPLE]
    if frame == "crop":
        rotation = crop_rotation(sample.principal_point, sample.focal)
        mesh, joints = mesh @ rotation, joints @ rotation
    return sample, mesh[:, None], joints[:, None], torch.from_numpy(cameras).float()


@pytest.mark.parametrize("frame", ["camera", "crop"])
def test_the_truth_has_no_error_in_its_own_frame(model: MeshRecoveryModel, frame: str) -> None:
    sample, mesh, joints, camera = photo(frame)
    terms = keypoint_terms(BOTH, sample, the_map(model), mesh, joints, camera, torch.ones(PEOPLE, 1), frame)
    assert terms["keypoints_2d"] < 1e-4 and terms["keypoints_3d"] < 1e-5
    other = "camera" if frame == "crop" else "crop"
    wrong = keypoint_terms(BOTH, sample, the_map(model), mesh, joints, camera, torch.ones(PEOPLE, 1), other)
    assert wrong["keypoints_2d"] > 0.01 and wrong["keypoints_3d"] > 0.005


def test_without_a_pinhole_it_is_weak_perspective(model: MeshRecoveryModel) -> None:
    _, mesh, _, camera = photo("camera")
    by_hand = mesh[..., :2] * camera[:, None, None, :1] + camera[:, None, None, 1:]
    unknown = torch.zeros(PEOPLE, dtype=torch.bool)
    blank = torch.zeros(PEOPLE)
    torch.testing.assert_close(project_to_crop(mesh, camera, None, None, None), by_hand)
    for frame in ("camera", "crop"):
        torch.testing.assert_close(
            project_to_crop(mesh, camera, blank, torch.zeros(PEOPLE, 2), unknown, frame), by_hand
        )
    # A long focal length on the optical axis: the pinhole tends to weak perspective.
    far = project_to_crop(mesh, camera, torch.full((PEOPLE,), 1e4), torch.zeros(PEOPLE, 2), None)
    torch.testing.assert_close(far, by_hand, atol=2e-3, rtol=0)


def test_means_by_hand() -> None:
    error = torch.tensor([[[0.2, 0.4]], [[1.0, 3.0]], [[9.0, float("nan")]]])  # (3, 1, 2)
    confidence = torch.tensor([[1.0, 1.0], [0.5, 0.0], [0.0, 0.0]])
    assert labelled_mean(error, confidence, torch.ones(3, 1)).item() == pytest.approx((0.3 + 1.0) / 2)
    assert labelled_mean(error, confidence, torch.tensor([[1.0], [2.0], [5.0]])).item() == pytest.approx(2.3 / 2)
    assert labelled_mean(error[2:], confidence[2:], torch.ones(1, 1)).item() == 0
    small = labelled_mean(error[:1], 0.01 * confidence[:1], torch.ones(1, 1)).item()
    assert small == pytest.approx(0.3)  # independent of the confidence of the only label


def test_labels_that_are_moved_by_hand(model: MeshRecoveryModel) -> None:
    sample, mesh, joints, camera = photo("camera")
    keypoints = the_map(model)
    assert sample.joints_2d is not None and sample.keypoints_3d is not None
    moved = dataclasses.replace(sample, joints_2d=sample.joints_2d + torch.tensor([0.1, -0.3]))
    terms = keypoint_terms(BOTH, moved, keypoints, mesh, joints, camera, torch.ones(PEOPLE, 1))
    assert terms["keypoints_2d"].item() == pytest.approx(0.4, abs=1e-4)
    # Invariant to the pelvis definition; an error of the nose is that of one keypoint.
    moved = dataclasses.replace(sample, keypoints_3d=sample.keypoints_3d + torch.tensor([0.0, 0.05, 0.02]))
    terms = keypoint_terms(BOTH, moved, keypoints, mesh, joints, camera, torch.ones(PEOPLE, 1))
    assert terms["keypoints_3d"] < 1e-5
    labels = sample.keypoints_3d.clone()
    labels[:, 0] += 0.3
    moved = dataclasses.replace(sample, keypoints_3d=labels)
    terms = keypoint_terms(BOTH, moved, keypoints, mesh, joints, camera, torch.ones(PEOPLE, 1), unit=0.3)
    assert terms["keypoints_3d"].item() == pytest.approx(1 / (26 + len(keypoints.joints)), abs=1e-4)


def test_both_the_mesh_and_the_joints_are_compared_each_label_by_its_confidence(model: MeshRecoveryModel) -> None:
    sample, mesh, joints, camera = photo("camera")
    keypoints, ones = the_map(model), torch.ones(PEOPLE, 1)
    assert sample.joints_2d is not None
    # Only the predicted joints are off: each is compared with the label of its name.
    off = joints + torch.tensor([0.0, 0.1, 0.0])
    terms = keypoint_terms(BOTH, sample, keypoints, mesh, off, camera, ones)
    share = len(keypoints.joints) / (26 + len(keypoints.joints))
    assert terms["keypoints_3d"].item() == pytest.approx(share * 0.1 / 3, rel=1e-3)
    assert terms["keypoints_2d"] > 0.01
    # The nose's label is off by 1: with confidence 0 it does not count, with 0.5 half.
    assert 0 not in keypoints.places
    labels = sample.joints_2d.clone()
    labels[:, 0, 0] += 1.0
    found = []
    for confidence in (0.0, 0.5, 1.0):
        sure = torch.ones(PEOPLE, 26)
        sure[:, 0] = confidence
        moved = dataclasses.replace(sample, joints_2d=labels, joints_2d_confidence=sure)
        found.append(keypoint_terms(BOTH, moved, keypoints, mesh, joints, camera, ones)["keypoints_2d"].item())
    others = 25 + len(keypoints.joints)
    assert found == pytest.approx([0, 0.5 / (others + 0.5), 1 / (others + 1)], abs=1e-4)


def test_joints_that_are_keypoints(model: MeshRecoveryModel) -> None:
    """By name, and only if the two coincide on the body: the hips here are 2.7 cm apart."""
    body, keypoints = free_body()[0], the_map(model)
    assert body.keypoint_names is not None
    names = [body.joint_names[number] for number in keypoints.joints]
    assert names == [body.keypoint_names[number] for number in keypoints.places]
    assert {"left_wrist", "right_ankle"} <= set(names) and "left_hip" not in names
    assert [body.keypoint_names[number] for number in keypoints.root] == ["left_hip", "right_hip"]


def test_terms_are_weighted_and_tell_how_many_have_labels(model: MeshRecoveryModel) -> None:
    sample, mesh, joints, camera = photo("camera")
    assert sample.joints_2d is not None and sample.keypoints_3d is not None
    confidence, known = torch.ones(PEOPLE, 26), torch.ones(PEOPLE, 26, dtype=torch.bool)
    confidence[0], known[:2] = 0, False
    sample = dataclasses.replace(sample, joints_2d_confidence=confidence, has_keypoints_3d=known)
    shares: dict[str, Tensor] = {}
    off = mesh + torch.linspace(0, 0.1, mesh.shape[2])[:, None]
    one, two = (
        keypoint_terms(config, sample, the_map(model), off, joints, camera, torch.ones(PEOPLE, 1), shares=shares)
        for config in (BOTH, LossConfig(keypoints_2d=2.0, keypoints_3d=5.0))
    )
    torch.testing.assert_close(two["keypoints_2d"], 2 * one["keypoints_2d"])
    torch.testing.assert_close(two["keypoints_3d"], 5 * one["keypoints_3d"])
    assert one["keypoints_2d"] > 1e-3 and one["keypoints_3d"] > 1e-3
    assert {name: share.item() for name, share in shares.items()} == {"keypoints_2d": 0.75, "keypoints_3d": 0.5}


def test_labels_without_hips_are_compared_where_they_are(model: MeshRecoveryModel) -> None:
    """Without both hips the labels' own origin counts: a mesh that is moved as a whole is off."""
    sample, mesh, joints, camera = photo("camera")
    keypoints, ones, shift = the_map(model), torch.ones(PEOPLE, 1), torch.tensor([0.0, 0.0, 0.3])
    assert sample.has_keypoints_3d is not None
    known = sample.has_keypoints_3d.clone()
    for hips, expected in ((keypoints.root, 0.1), (keypoints.root[:1], 0.1), (keypoints.root[:0], 0.0)):
        known[:] = True
        known[:, hips] = False
        unrooted = dataclasses.replace(sample, has_keypoints_3d=known)
        terms = keypoint_terms(BOTH, unrooted.zero_unlabelled(), keypoints, mesh + shift, joints + shift, camera, ones)
        assert terms["keypoints_3d"].item() == pytest.approx(expected, abs=1e-4)


def test_no_point_is_projected_from_behind_the_camera() -> None:
    """Points nearer than 0.1 m are moved there, and a scale that is not positive is a far camera."""
    points = torch.tensor([0.2, 0.1, -9.0]).expand(1, 1, 1, 3)
    camera, focal, centre = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([2.0]), torch.zeros(1, 2)
    seen = project_to_crop(points, camera, focal, centre, None)
    torch.testing.assert_close(seen.flatten(), torch.tensor([2 * 0.2 / 0.1, 2 * 0.1 / 0.1]))
    for scale in (0.0, -1.0):
        camera = torch.tensor([[scale, 0.3, -0.2]])
        seen = project_to_crop(points, camera, focal, centre, None)
        torch.testing.assert_close(seen.flatten(), torch.tensor([0.3, -0.2]), atol=1e-3, rtol=0)


# -- in a training step ------------------------------------------------------------------------------------------------


def flat(sample: Sample, three: bool = False, nothing: bool = False) -> Sample:
    """Samples of a data set with 2D keypoints or 3D joints only: no mesh, body joints or camera."""
    count = len(sample)
    no = torch.zeros(count, dtype=torch.bool)
    confidence, has_3d = torch.zeros(count, 26), torch.zeros(count, 26, dtype=torch.bool)
    if three:
        has_3d[:, 5:17] = True
    elif not nothing:
        confidence[:, 5:17] = 0.7
    return dataclasses.replace(
        sample,
        has_vertices=no,
        has_joints_3d=no,
        has_camera=no,
        has_perspective=no,
        joints_2d_confidence=confidence,
        has_keypoints_3d=has_3d,
        visible_fraction=None,
        occlusion=None,
        silhouette=None,
        depth=None,
    )


def gradient_of_the_mesh(
    sample: Sample, config: LossConfig, *overrides: str, step: int = 199
) -> tuple[dict[str, Tensor], Tensor]:
    """Terms, and the gradient at the layer from tokens to vertices."""
    model = make_model(*overrides)
    scheduler = build_scheduler(small_config("unused", *overrides))
    generator = torch.Generator().manual_seed(2)
    steps, noise = (
        torch.full((len(sample), 2), step),
        torch.randn(len(sample), 2, model.num_points, 3, generator=generator),
    )
    terms = training_losses(
        model, scheduler, config, sample, Draws(steps, noise), None, keypoint_map(config, model, free_body()[0])
    )
    terms["loss"].backward()
    gradient = model.denoisers[0].to_patch.weight.grad  # type: ignore[union-attr]
    return terms, torch.zeros(1) if gradient is None else gradient


@pytest.mark.parametrize("mode", ["direct", "diffusion"])
@pytest.mark.parametrize("three", [False, True], ids=["2D", "3D"])
def test_people_with_keypoints_alone_teach_the_mesh(mode: str, three: bool) -> None:
    sample = flat(people_block(), three)
    _, without = gradient_of_the_mesh(sample, LossConfig(), f"model.mode={mode}")
    assert (without == 0).all()  # as it was before there were these terms
    terms, gradient = gradient_of_the_mesh(sample, BOTH, f"model.mode={mode}")
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-4
    assert (terms["keypoints_3d"] > 0) == three and (terms["keypoints_2d"] > 0) == (not three)
    _, nothing = gradient_of_the_mesh(flat(people_block(), nothing=True), BOTH, f"model.mode={mode}")
    assert (nothing == 0).all()


def test_people_without_labels_change_neither_term() -> None:
    labelled, unlabelled = flat(people_block()), flat(people_block(), nothing=True)
    some = labelled.map(lambda tensor: tensor[:3])
    half = dataclasses.replace(
        unlabelled,
        joints_2d_confidence=torch.cat([some.joints_2d_confidence, unlabelled.joints_2d_confidence[3:]]),  # type: ignore
    )
    model = make_model("model.mode=direct")
    scheduler, keypoints = build_scheduler(small_config()), the_map(model)

    def term(sample: Sample) -> Tensor:
        draws = Draws(torch.zeros(len(sample), 1).long(), torch.zeros(len(sample), 1, model.num_points, 3))
        return training_losses(model, scheduler, BOTH, sample, draws, None, keypoints)["keypoints_2d"]

    torch.testing.assert_close(term(half), term(some))


@pytest.mark.slow
def test_garbage_where_nothing_is_labelled() -> None:
    sample = flat(people_block())
    names = ("focal", "principal_point", "pelvis", "keypoints_3d", "coarse_vertices", "joints_3d", "camera")
    wild = {name: torch.full_like(getattr(sample, name), float("nan")) for name in names}
    points = sample.joints_2d.clone()  # type: ignore[union-attr]
    points[sample.joints_2d_confidence == 0] = float("inf")
    for frame in ("camera", "crop"):
        overrides = ("model.mode=direct", f"model.frame={frame}")
        plain, gradient = gradient_of_the_mesh(sample, BOTH, *overrides)
        other, changed = gradient_of_the_mesh(dataclasses.replace(sample, **wild, joints_2d=points), BOTH, *overrides)
        assert torch.equal(plain["loss"], other["loss"]) and torch.equal(gradient, changed)


def test_noise_that_is_predicted_says_nothing_at_the_last_step() -> None:
    """There x̂_0 divides by nearly 0: unweighted, its error would be a thousand half-sides."""
    overrides = "diffusion.prediction_type=epsilon"
    last, gradient = gradient_of_the_mesh(flat(people_block()), BOTH, overrides)
    early, _ = gradient_of_the_mesh(people_block(), BOTH, overrides, step=20)
    assert last["keypoints_2d"] < 0.5 and gradient.isfinite().all()
    assert early["keypoints_2d"] > 0.01


def test_noise_levels_weigh_as_in_the_point_loss() -> None:
    """The weight at high SNR is gamma times that at the terminal step."""
    model, sample = make_model(), people_block()
    scheduler = build_scheduler(small_config())

    def term(weighting: str) -> Tensor:
        config = dataclasses.replace(BOTH, weighting=weighting, gamma=3.0)
        draws = Draws(torch.zeros(8, 1).long(), torch.zeros(8, 1, model.num_points, 3))
        return training_losses(model, scheduler, config, sample, draws, None, the_map(model))["keypoints_3d"]

    torch.testing.assert_close(term("truncated_snr"), 3 * term("uniform"))


@pytest.mark.slow
def test_off_is_as_if_absent() -> None:
    """With and without the keypoint map, bit-identical losses."""
    terms, gradient = gradient_of_the_mesh(people_block(), LossConfig())
    assert set(terms) == {"points", "camera", "loss"}
    again, same = gradient_of_the_mesh(people_block(), LossConfig(keypoints_2d=0.0, keypoints_3d=0.0))
    assert torch.equal(terms["loss"], again["loss"]) and torch.equal(gradient, same)
    more, _ = gradient_of_the_mesh(people_block(), BOTH)
    assert torch.equal(more["points"], terms["points"])
    torch.testing.assert_close(more["loss"], terms["loss"] + more["keypoints_2d"] + more["keypoints_3d"])


def test_vertices_and_joints_apart() -> None:
    """D2A-HMR's λ_v L_v + λ_3D L_3D: two means with two weights; both 0: one mean over all points."""
    together, _ = gradient_of_the_mesh(people_block(), LossConfig(camera=0))
    apart, _ = gradient_of_the_mesh(people_block(), LossConfig(camera=0, vertices=1.0, joints_3d=1.0))
    assert set(apart) == {"vertices", "joints_3d", "loss"}
    model = make_model()
    vertices, joints = model.config.num_coarse, model.config.num_joints
    mean = (vertices * apart["vertices"] + joints * apart["joints_3d"]) / (vertices + joints)
    torch.testing.assert_close(mean, together["points"])
    weighted, _ = gradient_of_the_mesh(people_block(), LossConfig(camera=0, vertices=2.0, joints_3d=0.5))
    torch.testing.assert_close(weighted["vertices"], 2 * apart["vertices"])
    torch.testing.assert_close(weighted["joints_3d"], 0.5 * apart["joints_3d"])
    one = torch.tensor([True] + [False] * 7)
    some = dataclasses.replace(people_block(), has_joints_3d=one, has_vertices=~one)
    alone, _ = gradient_of_the_mesh(some, LossConfig(camera=0, vertices=1.0))
    assert alone["vertices"] > 0 and "joints_3d" not in alone
