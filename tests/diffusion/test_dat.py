"""DAT as a wrapper of the denoiser: off is bit-equal to absent, on lowers the gap, for every option."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from small import small_pipeline

from hmdiff.diffusion.dat import AlignedDenoiser, aligned_sample
from hmdiff.diffusion.gap import distribution_gap, make_target, project
from hmdiff.diffusion.guidance import PAPER, Guidance
from hmdiff.diffusion.sampling import hypothesis_generators, initial_noise
from hmdiff.diffusion.sampling import sample as reverse_diffusion
from hmdiff.diffusion.schedule import make_scheduler
from hmdiff.errors import UserError
from hmdiff.geometry import crop_rotation, fitted_projection, perspective_fit
from hmdiff.heatmaps import Crop, Heatmaps, gaussian_heatmaps
from hmdiff.pipeline.cameras import CropCamera
from hmdiff.pipeline.reverse import guidance_plan

JOINTS, POINTS = 12, 20
everywhere = functools.partial(Guidance, last=1.0)  # in every step
KINDS = ("sample", "epsilon", "v_prediction")


def toy(kind: str = "sample", people: int = 2, count: int = 3):
    """A toy denoiser, keypoints linear in the points, and a target that differs from the unguided result."""
    scheduler = make_scheduler("ddim", 50, prediction_type=kind)
    generator = torch.Generator().manual_seed(3)
    mesh = torch.randn(POINTS, 3, generator=generator)
    matrix = torch.eye(JOINTS, POINTS)
    basis = torch.linalg.qr(torch.randn(3 * POINTS, 12, generator=generator))[0]

    def denoise(points, step):
        # The form of an ideal denoiser: the mesh plus x_k projected to a subspace, scaled with the signal.
        share = scheduler.alphas_cumprod[(step * 50).round().long() - 1][:, None]
        seen = (points.flatten(1) - share.sqrt() * mesh.flatten()) @ basis @ basis.T
        clean = mesh.flatten() + share.sqrt() * seen
        clean = clean.unflatten(1, (-1, 3))
        alpha, sigma = share.sqrt()[..., None], (1 - share).sqrt()[..., None]
        if kind == "sample":
            return clean
        noise = (points - alpha * clean) / sigma
        return noise if kind == "epsilon" else alpha * noise - sigma * clean

    def keypoints(points):
        return 0.5 * matrix @ points

    moved = torch.randn(3 * POINTS, generator=generator) @ basis @ basis.T
    wanted = matrix @ (mesh + 0.8 * moved.unflatten(0, (-1, 3)))
    heatmaps = gaussian_heatmaps((0.5 * wanted[:, :2]).clamp(-0.9, 0.9), torch.ones(JOINTS), 2.0)
    heatmaps = heatmaps.expand(people, -1, -1, -1)

    def start():
        generators = hypothesis_generators(0, range(people), count)
        return initial_noise(generators, POINTS), generators

    camera = torch.tensor([[1.0, 0.0, 0.0]]).expand(people, -1)
    return scheduler, denoise, keypoints, heatmaps, camera, start


def without(denoise, scheduler, start, steps):
    """The same rows without guidance."""

    def unguided(rows):
        noise, generators = start()
        return reverse_diffusion(denoise, scheduler, noise[rows], steps, [generators[row] for row in rows])

    return unguided


def run(guidance, kind="sample", steps=8, people=2, count=3, start_count=None):
    scheduler, denoise, keypoints, heatmaps, camera, start = toy(kind, people, count)
    target = make_target(guidance, heatmaps, camera, hypothesis_generators(1, range(people), count))
    plain = without(denoise, scheduler, start, steps)
    return aligned_sample(denoise, scheduler, start(), steps, 0.0, keypoints, target, guidance, people, plain)


def unguided_gap(guidance, kind="sample", people=2, count=3, steps=8):
    """Final gap of the same hypotheses without guidance."""
    scheduler, denoise, keypoints, heatmaps, camera, start = toy(kind, people, count)
    target = make_target(guidance, heatmaps, camera, hypothesis_generators(1, range(people), count))
    noise, generators = start()
    points = reverse_diffusion(denoise, scheduler, noise, steps, generators)
    return AlignedDenoiser(denoise, scheduler, keypoints, target, guidance).gap(points).unflatten(0, (people, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"pairing": "mean"},
        {"gap": "likelihood"},
        {"gradient": "estimate"},
        {"projection": "camera"},
        {"step": "score", "strength": 2.0},
        {"threshold": 0.0},
    ],
)
def test_the_gap_falls(kind, choice):
    _, report = run(everywhere(**choice), kind)
    assert not report.fell_back.all()
    without = unguided_gap(everywhere(**choice), kind)
    assert ((report.gap_after < report.gap_before) | (report.gap_after <= without)).all()
    assert torch.equal(report.gap_after[report.fell_back], without[report.fell_back])
    if not choice:
        assert report.gap_after.mean() < 0.5 * report.gap_before.mean()
    assert report.active.shape == (8, 2)


def test_disrupted_guidance_is_worse_than_dat():
    _, dat = run(everywhere(pairing="mean"))
    _, disrupted = run(everywhere(pairing="mean", mode="disrupted"))
    assert dat.gap_after.mean() < disrupted.gap_after.mean()


def test_a_hypothesis_that_guidance_hurt_is_the_unguided_one():
    # A step of thirty times the residual overshoots.
    points, report = run(everywhere(strength=30.0, threshold=0.0))
    assert report.fell_back.any()
    scheduler, denoise, _, _, _, start = toy()
    noise, generators = start()
    plain = reverse_diffusion(denoise, scheduler, noise, 8, generators)
    back = report.fell_back.flatten()
    assert torch.equal(points[back], plain[back])
    without = unguided_gap(everywhere(strength=30.0, threshold=0.0))
    assert ((report.gap_after <= without) | (report.gap_after <= report.gap_before)).all()


def test_guidance_stops_when_the_gap_has_closed():
    _, early = run(everywhere(threshold=0.5))
    _, late = run(everywhere(threshold=0.0))
    assert early.active[-1].max() == 0 and early.active[1].min() == 1
    assert early.active[0].max() == 0  # no signal at the terminal step
    assert late.active.sum() > early.active.sum()


def test_the_paper_guides_the_first_step_too():
    _, report = run(everywhere(first=True))
    assert report.active[0].min() == 1  # the default skips this step, see above
    scheduler, denoise, keypoints, heatmaps, camera, start = toy()
    noise, generators = start()
    target = make_target(everywhere(), heatmaps, camera, generators)
    step = torch.ones(len(noise))
    plain = denoise(noise, step)
    for guidance, moved in ((everywhere(), False), (everywhere(first=True), True)):
        found = AlignedDenoiser(denoise, scheduler, keypoints, target, guidance)(noise, step)
        assert torch.equal(found, plain) is not moved


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_papers_formula(kind):
    """ĝ = eps + s sqrt(1 - alpha_bar) grad_{x_k} D_k, through the denoiser; against an independent derivation."""
    scheduler, denoise, keypoints, heatmaps, camera, start = toy(kind)
    noise, generators = start()
    guidance = everywhere(step="gradient", strength=0.7, projection="camera", pairing="paired")
    target = make_target(guidance, heatmaps, camera, generators)
    step = torch.full((len(noise),), 0.4)
    share = scheduler.alphas_cumprod[19]
    alpha, sigma = share.sqrt(), (1 - share).sqrt()

    def eps_of(prediction, points):
        if kind == "epsilon":
            return prediction
        return (points - alpha * prediction) / sigma if kind == "sample" else alpha * prediction + sigma * points

    points = noise.clone().requires_grad_()
    eps = eps_of(denoise(points, step), points)
    seen = keypoints((points - sigma * eps) / alpha)[..., :2] * camera[0, 0] + camera[0, 1:]
    gap = (target.weight * (seen - target.points).square().sum(-1)).sum()
    (gradient,) = torch.autograd.grad(gap, points)
    expected = eps.detach() + 0.7 * sigma * gradient
    found = AlignedDenoiser(denoise, scheduler, keypoints, target, guidance)(noise, step)
    torch.testing.assert_close(eps_of(found, noise), expected, rtol=1e-3, atol=1e-5)
    assert (expected - eps.detach()).abs().max() > 1e-4


def test_disrupted_takes_its_length_at_x_k_too(monkeypatch):
    """The line search starts at x_k, not at x̂_0."""
    places = []
    line = AlignedDenoiser._line
    monkeypatch.setattr(AlignedDenoiser, "_line", lambda self, at, way: places.append(at) or line(self, at, way))
    scheduler, denoise, keypoints, heatmaps, camera, start = toy()
    noise, generators = start()
    step = torch.full((len(noise),), 0.6)
    for mode, place in (("disrupted", noise), ("dat", denoise(noise, step))):
        target = make_target(everywhere(mode=mode), heatmaps, camera, generators)
        AlignedDenoiser(denoise, scheduler, keypoints, target, everywhere(mode=mode))(noise, step)
        assert torch.equal(places.pop(), place)


def test_the_floor_is_what_the_draws_are_off():
    """If the keypoints are at the mean of U, D equals the floor: the relative gap is 0, and DAT is off."""
    scheduler, denoise, _, heatmaps, camera, start = toy(people=2, count=40)
    _, generators = start()
    guidance = dataclasses.replace(PAPER, projection="camera")
    target = make_target(guidance, heatmaps, camera, generators)
    mean = make_target(dataclasses.replace(guidance, pairing="mean"), heatmaps, camera, generators)
    torch.testing.assert_close(distribution_gap(guidance, mean.points, target), target.floor)
    assert target.floor.std() > 1e-5 and (mean.floor == 0).all() and torch.equal(mean.variance, target.variance)
    torch.testing.assert_close(target.floor.mean(), target.variance.mean(), rtol=0.2, atol=0)
    aligned = AlignedDenoiser(denoise, scheduler, lambda points: points, target, guidance, 2)
    aligned._switch(target.floor + 0.01)
    assert aligned.on.all()
    aligned._switch(target.floor + 0.01 * guidance.threshold * 0.9)
    assert not aligned.on.any()


def test_the_paper_decides_by_image():
    """One gap over the hypotheses of an image: distant ones keep DAT on for near ones; images are independent."""
    scheduler, denoise, keypoints, heatmaps, camera, start = toy(people=2, count=4)
    _, generators = start()
    for decision, expected in (("image", [True] * 4 + [False] * 4), ("hypothesis", [False] * 3 + [True] + [False] * 4)):
        guidance = everywhere(decision=decision, threshold=0.3)
        target = make_target(guidance, heatmaps, camera, generators)
        aligned = AlignedDenoiser(denoise, scheduler, keypoints, target, guidance, 2)
        aligned._switch(torch.ones(8))
        aligned._switch(torch.tensor([0.2, 0.2, 0.2, 0.9] + [0.2] * 4))
        assert aligned.on.tolist() == expected


def test_the_papers_form_keeps_what_it_made():
    """No fall-back: a hypothesis that guidance made worse is kept."""
    guidance = everywhere(strength=30.0, threshold=0.0)
    points, report = run(guidance)
    kept, plain = run(dataclasses.replace(guidance, fall_back=False))
    assert report.fell_back.any() and not plain.fell_back.any()
    assert not torch.equal(points, kept)


def test_the_last_steps_alone_are_guided_where_that_is_asked_for():
    _, some = run(everywhere(last=0.26, threshold=0.0))
    assert (some.active[:-2] == 0).all() and (some.active[-2:] == 1).all()  # of 8: those at 0.25 and 0.125 of K
    _, every = run(everywhere(threshold=0.0))
    assert torch.allclose(some.gap_before, every.gap_before)
    assert some.gap_after.mean() < unguided_gap(everywhere()).mean()


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_the_last_step_is_guided_whatever_is_asked_for(steps):
    _, report = run(Guidance(last=0.01, threshold=0.0), steps=steps)
    assert (report.active[-1] == 1).all() and (report.active[:-1] == 0).all()
    assert run(PAPER, steps=steps)[1].active[0].min() == 1  # all steps, the first too


def test_one_row_does_not_depend_on_the_others():
    few, _ = run(everywhere(), count=2)
    many, _ = run(everywhere(), count=5)
    assert torch.allclose(few.unflatten(0, (2, 2)), many.unflatten(0, (2, 5))[:, :2], atol=1e-5)


def test_the_line_step_solves_a_linear_problem_in_one_go():
    """One unknown: s = 1 removes the gap that this direction can remove, s = 0.5 half of it."""
    scheduler, _, _, heatmaps, camera, _ = toy()
    clean = torch.zeros(6, POINTS, 3)

    def keypoints(points):  # all keypoints depend on one number
        return points[:, :1, :].expand(-1, JOINTS, -1)

    left = {}
    for strength in (0.5, 1.0):
        guidance = everywhere(pairing="mean", projection="camera", gradient="estimate", strength=strength)
        target = make_target(guidance, heatmaps, camera, hypothesis_generators(0, range(2), 3))
        aligned = AlignedDenoiser(lambda x, t: clean, scheduler, keypoints, target, guidance)
        moved = aligned(torch.zeros(6, POINTS, 3), torch.full((6,), 0.5))
        mean = (target.weight[..., None] * target.points).sum(1)
        left[strength] = (moved[:, 0, :2] - mean).norm(dim=-1) / mean.norm(dim=-1)
    assert left[1.0].max() < 1e-3
    assert torch.allclose(left[0.5], torch.tensor(0.5), atol=1e-3)


def test_joints_the_estimator_did_not_see_do_not_pull():
    guidance = everywhere()
    _, _, _, heatmaps, camera, _ = toy()
    heatmaps = heatmaps.clone()
    heatmaps[:, 3] = 0
    target = make_target(guidance, heatmaps, camera, hypothesis_generators(0, range(2), 1))
    assert (target.weight[:, 3] == 0).all() and torch.allclose(target.weight.sum(-1), torch.ones(2))
    places = torch.randn(2, JOINTS, 3).requires_grad_()
    gap = distribution_gap(guidance, project(guidance, places, target), target)
    (gradient,) = torch.autograd.grad(gap.sum(), places)
    assert (gradient[:, 3] == 0).all() and (gradient[:, 4] != 0).any()


@pytest.mark.parametrize("projection", ["fit", "camera"])
@pytest.mark.parametrize("gap", ["samples", "likelihood"])
def test_the_gap_is_differentiated_right(projection, gap):
    guidance = everywhere(projection=projection, gap=gap)
    _, _, _, heatmaps, camera, _ = toy()
    target = make_target(guidance, heatmaps.double(), camera.double(), hypothesis_generators(0, range(2), 1))
    target = dataclasses.replace(target, principal_point=torch.tensor([[0.4, -0.2]] * 2, dtype=torch.float64))
    # Near the target, where the likelihood has a gradient and does not switch to its far branch.
    near = target.points + 0.01 * torch.randn(target.points.shape, generator=torch.Generator().manual_seed(0))
    places = torch.cat([near.double(), 0.2 * torch.randn(2, JOINTS, 1).double()], -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distribution_gap(guidance, project(guidance, x, target), target), places)


def test_nothing_to_compare_with_is_no_guidance():
    scheduler, denoise, keypoints, heatmaps, camera, start = toy()
    empty = heatmaps.clone()
    empty[0] = 0
    guidance = everywhere()
    target = make_target(guidance, empty, camera, hypothesis_generators(1, range(2), 3))
    plain = without(denoise, scheduler, start, 8)
    points, report = aligned_sample(denoise, scheduler, start(), 8, 0.0, keypoints, target, guidance, 2, plain)
    noise, generators = start()
    plain = reverse_diffusion(denoise, scheduler, noise, 8, generators)
    assert torch.allclose(points[:3], plain[:3], atol=1e-6) and (report.active[:, 0] == 0).all()
    assert not torch.allclose(points[3:], plain[3:], atol=1e-3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"mode": "dats"}, "guidance mode 'dats'"),
        ({"gap": "kl"}, "guidance gap 'kl'"),
        ({"strength": -1.0}, "guidance strength -1.0"),
        ({"threshold": float("nan")}, "guidance threshold nan"),
        ({"last": 0.0}, "guidance last 0.0"),
        ({"last": 1.5}, "guidance last 1.5"),
        ({"joint_weights": (0.0, 0.0)}, "joint_weights"),
    ],
)
def test_a_wrong_choice_is_named(values, text):
    with pytest.raises(UserError, match=text):
        Guidance(**values)


def test_joint_weights_of_another_number_are_refused():
    _, _, _, heatmaps, camera, _ = toy()
    with pytest.raises(UserError, match="3 numbers for 12 keypoints"):
        make_target(everywhere(joint_weights=(1.0, 1.0, 1.0)), heatmaps, camera, hypothesis_generators(0, [0, 1], 1))


# -- the camera that is fitted ---------------------------------------------------------------------------------------


def test_the_perspective_fit_finds_the_pinhole_that_saw_the_points():
    generator = torch.Generator().manual_seed(0)
    points = 0.4 * torch.randn(5, 26, 3, generator=generator, dtype=torch.float64)
    place = torch.tensor([[0.3, -0.2, 3.0], [1.0, 0.5, 4.0], [-1.5, 0.0, 2.5], [0, 0, 8.0], [0.2, 0.9, 5.0]]).double()
    principal = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    focal = torch.tensor([3.0, 4.0, 2.5, 9.0, 5.0]).double()
    camera_points = points + place[:, None]
    seen = camera_points[..., :2] / camera_points[..., 2:] * focal[:, None, None] + principal[:, None]
    fitted = perspective_fit(points, seen, torch.ones(5, 26).double(), principal, prior_weight=1e-12)
    assert torch.allclose(fitted[:, 3], 1 / place[:, 2], atol=1e-4)
    assert torch.allclose(fitted_projection(points, fitted, principal), seen, atol=1e-4)


def test_the_crop_rotation_takes_the_axis_to_the_ray_through_the_crop():
    principal, focal = torch.tensor([[0.8, -0.5], [0.0, 0.0]]), torch.tensor([3.0, 4.0])
    rotation = crop_rotation(principal, focal)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(2), atol=1e-6)
    ray = rotation[:, :, 2]
    seen = ray[:, :2] / ray[:, 2:] * focal[:, None] + principal
    assert torch.allclose(seen, torch.zeros(2, 2), atol=1e-6)  # the crop's centre
    assert torch.allclose(rotation[1], torch.eye(3))
    unknown = crop_rotation(torch.zeros(1, 2), torch.zeros(1))
    assert torch.allclose(unknown, torch.eye(3)[None])


# -- in the pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


def people(count: int = 2) -> Heatmaps:
    generator = torch.Generator().manual_seed(1)
    points = 0.6 * torch.randn(count, 26, 2, generator=generator).clamp(-1, 1)
    values = gaussian_heatmaps(points, torch.ones(count, 26), 2.0)
    return Heatmaps(
        values,
        torch.ones(count, 26, dtype=torch.bool),
        Crop.of(torch.tensor([[200.0, 150.0]]).expand(count, -1).clone(), torch.full((count,), 180.0)),
    )


def test_strength_zero_and_mode_none_are_bit_identical_to_no_guidance(pipe):
    plain = pipe(heatmaps=people(), num_hypotheses=3, num_inference_steps=4)
    for guidance in (everywhere(strength=0.0), everywhere(mode="none")):
        same = pipe(heatmaps=people(), num_hypotheses=3, num_inference_steps=4, guidance=guidance)
        assert torch.equal(plain.vertices, same.vertices) and same.guidance is None


def test_guidance_in_the_pipeline_reports_and_does_not_depend_on_the_batch_or_the_chunks(pipe, monkeypatch):
    # Random keypoints have no upright pose; body fitting to an untrained network's mesh amplifies rounding.
    settings = {"num_hypotheses": 4, "num_inference_steps": 4, "guidance": everywhere(), "upright": False}
    settings["surface"] = "vertices"
    whole = pipe(heatmaps=people(3), **settings)
    assert whole.guidance is not None and whole.guidance.gap_after.shape == (3, 4)
    assert (whole.guidance.gap_after <= whole.guidance.gap_before).float().mean() > 0.5
    alone = pipe(heatmaps=people(3)[1], people=[1], **settings)
    assert torch.allclose(alone.vertices[0], whole.vertices[1], atol=1e-5)
    monkeypatch.setattr("hmdiff.pipeline.reverse.ROWS_AT_ONCE", 6)
    parts = pipe(heatmaps=people(3), **settings)
    assert torch.allclose(parts.vertices, whole.vertices, atol=1e-5)
    assert torch.allclose(parts.guidance.active, whole.guidance.active, atol=1e-6)


def test_guidance_without_heatmaps_is_refused(pipe):
    with pytest.raises(UserError, match="guidance needs heatmaps"):
        guidance_plan(pipe.model, pipe.body, everywhere(), None, torch.ones(1, 3), CropCamera.of(people(1).crop, False))


def test_a_model_of_the_crops_frame_turns_its_meshes_to_the_camera(pipe):
    before = dict(pipe.model.config)
    # Without body fitting or crop rotation: the body fitted to a random mesh does not rotate exactly with the mesh.
    maps, sizes = people(1), torch.tensor([[1000.0, 800.0]])
    settings = {"num_hypotheses": 2, "num_inference_steps": 2, "surface": "vertices", "upright": False}
    plain = pipe(heatmaps=maps, photo_sizes=sizes, **settings)
    try:
        pipe.model.register_to_config(**{**before, "frame": "crop"})
        turned = pipe(heatmaps=maps, photo_sizes=sizes, **settings)
    finally:
        pipe.model.register_to_config(**before)
    principal = maps.crop.from_photo(sizes[:, None] / 2)[:, 0]
    rotation = crop_rotation(principal, sizes.norm(dim=-1) * 2 / maps.side)
    assert torch.allclose(turned.vertices, plain.vertices @ rotation[:, None].mT, atol=1e-5)
    assert not torch.allclose(turned.vertices, plain.vertices, atol=1e-3)
