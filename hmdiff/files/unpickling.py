"""Reads pickled model and label files without running them: a restricted unpickler.

Pickle is a program that may call anything. Here it may build plain containers, numpy arrays, and inert shells that
stand for scipy sparse matrices and chumpy arrays (what SMPL and MANO were published with); `load_pickle` then turns the
shells into numpy arrays. Every other name is refused. Our choice; the layouts are those of scipy's and chumpy's state.
"""

from __future__ import annotations

import codecs
import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from hmdiff.errors import UserError

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import _reconstruct, scalar  # type: ignore[no-redef]


class _Shell:
    """Stands for an object of a class that is not loaded: keeps its state, does nothing."""

    kind = ""

    state: dict[str, Any]

    def __new__(cls, *args: object, **kwargs: object) -> _Shell:
        shell = object.__new__(cls)
        shell.state = {}
        return shell

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


def _copyreg_reconstructor(cls: type, base: type, state: object) -> object:
    """`copyreg._reconstructor`, for shells alone: how protocols 0 and 1 make an object."""
    if not (isinstance(cls, type) and issubclass(cls, _Shell)):
        raise pickle.UnpicklingError("only a shell may be reconstructed")
    return cls()


def _latin1_encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, as numpy's protocol-2 arrays use it, with no other codec."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


_MULTIARRAY = {"_reconstruct": _reconstruct, "scalar": scalar}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(module, name): function for module in ("numpy.core.multiarray", "numpy._core.multiarray")
       for name, function in _MULTIARRAY.items()},
    ("_codecs", "encode"): _latin1_encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("copy_reg", "_reconstructor"): _copyreg_reconstructor,
    ("copyreg", "_reconstructor"): _copyreg_reconstructor,
    ("__builtin__", "object"): object,
    ("builtins", "object"): object,
}  # fmt: skip
_SPARSE = ("csc_matrix", "csr_matrix", "coo_matrix", "csc_array", "csr_array", "coo_array")


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Dots in a name (protocol 4) walk attributes: never needed here.
        if "." not in name:
            if module.split(".")[0] == "chumpy":
                return type("_ChumpyShell", (_Shell,), {"kind": name})
            if module.startswith("scipy.sparse") and name in _SPARSE:
                return type("_SparseShell", (_Shell,), {"kind": name})
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _chumpy_array(shell: _Shell) -> np.ndarray:
    if "x" in shell.state:  # chumpy.ch.Ch: a constant
        return np.asarray(_to_array(shell.state["x"]))
    if "a" in shell.state and "idxs" in shell.state:  # chumpy.reordering.Select and its kin: a[idxs], reshaped
        flat = np.asarray(_to_array(shell.state["a"])).ravel()[np.asarray(_to_array(shell.state["idxs"])).ravel()]
        shape = shell.state.get("preferred_shape")
        return flat if shape is None else flat.reshape(np.asarray(_to_array(shape)).astype(int).ravel())
    raise pickle.UnpicklingError(f"chumpy object {shell.kind} of an unknown layout")


def _sparse_array(shell: _Shell) -> np.ndarray:
    state = shell.state
    shape = tuple(int(size) for size in state["_shape" if "_shape" in state else "shape"])
    if shell.kind.startswith("coo"):
        row, column = (state["row"], state["col"]) if "row" in state else state["coords"]
        return scipy.sparse.coo_matrix((state["data"], (row, column)), shape=shape).toarray()
    matrix = scipy.sparse.csc_matrix if shell.kind.startswith("csc") else scipy.sparse.csr_matrix
    return matrix((state["data"], state["indices"], state["indptr"]), shape=shape).toarray()


def _to_array(value: Any) -> Any:
    """Shells to numpy arrays, through dicts, lists and tuples; anything else as it is."""
    if isinstance(value, _Shell):
        return _sparse_array(value) if value.kind in _SPARSE else _chumpy_array(value)
    if isinstance(value, dict):
        return {_to_text(key): _to_array(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_array(item) for item in value)
    return value


def _to_text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def load_pickle(path: str | Path) -> Any:
    """Content of a pickle of containers, numbers, strings and arrays; sparse and chumpy arrays come dense.

    Raises:
        UserError: the file cannot be read, is not a pickle, or asks for anything else to be constructed.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return unpickle(content, path)


def unpickle(
    content: bytes,
    path: str | Path,  # for the message
) -> Any:
    """`load_pickle` for bytes that were already read, such as an object array's inside an npz."""
    try:
        # latin1: the published files were written by Python 2.
        return _to_array(_RestrictedUnpickler(io.BytesIO(content), encoding="latin1").load())
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(
            f"{path}: not a pickle of plain arrays ({error}); download it again from its publisher"
        ) from None
