"""Pickles of plain arrays are read as Python reads them; hostile ones are refused within limits and without a crash."""

from __future__ import annotations

import collections
import pickle
import pickletools
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from standins import write_python2_pickle

from hmdiff.errors import UserError
from hmdiff.files.unpickling import load_pickle, unpickle

PLAIN: dict[str, Any] = {
    "floats": np.arange(12.0).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4)),
    "big": np.arange(5, dtype=">f4"),
    "bool": np.array([True, False]),
    "text": np.array(["a", "bcd", "ü"]),
    "bytes": np.array([b"x", b"yz"]),
    "empty": np.zeros((0, 3)),
    "scalar": np.float32(0.25),
    "objects": np.array([np.zeros(2), "a", None, 3], dtype=object),
    "one": np.array([np.zeros(2)], dtype=object),
    "list": [1, -(2**40), 2.5, None, True, "text", b"bytes\x00\xff", (), ("a",), (1, 2, 3, 4), [], {}],
    "ordered": collections.OrderedDict([("a", 1), ("b", np.zeros(2))]),
    "sparse": scipy.sparse.csc_matrix(np.eye(3)),
    "csr": scipy.sparse.csr_matrix(np.arange(6.0).reshape(2, 3)),
    "coo": scipy.sparse.coo_matrix(np.arange(6.0).reshape(2, 3)),
    "keys": {("S9", "60457274"): 1, 5: 2},
}


def same(found: Any, expected: Any) -> None:
    if scipy.sparse.issparse(expected):
        expected = expected.toarray()
    if isinstance(expected, np.ndarray):
        assert found.shape == expected.shape and found.dtype == expected.dtype.newbyteorder("=")
        for mine, theirs in zip(found.ravel(), expected.ravel(), strict=True):
            same(mine, theirs) if expected.dtype == object else np.testing.assert_equal(mine, theirs)
        return
    assert type(found) is type(expected) or isinstance(expected, collections.OrderedDict)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", range(6))
def test_what_python_pickled_is_read_back(protocol: int) -> None:
    same(unpickle(pickle.dumps(PLAIN, protocol), "x.pkl"), PLAIN)


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    data = {"poses": [np.arange(6.0).reshape(2, 3)], "genders": ["m", "f"], "seq": "caf\xe9"}
    write_python2_pickle(tmp_path / "a.pkl", data)
    same(load_pickle(tmp_path / "a.pkl"), data)


def test_shared_parts_stay_shared() -> None:
    part = [np.zeros(3)]
    found = unpickle(pickle.dumps([part, part]), "x.pkl")
    assert found[0] is found[1]


def array_pickle(shape: str, dtype: str, data: bytes, state: str = "(I3\nS'<'\nNNNI-1\nI-1\nI0\nt") -> bytes:
    """An array in protocol 0, with every part given."""
    head = f"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n{shape}cnumpy\ndtype\n"
    return f"{head}(S'{dtype}'\nI0\nI1\ntR{state}bI00\n".encode() + b"S'" + data + b"'\ntb."


def bomb(levels: int, first: bytes = b"]") -> bytes:
    """A list of two references to a list of two references ...: 2^levels lists when traversed."""
    return (
        b"(lp0\n."
        if levels == 0
        else first
        + b"q\x00"
        + b"".join(
            b"]q" + bytes([level]) + b"(h" + bytes([level - 1]) + b"h" + bytes([level - 1]) + b"e"
            for level in range(1, levels + 1)
        )
        + b"."
    )


def sparse_pickle(indices: Any, starts: Any, shape: tuple[int, int]) -> bytes:
    matrix = scipy.sparse.csc_matrix(np.eye(3))
    matrix.indices, matrix.indptr = np.array(indices, np.int32), np.array(starts, np.int32)
    matrix._shape = shape  # type: ignore[attr-defined]
    return pickle.dumps({"J_regressor": matrix})


def deep(opening: bytes, closing: bytes, levels: int) -> bytes:
    return opening * levels + closing * levels + b"."


