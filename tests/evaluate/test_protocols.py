"""Protocols: known values, invariances, the two orders of J14, and reports of several hypotheses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from hmdiff.body.skeletons import H36M14, H36M17, HAND21, J14, SMPL24, SPIN_H36M17, joint_indices
from hmdiff.errors import UserError
from hmdiff.evaluate.hand_metrics import curve_area, f_score
from hmdiff.evaluate.hypothesis_rows import COUNTS, cluster_representatives, score_hypotheses
from hmdiff.evaluate.metrics import (
    calibration_error,
    calibration_levels,
    expected_calibration_error,
    joint_error,
    procrustes_error,
)
from hmdiff.evaluate.protocol_errors import HIPS, Bodies, freihand_errors
from hmdiff.evaluate.protocols import MANY, PROTOCOLS, Protocol, get_protocol
from hmdiff.evaluate.published import PUBLISHED, published_rows
from hmdiff.geometry import axis_angle_to_matrix

WIDE = 40  # vertices of the toy mesh: more than joints


def curve_error(inside: torch.Tensor) -> float:  # (P, Q, J)
    frequency = inside.double().mean(0)
    return calibration_error(frequency, calibration_levels(frequency, len(frequency))).item()


def toy(protocol: Protocol, seed: int = 0, people: tuple[int, ...] = (3,)) -> tuple[Bodies, dict[str, Tensor]]:
    """Random meshes whose first vertices are the protocol's joints."""
    generator = torch.Generator().manual_seed(seed)
    vertices = torch.randn(*people, WIDE, 3, generator=generator, dtype=torch.float64)
    regressors = {
        name: torch.eye(24 if name == "body" else len(protocol.skeleton), WIDE, dtype=torch.float64)
        for name in protocol.needs_regressors()
    }
    return Bodies(vertices), regressors


def moved(bodies: Bodies, vertex: int | str, shift: Tensor | list[float], protocol: Protocol) -> Bodies:
    """One vertex, or the one that is a joint, moved by metres."""
    assert bodies.vertices is not None
    vertices = bodies.vertices.clone()
    place = protocol.skeleton.index(vertex) if isinstance(vertex, str) else vertex
    vertices[..., place, :] += torch.as_tensor(shift, dtype=vertices.dtype)
    return Bodies(vertices)


