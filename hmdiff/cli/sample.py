"""`hmdiff sample`: photos with keypoints or heatmaps in; meshes, arrays and a picture of every person out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.cli.sample_people import about, one_photo_s, sample_people
from hmdiff.errors import UserError
from hmdiff.names import SAVED

if TYPE_CHECKING:
    from hmdiff.cli.estimation import Estimation
    from hmdiff.cli.photo_list import Results
    from hmdiff.estimators.people import Box, PhotoPeople
    from hmdiff.heatmaps.cameras import PhotoCamera
    from hmdiff.pipeline import HMDiffPipeline

PHOTOS_AT_ONCE = 16  # sampled together, while the next ones are read and their poses estimated


def add_parser(subparsers: Any) -> None:
    from hmdiff.cli.camera import add_camera
    from hmdiff.cli.depth_maps import add_depth
    from hmdiff.cli.estimation import add_estimation
    from hmdiff.cli.sample_video import add_smoothing

    parser = arguments.new_parser(
        subparsers,
        "sample",
        "recover 3D bodies of the people in photos",
        "hmdiff sample photo.jpg --keypoints photo.json",
        "For each person it writes NAME.npz (vertices, joints, keypoints, camera, spread, the number of the selected "
        "hypothesis, modes and their weights, and the pose and shape fitted to each hypothesis), NAME.obj (the mean "
        "body), NAME.glb (mean and hypotheses), NAME.png (a picture of them over the photo and from the side) and "
        "NAME_spread.png (the selected one, coloured by spread), and NAME.html (all of it, for a browser); NAME_0, "
        "NAME_1, ... where there are several people; PHOTO_scene.glb is everybody before the photo's camera, and "
        "results.jsonl one line a person. A folder is gone on with where it was stopped, and so is a video, of "
        "which it writes NAME_track_0.npz, NAME_track_0_animated.glb, NAME_track_0.bvh, ... and NAME_overlay.mp4. "
        "Hypotheses are numbered from 0 everywhere.",
    )
    parser.add_argument(
        "photos",
        nargs="+",
        type=Path,
        metavar="PHOTO",
        help="jpg, png, webp, ...; a video (mp4, mov, ...), whose people are tracked; a folder of them; or a pattern "
        "in quotes, such as 'clips/*/*.jpg'",
    )
    parser.add_argument(
        "--keypoints",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="keypoints of any of the formats in docs/keypoints.md, one file a photo, or one about all (default: "
        "NAME.json or NAME_keypoints.json beside the photo)",
    )
    parser.add_argument(
        "--heatmaps",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="npz with heatmaps, center, side; they win over keypoints (default: NAME_heatmaps.npz beside the photo)",
    )
    parser.add_argument(
        "--box",
        type=arguments.box,
        action="append",
        metavar="X1,Y1,X2,Y2",
        help="the person's box in photo pixels; with --pose once for each person (default: the JSON's, or about the "
        "keypoints; with --pose the detector's)",
    )
    add_estimation(parser)
    add_depth(parser)
    arguments.add_checkpoint(parser)
    arguments.add_sampling(parser)
    arguments.add_guidance(parser)
    add_camera(parser)
    add_smoothing(parser)
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument(
        "--save",
        type=kinds_of_files,
        default=SAVED,
        metavar="KINDS",
        help=f"what to write of each person in a photo, of {','.join(SAVED)}; the npz is always written, and with it "
        "alone a folder of photos is done soonest (default: all)",
    )
    parser.set_defaults(run=run)


def kinds_of_files(text: str) -> tuple[str, ...]:
    """`glb,png` as a subset of `SAVED`, in the order of `SAVED`."""
    asked = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(asked - set(SAVED))
    if unknown or not asked:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose of {','.join(SAVED)}")
    return tuple(kind for kind in SAVED if kind in asked or kind == "npz")


def run(options: argparse.Namespace) -> int:
    from hmdiff.cli.depth_maps import check_depth
    from hmdiff.cli.estimation import estimation_of
    from hmdiff.cli.main import report
    from hmdiff.cli.photo_list import photos_of
    from hmdiff.cli.sample_video import check_clips
    from hmdiff.estimators.people import pair_files
    from hmdiff.files.locks import claim
    from hmdiff.files.outputs import photo_names, protect_from_clip, protect_inputs
    from hmdiff.files.storage import make_folder
    from hmdiff.video.reading import is_clip

    inputs, many = photos_of(options.photos)
    clips = [path for path in inputs if is_clip(path)]
    options.photos = [path for path in inputs if not is_clip(path)]
    check_clips(options, clips)
    if options.box is not None and len(options.photos) > 1:
        raise UserError(f"--box is about one photo, {len(options.photos)} were given; sample them one by one")
    keypoints = pair_files("--keypoints", options.keypoints, options.photos)
    heatmaps = pair_files("--heatmaps", options.heatmaps, options.photos)
    source = estimation_of(options)
    check_depth(options)
    protect_inputs(options.output, options.photos, inputs_of(options, keypoints, heatmaps))
    named_clips = list(zip(clips, photo_names(clips), strict=True))
    for path, name in named_clips:
        protect_from_clip(options.output, name, path)
    make_folder(options.output)
    files = list(zip(options.photos, keypoints, heatmaps, photo_names(options.photos), strict=True))
    # Two runs in one folder would overwrite each other's lines of results.jsonl.
    with claim(options.output, "wait for it, or give another --output", name=None):
        failures = _sampled(options, source, files, many, named_clips)
    for failure in failures:
        report(failure)
    return 2 if failures else 0


def _sampled(
    options: argparse.Namespace,
    source: Estimation | None,
    files: list[tuple[Path, Path | None, Path | None, str]],  # photo, keypoints, heatmaps, name
    many: bool,  # a folder or a pattern was given: skip finished photos
    named_clips: list[tuple[Path, str]],
) -> list[str]:  # error messages
    from tqdm import tqdm

    from hmdiff.cli.camera import cameras
    from hmdiff.cli.photo_list import Results
    from hmdiff.cli.sample_video import sample_clips

    results = Results.open(options.output, settings_of(options))
    if many:
        todo = [each for each in files if not results.done(each[0])]
        if len(todo) < len(files):
            print(f"{len(files) - len(todo)} of {len(files)} photos are done (see {results.path})", flush=True)
        files = todo
    results.restart([photo for photo, *_ in files])
    print(f"loading {options.checkpoint}", flush=True)
    run = Run(options, source, cameras(options), results)
    bar = tqdm(total=len(files), desc="photos", unit="photo", disable=None if len(files) > 1 else True, leave=False)
    started = time.perf_counter()
    run.everything(files, bar.update)
    bar.close()
    failures = run.failures
    if len(files) > PHOTOS_AT_ONCE:  # until here every part of the folder had its own line
        failed = f"; {len(failures)} of them could not be done" if failures else ""
        seconds = time.perf_counter() - started
        print(f"in all {run.people} people in {len(files)} photos, {seconds:.0f} s{failed}", flush=True)
    if source is not None and named_clips:
        failures = failures + sample_clips(options, named_clips, source, run.camera_of, results.settings)
    return failures


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that determine a result besides the photo, as stored in results.jsonl."""
    names = (
        "checkpoint",
        "num_hypotheses",
        "steps",
        "sampler",
        "eta",
        "seed",
        "guidance",
        "strength",
        "last",
        "focal",
        "principal_point",
        "pose",
        "max_people",
    )
    settings = {name: getattr(options, name, None) for name in names}
    for name in ("keypoints", "heatmaps", "intrinsics", "depth"):
        if given := getattr(options, name, None):
            settings[name] = [str(each) for each in given] if isinstance(given, list) else str(given)
    kinds = getattr(options, "save", SAVED)
    return settings if set(kinds) == set(SAVED) else settings | {"save": ",".join(kinds)}


