"""Named parts of 3DPW that the occlusion papers report: lists of sequences and frames.

3DPW-OC: Zhang et al., CVPR 2020 (sequences in which things hide people); 3DPW-PC: Sun et al. (ROMP), ICCV 2021 (frames
in which people hide each other), both over all three splits; 3DPW-Crowd: Choi et al. (3DCrowdNet), CVPR 2022, of the
validation split. As ROMP's and JOTR's code select them: a frame range holds its first frame and not its last. OC and
PC hold sequences of the training split: a model that was trained on 3DPW's training split has seen them.
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

# Which of 3DPW's own splits a named part is taken from.
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
    """Whether the part may hold frames of that sequence."""
    if split == "3dpw_oc":
        return sequence.rpartition("_")[0] in OC_SEQUENCES
    if split == "3dpw_pc":
        return sequence in PC_FRAMES
    return split != "3dpw_crowd" or sequence in CROWD_SEQUENCES


def has_frame(
    split: str,  # a key of SPLITS_OF
    sequence: str,
    frame: int,  # position in the sequence, which is the image's number
) -> bool:
    """Whether the part holds that frame of that sequence."""
    if not has_sequence(split, sequence):
        return False
    first, end = PC_FRAMES[sequence] if split == "3dpw_pc" else (0, frame + 1)
    return first <= frame < end