HOSTILE = {
    "forged dtype": (array_pickle("(I1\nt", "O8", b"\\x08" * 8), "objects"),
    "records": (array_pickle("(I1\nt", "V8", b"\\x08" * 8), "dtype"),
    "subarray": (array_pickle("(I1\nt", "f8", b"\\x08" * 8, "(I3\nS'<'\n(NN(I4\nttNNI-1\nI-1\nI0\nt"), "records"),
    "comma dtype": (array_pickle("(I1\nt", "O,f8", b"\\x08" * 8), "dtype"),
    "short data": (array_pickle("(I1000000000\nt", "f8", b"\\x08" * 8), "another length"),
    "negative shape": (array_pickle("(I-1\nt", "f8", b"\\x08" * 8), "shape"),
    "overflow": (array_pickle("(I4294967296\nI4294967296\nt", "f8", b""), "another length"),
    "bad unicode": (array_pickle("(I1\nt", "U1", b"\\xff\\xff\\xff\\x7f"), "not Unicode"),
    "no data at all": (array_pickle("(I1000000000000\nt", "S0", b""), "far more data|another length"),
    "sparse index": (sparse_pickle([0, 1, 10**9], [0, 1, 2, 3], (3, 3)), "indices"),
    "sparse negative": (sparse_pickle([0, 1, -5], [0, 1, 2, 3], (3, 3)), "indices|negative"),
    "sparse starts": (sparse_pickle([0, 1, 2], [0, 1, 900, 3], (3, 3)), "not a pickle"),
    "sparse shape": (sparse_pickle([0, 1, 2], [0, 1, 2, 3], (2**31, 3)), "far more data"),
    "circle": (b"]q\x00h\x00a.", "circle"),
    "deep list": (deep(b"(", b"l", 100_000), "nested too deeply"),
    "deep key": (b"}" + b")" + b"\x85" * 100_000 + b"Ns.", "dictionary key"),
    "huge key": (b"}\x8a\x10" + b"\x01" * 16 + b"Ns.", "dictionary key"),
    "memo": (b"Nr\xff\xff\xff\x7f.", None),
    "long bytes": (b"\x8e" + struct.pack("<Q", 2**62) + b"x.", "cut short"),
    "long integer": (b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".", "integer of"),
    "decimal": (b"I" + b"9" * 400 + b"\n.", None),
    "decimals": (b"I" + b"9" * 5000 + b"\n.", "without an end"),
    "persistent": (b"Pid\n.", "not allowed"),
    "extension": (b"\x82\x01.", "not allowed"),
    "set": (b"\x8f.", "not allowed"),
    "two states": (b"cchumpy.ch\nCh\n)\x81}b}b.", "a state for what has none"),
    "class alone": (b"cnumpy\nndarray\n.", "where a value was expected"),
    "ndarray made": (b"cnumpy\nndarray\n(I9\ntR.", "where a value was expected"),
    "object made": (b"c__builtin__\nobject\n)R.", "where a value was expected"),
    "other class": (b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.", "reconstructed"),
    "codec": (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "codec"),
    "empty": (b"", "cut short"),
    "no stack": (b"tR.", "no mark"),
    "system": (b"cos\nsystem\n(S'true'\ntR.", "os.system is not allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name: str) -> None:
    content, message = HOSTILE[name]
    started = time.perf_counter()
    if message is None:
        unpickle(content, "x.pkl")  # unusual, but harmless
    else:
        with pytest.raises(UserError, match=message) as error:
            unpickle(content, "x.pkl")
        assert str(error.value).startswith("x.pkl: ") and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("levels", [12, 24, 40, 62])
def test_three_hundred_bytes_stay_small(levels: int, text: bool) -> None:
    """Each list contains the previous one twice; read or refused as a list, as a chumpy and as a scipy array."""
    whole = b"(" + bomb(levels, b"(U\x01al" if text else b"(K\x01l")[:-1] + b"1"
    last = b"h" + bytes([levels])
    alone = whole + b"}U\x04vert" + last + b"s."
    array = whole + b"cchumpy.ch\nCh\n)\x81}U\x01x" + last + b"sb."
    parts = b"".join(b"U" + bytes([len(name)]) + name + last + b"s" for name in (b"data", b"indices", b"indptr"))
    sparse = whole + b"cscipy.sparse.csc\ncsc_matrix\n)\x81}U\x06_shapeK\x03K\x03\x86s" + parts + b"b."
    for content in (alone, array, sparse):
        assert len(content) < 900
        started = time.process_time()
        if levels == 12 and (content is alone or (content is array and not text)):
            unpickle(content, "x.pkl")
        else:
            with pytest.raises(UserError, match=r"referenced again and again|numbers"):
                unpickle(content, "x.pkl")
        assert time.process_time() - started < 1


def test_long_texts_are_not_made_an_array() -> None:
    """numpy would pad each short text to the longest: 40 GB."""
    many = b"(X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"U\x01b" * 10**4 + b"l"
    with pytest.raises(UserError, match="text where numbers"):
        unpickle(b"cchumpy.ch\nCh\n)\x81}U\x01x" + many + b"sb.", "x.pkl")


def test_one_string_is_not_made_ten_thousand_times() -> None:
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00"
    content = b"(" + text + b"0" + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 10_000 + b"l."
    with pytest.raises(UserError, match="far more data"):
        unpickle(content, "x.pkl")


def test_too_many_operations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hmdiff.files.pickle_machine.MAX_OPERATIONS", 100)
    with pytest.raises(UserError, match="more than 100 operations"):
        unpickle(b"N0" * 60 + b"N.", "x.pkl")


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.pkl", "wb") as handle:
        handle.truncate(2**31)
    with pytest.raises(UserError, match="no pickle of more than"):
        load_pickle(tmp_path / "a.pkl")


def test_mutants_of_a_body_are_read_or_refused() -> None:
    """Bytes flipped, removed, doubled and misplaced: the result is a value or one line, nothing else."""
    originals = [
        pickle.dumps({"weights": np.eye(4), "J": scipy.sparse.csc_matrix(np.eye(4)), "kin": [[1, 2], "a"]}, p)
        for p in (0, 2, 4)
    ]
    random_state = random.Random(0)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3000):
        content = bytearray(random_state.choice(originals))
        for _ in range(random_state.randint(1, 3)):
            place = random_state.randrange(len(content))
            match random_state.randrange(4):
                case 0:
                    content[place] ^= 1 << random_state.randrange(8)
                case 1:
                    del content[place : place + random_state.randint(1, 8)]
                case 2:
                    content[place:place] = bytes([random_state.choice(list(pickletools.code2op)).encode("latin1")[0]])
                case 3:
                    content[place : place + 4] = struct.pack("<i", random_state.choice([-1, 2**31 - 1, 0, 255]))
            if not content:
                break
        try:
            unpickle(bytes(content), "x.pkl")
        except UserError:
            refused += 1
    assert 1000 < refused < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KB
