"""A document of every family of keypoint files in docs/keypoints.md, row by row: one standing person."""

from __future__ import annotations

from typing import Any

from hmdiff.body.skeletons import COCO17, HALPE26, OPENPOSE18, OPENPOSE25
from hmdiff.heatmaps.formats.joint_names import HALPE136, MEDIAPIPE33, WHOLEBODY133

WIDTH, HEIGHT = 400, 300
# A standing person in photo pixels, by our names: all that any family knows.
BODY = {
    "nose": (200, 60),
    "left_eye": (205, 55),
    "right_eye": (195, 55),
    "left_ear": (211, 58),
    "right_ear": (189, 58),
    "left_shoulder": (225, 90),
    "right_shoulder": (175, 90),
    "left_elbow": (240, 125),
    "right_elbow": (160, 125),
    "left_wrist": (245, 160),
    "right_wrist": (155, 160),
    "left_hip": (215, 160),
    "right_hip": (185, 160),
    "left_knee": (217, 210),
    "right_knee": (183, 210),
    "left_ankle": (218, 260),
    "right_ankle": (182, 260),
    "top_head": (200, 38),
    "neck": (200, 90),
    "mid_hip": (200, 160),
    "left_big_toe": (226, 272),
    "right_big_toe": (174, 272),
    "left_small_toe": (231, 270),
    "right_small_toe": (169, 270),
    "left_heel": (215, 266),
    "right_heel": (185, 266),
}
BOX = [140.0, 30.0, 260.0, 280.0]
XYWH = [140.0, 30.0, 120.0, 250.0]


def places(names: Any, third: float | None = 0.9) -> list[list[float]]:
    """Joints that nobody of us has lie on the chest."""
    more = [] if third is None else [third]
    return [[*map(float, BODY.get(name, (200, 110))), *more] for name in names]


def flat(names: Any, third: float = 0.9) -> list[float]:
    return [number for joint in places(names, third) for number in joint]


def dataset(spelled: list[str], ours: list[str], **more: Any) -> dict[str, Any]:
    item = {"id": 7, "image_id": 1, "category_id": 1, "keypoints": flat(ours, 2), "bbox": XYWH, "iscrowd": 0}
    return {
        "images": [{"id": 1, "file_name": "photo.jpg", "width": WIDTH, "height": HEIGHT}],
        "annotations": [item | more],
        "categories": [{"id": 1, "name": "person", "keypoints": spelled}],
    }


H36M = [
    "root",
    "right_hip",
    "right_knee",
    "right_foot",
    "left_hip",
    "left_knee",
    "left_foot",
    "spine",
    "thorax",
    "neck_base",
    "head",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
]
H36M_OURS = [
    "mid_hip",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "-",
    "neck",
    "-",
    "-",
    *H36M[11:],
]
POSETRACK = ["nose", "head_bottom", "head_top", *COCO17[3:]]
POSETRACK_OURS = ["nose", "-", "top_head", *COCO17[3:]]
MPII = [
    "right_ankle",
    "right_knee",
    "right_hip",
    "left_hip",
    "left_knee",
    "left_ankle",
    "pelvis",
    "thorax",
    "upper_neck",
    "head_top",
    "right_wrist",
    "right_elbow",
    "right_shoulder",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
]
MPII_OURS = [*MPII[:6], "mid_hip", "neck", "-", "top_head", *MPII[10:]]
CROWDPOSE = [*COCO17[5:], "top_head", "neck"]
AIC = [
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "head_top",
    "neck",
]
AIC_OURS = [*AIC[:12], "top_head", "neck"]
HALPE = [*COCO17, "head", "neck", "hip", *HALPE26[20:]]
WITH_FEET = dataset(list(COCO17), list(COCO17), foot_kpts=flat(WHOLEBODY133[17:23], 2), foot_valid=True)
NORMALISED = [{"x": x / WIDTH, "y": y / HEIGHT, "visibility": c} for x, y, c in places(MEDIAPIPE33)]
INSTANCE = {"keypoints": places(COCO17, None), "keypoint_scores": [0.9] * 17, "bbox": [BOX], "bbox_score": 0.9}
SHARES = [value for x, y, c in places(COCO17) for value in (x / WIDTH, y / HEIGHT, c)]
LABELS = " ".join(map(str, [0, 0.5, 155 / HEIGHT, 0.3, 250 / HEIGHT, *SHARES]))

