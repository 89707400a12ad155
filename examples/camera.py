"""Where a photo shows a body: the camera's matrix, the vertices before the camera, and SMPL's parameters.

python examples/camera.py photo.jpg
"""

from __future__ import annotations

import sys

from PIL import Image

from hmdiff import HMDiffPipeline


def main(photo: str) -> None:
    pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
    person = pipe(Image.open(photo), num_hypotheses=5).people[0]
    print("K", person.intrinsics.tolist())
    points = person.camera_vertices[person.selected]  # (V, 3) metres: x right, y down, z forward, the camera at 0
    pixels = person.project(points)  # (V, 2) pixels of the photo
    print(f"{points[:, 2].mean():.2f} m away, from pixel {pixels.amin(0).tolist()} to {pixels.amax(0).tolist()}")
    for name, values in person.to_smpl().items():
        print(name, tuple(values.shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