class Run:
    """Runs photos in batches through one pipeline, which is loaded at the first photo with a person."""

    def __init__(
        self,
        options: argparse.Namespace,
        source: Estimation | None,
        camera_of: Callable[[Path], PhotoCamera],
        results: Results,
    ) -> None:
        self.options, self.source, self.camera_of, self.results = options, source, camera_of, results
        self.failures: list[str] = []
        self.people = 0  # sampled so far
        self._pipeline: HMDiffPipeline | None = None
        self._sizes: dict[tuple[int, ...], PhotoPeople] = {}  # a photo of each, upright or not

    def everything(
        self,
        files: Sequence[tuple[Path, Path | None, Path | None, str]],  # photo, keypoints, heatmaps, name
        progress: Callable[[int], Any],
    ) -> None:
        """Sample photos while a second thread reads the next ones and estimates their poses."""
        from concurrent.futures import ThreadPoolExecutor

        parts = [files[first : first + PHOTOS_AT_ONCE] for first in range(0, len(files), PHOTOS_AT_ONCE)]
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.read, part) for part in parts[:1]]
            for number, part in enumerate(parts):
                found = ahead.pop().result()
                ahead = [reader.submit(self.read, following) for following in parts[number + 1 : number + 2]]
                self.photos(found)
                progress(len(part))

    def read(
        self,
        files: Sequence[tuple[Path, Path | None, Path | None, str]],
    ) -> list[tuple[Path, str, PhotoPeople | UserError | OSError]]:
        """The people in each photo, or the error that prevented reading it."""
        found: list[tuple[Path, str, PhotoPeople | UserError | OSError]] = []
        for photo, keypoints, heatmaps, name in files:
            try:
                seen = _read(photo, keypoints, heatmaps, self.options.box, self.source, self.camera_of(photo))
                found.append((photo, name, seen))
            except (UserError, OSError) as error:
                found.append((photo, name, error))
        return found

    def photos(self, read: Sequence[tuple[Path, str, PhotoPeople | UserError | OSError]]) -> None:
        """Sample the detected people and write their files."""
        from hmdiff.cli.depth_maps import with_depth
        from hmdiff.cli.main import warn

        options = self.options
        people: list[PhotoPeople] = []
        names: dict[Path, str] = {}
        for photo, name, found in read:
            if isinstance(found, UserError | OSError):
                self._failed(photo, one_photo_s(found))
                continue
            for note in found.notes:
                warn(note)
            self._compare_sizes(found)
            people.append(found)
            names[photo] = name
        if not people:
            return
        if self._pipeline is None:
            self._pipeline = arguments.load_pipeline(options.checkpoint, arguments.resolve_device(options.device))
            arguments.check_sampling(self._pipeline, options)
        people, without = with_depth(people, self._pipeline, options)
        self.failures += without
        if people:
            self.people += sum(len(photo.heatmaps) for photo in people)
            self.failures += sample_people(self._pipeline, people, options, self.results, names)

    def _compare_sizes(self, found: PhotoPeople) -> None:
        """One camera's photos have one size; one of another was cut out, and its centre is not the camera's."""
        from hmdiff.cli.main import warn

        options, size = self.options, tuple(sorted(found.size))
        if options.focal is None or options.principal_point is not None or options.intrinsics is not None:
            return
        if len(self._sizes) == 1 and size not in self._sizes:
            sizes = (
                f"{each.photo} has {each.size[0]} x {each.size[1]} pixels" for each in (*self._sizes.values(), found)
            )
            warn(
                f"{', '.join(sizes)}, with one --focal: each centre is taken for the principal point; where one "
                "was cut out of another, give --principal-point CX,CY or --intrinsics FILE"
            )
        self._sizes.setdefault(size, found)

    def _failed(self, photo: Path, error: UserError) -> None:
        text = about(photo, error)
        self.failures.append(text)
        if len(self.options.photos) > 1:  # a single bad photo writes nothing
            self.results.add(photo, error=text)


def _read(
    photo: Path,
    keypoints: Path | None,
    heatmaps: Path | None,
    boxes: list[Box] | None,
    source: Estimation | None,
    camera: PhotoCamera,
) -> PhotoPeople:
    """Read one photo. A single box also sets the crop of keypoints; several boxes go to the pose estimator."""
    from hmdiff.estimators.people import read_people

    if boxes is not None and len(boxes) > 1 and source is None:
        raise UserError(f"{len(boxes)} times --box, but only --pose MODEL takes several people's; give one")
    return read_people(photo, keypoints, heatmaps, boxes[0] if boxes else None, source, boxes, camera)


def inputs_of(
    options: argparse.Namespace, keypoints: Sequence[Path | None], heatmaps: Sequence[Path | None]
) -> list[Path | None]:
    """Every file that is read, including those found beside a photo."""
    from hmdiff.estimators.people import heatmaps_beside, keypoints_beside

    beside = [each for photo in options.photos for each in (keypoints_beside(photo), heatmaps_beside(photo))]
    depth = [Path(name) for name in options.depth]
    return [*options.photos, *keypoints, *heatmaps, *beside, *depth, options.intrinsics]
