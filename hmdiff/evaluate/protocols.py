"""Named evaluation protocols: ground truth, joints, root and alignment. Every number is reported with its protocol.

Numbers of different protocols are not comparable. A protocol maps predicted and ground truth bodies to errors per
person. `min_of_n` and `biggs` define what is reported for several hypotheses; each hypothesis is scored by a base
protocol. B people, N hypotheses, J joints, V vertices.

Definitions follow the authors' evaluation code, cited below; our additions are marked "ours".
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from hmdiff.body.skeletons import H36M14, H36M17, HALPE26, HAND21, J14, SMPL24, SPIN_H36M17
from hmdiff.errors import UserError
from hmdiff.evaluate.metrics import root_of
from hmdiff.evaluate.protocol_errors import (
    HIPS,
    Bodies,
    Errors,
    emdb_errors,
    freihand_errors,
    humaniflow_errors,
    jotr_errors,
    metro_errors,
    spin_errors,
    synthetic_errors,
)


class Metric(NamedTuple):
    header: str
    unit: str = "mm"  # or "share", 0..1
    higher_is_better: bool = False


PVE, MPJPE, PA_MPJPE = Metric("PVE"), Metric("MPJPE"), Metric("PA-MPJPE")
ErrorFunction = Callable[[Bodies, Bodies, Mapping[str, Tensor]], Errors]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one prediction of one person is scored."""

    name: str
    citation: str
    ground_truth: str
    joints: str
    root: str
    alignment: str
    kind: str  # of body: smpl, mano, or any (the model's own)
    mesh: str  # of the ground truth: gendered, neutral, or labelled (the data set's mesh on the model's own body)
    regressor: str  # h36m, h36m_correct (the user's files), body (its J_regressor) or keypoints (the body's)
    skeleton: tuple[str, ...]  # names of the regressor's rows
    needed: tuple[str, ...]  # joints that a prediction without vertices must have
    centre: tuple[str, ...]  # root at which hypotheses are aligned before averaging; empty: none
    metrics: Mapping[str, Metric]  # in display order
    errors: ErrorFunction
    mesh_joints: bool = True  # always regress joints from the vertices, even if a prediction also has joints
    same_source: bool = False  # if predicted joints are regressed from the mesh, so are the ground truth's
    motion_capture: bool = False  # data sets without bodies are scored on their measured joints
    base: Protocol | None = None  # of min_of_n and biggs

    @property
    def title(self) -> str:
        """The name reported with every number: `spin`, or `min_of_n/spin`."""
        return self.name if self.base is None else f"{self.name}/{self.base.name}"

    def completed(
        self,
        bodies: Bodies,
        regressors: Mapping[str, Tensor],  # (J, V) each, for the names in `needs_regressors`
    ) -> Bodies:
        """The bodies with the protocol's joints. Raises `UserError` if they can neither be found nor regressed."""
        has_joints = bodies.joints is not None and not (self.mesh_joints and bodies.vertices is not None)
        if has_joints:
            bodies.named(self.needed)
            return bodies
        if bodies.vertices is None:
            raise UserError(f"protocol {self.title}: neither vertices nor joints are given; give one of them")
        return bodies.regressed(regressors[self.regressor], self.skeleton)

    def both(self, predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> tuple[Bodies, Bodies]:
        """Prediction and ground truth with the protocol's joints."""
        if self.same_source and predicted.joints is None and target.vertices is not None:
            target = Bodies(target.vertices)
        return self.completed(predicted, regressors), self.completed(target, regressors)

    def score(
        self,
        predicted: Bodies,  # (..., V, 3) and/or (..., J, 3)
        target: Bodies,  # leading dimensions broadcast
        regressors: Mapping[str, Tensor] | None = None,
    ) -> Errors:  # metric -> (...)
        """Errors of every prediction, by metric."""
        regressors = regressors or {}
        predicted, target = self.both(predicted, target, regressors)
        errors = self.errors(predicted, target, regressors)
        return {metric: errors[metric] for metric in self.metrics if metric in errors}

    def mean(
        self,
        predicted: Bodies,  # (B, N, ...)
        regressors: Mapping[str, Tensor] | None = None,
    ) -> Bodies:  # (B, ...)
        """The mean of the hypotheses after aligning them at the protocol's root."""
        bodies = self.completed(predicted, regressors or {})
        if self.centre:
            origin = root_of(bodies.named(self.centre), self.centre, self.centre)
            bodies = bodies.map(lambda points: points - origin)
        return bodies.map(lambda points: points.mean(1))

    def needs_regressors(self) -> tuple[str, ...]:
        return (self.regressor, "body") if self.name == "jotr" else (self.regressor,)


_HMR_J14 = (
    "14 joints of Human3.6M's, LSP's order, by J_regressor_h36m: H36M_TO_J14 = 6,5,4,1,2,3,16,15,14,11,12,13,8,10"
)
_PA = "PA: similarity Procrustes a person, proper rotation"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="spin",
            citation="Kolotouros et al., SPIN, ICCV 2019, arXiv 1909.12828: eval.py",
            ground_truth="the gendered SMPL mesh of the labels; of Human3.6M the joints of motion capture",
            joints=_HMR_J14,
            root="joint 0 of the regressor, the pelvis; PVE, which SPIN does not report, about the same (ours)",
            alignment=_PA,
            kind="smpl",
            mesh="gendered",
            regressor="h36m",
            skeleton=SPIN_H36M17,
            needed=(*J14, "pelvis"),
            centre=("pelvis",),
            metrics={"pve": PVE, "mpjpe": MPJPE, "pa_mpjpe": PA_MPJPE},
            errors=spin_errors,
            motion_capture=True,
        ),
        Protocol(
            name="metro",
            citation="Lin et al., METRO, CVPR 2021, arXiv 2012.09760: run_metro_bodymesh.py; FastMETRO and Mesh "
            "Graphormer keep it",
            ground_truth="the neutral SMPL mesh of the labels; of Human3.6M the joints of motion capture",
            joints="14 joints of Human3.6M's, LSP's order, by J_regressor_h36m_correct: H36M_J17_TO_J14 = "
            "3,2,1,4,5,6,16,15,14,11,12,13,8,10",
            root="middle of the hips; PVE about joint 0 of the regressor, the pelvis",
            alignment=_PA,
            kind="smpl",
            mesh="neutral",
            regressor="h36m_correct",
            skeleton=H36M17,
            needed=J14,
            centre=HIPS,
            metrics={"pve": PVE, "mpjpe": MPJPE, "pa_mpjpe": PA_MPJPE},
            errors=metro_errors,
            motion_capture=True,
        ),
        Protocol(
            name="jotr",
            citation="Li et al., JOTR, ICCV 2023, arXiv 2307.16377: dataloader/PW3D.py, as 3DCrowdNet's",
            ground_truth="the gendered SMPL mesh of the labels",
            joints="14 of Human3.6M's 17 in their own order, 1..6, 8, 10..16, by J_regressor_h36m_correct",
            root="Human3.6M's pelvis, joint 0 of the regressor; PVE about SMPL's joint 0, by SMPL's own regressor",
            alignment=_PA,
            kind="smpl",
            mesh="gendered",
            regressor="h36m_correct",
            skeleton=H36M17,
            needed=(*H36M14, "pelvis"),
            centre=("pelvis",),
            metrics={"pve": PVE, "mpjpe": MPJPE, "pa_mpjpe": PA_MPJPE},
            errors=jotr_errors,
        ),
        Protocol(
            name="humaniflow",
            citation="Sengupta et al., HuManiFlow, CVPR 2023, arXiv 2305.06968: evaluate_humaniflow.py",
            ground_truth="the gendered SMPL mesh of the labels, SMPL's raw output: turned about its root, not moved",
            joints=_HMR_J14,
            root="none: nothing is moved. A mesh that is relative to its pelvis is put where SMPL's neutral mean "
            "shape has it (ours)",
            alignment="-SC: the true points' mean and root mean square radius, no rotation; -PA: similarity "
            "Procrustes a person, proper rotation",
            kind="smpl",
            mesh="gendered",
            regressor="h36m",
            skeleton=SPIN_H36M17,
            needed=J14,
            centre=(),
            metrics={
                "pve": PVE,
                "pve_sc": Metric("PVE-SC"),
                "pve_pa": Metric("PVE-PA"),
                "mpjpe": MPJPE,
                "mpjpe_sc": Metric("MPJPE-SC"),
                "mpjpe_pa": Metric("MPJPE-PA"),
            },
            errors=humaniflow_errors,
        ),
        Protocol(
            name="emdb",
            citation="Kaufmann et al., EMDB, ICCV 2023, arXiv 2308.16894: evaluation_metrics.py",
            ground_truth="the gendered SMPL mesh of the labels",
            joints="SMPL's 24: a prediction's own where it gives them, against the labels'; else read off both meshes "
            "by the body's J_regressor (ours)",
            root="middle of SMPL's joints 1 and 2, the hips; the mesh about the same",
            alignment=f"{_PA}, of the joints; PA-PVE: the mesh moved by the joints' similarity",
            kind="any",
            mesh="gendered",
            regressor="body",
            skeleton=SMPL24,
            needed=SMPL24,
            centre=HIPS,
            metrics={"pve": PVE, "pa_pve": Metric("PA-PVE"), "mpjpe": MPJPE, "pa_mpjpe": PA_MPJPE},
            errors=emdb_errors,
            mesh_joints=False,
            same_source=True,
        ),
        Protocol(
            name="freihand",
            citation="Zimmermann et al., FreiHAND, ICCV 2019, arXiv 1909.04349: eval.py; 3960 evaluation images",
            ground_truth="the data set's own 21 joints and 778 vertices of MANO",
            joints="21, FreiHAND's order: a prediction's own, else by MANO's J_regressor and five fingertips",
            root="none: centroids are aligned",
            alignment="joints and vertices apart, orthogonal Procrustes with scale, reflection allowed; F-score of "
            "nearest neighbours at 5 and 15 mm, AUC over 0..50 mm in 100 steps, all after it",
            kind="mano",
            mesh="labelled",
            regressor="keypoints",
            skeleton=HAND21,
            needed=HAND21,
            centre=("wrist",),
            metrics={
                "pa_mpjpe": PA_MPJPE,
                "pa_pve": Metric("PA-PVE"),
                "auc_joints": Metric("AUC joints", "share", True),
                "auc_vertices": Metric("AUC vertices", "share", True),
                "f_5": Metric("F@5", "share", True),
                "f_15": Metric("F@15", "share", True),
            },
            errors=freihand_errors,
            mesh_joints=False,
        ),
        Protocol(
            name="synthetic",
            citation="ours, as hmdiff evaluate without a protocol",
            ground_truth="the mesh of the people themselves, on the model's own body",
            joints="the 14 of LSP by name, by the body's keypoint regressor",
            root="middle of the hips; PVE about the same",
            alignment=f"{_PA}, of joints and vertices apart",
            kind="any",
            mesh="labelled",
            regressor="keypoints",
            skeleton=HALPE26,
            needed=J14,
            centre=HIPS,
            metrics={"pve": PVE, "mpjpe": MPJPE, "pa_mpjpe": PA_MPJPE, "pa_pve": Metric("PA-PVE")},
            errors=synthetic_errors,
        ),
    )
}

