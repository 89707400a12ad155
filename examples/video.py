"""Track everybody in a video and write what `hmdiff sample clip.mp4` writes.

python examples/video.py clip.mp4 outputs
"""

from __future__ import annotations

import sys

from hmdiff import HMDiffPipeline


def main(clip: str, folder: str) -> None:
    pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
    video = pipe.video(clip, num_hypotheses=4)
    for note in video.notes:
        print(note)
    for track in video.tracks:
        hips = track.vertices().mean(1)  # (frames, 3) metres, the camera's frame
        print(f"track {track.number}: {len(track.frames)} frames, {hips[0, 2]:.1f} to {hips[-1, 2]:.1f} m away")
    for path in video.save(folder):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
