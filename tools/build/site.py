"""A hook of mkdocs (mkdocs.yml): files outside docs/ that pages link to become part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
_OUTSIDE = re.compile(r"\]\(\.\./((?:assets/)?[\w.]+)(#[\w-]+)?\)")


def linked_files(markdown: str) -> set[str]:  # relative to the repository
    """The files one folder above a page of docs/ that it links to."""
    return {match[1] for match in _OUTSIDE.finditer(markdown)}


def on_files(files: Files, config: Any) -> Files:
    pages = [file for file in files.documentation_pages() if "/" not in file.src_uri]
    for name in sorted(set().union(*(linked_files(page.content_string) for page in pages))):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """In the site they lie in the folder of the pages, not above it."""
    return _OUTSIDE.sub(r"](\1\2)", markdown)
