"""Who may import whom. The imports are read from the source, not run; a new module must be given its place here."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hmdiff"

# A module imports from lower layers, and from its own, but for the rooms, which never import each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "names"}),
    frozenset({"body.skeletons", "config", "files", "geometry"}),
    frozenset({"body", "data.sample", "heatmaps", "viz.canvas", "viz.renderer", "viz.renderer_numba"}),
    frozenset(
        {
            "data",
            "diffusion",
            "estimators",
            "evaluate.hand_metrics",
            "evaluate.metrics",
            "evaluate.uncertainty_metrics",
            "losses",
            "models",
        }
    ),
    frozenset({"build", "evidence", "output", "recovered", "pipeline", "video", "viz"}),
    frozenset({"evaluate"}),
    frozenset({"train"}),
    frozenset({"lab"}),
    frozenset({"__main__", "cli"}),
)
ROOMS = 3
# Beyond the layers: what these import of ours, at most.
AT_MOST = {"geometry": frozenset[str](), "body.skeletons": frozenset[str]()}
NEVER = {"models": frozenset({"data.sample"})}  # models never see a data set, not even its type

# Not installed by default, or slow to load: only inside functions, but for the modules that exist for them.
OPTIONAL = {
    "smplx",
    "numba",
    "mmpose",
    "mmdet",
    "mmcv",
    "mmengine",
    "anny",
    "robust_laplacian",
    "transformers",
    "ai_edge_litert",
    "mediapipe",
    "av",
}
MADE_FOR_THEM = {"numba": {"viz.renderer_numba"}}


def source_files(package: Path) -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}


def place(module: str) -> tuple[str, int] | None:
    """The entry of the table that holds the module, the longest that fits, and its layer."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        entry = ".".join(parts[:length])
        for layer, entries in enumerate(LAYERS):
            if entry in entries:
                return entry, layer
    return None


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_level: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every absolute import: the module, and the names taken from it. Relative ones are not the style of the house."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            yield child
            yield from walk(child)

    for node in walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; name the module in full"
            yield node.module or "", tuple(alias.name for alias in node.names)


def ours(path: Path, known: dict[str, Path], top_level: bool = False) -> set[str]:
    """Modules of the package that a file imports, `from hmdiff.data import sample` counting as `data.sample`."""
    found = set()
    for module, names in imports(path, top_level):
        if module.split(".")[0] != PACKAGE.name:
            continue
        base = module.removeprefix(PACKAGE.name).lstrip(".")
        below = {f"{base}.{name}".lstrip(".") for name in names} & set(known)
        found |= below or ({base} if base else set())
    return found


def violations(package: Path) -> list[str]:
    known = source_files(package)
    found = []
    for module, path in sorted(known.items()):
        here = place(module)
        if here is None:
            found.append(f"{module}: has no layer; give it one in LAYERS of {Path(__file__).name}")
            continue
        entry, layer = here
        for other in sorted(ours(path, known)):
            there = place(other)
            if there is None or other == module:
                continue
            other_entry, other_layer = there
            allowed = other_layer < layer or (other_layer == layer and (layer != ROOMS or other_entry == entry))
            allowed &= entry not in AT_MOST or other_entry in AT_MOST[entry]
            allowed &= other_entry not in NEVER.get(entry, ())
            if not allowed:
                found.append(f"{module} (layer {layer}) imports {other} (layer {other_layer})")
    return found


def test_imports_go_downwards() -> None:
    assert not violations(PACKAGE)


def test_no_module_needs_itself() -> None:
    """Nor by an import inside a function, nor for a type alone."""
    known = source_files(PACKAGE)
    graph = {module: ours(path, known) - {module} for module, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_optional_packages_are_loaded_where_they_are_used() -> None:
    found = [
        f"{module} imports {imported} at the top"
        for module, path in source_files(PACKAGE).items()
        for imported, _ in imports(path, top_level=True)
        if (root := imported.split(".")[0]) in OPTIONAL and module not in MADE_FOR_THEM.get(root, ())
    ]
    assert not found


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("geometry.py", "from hmdiff.errors import UserError", "geometry .* imports errors"),
        ("files/storage.py", "import hmdiff.train.loop", "files.storage .* imports train.loop"),
        ("diffusion/dat.py", "from hmdiff.models.denoiser import X", "diffusion.dat .* imports models.denoiser"),
        ("models/x.py", "def f():\n    from hmdiff.evaluate import metrics", "models.x .* imports evaluate.metrics"),
        ("models/y.py", "from hmdiff.data.sample import Sample", "models.y .* imports data.sample"),
        ("viz/renderer.py", "from hmdiff.data import synthetic", "viz.renderer .* imports data.synthetic"),
        ("data/sample.py", "from hmdiff.data.synthetic.people import x", "data.sample .* imports data.synthetic"),
        ("evaluate/evaluation.py", "from hmdiff.train.loop import x", "evaluate.evaluation .* imports train.loop"),
        ("nobody_knows.py", "", "nobody_knows: has no layer"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, message: str) -> None:
    for name in (file, "models/denoiser.py", "data/synthetic.py", "evaluate/metrics.py", "train/loop.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("from hmdiff.errors import UserError\n")
    (tmp_path / file).write_text(line)
    (found,) = violations(tmp_path)
    assert re.match(message, found)


def test_few_things_lie_beside_the_rooms() -> None:
    loose = sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.name == "py.typed")
    assert len(loose) <= 12, f"beside the rooms' folders lie {', '.join(loose)}"


def test_every_package_is_in_the_wheel() -> None:
    """setup.cfg lists the packages by hand, since assets/ and configs/ become packages only in a wheel."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    listed = set(settings["options"]["packages"].split()) - {"hmdiff.assets", "hmdiff.configs"}
    assert listed == {".".join(path.parent.relative_to(REPOSITORY).parts) for path in PACKAGE.rglob("__init__.py")}


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    folders = {path.parent.relative_to(REPOSITORY / "tests") for path in (REPOSITORY / "tests").rglob("test_*.py")}
    strays = {folder.parts[0] for folder in folders if folder.parts} - rooms - {"tools"}
    assert not strays, f"tests/{min(strays)} is no room of hmdiff"


def test_importing_the_package_is_light() -> None:
    command = [sys.executable, "-c", "import sys, hmdiff; print(*sys.modules)"]
    output = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=True).stdout
    loaded = {name.split(".")[0] for name in output.split()}
    assert "hmdiff" in loaded
    assert not loaded & (OPTIONAL | {"matplotlib", "diffusers", "timm", "accelerate", "trimesh", "cv2", "tensorboard"})
