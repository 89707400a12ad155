"""Subsets of 3DPW that occlusion papers report: lists of sequences and frames.

3DPW-OC: Zhang et al., CVPR 2020 (sequences with occluding objects); 3DPW-PC: Sun et al. (ROMP), ICCV 2021 (frames in
which people occlude each other), both over all three splits; 3DPW-Crowd: Choi et al. (3DCrowdNet), CVPR 2022, from the
validation split. Selected as in ROMP's and JOTR's code: a frame range includes its first frame and excludes its last.
OC and PC contain training sequences, which a model trained on 3DPW has seen.
"""

from __future__ import annotations

SPLITS = ("train", "validation", "test")

OC_SEQUENCES = frozenset(
    """
    courtyard_backpack courtyard_basketball courtyard_bodyScannerMotions courtyard_box courtyard_golf
    courtyard_jacket courtyard_laceShoe downtown_stairs flat_guitar flat_packBags outdoors_climbing
    outdoors_crosscountry outdoors_fencing outdoors_freestyle outdoors_golf outdoors_parcours outdoors_slalom
    """.split()
)
PC_FRAMES = {
    "courtyard_basketball_00": (200, 280),
    "courtyard_captureSelfies_00": (500, 600),
    "courtyard_dancing_00": (60, 370),
    "courtyard_dancing_01": (60, 270),
    "courtyard_hug_00": (100, 500),
    "downtown_bus_00": (1620, 1900),
}
CROWD_SEQUENCES = frozenset({"courtyard_hug_00", "courtyard_dancing_00"})

# The 3DPW splits that a subset is taken from.
SPLITS_OF = {
    **{split: (split,) for split in SPLITS},
    "all": SPLITS,
    "3dpw_oc": SPLITS,
    "3dpw_pc": SPLITS,
    "3dpw_crowd": ("validation",),
}


def has_sequence(
    split: str,  # a key of SPLITS_OF
    sequence: str,  # downtown_bus_00
) -> bool:
    """Whether the subset may contain frames of that sequence."""
    if split == "3dpw_oc":
        return sequence.rpartition("_")[0] in OC_SEQUENCES
    if split == "3dpw_pc":
        return sequence in PC_FRAMES
    return split != "3dpw_crowd" or sequence in CROWD_SEQUENCES


def has_frame(
    split: str,  # a key of SPLITS_OF
    sequence: str,
    frame: int,  # position in the sequence, equal to the image's number
) -> bool:
    """Whether the subset contains that frame of that sequence."""
    if not has_sequence(split, sequence):
        return False
    first, end = PC_FRAMES[sequence] if split == "3dpw_pc" else (0, frame + 1)
    return first <= frame < end
