"""Damage and attacks for files: bytes flipped, cut, doubled; unexpected values in JSON, YAML, npz, safetensors and
pickles; pickles with forbidden calls."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
from typing import Any

import numpy as np

STRANGE: tuple[Any, ...] = (
    None,
    True,
    "",
    "text",
    -1,
    0,
    1e308,
    -1e30,
    float("nan"),
    float("inf"),
    10**30,
    2**31,
    2**63,
    [],
    {},
    [[[]]],
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    [0] * 5000,
    {"a": {"b": None}},
    "${oc.env:NOT_SET}",
)


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes of a few bytes, or a cut."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        if not data:
            break
        # Half of the changes hit the beginning, where headers are.
        place = draw.randrange(min(len(data), 512)) if draw.random() < 0.5 else draw.randrange(len(data))
        length = draw.randint(1, 16)
        match draw.randrange(7):
            case 0:
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place] = draw.randrange(256)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                data[place : place + 4] = struct.pack("<i", draw.choice([-1, 2**31 - 1, 0, -(2**31)]))
            case 5:
                data[place : place + 8] = struct.pack("<q", draw.choice([-1, 2**62, 2**32, 0]))
            case _:
                del data[place + draw.randrange(len(data) - place) :]
    return bytes(data)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """One to three values replaced, keys removed, entries doubled; one time in six, byte damage."""
    if draw.random() < 1 / 6:
        return mutate_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        value = _changed(value, draw)
    return json.dumps(value).encode()


def _changed(value: Any, draw: random.Random) -> Any:
    """A copy with one change at a random depth."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value[:place] + value[place + 1 :]
        if draw.random() < 0.05:
            return [*value, value[place]]
        return [*value[:place], _changed(value[place], draw), *value[place + 1 :]]
    return draw.choice(STRANGE)


def mutate_text(content: bytes, draw: random.Random) -> bytes:
    """For YAML: the value of a line replaced, a line removed or doubled; or byte damage."""
    if draw.random() < 1 / 4:
        return mutate_bytes(content, draw)
    lines = content.decode().splitlines()
    for _ in range(draw.randint(1, 2)):
        place = draw.randrange(len(lines))
        match draw.randrange(3):
            case 0:
                head = lines[place].split(":")[0]
                lines[place] = f"{head}: {json.dumps(draw.choice(STRANGE))}"
            case 1:
                lines[place : place + 1] = []
            case _:
                lines.insert(draw.randrange(len(lines) + 1), lines[place])
        if not lines:
            break
    return "\n".join(lines).encode()


def mutate_pickle(content: bytes, draw: random.Random) -> bytes:
    """A value replaced; a call, a deep or a huge structure inserted between two opcodes; or byte damage."""
    kind = draw.random()
    if kind < 1 / 3:
        return mutate_bytes(content, draw)
    if kind < 2 / 3:
        try:
            value = pickle.loads(content, encoding="latin1")  # our own file
        except pickle.UnpicklingError:  # written by torch, with external storages
            return mutate_bytes(content, draw)
        return pickle.dumps(_changed_object(value, draw), draw.choice([0, 2, 4]))
    try:
        places = [place for _, _, place in pickletools.genops(content) if place]
    except ValueError:  # a zip archive of torch
        return mutate_bytes(content, draw)
    place = draw.choice(places)
    return content[:place] + draw.choice(HOSTILE) + content[place:]


# Calls leave their result on the stack, so that the following code can run; the last ones exhaust memory or depth.
HOSTILE: tuple[bytes, ...] = (
    b"cposix\nsystem\n(S'true'\ntR",
    b"cos\nsystem\n(S'true'\ntR0",
    b"(S'true'\niposix\nsystem\n",
    b"(cposix\nsystem\nS'true'\no0",
    b"c__builtin__\neval\n(S'1+1'\ntR",
    b"cbuiltins\nexec\n(S'import os'\ntR0",
    b"csubprocess\nPopen\n(S'true'\ntR0",
    b"cnumpy\nload\n(S'/etc/passwd'\ntR0",
    b"cbuiltins\nopen\n(S'/tmp/hmdiff_opened'\nS'w'\ntR0",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R0",
    b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb0",
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR0",
    b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'AAAAAAAA'\ntR0",
    b"cscipy.sparse.csc\ncsc_matrix\n(tR0",
    b"ccodecs\nencode\n(S'x'\nS'zip'\ntR0",
    b"Psome id\n",
    b"\x82\x01",
    b"(" * 5000 + b"t" * 5000 + b"0",
    b"]" * 2000 + b"a" * 1999 + b"0",
    b"r\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"I" + b"9" * 400 + b"\n0",
    b"]" + b"(22e" * 60 + b"0",
)


