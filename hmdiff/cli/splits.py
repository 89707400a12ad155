"""The synthetic people used by the evaluation commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hmdiff.body.body import Body
    from hmdiff.data.synthetic.people import SyntheticHumans
    from hmdiff.pipeline import HMDiffPipeline

PEOPLE = 500  # per split
MAP_SIZE = 64  # side in pixels of the visibility maps, and of the depth maps that some models read
_made: dict[tuple[str, int | None, int], SyntheticHumans] = {}


def people_for(pipeline: HMDiffPipeline, maps: bool = False, picture: int | None = None) -> SyntheticHumans:
    """The people of the splits with the inputs that a checkpoint reads: images or depth; `maps` always adds maps.

    `picture` is the image size for a checkpoint that does not read images.
    """
    model = pipeline.model.config
    size = picture if model.inputs == "heatmaps" else model.image_size
    return test_people(pipeline.body, size, MAP_SIZE if maps or model.depth_map else 0)


def test_people(body: Body, image_size: int | None = None, map_size: int = 0) -> SyntheticHumans:
    """The people of the splits, the same for every checkpoint: the default data, with images if requested."""
    from hmdiff.build import build_data, build_mesh
    from hmdiff.config import load_config

    key = (body.name, image_size, map_size)
    if key not in _made:
        pictures = [] if image_size is None else ["data.pictures=true", f"data.image_size={image_size}"]
        config = load_config(None, [*pictures, f"data.map_size={map_size}"])
        _made[key] = build_data(config, body, build_mesh(config, body), full_mesh=True)
    return _made[key]