def rotation(seed: int = 0) -> Tensor:
    return axis_angle_to_matrix(torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def score(protocol: Protocol, predicted: Bodies, target: Bodies, regressors: dict[str, Tensor]) -> dict[str, float]:
    """Means over people, whose errors are equal here."""
    return {name: values.mean().item() for name, values in protocol.score(predicted, target, regressors).items()}


# -- statements ------------------------------------------------------------------------------------------------------


def test_every_protocol_says_what_it_is() -> None:
    assert {*PROTOCOLS, *MANY} == {
        "spin",
        "metro",
        "jotr",
        "humaniflow",
        "emdb",
        "freihand",
        "synthetic",
        "min_of_n",
        "biggs",
    }
    for name in (*PROTOCOLS, *MANY):
        protocol = get_protocol(name)
        for word in ("citation", "ground_truth", "joints", "root", "alignment"):
            assert len(getattr(protocol, word)) > 10, (name, word)
        assert name == "synthetic" or "arXiv" in protocol.citation
        assert set(protocol.needed) <= set(protocol.skeleton) and set(protocol.centre) <= set(protocol.skeleton)
    assert "gendered" in PROTOCOLS["spin"].ground_truth and "neutral" in PROTOCOLS["metro"].ground_truth


def test_bases() -> None:
    assert get_protocol("min_of_n", body="smpl").title == "min_of_n/spin"
    assert get_protocol("min_of_n", body="mano").title == "min_of_n/freihand"
    assert get_protocol("biggs", body="free").title == "biggs/synthetic"
    protocol = get_protocol("min_of_n", "jotr", "smpl")
    assert protocol.base is PROTOCOLS["jotr"] and protocol.regressor == "h36m_correct"
    for words, message in (
        (("spinn",), r"protocol 'spinn' is not known; the nearest is 'spin'"),
        (("min_of_n", "metros"), r"protocol 'metros' is not known; the nearest is 'metro'"),
        (("spin", "metro"), "protocol 'spin' has no base"),
        (("min_of_n", "biggs"), "base 'biggs' scores several hypotheses"),
        (("biggs", "freihand"), "biggs picks by MPJPE, which 'freihand' has not"),
    ):
        with pytest.raises(UserError, match=message):
            get_protocol(*words)


def test_published_rows_belong_to_protocols_and_name_their_source() -> None:
    for row in PUBLISHED:
        metrics = {*get_protocol(row.protocol, body="smpl").metrics, "ece"}
        assert row.source and row.values and set(row.values) <= metrics
    found = {(row.method, row.data): row.values for row in published_rows("metro")}
    assert found["HMDiff", "3DPW"] == {"pve": 82.4, "mpjpe": 72.7, "pa_mpjpe": 44.5}
    assert found["HMDiff", "Human3.6M P2"] == {"mpjpe": 49.3, "pa_mpjpe": 32.4}
    found = {(row.method, row.data): row.values for row in published_rows("jotr")}
    assert found["JOTR", "3DPW-OC"] == {"mpjpe": 75.7, "pa_mpjpe": 52.2, "pve": 92.6} and len(found) == 8
    assert published_rows("freihand") == []


# -- joints ----------------------------------------------------------------------------------------------------------


def test_orders_of_j14_are_the_published_ones() -> None:
    assert joint_indices(J14, SPIN_H36M17) == [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]
    assert joint_indices(J14, H36M17) == [3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10]
    assert joint_indices(H36M14, H36M17) == [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    for name, skeleton in (("spin", SPIN_H36M17), ("metro", H36M17), ("jotr", H36M17)):
        assert PROTOCOLS[name].skeleton == skeleton


def test_the_two_orders_are_not_interchangeable() -> None:
    """The same 17 rows under both index maps: the legs are exchanged, so errors equal their distance."""
    rows = torch.zeros(1, 17, 3, dtype=torch.float64)
    for side, x in (("left", 0.1), ("right", -0.1)):
        for joint, y in (("hip", 0.0), ("knee", 0.4), ("ankle", 0.8)):
            rows[0, H36M17.index(f"{side}_{joint}")] = torch.tensor([x, y, 0])
    rows[0, 11:, 0] = torch.tensor([0.2, 0.2, 0.2, -0.2, -0.2, -0.2])
    rows[0, 11:, 1] = torch.tensor([-0.5, -0.2, 0.0, -0.5, -0.3, -0.1])
    rows[0, 8, 1], rows[0, 10, 1] = -0.6, -0.8
    right = rows[:, joint_indices(J14, H36M17)]
    wrong = rows[:, joint_indices(J14, SPIN_H36M17)]
    assert joint_error(wrong, right, J14, HIPS).item() == pytest.approx(1000 * 6 * 0.2 / 14)  # six joints by 0.2 m
    assert procrustes_error(wrong, right).item() > 10  # alignment does not remove it
    # A regressor needs its own map: rows in SPIN's order under SPIN's protocol are the same joints.
    spin, metro = PROTOCOLS["spin"], PROTOCOLS["metro"]
    order = joint_indices(SPIN_H36M17, H36M17)
    mesh, correct = Bodies(rows), torch.eye(17, dtype=torch.float64)
    expected = metro.completed(mesh, {"h36m_correct": correct}).named(J14)
    assert torch.equal(spin.completed(mesh, {"h36m": correct[order]}).named(J14), expected)
    assert not torch.equal(spin.completed(mesh, {"h36m": correct}).named(J14), expected)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_joints_are_taken_by_name(name: str) -> None:
    """Joints in another order, with others among them, give the same errors; a missing one is named."""
    protocol = PROTOCOLS[name]
    target, regressors = toy(protocol)
    predicted, _ = toy(protocol, 1)
    from_mesh = protocol.score(predicted, target, regressors)
    alone = protocol.completed(predicted, regressors)
    names = [*reversed(protocol.needed), "tail"]
    joints = torch.cat([alone.named(names[:-1]), torch.full((3, 1, 3), math.nan)], -2)
    given = protocol.score(Bodies(None, joints, tuple(names)), target, regressors)
    assert 0 < len(given) < len(from_mesh)
    for metric, values in given.items():
        torch.testing.assert_close(values, from_mesh[metric])
    with pytest.raises(UserError, match=f"joint '{protocol.needed[-1]}' is needed and not given; .* are .*tail"):
        protocol.score(Bodies(None, joints[..., 1:, :], tuple(names[1:])), target, regressors)
    with pytest.raises(UserError, match=f"protocol {name}: neither vertices nor joints are given"):
        protocol.score(Bodies(), target, regressors)


def test_joints_off_the_mesh_are_what_most_protocols_compare() -> None:
    spin, emdb = PROTOCOLS["spin"], PROTOCOLS["emdb"]
    target, regressors = toy(spin)
    own = Bodies(target.vertices, torch.randn(3, 17, 3, dtype=torch.float64), SPIN_H36M17)
    assert score(spin, own, target, regressors)["mpjpe"] == 0
    # EMDB uses a prediction's own joints, or else regresses both: the labelled joints would differ.
    target, regressors = toy(emdb)
    assert target.vertices is not None
    labelled = Bodies(target.vertices, target.vertices[:, :24] + torch.randn(3, 24, 3, dtype=torch.float64), SMPL24)
    assert score(emdb, target, labelled, regressors)["mpjpe"] == 0
    assert score(emdb, labelled, labelled, regressors)["mpjpe"] == 0
    mixed = Bodies(target.vertices, target.vertices[:, :24], SMPL24)
    assert score(emdb, mixed, labelled, regressors)["mpjpe"] > 1


# -- known values ----------------------------------------------------------------------------------------------------


def test_spin_by_hand() -> None:
    protocol = PROTOCOLS["spin"]
    target, regressors = toy(protocol)
    errors = score(protocol, moved(target, "right_ankle", [0.03, 0, 0], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(30 / 14) and errors["pve"] == pytest.approx(30 / WIDE)
    assert 0 < errors["pa_mpjpe"] < errors["mpjpe"] * 2
    # The root is joint 0: moved alone, everything else is off by as much, and the shape of the rest is right.
    errors = score(protocol, moved(target, "pelvis", [0, 0.014, 0], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(14) and errors["pa_mpjpe"] == pytest.approx(0, abs=1e-6)
    assert errors["pve"] == pytest.approx(14 * (WIDE - 1) / WIDE)
    # Joints outside the 14 are ignored.
    errors = score(protocol, moved(target, "spine", [1, 0, 0], protocol), target, regressors)
    assert errors["mpjpe"] == 0 and errors["pve"] == pytest.approx(1000 / WIDE)


def test_metro_by_hand() -> None:
    protocol = PROTOCOLS["metro"]
    target, regressors = toy(protocol)
    # The pelvis is not its root: joints are right, and the mesh is about the pelvis.
    errors = score(protocol, moved(target, "pelvis", [0, 0.014, 0], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(0, abs=1e-9)
    assert errors["pve"] == pytest.approx(14 * (WIDE - 1) / WIDE)
    # A hip moved by 28: the root by 14, so that hip is off by 14 and the other 13 joints by 14.
    errors = score(protocol, moved(target, "left_hip", [0.028, 0, 0], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(14) and errors["pve"] == pytest.approx(28 / WIDE)


def test_jotr_by_hand() -> None:
    protocol = PROTOCOLS["jotr"]
    target, regressors = toy(protocol)
    regressors["body"] = torch.eye(24, WIDE, dtype=torch.float64).roll(30, 1)  # SMPL's joint 0 is vertex 30
    errors = score(protocol, moved(target, "pelvis", [0, 0.014, 0], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(14) and errors["pve"] == pytest.approx(14 / WIDE)
    errors = score(protocol, moved(target, 30, [0, 0.014, 0], protocol), target, regressors)
    assert errors["mpjpe"] == 0 and errors["pve"] == pytest.approx(14 * (WIDE - 1) / WIDE)
    assert protocol.needs_regressors() == ("h36m_correct", "body")


def test_humaniflow_by_hand() -> None:
    protocol = PROTOCOLS["humaniflow"]
    target, regressors = toy(protocol)
    shifted = target.map(lambda points: points + torch.tensor([0.01, 0, 0], dtype=points.dtype))
    errors = score(protocol, shifted, target, regressors)  # no alignment
    assert errors["mpjpe"] == pytest.approx(10) and errors["pve"] == pytest.approx(10)
    assert max(errors[name] for name in errors if "_" in name) < 1e-6
    grown = target.map(lambda points: 1.1 * points)
    errors = score(protocol, grown, target, regressors)
    assert errors["mpjpe"] > 100 and errors["mpjpe_sc"] < 1e-6 and errors["pve_sc"] < 1e-6
    turned = target.map(lambda points: points @ rotation().mT)
    errors = score(protocol, turned, target, regressors)
    assert errors["mpjpe_sc"] > 100 and errors["mpjpe_pa"] < 1e-6 and errors["pve_sc"] > 100 and errors["pve_pa"] < 1e-6
    # Two points, worked out: radius 2 of the prediction against 1 leaves nothing, whatever the mean.
    pair = torch.zeros(1, 17, 3, dtype=torch.float64)
    pair[0, joint_indices(J14[:7], SPIN_H36M17), 0] = 1.0
    pair[0, joint_indices(J14[7:], SPIN_H36M17), 0] = -1.0
    eye = {"h36m": torch.eye(17, dtype=torch.float64)}
    errors = score(protocol, Bodies(2 * pair + 3), Bodies(pair), eye)
    assert errors["mpjpe_sc"] < 1e-6
    assert errors["mpjpe"] == pytest.approx(1000 * (math.hypot(4, 3, 3) + math.hypot(2, 3, 3)) / 2)


def test_emdb_by_hand() -> None:
    protocol = PROTOCOLS["emdb"]
    target, regressors = toy(protocol)
    errors = score(protocol, moved(target, "right_hand", [0.024, 0, 0], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(1)
    # A hip moved by 24 moves the root by 12.
    errors = score(protocol, moved(target, "left_hip", [0, 0, 0.024], protocol), target, regressors)
    assert errors["mpjpe"] == pytest.approx(12) and errors["pve"] == pytest.approx(12)
    # The mesh is aligned by the joints' similarity: with correct joints its error is unchanged.
    errors = score(protocol, moved(target, 30, [0.04, 0, 0], protocol), target, regressors)
    assert errors["pa_mpjpe"] < 1e-6 and errors["pa_pve"] == pytest.approx(40 / WIDE)
    flat = target.map(lambda points: torch.cat([points[..., :24, :], 2 * points[..., 24:, :]], -2))
    turned = flat.map(lambda points: 0.7 * points @ rotation().mT + 1)
    torch.testing.assert_close(
        protocol.score(turned, target, regressors)["pa_pve"], protocol.score(flat, target, regressors)["pa_pve"]
    )


def test_freihand_by_hand() -> None:
    protocol = PROTOCOLS["freihand"]
    assert protocol.skeleton == HAND21
    # An octahedron of radius 0.1 with one pair of points pulled out by 0.012 each: centroid and axes stay.
    points = 0.1 * torch.cat([torch.eye(3), -torch.eye(3)]).double()[None]
    pulled = points.clone()
    pulled[0, [0, 3]] *= 1.12
    scale = (0.1 * 0.112 * 2 + 4 * 0.01) / (2 * 0.112**2 + 4 * 0.01)
    distances = [abs(0.112 * scale - 0.1), abs(0.1 * scale - 0.1)]
    bodies = [Bodies(points, points[:, :3], HAND21[:3]) for points in (pulled, points)]
    errors = {name: values.item() for name, values in freihand_errors(*bodies, {}).items()}
    assert errors["pa_pve"] == pytest.approx(1000 * (2 * distances[0] + 4 * distances[1]) / 6)
    assert errors["f_5"] == pytest.approx(4 / 6) and errors["f_15"] == 1  # 7 mm off two of six, 4.5 the others
    assert errors["pa_mpjpe"] != pytest.approx(errors["pa_pve"], rel=0.01)  # three of the points, aligned apart
    assert 8 > 1000 * distances[0] > 5 > 1000 * distances[1]


def test_f_score_and_curve_by_hand() -> None:
    truth = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    guess = torch.tensor([[[0.0, 0, 0.003], [0, 0, 0.004], [0, 0, 0.5], [1, 0, 0.01]]])
    # Near a true point: 2 of 4 at 5 mm, 3 of 4 at 15; near a predicted one: 1 of 2 and 2 of 2.
    assert f_score(guess, truth)[:, 0].tolist() == pytest.approx([2 * 0.5 * 0.5 / 1, 2 * 0.75 * 1 / 1.75])
    assert f_score(truth + 9, truth).tolist() == [[0.0], [0.0]]
    for distance, f in ((0.0049, 1), (0.0051, 0)):
        assert f_score(truth + torch.tensor([distance, 0, 0]), truth)[0].item() == f
    zero = torch.zeros(1, 1, 3)
    assert f_score(zero, zero, (0.0,)).item() == 0  # strictly below the threshold
    for distance, area in ((0.0, 1.0), (0.06, 0.0), (0.025, 0.5)):
        found = curve_area(truth + torch.tensor([0, distance, 0]), truth).item()
        assert found == pytest.approx(area, abs=0.01), distance
    half = truth.clone()
    half[0, 1] += 1
    assert curve_area(half, truth).item() == pytest.approx(0.5)


def test_freihand_is_what_the_data_set_s_own_evaluation_computes() -> None:
    """Compared with a reference by scipy and loops, one keypoint at a time over all people."""
    random = np.random.default_rng(0)
    truth = 0.08 * random.normal(size=(4, 21, 3))
    guess = truth + 0.01 * random.normal(size=truth.shape)
    guess[2] *= [-1.3, 1.3, 1.3]  # a mirror image
    distances = []
    for real, predicted in zip(truth, guess, strict=True):
        a, b = real - real.mean(0), predicted - predicted.mean(0)
        size = np.linalg.norm(a)
        turn, s = orthogonal_procrustes(a / size, b / np.linalg.norm(b))
        back = b / np.linalg.norm(b) @ turn.T * s * size + real.mean(0)
        distances.append(np.linalg.norm(back - real, axis=-1))
    table, thresholds = np.stack(distances), np.linspace(0, 0.05, 100)
    areas = [np.trapezoid([(table[:, k] <= t).mean() for t in thresholds], thresholds) / 0.05 for k in range(21)]
    bodies = [Bodies(torch.from_numpy(x), torch.from_numpy(x), HAND21) for x in (guess, truth)]
    found = PROTOCOLS["freihand"].score(*bodies)
    np.testing.assert_allclose(found["pa_mpjpe"], 1000 * table.mean(1), rtol=1e-9)
    assert found["auc_joints"].mean().item() == pytest.approx(np.mean(areas))
    torch.testing.assert_close(found["pa_pve"], found["pa_mpjpe"])
    assert table[2].max() < 0.05


# -- invariances -----------------------------------------------------------------------------------------------------

ALIGNED = {
    "spin": ["pa_mpjpe"],
    "metro": ["pa_mpjpe"],
    "jotr": ["pa_mpjpe"],
    "humaniflow": ["pve_pa", "mpjpe_pa"],
    "emdb": ["pa_pve", "pa_mpjpe"],
    "synthetic": ["pa_mpjpe", "pa_pve"],
    "freihand": ["pa_mpjpe", "pa_pve", "auc_joints", "auc_vertices", "f_5", "f_15"],
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_invariances(name: str) -> None:
    protocol = PROTOCOLS[name]
    target, regressors = toy(protocol)
    target = target.map(lambda points: 0.1 * points)
    noise, _ = toy(protocol, 1)
    assert target.vertices is not None and noise.vertices is not None
    predicted = Bodies(target.vertices + 0.005 * noise.vertices)
    plain = protocol.score(predicted, target, regressors)
    assert set(plain) == set(protocol.metrics)
    similar = protocol.score(predicted.map(lambda p: 1.7 * p @ rotation().mT + 0.3), target, regressors)
    shifted = protocol.score(predicted.map(lambda p: p + 0.3), target, regressors)
    for metric, values in plain.items():
        same = torch.allclose(similar[metric], values, rtol=1e-6)
        assert same == (metric in ALIGNED[name]), metric
        raw = name == "humaniflow" and metric in ("pve", "mpjpe")
        assert torch.allclose(shifted[metric], values, rtol=1e-6) != raw, metric
    perfect = protocol.score(target, target, regressors)
    for metric, values in perfect.items():
        best = 1.0 if protocol.metrics[metric].higher_is_better else 0.0
        slack = 0.006 if metric.startswith("auc") else 1e-6  # rounding is above the first threshold of the curve, 0
        torch.testing.assert_close(values, torch.full_like(values, best), rtol=0, atol=slack)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_mirror_image_is_refused_but_by_freihand(name: str) -> None:
    protocol = PROTOCOLS[name]
    target, regressors = toy(protocol)
    mirrored = target.map(lambda points: points * torch.tensor([-1.0, 1, 1], dtype=points.dtype))
    for metric in ALIGNED[name]:
        if protocol.metrics[metric].unit != "mm":
            continue
        errors = protocol.score(mirrored, target, regressors)[metric]
        assert (errors < 1e-6).all() if name == "freihand" else (errors > 50).all()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_person_s_numbers_do_not_depend_on_the_batch(name: str) -> None:
    protocol = PROTOCOLS[name]
    target, regressors = toy(protocol, people=(4,))
    predicted, _ = toy(protocol, 1, (4, 2))
    whole = protocol.score(predicted, target.map(lambda points: points[:, None]), regressors)
    for person in range(4):
        alone = protocol.score(
            predicted.map(lambda p, i=person: p[i, 1]), target.map(lambda p, i=person: p[i]), regressors
        )
        for metric, values in whole.items():
            assert values.shape == (4, 2)
            torch.testing.assert_close(values[person, 1], alone[metric].to(values))


# -- many hypotheses -------------------------------------------------------------------------------------------------


def several(protocol: Protocol, total: int, spread: float = 0.05) -> tuple[Bodies, Bodies, dict[str, Tensor]]:
    target, regressors = toy(protocol, people=(3,))
    noise, _ = toy(protocol, 1, (3, total))
    assert target.vertices is not None and noise.vertices is not None
    return Bodies(target.vertices[:, None] + spread * noise.vertices), target, regressors


def test_one_estimate_and_several_hypotheses() -> None:
    protocol = PROTOCOLS["spin"]
    predicted, target, regressors = several(protocol, 6)
    each = protocol.score(predicted, target.map(lambda p: p[:, None]), regressors)
    chosen = torch.tensor([3, 0, 5])
    rows = score_hypotheses(protocol, predicted, target, regressors, lambda count: chosen).rows
    assert list(rows) == ["first", "mean of 6", "oracle of 6", "selected of 6"]
    for metric, errors in each.items():
        torch.testing.assert_close(rows["first"][metric], errors[:, 0])
        torch.testing.assert_close(rows["oracle of 6"][metric], errors.amin(1))
        torch.testing.assert_close(rows["selected of 6"][metric], errors[torch.arange(3), chosen])
    pelvis = predicted.vertices[:, :, :1]  # type: ignore[index]
    mean = protocol.score(Bodies((predicted.vertices - pelvis).mean(1)), target, regressors)  # type: ignore[operator]
    torch.testing.assert_close(rows["mean of 6"], mean)
    alone = score_hypotheses(protocol, predicted.map(lambda p: p[:, :1]), target, regressors).rows
    assert list(alone) == ["estimate"]
    torch.testing.assert_close(alone["estimate"], rows["first"])


def test_hypotheses_in_other_places_have_the_mean_of_their_shapes() -> None:
    """Hypotheses are root-aligned before averaging, except by humaniflow."""
    for name in ("spin", "humaniflow"):
        predicted, target, regressors = several(PROTOCOLS[name], 4)
        far = Bodies(predicted.vertices + torch.randn(3, 4, 1, 3))  # type: ignore[operator]
        here, there = (
            PROTOCOLS[name].score(PROTOCOLS[name].mean(x, regressors), target, regressors)["mpjpe"]
            for x in (predicted, far)
        )
        assert torch.allclose(here, there) == (name == "spin")


def test_min_of_n_reports_all_counts_and_calibration() -> None:
    protocol = get_protocol("min_of_n", "spin")
    predicted, target, regressors = several(protocol, 30)
    scores = score_hypotheses(protocol, predicted, target, regressors, lambda count: torch.tensor([count - 1, 0, 0]))
    kinds = ("mean", "oracle", "selected")
    assert list(scores.rows) == ["first", *(f"{kind} of {n}" for n in (5, 10, 25, 30) for kind in kinds)]
    assert COUNTS == (1, 5, 10, 25, 100)
    each = protocol.score(predicted, target.map(lambda p: p[:, None]), regressors)
    best = [scores.rows[f"oracle of {n}"]["mpjpe"] for n in (5, 10, 25, 30)]
    for more, fewer in zip(best[1:], best, strict=False):
        assert (more <= fewer).all()
    torch.testing.assert_close(best[1], each["mpjpe"][:, :10].amin(1))
    assert scores.rows["selected of 10"]["pve"][0] == each["pve"][0, 9]
    assert scores.inside is not None
    joints = [protocol.completed(x, regressors).named(protocol.needed) for x in (predicted, target)]
    pelvis = [protocol.completed(x, regressors).named(["pelvis"]) for x in (predicted, target)]
    expected = expected_calibration_error(joints[0] - pelvis[0], joints[1] - pelvis[1])
    assert curve_error(scores.inside) == pytest.approx(expected)
    few = score_hypotheses(protocol, predicted.map(lambda p: p[:, :4]), target, regressors)
    assert few.inside is None and list(few.rows) == ["first", "mean of 4", "oracle of 4"]


def test_the_best_share_is_the_largest() -> None:
    protocol = get_protocol("min_of_n", "freihand")
    predicted, target, regressors = several(protocol, 5, 0.005)
    rows = score_hypotheses(protocol, predicted, target, regressors).rows
    each = protocol.score(predicted, target.map(lambda p: p[:, None]), regressors)
    torch.testing.assert_close(rows["oracle of 5"]["f_5"], each["f_5"].amax(1))
    torch.testing.assert_close(rows["oracle of 5"]["pa_pve"], each["pa_pve"].amin(1))


def test_biggs_picks_one_of_the_representatives_for_all_metrics() -> None:
    protocol = get_protocol("biggs", "spin")
    predicted, target, regressors = several(protocol, 30)
    rows = score_hypotheses(protocol, predicted, target, regressors).rows
    assert list(rows) == ["first", "pick of 5 of 30", "pick of 10 of 30", "pick of 25 of 30"]
    each = protocol.score(predicted, target.map(lambda p: p[:, None]), regressors)
    for person in range(3):
        for row in list(rows)[1:]:
            (pick,) = (each["mpjpe"][person] == rows[row]["mpjpe"][person]).nonzero()[:, 0].tolist()
            assert rows[row]["pa_mpjpe"][person] == each["pa_mpjpe"][person, pick]
            assert rows[row]["pve"][person] == each["pve"][person, pick]
    apart = sum((rows["pick of 25 of 30"][m] - each[m].amin(1)).sum() for m in ("pa_mpjpe", "pve"))
    assert apart > 0  # the oracle of each metric is better than a single pick


def test_representatives_are_one_of_each_group() -> None:
    centres = 10 * torch.randn(5, 4, 3)
    joints = (centres[:, None] + 0.01 * torch.randn(5, 6, 4, 3)).flatten(0, 1)
    found = cluster_representatives(joints, 5)
    assert sorted((found // 6).tolist()) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found, cluster_representatives(joints, 5))
    assert cluster_representatives(joints[:1].expand(30, -1, -1), 5).tolist() == [
        0
    ]  # equal hypotheses, as from a regressor


def test_a_calibrated_posterior_has_little_error() -> None:
    """Ground truth from the hypotheses' distribution, compared with hypotheses of too little spread."""
    protocol: Any = get_protocol("min_of_n", "spin")
    eye = {"h36m": torch.eye(17, dtype=torch.float64)}
    truth, drawn = torch.randn(150, 17, 3).double(), torch.randn(150, 60, 17, 3).double()
    truth[:, 0], drawn[:, :, 0] = 0, 0
    errors = []
    for width in (1.0, 0.5):
        scores = score_hypotheses(protocol, Bodies(width * drawn), Bodies(truth), eye)
        assert scores.inside is not None
        errors.append(curve_error(scores.inside))
    assert errors[0] < 0.05 < 0.15 < errors[1]