def _changed_object(value: Any, draw: random.Random) -> Any:
    """A copy with one entry replaced, at any depth, including inside arrays."""
    if isinstance(value, dict) and value and draw.random() < 0.95:
        key = draw.choice(sorted(value, key=str))
        if draw.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: _changed_object(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [_changed_object(item, draw) if at == place else item for at, item in enumerate(value)]
    if isinstance(value, np.ndarray) and draw.random() < 0.8:
        return changed_array(value, draw)
    return draw.choice((*STRANGE, 10**400, b"bytes", (1, 2), np.zeros(0), np.array(["text"]), np.float32("nan")))


def changed_array(array: np.ndarray, draw: random.Random) -> np.ndarray:
    """Other values, another shape or another dtype; unchanged if numpy cannot convert it."""
    try:
        return _changed_array(array, draw)
    except (ValueError, TypeError):
        return array


def _changed_array(array: np.ndarray, draw: random.Random) -> np.ndarray:
    match draw.randrange(8):
        case 0:
            return array[: len(array) // 2] if array.ndim else np.array([array, array])
        case 1:
            return array[..., None]
        case 2:
            return np.concatenate([array, array]) if array.ndim else array
        case 3:
            return array.astype(draw.choice(["S8", "U8", "object", "complex128", "bool", "int8"]))
        case 4:
            return np.zeros_like(array)
        case _:
            # Indices keep their dtype, floats may become anything.
            number = draw.choice([-1, 2**31 - 1, -(2**31)] if array.dtype.kind in "iu" else _NUMBERS)
            with np.errstate(all="ignore"):
                changed = array.copy() if array.dtype.kind in "iuf" else np.full(array.shape, np.nan)
                places = [draw.randrange(max(1, changed.size)) for _ in range(draw.choice([1, 1, changed.size or 1]))]
                if changed.size:
                    changed.reshape(-1)[places] = np.array(number).astype(changed.dtype)
            return changed


_NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e308, 0.0, -1.0, 1e-300)


def mutate_npz(content: bytes, draw: random.Random) -> bytes:
    """An array changed, removed or pickled; or byte damage, most of which the archive's own checksums detect."""
    if draw.random() < 1 / 4:
        return mutate_bytes(content, draw)
    with np.load(io.BytesIO(content), allow_pickle=True) as found:  # our own file
        arrays = {name: found[name] for name in found.files}
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(sorted(arrays))
        array = arrays[name]
        if draw.random() < 0.1 and len(arrays) > 1:
            del arrays[name]
        elif draw.random() < 0.3:  # an object column with one unexpected entry
            rows = list(array) if array.ndim else [array]
            column = np.empty(len(rows), object)
            for row, value in enumerate(rows):
                column[row] = value
            if len(rows):
                column[draw.randrange(len(rows))] = draw.choice(STRANGE)
            arrays[name] = column
        else:
            arrays[name] = changed_array(array, draw)
    output = io.BytesIO()
    np.savez(output, **arrays)
    return output.getvalue()


def mutate_npy(content: bytes, draw: random.Random) -> bytes:
    """Byte damage, mostly in the header; or the array changed."""
    if draw.random() < 1 / 2:
        return mutate_bytes(content, draw)
    output = io.BytesIO()
    np.save(output, changed_array(np.load(io.BytesIO(content)), draw))
    return output.getvalue()


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Damage in the JSON header; non-finite or huge weights; or byte damage."""
    kind = draw.random()
    if kind < 1 / 3:
        return mutate_bytes(content, draw)
    size = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + size], bytearray(content[8 + size :])
    if kind < 2 / 3:
        header = mutate_json(header, draw)
    else:
        for _ in range(draw.choice([1, 1, 100])):
            place = draw.randrange(len(data) // 8) * 8
            data[place : place + 8] = draw.choice(
                [b"\xff" * 8, b"\0\0\x80\x7f" * 2, struct.pack("<q", -1), struct.pack("<q", 2**40), bytes(8)]
            )
    return struct.pack("<Q", len(header)) + header + bytes(data)


def mutate_csv(content: bytes, draw: random.Random) -> bytes:
    """A cell replaced, a row doubled or removed; or byte damage."""
    if draw.random() < 1 / 3:
        return mutate_bytes(content, draw)
    rows = [line.split(b",") for line in content.splitlines()]
    for _ in range(draw.randint(1, 3)):
        row = draw.choice(rows)
        match draw.randrange(4):
            case 0:
                del row[draw.randrange(len(row)) :]
            case 1:
                rows.insert(draw.randrange(len(rows)), list(row))
            case _ if row:
                row[draw.randrange(len(row))] = json.dumps(draw.choice(STRANGE)).encode()
            case _:
                pass
    return b"\n".join(b",".join(row) for row in rows) + b"\n"


def mutate_zip(content: bytes, draw: random.Random) -> bytes:
    """For files of torch.save: byte damage, or its pickle replaced in an archive with valid checksums."""
    import zipfile

    if draw.random() < 1 / 3:
        return mutate_bytes(content, draw)
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(output, "w") as changed:
        names = archive.namelist()
        victim = draw.choice(names + 4 * [name for name in names if name.endswith(".pkl")])
        for name in names:
            data = archive.read(name)
            if name == victim:
                places = [at for _, _, at in pickletools.genops(data) if at] if name.endswith(".pkl") else []
                if places and draw.random() < 0.5:
                    at = draw.choice(places)
                    data = data[:at] + draw.choice(HOSTILE) + data[at:]
                elif data:
                    data = mutate_bytes(data, draw)
            changed.writestr(name, data)
    return output.getvalue()


MUTATIONS = {
    ".json": mutate_json,
    ".jsonl": mutate_csv,
    ".yaml": mutate_text,
    ".npz": mutate_npz,
    ".npy": mutate_npy,
    ".pkl": mutate_pickle,
    ".safetensors": mutate_safetensors,
    ".csv": mutate_csv,
    ".bin": mutate_zip,
}
