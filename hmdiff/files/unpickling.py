"""Pickled model and label files as plain values: containers, numbers, text and numpy arrays. Nothing is executed.

`hmdiff.files.pickle_machine` returns shells; here each is converted to an array with checks. A numpy array is
`frombuffer` over the file's bytes, with a dtype from an allow-list (never the pickled state of a dtype, which numpy
trusts). scipy's sparse matrices (SMPL's joint regressor) and chumpy's arrays (in published SMPL and MANO files) become
dense. Time and memory are bounded by the file's length: shared parts are converted once. Our choice; the layouts are
numpy's, scipy's and chumpy's.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.errors import UserError
from hmdiff.files.pickle_machine import Name, PickleError, Shell, run_pickle

MAX_BYTES = 1 << 30  # pickle size in bytes
_MAX_DEPTH = 64
_MAX_NODES = 8_000_000  # visited values
_SHARED = 1 << 26  # bytes allowed for values referenced more than once, beyond sixteen times the file size
_SLACK = 1 << 28  # bytes allowed for dense copies of sparse arrays etc., beyond four times the file size

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_BUILTINS = ("__builtin__", "builtins")
_COPYREG = ("copy_reg", "copyreg")
_SPARSE = ("csc_matrix", "csr_matrix", "coo_matrix", "csc_array", "csr_array", "coo_array")
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    *((module, name) for module in _MULTIARRAY for name in ("_reconstruct", "scalar")),
    *((module, "_frombuffer") for module in _NUMERIC),
    *((module, name) for module in _BUILTINS for name in ("object", "bytes")),
    *((module, "_reconstructor") for module in _COPYREG),
}
_KINDS = re.compile(r"[<>=|]?([biufSUO?])(\d{0,6})")  # allowed dtypes


def load_pickle(path: str | Path) -> Any:
    """Content of a pickle of containers, numbers, strings and arrays; sparse and chumpy arrays become dense.

    Raises:
        UserError: the file cannot be read, is not a pickle, or constructs any other object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; no pickle of more than {MAX_BYTES:,} is read")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return unpickle(content, path)


def unpickle(
    content: bytes,
    path: str | Path,  # for the message
) -> Any:
    """`load_pickle` for bytes that were already read, such as an object array inside an npz."""
    try:
        return _Reader(len(content)).read(run_pickle(content, _allowed), 0)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: not a pickle of plain arrays ({reason}); download it again from its publisher"
        ) from None


def _allowed(name: Name) -> bool:
    return name in _ALLOWED or _is_chumpy(name) or _is_sparse(name)


def _is_chumpy(name: Name) -> bool:
    return name.module.split(".")[0] == "chumpy" and name.name.isidentifier()


def _is_sparse(name: Name) -> bool:
    return name.module.split(".")[:2] == ["scipy", "sparse"] and name.name in _SPARSE


