"""The synthetic people that commands evaluate on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hmdiff.body.body import Body
    from hmdiff.data.synthetic.people import SyntheticHumans

PEOPLE = 500  # of a split
MAP_SIZE = 64  # pixels of the maps that tell how much is visible, and of the depths that some models read


def test_people(body: Body, image_size: int | None = None, map_size: int = 0) -> SyntheticHumans:
    """The people of the splits, the same for every checkpoint: the default data, with pictures where they are read."""
    from hmdiff.build import build_data, build_mesh
    from hmdiff.config import load_config

    pictures = [] if image_size is None else ["data.pictures=true", f"data.image_size={image_size}"]
    config = load_config(None, [*pictures, f"data.map_size={map_size}"])
    return build_data(config, body, build_mesh(config, body), full_mesh=True)
