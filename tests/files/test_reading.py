"""Bounded reading: damaged or malicious bytes, JSON, npz and images all end in one line."""

from __future__ import annotations

import ast
import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hmdiff.errors import UserError
from hmdiff.files import images
from hmdiff.files.images import open_image
from hmdiff.files.reading import ArrayArchive, read_bytes, read_json, read_npz
from hmdiff.viz.canvas import read_picture

PACKAGE = Path(images.__file__).parents[1]


def one_line(path: Path, error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert str(path) in text and "\n" not in text and len(text) < len(str(path)) + 400
    return text


# -- bytes and JSON --------------------------------------------------------------------------------------------------


def test_what_the_system_refuses_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "a device"),
        (loop, "symbolic link"),
        (tmp_path / "file" / "below", "a file stands where a folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_bytes(path)
        one_line(path, error)
    for name, message in (("n" * 300, "too long"), ("a\0b", "not a file name")):
        with pytest.raises(UserError, match=message):
            read_bytes(tmp_path / name)
    with pytest.raises(UserError, match="1 bytes, at most 0 are read"):
        read_bytes(tmp_path / "file", most=0)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 10**6, b"\xff\xfe", b'{"a": 1}x', b"nul", b"1" * 10**5 + b"x", b'"\\ud800'],
)
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not JSON") as error:
        read_json(path)
    one_line(path, error)


def test_integers_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f"\ufeff[1, -25, {10**17}, {10**30}, 1{'0' * 10_000}]")
    assert read_json(tmp_path / "a.json") == [1, -25, 10**17, 1e30, float("inf")]


# -- arrays ----------------------------------------------------------------------------------------------------------


def npy(shape: str, dtype: str = "'<f8'", data: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_only_what_is_wanted_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(3.0), huge=np.zeros(10**6), b=np.array(["x", "yz"]), c=np.array([True]))
    found = read_npz(path, ("a", "b", "c", "absent"), most=10_000)
    assert sorted(found) == ["a", "b", "c"]
    assert found["a"].tolist() == [0, 1, 2] and found["b"].tolist() == ["x", "yz"] and found["c"].dtype == bool
    with pytest.raises(UserError, match=r"'huge' claims 8,000,000 bytes, more than is read") as error:
        read_npz(path, most=10_000)
    one_line(path, error)
    with pytest.raises(UserError, match=r"no array 'nothing' \(found: a, b, c, huge\)"):
        ArrayArchive(path).read("nothing")


def test_a_single_array_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.eye(3))
    found = ArrayArchive(tmp_path / "a.npy")
    assert found.single and found.shape("") == (3, 3) and np.array_equal(found.read(""), np.eye(3))
    with pytest.raises(UserError, match="more than is read"):
        ArrayArchive(tmp_path / "a.npy", most=10).read("")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000,)"), "claims 8,000,000,000 bytes, more than is read"),
        (npy("(100000000,)"), "claims 800,000,000 bytes and holds"),
        (npy("(2,)", data=b"x" * 9), "claims 16 bytes and holds|damaged"),
        (npy("(-1,)"), "an array of shape"),
        (npy("(99999999999999999999,)"), "more than is read"),
        (npy("(4294967296, 4294967296)"), "more than is read"),
        (npy("(1000000000000,)", "'|S0'"), "more than is read"),
        (npy("(1,)", "'<U1'", b"\xff\xff\xff\x7f"), "not Unicode"),
        (npy("(1,)", "'|O'", b"x" * 8), "pickled Python objects"),
        (npy("[1]"), "damaged"),
        (npy("(1,"), "damaged"),
        (npy("(1,)", "'<f3'"), "damaged"),
        (npy("(" * 2000 + ")" * 2000), "damaged"),
        (b"\x93NUMPY\x03\x00\x00\x00\x00\x00", "npy format"),
        (b"text", "damaged"),
        (b"", "damaged"),
    ],
)
def test_arrays_that_lie_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = archive(tmp_path / "a.npz", {"a": content})
    with pytest.raises(UserError, match=message) as error:
        read_npz(path, most=10**9)
    one_line(path, error)
    if content.startswith(b"\x93NUMPY"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(UserError):
            ArrayArchive(tmp_path / "a.npy", most=10**9).read("")


def test_archives_of_other_kinds_are_refused(tmp_path: Path) -> None:
    good = npy("(1,)", data=b"\0" * 8)
    with pytest.raises(UserError, match="packed by method"):
        read_npz(archive(tmp_path / "lzma.npz", {"a": good}, zipfile.ZIP_LZMA))
    locked = archive(tmp_path / "locked.npz", {"a": good}, zipfile.ZIP_STORED)
    content = bytearray(locked.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1  # the encryption flag
    locked.write_bytes(content)
    with pytest.raises(UserError, match="encrypted"):
        read_npz(locked)
    assert read_npz(archive(tmp_path / "none.npz", {})) == {}
    for name in ("absent.npz", "."):
        with pytest.raises(UserError):
            read_npz(tmp_path / name)


def test_mutants_of_an_archive_are_read_or_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.arange(30.0).reshape(5, 6), names=np.array(["left", "right"]))
    generator, refused = random.Random(0), 0
    for number in range(600):
        content = bytearray(buffer.getvalue())
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(content))
            if generator.random() < 0.7:
                content[place] = generator.randrange(256)
            else:
                del content[place : place + generator.randint(1, 40)]
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        try:
            read_npz(path, ("a", "names"), most=10**6)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


# -- pictures --------------------------------------------------------------------------------------------------------


def test_only_the_formats_of_photos_are_opened(tmp_path: Path) -> None:
    """An EPS named photo.jpg would start Ghostscript; Pillow's other formats are not for photos either."""
    path = tmp_path / "photo.jpg"
    picture = Image.new("RGB", (8, 6), (10, 200, 30))
    for kind in images.FORMATS:
        picture.save(path, format=kind)
        assert read_picture(path).shape == (6, 8, 3)
    for kind in ("EPS", "PDF", "ICO", "TGA", "SGI", "PCX", "IM"):
        picture.save(path, format=kind)
        with pytest.raises(UserError, match="not a picture"):
            read_picture(path)


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="100 x 100 pixels, far too many") as error, open_image(path):
        pass
    one_line(path, error)


@pytest.mark.slow
def test_pictures_are_opened_in_one_place() -> None:
    """Images, and arrays, pickles and JSON of others, are opened only in `hmdiff.files`."""
    forbidden = {("Image", "open"), ("np", "load"), ("pickle", "load"), ("pickle", "loads"), ("torch", "load")}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = node.func.value
                if isinstance(of, ast.Name) and (of.id, node.func.attr) in forbidden:
                    found.append(str(path.relative_to(PACKAGE)))
    # Exceptions: the shipped asset, and files that we have just written; weights with weights_only.
    assert sorted(set(found)) == [
        "body/licensed.py",
        "body/mesh_cache.py",
        "files/foreign_weights.py",
        "files/images.py",
    ]


def test_json_stays_json(tmp_path: Path) -> None:
    value: dict[str, Any] = {"a": [1, 2.5, None, True, "ü"], "b": {}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value
