"""The documentation names code that is there: files, functions, API pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hmdiff"
HOPS = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (REPOSITORY / "docs" / "architecture.md").read_text())


def defined(tree: ast.AST) -> dict[str, ast.AST]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name: node for node in ast.iter_child_nodes(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize(("file", "name"), HOPS)
def test_every_hop_of_the_walks_is_there(file: str, name: str) -> None:
    place: ast.AST = ast.parse((PACKAGE / file).read_text())
    for part in name.split("."):
        assert part in defined(place), f"docs/architecture.md: {file} has no {name}"
        place = defined(place)[part]


def test_the_walks_are_read() -> None:
    assert len(HOPS) > 20


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs" / "api").glob("*.md")), ids=lambda page: page.stem)
def test_api_pages_are_about_modules(page: Path) -> None:
    modules = re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    assert modules
    for module in modules:
        assert (REPOSITORY / (module.replace(".", "/") + ".py")).is_file(), f"{page.name}: no module {module}"


def test_files_that_the_documentation_names_are_there() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]
    for page in pages:
        for name in re.findall(r"`((?:hmdiff|tests|tools|configs)/[\w/]+\.\w+)`", page.read_text()):
            assert (REPOSITORY / name).exists(), f"{page.name}: {name} is not there"


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.relative_to(REPOSITORY / "docs").as_posix() for page in (REPOSITORY / "docs").rglob("*.md")}
