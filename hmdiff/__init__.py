"""hmdiff: human mesh recovery by reverse diffusion, several calibrated 3D bodies from one photo.

`import hmdiff` is fast: the names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmdiff.heatmaps import Heatmaps
    from hmdiff.pipeline import HMDiffPipeline, MeshOutput

__version__ = "0.1.0"
__all__ = ["HMDiffPipeline", "Heatmaps", "MeshOutput", "__version__"]

_HOME = {"HMDiffPipeline": "hmdiff.pipeline", "MeshOutput": "hmdiff.pipeline", "Heatmaps": "hmdiff.heatmaps"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
