"""Damage and malice for files: bytes flipped, cut, doubled; values of a JSON replaced by what nobody expects."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

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
        # The beginning, where headers are, as often as all the rest.
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
    """One to three values replaced, keys taken away, entries doubled; or, one time in six, bytes."""
    if draw.random() < 1 / 6:
        return mutate_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        value = _changed(value, draw)
    return json.dumps(value).encode()


def _changed(value: Any, draw: random.Random) -> Any:
    """A copy with one change somewhere below."""
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
    """For YAML: a value of a line replaced, a line taken away or doubled; or bytes."""
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
