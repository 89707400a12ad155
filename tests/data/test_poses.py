"""Pose samplers: anatomy on known poses, the prior against an oracle, determinism, limits, collisions."""

import json
import math

import numpy as np
import pytest
import torch

from hmdiff.body import anatomy
from hmdiff.body.body import load_body
from hmdiff.body.skeletons import SMPL24, SMPL24_PARENTS, mirror_permutation
from hmdiff.data.synthetic import collision
from hmdiff.data.synthetic.limit_sampler import JointLimitSampler
from hmdiff.data.synthetic.pose_prior import PosePrior, mirror_features, pose_features
from hmdiff.data.synthetic.poses import PoseMixture, joint_limit_violation, mirror_pose, sample_orientation
from hmdiff.data.synthetic.postures import PostureSampler
from hmdiff.errors import UserError
from hmdiff.files.resources import asset_path
from tools.build.intersection import self_intersection
from tools.build.poses import CREDIT, fit_mixture, write_prior

INDEX = {name: number for number, name in enumerate(SMPL24)}
MIRRORED = torch.tensor([-1.0, 1.0, 1.0])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pose(**degrees: tuple[float, float, float]) -> torch.Tensor:  # (1, 24, 3, 3)
    angles = torch.zeros(1, 24, 3, dtype=torch.float64)
    for joint, values in degrees.items():
        angles[0, INDEX[joint]] = torch.deg2rad(torch.tensor(values, dtype=torch.float64))
    return anatomy.angles_to_rotations(angles)


def bone(rotations: torch.Tensor, start: str, end: str) -> torch.Tensor:  # (3,) unit length
    joints, _ = collision.forward_kinematics(rotations)
    return torch.nn.functional.normalize(joints[0, INDEX[end]] - joints[0, INDEX[start]], dim=-1)


@pytest.fixture(scope="module")
def prior() -> PosePrior:
    return PosePrior.load()


@pytest.fixture(scope="module")
def small_prior() -> PosePrior:
    generator = seeded(5)
    factors = 0.2 * torch.eye(63) + 0.03 * torch.randn(3, 63, 63, generator=generator).tril(-1)
    return PosePrior(torch.tensor([0.2, 0.3, 0.5]), 0.2 * torch.randn(3, 63, generator=generator), factors)


# ------------------------------------------------------------------------------------------------ anatomy


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_angles_round_trip(batch):
    angles = 0.9 * (2 * torch.rand(batch, 24, 3, dtype=torch.float64, generator=seeded()) - 1)
    angles[:, 0] = 0
    rotations = anatomy.angles_to_rotations(angles)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).double().expand_as(rotations))
    torch.testing.assert_close(anatomy.rotations_to_angles(rotations), angles)


@pytest.mark.parametrize(
    ("joint", "degrees", "start", "end", "direction"),
    [
        ("left_knee", (90, 0, 0), "left_knee", "left_ankle", (0, 0, -1)),  # the shank moves back
        ("right_hip", (-90, 0, 0), "right_hip", "right_knee", (0, 0, 1)),  # the thigh moves forwards
        ("left_hip", (0, 90, 0), "left_hip", "left_knee", (1, 0, 0)),  # outwards
        ("right_hip", (0, 90, 0), "right_hip", "right_knee", (-1, 0, 0)),
        ("left_elbow", (90, 0, 0), "left_elbow", "left_wrist", (0, 0, 1)),  # forearms fold forwards
        ("right_elbow", (90, 0, 0), "right_elbow", "right_wrist", (0, 0, 1)),
        ("left_shoulder", (0, 90, 0), "left_shoulder", "left_elbow", (0, 1, 0)),  # arms up
        ("right_shoulder", (0, -90, 0), "right_shoulder", "right_elbow", (0, -1, 0)),  # hanging
        ("right_shoulder", (90, 0, 0), "right_shoulder", "right_elbow", (0, 0, 1)),  # in front
    ],
)
def test_angles_mean_what_they_are_called(joint, degrees, start, end, direction):
    torch.testing.assert_close(
        bone(pose(**{joint: degrees}), start, end), torch.tensor(direction).double(), atol=2e-2, rtol=0
    )


