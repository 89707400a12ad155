"""Output names of commands that read photos, one per person, and protection of files that hmdiff did not write."""

from __future__ import annotations

import glob
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from hmdiff.errors import UserError

SCENE = "_scene.glb"
OVERLAY = "_overlay.mp4"
PERSON_FILES = (".npz", ".html", ".obj", ".glb", ".png", "_spread.png", SCENE)
OURS = "spread_mm"  # an array of every npz written by `hmdiff sample`, in any version


def photo_names(photos: Sequence[Path]) -> list[str]:
    """A unique name for every photo: its stem, prefixed by parent folders where several photos share one."""
    depth = [0] * len(photos)

    def name(index: int) -> str:
        folders = photos[index].absolute().parts[1:-1]
        return "_".join((*folders[len(folders) - depth[index] :], photos[index].stem))

    while True:
        names = [name(index) for index in range(len(photos))]
        clashing = [index for index, each in enumerate(names) if names.count(each) > 1]
        deeper = [i for i in clashing if depth[i] < len(photos[i].absolute().parts) - 2]
        if not deeper:
            break
        for index in deeper:
            depth[index] += 1
    for index, each in enumerate(names):  # the same photo given twice
        copy = 2
        while names[index] in names[:index]:
            names[index], copy = f"{each}-{copy}", copy + 1
    return names


def output_names(
    photos: Sequence[Path],
    counts: Sequence[int],  # number of people in each
    bases: Sequence[str] | None = None,  # the photos' unique names; None: `photo_names`
    taken: Iterable[str] = (),  # names in use
) -> dict[tuple[int, int], str]:
    """(photo, person) -> unique name: the photo's, _i if there are several people, -2 if the name is in use."""
    names: dict[tuple[int, int], str] = {}
    bases = photo_names(photos) if bases is None else bases
    others = set(taken)
    for number, count in enumerate(counts):
        for person in range(count):
            base = bases[number] + (f"_{person}" if count > 1 else "")
            name, copy = base, 2
            while name in others:
                name, copy = f"{base}-{copy}", copy + 1
            names[number, person] = name
            others.add(name)
    return names


def protect_inputs(
    folder: Path,
    photos: Sequence[Path],
    inputs: Iterable[Path | None],  # all input files: photos, keypoints, heatmaps, depth, cameras
    suffixes: Sequence[str] = PERSON_FILES,
) -> None:
    """Refuse, before any work, an output that would replace an input or a file that hmdiff did not write.

    Raises:
        UserError: names the file and suggests another folder.
    """
    if not folder.is_dir():
        return
    there = {path.name: path for path in folder.iterdir()}
    read = {path.resolve() for path in inputs if path is not None and path.exists()}
    for stem in photo_names(photos):
        for suffix in suffixes:
            for name, path in there.items():
                if not name.endswith(suffix) or not _is_name_of(name.removesuffix(suffix), stem):
                    continue
                if path.resolve() in read:
                    raise UserError(f"{path}: is read, and would be replaced by the result; give another --output")
                if suffix in PERSON_FILES and not is_ours(path, suffix):
                    raise UserError(
                        f"{path}: is there already and was not written by hmdiff; move it, or give another --output"
                    )


def _is_name_of(name: str, stem: str) -> bool:
    """Whether it is `stem`, possibly with a person's or a copy's number."""
    if not name.startswith(stem):
        return False
    rest = name[len(stem) :]
    return rest == "" or (rest[0] in "_-" and rest[1:].replace("-", "").isdigit())


def is_ours(path: Path, suffix: str) -> bool:
    """Whether hmdiff wrote the file: its npz lies beside it; for a scene, the npz of any of its people."""
    stem = path.name.removesuffix(suffix)
    names = [path.name] if suffix == ".npz" else [f"{stem}.npz"]
    if suffix == SCENE:
        names += [other.name for other in path.parent.glob(f"{glob.escape(stem)}_[0-9]*.npz")]
    for name in names:
        try:
            with zipfile.ZipFile(path.with_name(name)) as archive:
                if f"{OURS}.npy" in archive.namelist():
                    return True
        except (OSError, zipfile.BadZipFile):
            continue
    return False


def protect_from_clip(folder: Path, name: str, clip: Path) -> None:
    """The same for a video's results, NAME_track_0.npz, ... and NAME_overlay.mp4. Raises `UserError`."""
    overlay = folder / f"{name}{OVERLAY}"
    if not overlay.exists():
        return
    if overlay.resolve() == clip.resolve():
        raise UserError(f"{overlay}: is read, and would be replaced by the result; give another --output")
    if not tracks_of(folder, name):
        raise UserError(f"{overlay}: is there already and was not written by hmdiff; move it, or give another --output")


def tracks_of(folder: Path, name: str) -> list[Path]:
    """The npz files of a video's tracks that `hmdiff sample` wrote."""
    return [path for path in sorted(folder.glob(f"{glob.escape(name)}_track_[0-9]*.npz")) if is_ours(path, ".npz")]
