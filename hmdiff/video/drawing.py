"""The overlay of a video: everybody's mean body over the frames, as an mp4.

Drawn is the coarser mesh of the synthetic pictures (3,000 vertices), within a pixel of the whole. OpenCV's own FFmpeg
writes MPEG-4 part 2, which VLC, ffplay and QuickTime play; browsers want H.264, which no permissively licensed wheel
encodes: ``ffmpeg -i NAME_overlay.mp4 -c:v libx264 web.mp4`` makes it. There is no sound in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2

from hmdiff.body.mesh_cache import load_mesh
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file
from hmdiff.video.reading import ClipInfo, read_frames
from hmdiff.video.tracks import VideoTrack
from hmdiff.viz.overlays import PALETTE, overlay

_DRAWN = 3000  # vertices
_CODEC = "mp4v"


def draw_video(
    path: str | Path,
    info: ClipInfo,
    tracks: Sequence[VideoTrack],
    progress: Callable[[int], None] | None = None,  # told how many frames are drawn
) -> None:
    """Write the mp4, atomically. Raises `UserError` where it cannot be encoded."""
    drawn = []
    for track in tracks:
        mesh = load_mesh(track.body, min(_DRAWN, track.body.num_vertices), fitted=False)
        small = track.body.select(mesh.coarse_ids.to(track.body.v_template.device))
        drawn.append((track, track.vertices(body=small).cpu(), mesh.coarse_faces.cpu()))
    with atomic_file(path) as temporary:
        codec = cv2.VideoWriter.fourcc(*_CODEC)
        writer = cv2.VideoWriter(str(temporary), codec, info.frame_rate, info.size)
        if not writer.isOpened():
            raise UserError(f"{path}: OpenCV cannot write an mp4 of {info.width} x {info.height} here")
        try:
            for frame in read_frames(info):
                assert frame.picture is not None
                picture = frame.picture
                here = [
                    (track, vertices, faces, frame.number - int(track.frames[0]))
                    for track, vertices, faces in drawn
                    if track.frames[0] <= frame.number <= track.frames[-1]
                ]
                # The farthest first, so that who is in front covers who is behind.
                for track, vertices, faces, row in sorted(here, key=lambda each: -float(each[1][each[3]][:, 2].mean())):
                    body = vertices[row]
                    colour = PALETTE[track.number % len(PALETTE)]
                    opacity = 0.85 if track.seen[row] else 0.4
                    picture = overlay(
                        picture, body, faces, body.new_zeros(3), track.focal, track.principal_point, colour, opacity
                    )
                writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
                if progress is not None:
                    progress(1)
        finally:
            writer.release()