def test_mirror_is_an_involution_and_mirrors_the_joints():
    rotations = anatomy.angles_to_rotations(torch.randn(5, 24, 3, generator=seeded()))
    mirrored = mirror_pose(rotations)
    torch.testing.assert_close(mirror_pose(mirrored), rotations)
    joints, _ = collision.forward_kinematics(rotations)
    expected = joints[:, mirror_permutation(SMPL24)] * MIRRORED
    torch.testing.assert_close(collision.forward_kinematics(mirrored)[0], expected)
    assert (mirrored - rotations).abs().max() > 0.1
    torch.testing.assert_close(pose_features(mirrored), mirror_features(pose_features(rotations)), atol=1e-4, rtol=0)


def test_violation_is_in_degrees_beyond_the_limit():
    assert joint_limit_violation(torch.eye(3).expand(2, 24, 3, 3)).tolist() == [0, 0]
    assert joint_limit_violation(pose(left_knee=(200, 0, 0))).item() == pytest.approx(200 - 155, abs=1e-3)
    assert joint_limit_violation(pose(right_knee=(-25, 0, 0))).item() == pytest.approx(25 - 5, abs=1e-3)
    assert joint_limit_violation(pose(left_elbow=(-30, 0, 0))).item() == pytest.approx(30 - 6, abs=1e-3)
    # An arm pointing straight back at shoulder level: 90 degrees, 50 beyond the limit of 40.
    assert joint_limit_violation(pose(left_shoulder=(-90, 0, -70))).item() == pytest.approx(50, abs=1e-3)
    both = torch.cat([pose(left_knee=(200, 0, 0)), pose(left_knee=(60, 0, 0))])
    assert joint_limit_violation(both).tolist() == pytest.approx([45, 0], abs=1e-3)