class _Reader:
    """Converts the interpreter's output to plain values, each shared part once, within a budget."""

    def __init__(self, size: int) -> None:
        self.budget = 4 * size + _SLACK  # bytes that may still be allocated
        self.nodes = 0
        self.most = 16 * size + _SHARED
        self.sizes: dict[int, int] = {}  # by id, see `_size`
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # keeps the objects alive whose ids are in `done`
        self.open: set[int] = set()

    def read(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        self.nodes += 1
        if depth > _MAX_DEPTH or self.nodes > _MAX_NODES or id(value) in self.open:
            raise PickleError("nested too deeply, too large, or in a circle")
        self.open.add(id(value))
        result = self._made(value, depth + 1)
        self.open.discard(id(value))
        if isinstance(result, list | tuple | dict | np.ndarray):
            self.sizes[id(result)] = self._size(result)
        self.done[id(value)] = result
        self.kept.append(value)
        return result

    def _made(self, value: Any, depth: int) -> Any:
        if isinstance(value, list):
            self.nodes += len(value)
            return [self.read(item, depth) for item in value]
        if isinstance(value, Name):
            raise PickleError(f"{value.module}.{value.name} where a value was expected")
        if isinstance(value, tuple):
            self.nodes += len(value)
            return tuple(self.read(item, depth) for item in value)
        if isinstance(value, dict):
            self.nodes += len(value)
            return {_text(key): self.read(item, depth) for key, item in value.items()}
        assert isinstance(value, Shell)
        name = value.name
        if name.name == "_reconstructor":
            value, name = _reconstructed(value)
        if _is_sparse(name):
            return self._sparse(name.name, value, depth)
        if _is_chumpy(name):
            return self._chumpy(name.name, value, depth)
        if name.name == "_reconstruct":
            return self._array(value, depth)
        if name.name == "_frombuffer":
            data, dtype, shape, order = value.arguments
            return self._values(data, _dtype(dtype), shape, order == "F", depth)
        if name.name == "scalar":
            dtype, data = value.arguments
            return self._values(data, _dtype(dtype), (), False, depth)[()]
        if name.name == "encode":
            return self._encoded(value)
        if name.name == "bytes" and value.arguments == ():
            return b""
        if name.name == "OrderedDict":
            pairs = value.arguments[0] if value.arguments else ()
            return self.read({**_pairs(pairs), **(value.state or {})}, depth)
        raise PickleError(f"{name.module}.{name.name} where a value was expected")

    def _size(self, made: list | tuple | dict | np.ndarray) -> int:
        """Bytes of the value as one array, shared values counted at each reference.

        A few hundred bytes can reference 2^40 numbers, and np.asarray would visit them all.
        """
        size = made.nbytes if isinstance(made, np.ndarray) else 8 * len(made)
        if not isinstance(made, np.ndarray) or made.dtype == object:
            parts = made.values() if isinstance(made, dict) else made.flat if isinstance(made, np.ndarray) else made
            size += sum(self.sizes.get(id(part), 8) for part in parts)
        if size > self.most:
            raise PickleError("the same values referenced again and again: far more data than the file holds")
        return size

    def _spend(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise PickleError("far more data than the file holds")

    def _encoded(self, value: Shell) -> bytes:
        """`_codecs.encode` to latin1: the encoding of Python 3 bytes, and so of numpy data, in protocol 2."""
        text, *encoding = value.arguments
        if not isinstance(text, str) or encoding not in ([], ["latin1"], ["latin-1"]):
            raise PickleError("a codec other than latin1 is not allowed")
        self._spend(len(text))
        return text.encode("latin1")

    def _array(self, value: Shell, depth: int) -> np.ndarray:
        state = value.state
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise PickleError("an array without its data")
        shape, dtype, fortran, data = state[-4:]
        return self._values(data, _dtype(dtype), shape, bool(fortran), depth)

    def _values(self, data: Any, dtype: str, shape: Any, fortran: bool, depth: int) -> np.ndarray:
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n < 2**40 for n in shape):
            raise PickleError(f"an array of shape {shape!r}"[:80])
        if len(shape) > 8:
            raise PickleError("an array of more than 8 axes")
        count, order = math.prod(shape), "F" if fortran else "C"
        if dtype == "O":
            items = self.read(data, depth)
            if not isinstance(items, list) or len(items) != count:
                raise PickleError("an array of objects without as many objects")
            self._spend(8 * count)
            objects = np.empty(count, object)
            objects[:] = items if count != 1 else [items[0]]
            for number, item in enumerate(items):
                objects[number] = item  # a slice assignment would broadcast an array
            return objects.reshape(shape, order=order)  # type: ignore[call-overload, no-any-return]
        data = self.read(data, depth)
        data = data.encode("latin1") if isinstance(data, str) else data
        kind = np.dtype(dtype)
        if not isinstance(data, bytes) or len(data) != count * kind.itemsize:
            raise PickleError(f"an array of shape {shape} and {dtype} whose data has another length")
        self._spend(len(data) + count)
        if kind.itemsize == 0:
            return np.zeros(shape, kind)
        # Copy to native byte order, writable, as numpy's own unpickling would.
        found = np.frombuffer(data, kind).astype(kind.newbyteorder("="))
        if kind.kind == "b":
            found = np.frombuffer(data, np.uint8) != 0
        if kind.kind == "U" and count and int(found.view(np.uint32).max()) > 0x10FFFF:
            raise PickleError("an array of text that is not Unicode")
        return found.reshape(shape, order=order)  # type: ignore[call-overload, no-any-return]

    def _chumpy(self, kind: str, value: Shell, depth: int) -> np.ndarray:
        state = value.state
        if isinstance(state, dict) and "x" in state:  # chumpy.ch.Ch: a constant
            return self._numbers(state["x"], depth)
        if isinstance(state, dict) and "a" in state and "idxs" in state:  # chumpy.reordering.Select: a[idxs], reshaped
            flat, chosen = (self._numbers(state[key], depth).ravel() for key in ("a", "idxs"))
            self._spend(chosen.size * flat.itemsize)
            found = flat[_integers(chosen)]
            shape = state.get("preferred_shape")
            if shape is None:
                return found
            return found.reshape(tuple(_integers(self._numbers(shape, depth).ravel()).tolist()))
        raise PickleError(f"chumpy object {kind} of an unknown layout")

    def _sparse(self, kind: str, value: Shell, depth: int) -> np.ndarray:
        state = value.state
        if not isinstance(state, dict):
            raise PickleError(f"a {kind} without its data")
        shape = self.read(state["_shape" if "_shape" in state else "shape"], depth)
        rows, columns = (int(size) for size in shape)
        if min(rows, columns) < 0 or len(shape) != 2:
            raise PickleError(f"a {kind} of shape {shape!r}"[:80])
        data = self._numbers(state["data"], depth)
        if data.ndim != 1 or data.dtype.kind not in "biuf":
            raise PickleError(f"a {kind} whose data are not numbers")
        self._spend(rows * columns * data.itemsize)
        if kind.startswith("coo"):
            places = (state["row"], state["col"]) if "row" in state else state["coords"]
            row, column = (self._integers(place, depth) for place in places)
        else:
            minor, starts = self._integers(state["indices"], depth), self._integers(state["indptr"], depth)
            lengths = np.diff(starts)
            if starts.ndim != 1 or len(starts) != (columns if kind.startswith("csc") else rows) + 1:
                raise PickleError(f"a {kind} whose row or column starts are not as many as its shape has")
            if starts[0] != 0 or starts[-1] != len(minor) or (lengths < 0).any():
                raise PickleError(f"a {kind} whose row or column starts do not rise from 0 to its entries")
            major = np.repeat(np.arange(len(lengths)), lengths)
            row, column = (minor, major) if kind.startswith("csc") else (major, minor)
        if not data.shape == row.shape == column.shape:
            raise PickleError(f"a {kind} whose indices are not as many as its data")
        for places, size in ((row, rows), (column, columns)):
            if places.size and not (places.min() >= 0 and places.max() < size):
                raise PickleError(f"a {kind} of {rows} x {columns} with indices outside of it")
        dense = np.zeros((rows, columns), data.dtype)
        # Not with scipy: its `toarray` writes to unchecked indices, and `check_format` misses some.
        np.add.at(dense, (row, column), data)
        return dense

    def _integers(self, value: Any, depth: int) -> np.ndarray:
        return _integers(self._numbers(value, depth))

    def _numbers(self, value: Any, depth: int) -> np.ndarray:
        found = self.read(value, depth)
        if _has_text(found):  # numpy pads each to the longest
            raise PickleError("text where numbers were expected")
        return np.asarray(found)


def _reconstructed(value: Shell) -> tuple[Shell, Name]:
    """`copyreg._reconstructor(class, object, None)`: object creation in protocols 0 and 1."""
    if not value.arguments or not isinstance(value.arguments[0], Name):
        raise PickleError("a reconstruction without a class")
    name = value.arguments[0]
    if not (_is_chumpy(name) or _is_sparse(name)):
        raise PickleError(f"{name.module}.{name.name} may not be reconstructed")
    return value, name


def _pairs(pairs: Any) -> dict[Any, Any]:
    found = {}
    for key, item in pairs:
        if not isinstance(key, str | bytes):
            raise PickleError("a key that is not text")
        found[key] = item
    return found


def _dtype(value: Any) -> str:
    """A dtype's code from its shell: name and byte order; the rest of its state is ignored."""
    if not isinstance(value, Shell) or value.name != Name("numpy", "dtype") or not value.arguments:
        raise PickleError("an array without a dtype")
    code, state = value.arguments[0], value.state
    code = code.decode("latin1") if isinstance(code, bytes) else code
    match = _KINDS.fullmatch(code) if isinstance(code, str) else None
    if match is None:
        raise PickleError(f"a dtype {code!r} is not allowed"[:80])
    kind, size = match.groups()
    if kind == "O":
        return "O"
    order = "<"
    if isinstance(state, tuple) and len(state) > 1:
        order = state[1] if isinstance(state[1], str) else bytes(state[1]).decode("latin1")
        # (version, order, subarray, names, fields, itemsize, ...): structured dtypes are refused
        if len(state) > 4 and any(part is not None for part in state[2:5]):
            raise PickleError("a dtype of records is not allowed")
    if order not in tuple("<>=|"):
        raise PickleError("a dtype of an unknown byte order")
    return f"{'>' if order == '>' else '<'}{kind}{size}"


def _integers(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu" or (values.size and int(values.max()) > 2**62):
        raise PickleError("indices that are not integers")
    return values.astype(np.int64)


def _has_text(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_text, value))
    return isinstance(value, str | bytes | dict) or (isinstance(value, np.ndarray) and value.dtype.kind not in "biuf")


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key