# (row of docs/keypoints.md, what the file holds, the joints that come of it)
ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "COCO data set": (dataset(list(COCO17), list(COCO17)), COCO17),
    "COCO data set without names": (dataset([], list(COCO17)), COCO17),
    "COCO-WholeBody data set, feet beside": (WITH_FEET, WHOLEBODY133[:23]),
    "COCO-WholeBody, 133 joints": (dataset([], list(WHOLEBODY133)), WHOLEBODY133[:23]),
    "Human3.6M names": (dataset(H36M, H36M_OURS), tuple(H36M_OURS)),
    "PoseTrack names": (dataset(POSETRACK, POSETRACK_OURS), tuple(POSETRACK_OURS)),
    "MPII names": (dataset(MPII, MPII_OURS), tuple(MPII_OURS)),
    "CrowdPose names": (dataset(CROWDPOSE, CROWDPOSE), tuple(CROWDPOSE)),
    "AIC names": (dataset(AIC, AIC_OURS), tuple(AIC_OURS)),
    "Halpe data set, 26 names": (dataset(HALPE, list(HALPE26)), HALPE26),
    "Halpe data set, 136 joints": (dataset([], list(HALPE136)), HALPE26),
    "COCO results": ([{"image_id": 1, "category_id": 1, "keypoints": flat(COCO17), "score": 0.9}], COCO17),
    "Detectron2 results": (
        [{"image_id": 1, "category_id": 1, "keypoints": flat(COCO17), "bbox": XYWH, "score": 1}],
        COCO17,
    ),
    "Detectron2 instances": (
        {"instances": {"pred_keypoints": [places(COCO17)], "pred_boxes": [BOX], "image_size": [HEIGHT, WIDTH]}},
        COCO17,
    ),
    "torchvision Keypoint R-CNN": (
        {"keypoints": [places(COCO17, 1)], "keypoints_scores": [[8.0] * 17], "boxes": [BOX]},
        COCO17,
    ),
    "AlphaPose, 17": ([{"image_id": "photo.jpg", "keypoints": flat(COCO17), "box": XYWH, "idx": [3.0]}], COCO17),
    "AlphaPose, Halpe 26": ([{"image_id": "photo.jpg", "keypoints": flat(HALPE26), "box": XYWH, "idx": 0.0}], HALPE26),
    "AlphaPose, Halpe 136": ([{"image_id": "photo.jpg", "keypoints": flat(HALPE136), "box": XYWH}], HALPE26),
    "AlphaPose, WholeBody 133": ([{"image_id": "photo.jpg", "keypoints": flat(WHOLEBODY133)}], WHOLEBODY133[:23]),
    "AlphaPose, cmu": ({"photo.jpg": {"version": 1, "bodies": [{"joints": flat(OPENPOSE18)}]}}, OPENPOSE18),
    "OpenPose BODY_25": (
        {"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": flat(OPENPOSE25)}]},
        OPENPOSE25,
    ),
    "OpenPose COCO": ({"people": [{"pose_keypoints_2d": flat(OPENPOSE18)}]}, OPENPOSE18),
    "mmpose predictions": ([INSTANCE], COCO17),
    "mmpose predictions, Halpe 26": (
        [{"keypoints": places(HALPE26, None), "keypoint_scores": [0.9] * 26, "bbox": [BOX]}],
        HALPE26,
    ),
    "mmpose inferencer": ({"predictions": [[INSTANCE]]}, COCO17),
    "mmpose instance_info": (
        {
            "meta_info": {"dataset_name": "h36m", "keypoint_id2name": dict(enumerate(H36M))},
            "instance_info": [{"keypoints": places(H36M_OURS, None), "keypoint_scores": [0.9] * 17, "bbox": [BOX]}],
        },
        tuple(H36M_OURS),
    ),
    "ultralytics to_json": (
        [
            {
                "name": "person",
                "box": dict(zip(("x1", "y1", "x2", "y2"), BOX, strict=True)),
                "track_id": 4,
                "keypoints": {
                    "x": [x for x, _, _ in places(COCO17)],
                    "y": [y for _, y, _ in places(COCO17)],
                    "visible": [0.9] * 17,
                },
            }
        ],
        COCO17,
    ),
    "ultralytics save_txt": (LABELS, COCO17),
    "transformers ViTPose": (
        [[{"keypoints": places(COCO17, None), "scores": [0.9] * 17, "labels": list(range(17)), "bbox": BOX}]],
        COCO17,
    ),
    "MediaPipe tasks": ({"pose_landmarks": [NORMALISED], "pose_world_landmarks": []}, MEDIAPIPE33),
    "MediaPipe solutions": ({"pose_landmarks": {"landmark": NORMALISED}}, MEDIAPIPE33),
    "MediaPipe bare list": (NORMALISED, MEDIAPIPE33),
    "TensorFlow.js": (
        [
            {
                "score": 0.9,
                "keypoints": [
                    {"x": x, "y": y, "score": c, "name": n} for n, (x, y, c) in zip(COCO17, places(COCO17), strict=True)
                ],
            }
        ],
        COCO17,
    ),
    "PoseNet": (
        [
            {
                "keypoints": [
                    {"position": {"x": x, "y": y}, "score": c, "part": "leftHip" if n == "left_hip" else n}
                    for n, (x, y, c) in zip(COCO17, places(COCO17), strict=True)
                ]
            }
        ],
        COCO17,
    ),
    "plain, a named set": ({"keypoints_halpe26": places(HALPE26), "box_xyxy": BOX}, HALPE26),
    "plain, named joints": ({"keypoints": places(HALPE26), "names": list(HALPE26)}, HALPE26),
    "plain, bare": (places(COCO17), COCO17),
}