MANY: dict[str, tuple[str, str]] = {  # for several hypotheses: citation, and what is reported
    "min_of_n": (
        "as ProHMR (Kolotouros et al., ICCV 2021, arXiv 2108.11944) and what followed it; calibration: Pierzchlewicz "
        "et al., arXiv 2210.11179",
        "of the first N hypotheses, N = 1, 5, 10, 25, 100: oracle (the best by each metric on its own, which needs "
        "the truth and rewards miscalibration), the mean, and the one selected without the truth; ECE beside",
    ),
    "biggs": (
        "Biggs et al., 3D Multi-bodies, NeurIPS 2020, arXiv 2011.00980",
        "all hypotheses in n clusters by K-means on their joints about the root, n = 5, 10, 25; of the n hypotheses "
        "nearest to the centres the one of least MPJPE is picked (ours), and all metrics are those of that one pick",
    ),
}


def get_protocol(
    name: str,  # of PROTOCOLS, or of MANY
    base: str | None = None,  # for min_of_n and biggs; None: spin on SMPL, freihand on MANO, else synthetic
    body: str | None = None,  # kind of body, which determines the default base: smpl, mano, or another
) -> Protocol:
    """A protocol by name. Raises `UserError` for an unknown name, or an invalid base."""
    known = [*PROTOCOLS, *MANY]
    for word in (name, base):
        if word is not None and word not in known:
            nearest = difflib.get_close_matches(word, known, 1, cutoff=0)[0]
            raise UserError(f"protocol {word!r} is not known; the nearest is {nearest!r}, of {', '.join(known)}")
    if name in PROTOCOLS:
        if base is not None:
            raise UserError(f"protocol {name!r} has no base to choose; only {' and '.join(MANY)} have one")
        return PROTOCOLS[name]
    if base in MANY:
        raise UserError(f"base {base!r} scores several hypotheses; choose one of {', '.join(PROTOCOLS)}")
    one = PROTOCOLS[base or {"smpl": "spin", "mano": "freihand"}.get(body or "", "synthetic")]
    if name == "biggs" and "mpjpe" not in one.metrics:
        raise UserError(f"protocol biggs picks by MPJPE, which {one.name!r} has not; choose another base")
    citation, reported = MANY[name]
    return dataclasses.replace(
        one,
        name=name,
        base=one,
        citation=f"{citation}; one hypothesis as {one.citation}",
        alignment=f"{one.alignment}; {reported}",
    )