def test_clamped_angles_violate_nothing_but_the_reach_of_arms():
    angles = 6 * torch.rand(200, 24, 3, dtype=torch.float64, generator=seeded()) - 3
    rotations = anatomy.angles_to_rotations(anatomy.clamp_angles(angles))
    excess = anatomy.limit_excess(anatomy.rotations_to_angles(rotations))
    others = [number for name, number in INDEX.items() if "shoulder" not in name]
    assert excess[:, others].max() < 1e-6
    # Reach computed without angles equals the shoulders' remaining excess.
    torch.testing.assert_close(anatomy.reach_excess(rotations), excess.sum(-1), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- collisions


def test_kinematics_equal_a_plain_loop():
    rotations = anatomy.angles_to_rotations(torch.randn(3, 24, 3, generator=seeded()))
    world, joints = [rotations[:, 0]], [torch.zeros(3, 3)]
    for joint, parent in list(enumerate(SMPL24_PARENTS))[1:]:
        joints.append(joints[parent] + world[parent] @ collision.OFFSETS[joint])
        world.append(world[parent] @ rotations[:, joint])
    found = collision.forward_kinematics(rotations)
    torch.testing.assert_close(found[0], torch.stack(joints, 1))
    torch.testing.assert_close(found[1], torch.stack(world, 1))


def test_segment_distance_equals_a_search():
    points = torch.randn(4, 30, 3, generator=seeded(), dtype=torch.float64)
    steps = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    first = points[0][:, None] + steps * (points[1] - points[0])[:, None]
    second = points[2][:, None] + steps * (points[3] - points[2])[:, None]
    searched = torch.cdist(first, second).flatten(1).amin(-1)
    torch.testing.assert_close(collision.segment_distance(*points), searched, atol=0.02, rtol=0)


def test_blocked_poses_are_found_and_free_ones_are_not():
    assert collision.capsule_penetration(pose()).item() == 0
    crossed = pose(left_hip=(0, -35, 0), right_hip=(0, -35, 0))
    assert collision.capsule_penetration(crossed).item() > 0.05
    through_the_belly = pose(left_shoulder=(0, -85, 85), left_elbow=(85, 0, 0))
    assert collision.capsule_penetration(through_the_belly).item() > 0.05
    hanging = pose(left_shoulder=(0, -78, -10), right_shoulder=(0, -78, -10))
    assert collision.capsule_penetration(hanging).item() == 0
    turned = pose()
    turned[:, 0] = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    assert collision.capsule_penetration(turned).item() == 0


# ------------------------------------------------------------------------------------------------- prior


def test_log_prob_equals_torch_distributions(small_prior):
    rotations = anatomy.angles_to_rotations(0.3 * torch.randn(6, 24, 3, generator=seeded()))
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(small_prior.weights),
        torch.distributions.MultivariateNormal(small_prior.means, scale_tril=small_prior.factors),
    )
    features = pose_features(rotations)
    both = torch.stack([mixture.log_prob(features), mixture.log_prob(mirror_features(features))])
    expected = both.logsumexp(0) - math.log(2)
    torch.testing.assert_close(small_prior.log_prob(rotations), expected, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(small_prior.log_prob(mirror_pose(rotations)), expected, atol=1e-2, rtol=1e-4)
    # Independent of the root and of the rest of the batch.
    turned = rotations[2:3].clone()
    turned[:, 0] = torch.eye(3).roll(1, 0)
    torch.testing.assert_close(small_prior.log_prob(turned), expected[2:3], atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", ["pose_prior.npz", "pose_prior_train.npz"])
def test_shipped_priors_are_small_credited_and_prefer_people(name: str) -> None:
    path = asset_path(name)
    prior = PosePrior.load(path)
    assert path.stat().st_size < 400_000
    assert prior.metadata["credit"] == CREDIT
    assert CREDIT in " ".join(asset_path("NOTICE").read_text().split())
    standing = pose(left_shoulder=(0, -75, -10), right_shoulder=(0, -75, -10)).float()
    contorted = pose(left_hip=(-120, 0, 0), left_knee=(5, 0, 0), right_hip=(30, 0, 0), spine1=(-20, 0, 0)).float()
    assert prior.log_prob(standing) > 0 > prior.log_prob(contorted)


def test_prior_survives_saving(small_prior, tmp_path):
    write_prior(tmp_path / "prior.npz", small_prior, {"credit": CREDIT})
    loaded = PosePrior.load(tmp_path / "prior.npz")
    torch.testing.assert_close(loaded.means, small_prior.means)
    torch.testing.assert_close(loaded.factors, small_prior.factors, atol=1e-3, rtol=1e-3)
    assert loaded.metadata == {"credit": CREDIT}


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz"):
        PosePrior.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match="not a pose prior"):
        PosePrior.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", weights=np.ones(2), metadata=np.array(json.dumps({})))
    with pytest.raises(UserError, match="not a pose prior"):
        PosePrior.load(tmp_path / "other.npz")


def test_fit_finds_a_mixture_again(small_prior):
    drawn = small_prior.means[0] + (small_prior.factors[0] @ torch.randn(400, 63, 1, generator=seeded()))[..., 0]
    fitted = fit_mixture(drawn, components=1, iterations=12)
    # A component and its mirror image are equivalent: the mean must match one of them.
    gap = torch.stack([(fitted.means[0] - m).norm() for m in (drawn.mean(0), mirror_features(drawn.mean(0)))])
    assert gap.min() < 0.1 * gap.max()
    again = fit_mixture(drawn, components=1, iterations=12)
    assert torch.equal(again.factors, fitted.factors)


# ---------------------------------------------------------------------------------------------- samplers

SAMPLERS = {
    "prior": lambda n, g: PosePrior.load().sample(n, g),
    "limits": lambda n, g: JointLimitSampler().sample(n, g),
    "mixture": lambda n, g: PoseMixture().sample(n, g),
    "tail": lambda n, g: PoseMixture().sample(n, g, tail=True),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_people(name):
    rotations = SAMPLERS[name](256, seeded(1))
    assert rotations.shape == (256, 24, 3, 3)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotations[:, 0], torch.eye(3).expand(256, 3, 3))
    assert (joint_limit_violation(rotations) > 0).float().mean() < 0.01
    assert (collision.capsule_penetration(rotations) > 0.02).float().mean() < 0.03
    assert rotations.std(0)[1:20].amax((1, 2)).min() > 0.01  # every joint moves


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_depend_on_the_seed_alone(name):
    draw = SAMPLERS[name]
    first = draw(8, seeded(3))
    torch.manual_seed(99)  # the global generator has no effect
    assert torch.equal(draw(8, seeded(3)), first)
    assert not torch.equal(draw(8, seeded(4)), first)
    # A fixed number of draws: the generator's final state does not depend on rejections.
    used, fresh = seeded(3), seeded(3)
    draw(8, used)
    draw(8, fresh)
    assert torch.equal(torch.rand(3, generator=used), torch.rand(3, generator=fresh))
    assert draw(1, seeded(0)).shape == (1, 24, 3, 3)


def test_spread_widens_the_prior(prior):
    narrow, wide = (prior.sample(200, seeded(0), spread)[:, 1:22] for spread in (0.3, 1.0))
    assert narrow.std(0).mean() < wide.std(0).mean()


def test_tail_is_far_from_the_prior(prior):
    mixture = PoseMixture(prior=prior)
    tail = prior.log_prob(mixture.sample(200, seeded(0), tail=True))
    usual = prior.log_prob(prior.sample(200, seeded(0)))
    assert tail.quantile(0.99) < usual.quantile(0.01)


def test_shares_choose_the_source(prior):
    only_prior = prior.log_prob(PoseMixture(1, 0, 0, prior).sample(200, seeded(0)))
    only_limits = prior.log_prob(PoseMixture(0, 1, 0, prior).sample(200, seeded(0)))
    blends = prior.log_prob(PoseMixture(0, 0, 1, prior).sample(200, seeded(0)))
    assert only_prior.median() > blends.median() > only_limits.median()
    for shares in ((-1, 1, 1), (0, 0, 0), (math.nan, 0, 1)):
        with pytest.raises(UserError, match="shares"):
            PoseMixture(*shares, prior=prior)


def test_orientations_stand_up_in_the_camera_and_tail_ones_do_not():
    usual, tail = sample_orientation(2000, seeded(0)), sample_orientation(2000, seeded(0), tail=True)
    for rotations in (usual, tail):
        torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(2000), atol=1e-5, rtol=0)
        torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0)
    upright, upright_tail = -usual[:, 1, 1], -tail[:, 1, 1]  # cosine between the body's axis and the photo's up
    assert (upright > 0.5).float().mean() > 0.95 and upright.min() > -0.2
    assert (upright_tail < 0).float().mean() > 0.2
    facing = -usual[:, 2, 2]  # 1: facing the camera
    assert (facing > 0.7).float().mean() > 1.5 * (facing < -0.7).float().mean() > 0.1
    assert torch.equal(sample_orientation(5, seeded(1)), sample_orientation(5, seeded(1)))


