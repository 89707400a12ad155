"""Locations of the shipped files: assets (body, prior, checkpoint, sample images) and configs."""

from __future__ import annotations

from pathlib import Path

from hmdiff.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(kind: str, name: str) -> Path:
    # A wheel has them inside the package; a clone (and its editable install) beside the package.
    for root in (_PACKAGE / kind, _PACKAGE.parent / kind):
        if (root / name).exists():
            return root / name
    raise UserError(f"{kind}/{name}: not part of this installation of hmdiff; reinstall it")


def asset_path(name: str) -> Path:
    """Path of a shipped asset, such as ``body.npz``. Raises `UserError` if the installation lacks it."""
    return _shipped("assets", name)


def config_path(name: str) -> Path:
    """Path of a config file, or of a shipped config by name, such as ``quickstart``; it may not exist."""
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    return _shipped("configs", "quickstart.yaml").with_name(path.stem + ".yaml")
