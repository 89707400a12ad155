"""The overlay of a video: everybody's mean body over the frames, as an mp4.

It draws the reduced mesh of the synthetic images (3,000 vertices), within a pixel of the full one. Codecs: `writing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hmdiff.body.mesh_cache import load_mesh
from hmdiff.files.storage import atomic_file
from hmdiff.video.reading import ClipInfo, read_frames
from hmdiff.video.tracks import VideoTrack
from hmdiff.video.writing import open_clip
from hmdiff.viz.overlays import PALETTE, overlay

_DRAWN = 3000  # number of vertices


def draw_video(
    path: str | Path,
    info: ClipInfo,
    tracks: Sequence[VideoTrack],
    progress: Callable[[int], None] | None = None,  # called with the number of frames drawn
) -> str:  # codec
    """Write the mp4 atomically. Raises `UserError` if it cannot be encoded."""
    drawn = []
    for track in tracks:
        mesh = load_mesh(track.body, min(_DRAWN, track.body.num_vertices), fitted=False)
        small = track.body.select(mesh.coarse_ids.to(track.body.v_template.device))
        drawn.append((track, track.vertices(body=small).cpu(), mesh.coarse_faces.cpu()))
    with atomic_file(path) as temporary, open_clip(temporary, info.size, info.frame_rate, path) as writer:
        for frame in read_frames(info):
            assert frame.picture is not None
            picture = frame.picture
            here = [
                (track, vertices, faces, frame.number - int(track.frames[0]))
                for track, vertices, faces in drawn
                if track.frames[0] <= frame.number <= track.frames[-1]
            ]
            # Farthest first, so that closer people occlude others.
            for track, vertices, faces, row in sorted(here, key=lambda each: -float(each[1][each[3]][:, 2].mean())):
                body = vertices[row]
                colour = PALETTE[track.number % len(PALETTE)]
                opacity = 0.85 if track.seen[row] else 0.4
                picture = overlay(
                    picture, body, faces, body.new_zeros(3), track.focal, track.principal_point, colour, opacity
                )
            writer.write(picture)
            if progress is not None:
                progress(1)
    return writer.codec