# ------------------------------------------------------------------------------------- mesh self-intersection


def test_self_intersection_is_none_at_rest_and_grows_with_a_limb_inside_another():
    body = load_body("free")
    rest, arm_in_belly = pose().float(), pose(left_shoulder=(0, -85, 85), left_elbow=(85, 0, 0)).float()
    shares = self_intersection(body, torch.cat([rest, arm_in_belly]), stride=20)
    assert shares[0] == 0
    assert 0.02 < shares[1] < 0.3


def test_postures_are_people_inside_their_limits() -> None:
    poses, tilt = PostureSampler().sample(512, torch.Generator().manual_seed(0))
    assert poses.shape == (512, 24, 3, 3) and tilt.shape == (512, 3, 3)
    assert anatomy.joint_limit_violation(poses).quantile(0.98) < 1
    assert (collision.capsule_penetration(poses) > 0.02).float().mean() < 0.1
    torch.testing.assert_close(tilt @ tilt.mT, torch.eye(3).expand_as(tilt), atol=1e-5, rtol=0)
    # The tilt's second column is up: level for lying people, and more than a quarter of the people lie or crawl.
    level = tilt[:, 1, 1].abs() < 0.4
    assert 0.2 < level.float().mean() < 0.5
    again = PostureSampler().sample(512, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], poses) and torch.equal(again[1], tilt)


def test_wide_orientations_roll_and_look_from_everywhere() -> None:
    def up(**options: bool) -> torch.Tensor:  # the body's up direction in the camera frame
        return sample_orientation(4000, torch.Generator().manual_seed(0), **options)[:, :, 1]

    narrow, wide = up(), up(wide=True)
    assert (narrow[:, 1] > 0).float().mean() < 0.01  # nobody upside down
    assert 0.02 < (wide[:, 1] > 0).float().mean() < 0.2
    assert (wide[:, 2].abs() > 0.8).float().mean() > 2 * (narrow[:, 2].abs() > 0.8).float().mean()
    leaning = torch.eye(3).expand(4000, 3, 3)
    upright = sample_orientation(4000, torch.Generator().manual_seed(0), leaning=leaning)
    assert upright[:, 1, 1].max() < -0.7
