"""Where the files shipped with the package lie: assets (body, prior, checkpoint, sample pictures) and configs."""

from __future__ import annotations

from pathlib import Path

from hmdiff.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(kind: str, name: str) -> Path:
    # A wheel carries them inside the package, a clone (and an editable install of it) beside the package.
    for root in (_PACKAGE / kind, _PACKAGE.parent / kind):
        if (root / name).exists():
            return root / name
    raise UserError(f"{kind}/{name}: not part of this installation of hmdiff; reinstall it")


def asset_path(name: str) -> Path:
    """Path of a shipped asset, such as ``body.npz``. Raises `UserError` when the installation lacks it."""
    return _shipped("assets", name)


def config_path(name: str) -> Path:
    """A config's file by its path, or a shipped one by its name, such as ``quickstart``; it need not be there."""
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    return _shipped("configs", "quickstart.yaml").with_name(path.stem + ".yaml")
