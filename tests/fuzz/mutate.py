"""Inputs made from inputs: bytes are changed blindly, JSON (alone or line by line) as a tree too.

The first byte chooses a file and is kept, but for now and then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random

VALUES = (
    None, True, False, 0, 1, -1, 2, 8, 255, 2**31, 2**53, 2**63, 10**19, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "0", "1e999", "nan", "\0", "\ud800", "../../x", "/x",
    "é" * 50, [], {}, [[]], [0], [1, 2, 3], ["x"], {"x": 1}, [None], [[1, 2], 3], [10**9] * 3,
)
TOKENS = (
    b"\0", b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"{", b"[", b"]", b'"', b":", b"-", b"\n",
    b"*a",
    b"&a ", b"<<: ", b"!!python/object/apply:os.system ", b"- ", b"PK\x01\x02", b"PK\x03\x04",
    b"../", b"IDAT", b"IHDR", b"tRNS", b"iCCP", b"eXIf", b"shape", b"|O", b"fortran_order", b"<f8",
    b"None", b"True", b"-1", b"1e400", b"NaN", b"Infinity", b"9" * 30, b"9" * 5000, b"\xed\xa0\x80",
)


def mutate(data: bytes, draw: Random, others: Sequence[bytes] = ()) -> bytes:
    """Another input like ``data``.

    Args:
        data: at least one byte.
        draw: where all chance comes from.
        others: inputs that may be crossed with it.
    """
    slot, body = data[:1], data[1:]
    if draw.random() < 0.02:
        slot = bytes([draw.randrange(8)])
    if draw.random() < 0.6 and (changed := _change_json(body, draw)) is not None:
        return slot + changed
    for _ in range(1 << draw.randrange(4)):
        body = _change_bytes(body, draw, others)
    return slot + body


def _change_bytes(body: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(body) + 1)
    size = draw.choice((1, 1, 2, 4, 8, 16, 64))
    part = body[at : at + size]
    match draw.randrange(8):
        case 0 if part:
            new = bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:]
        case 1:
            new = draw.randbytes(len(part))
        case 2:
            new = b""
        case 3:
            new = part * draw.choice((2, 2, 2, 3, 100, 3000))
        case 4:
            new = draw.choice(TOKENS) + part
        case 5:
            new = draw.choice(TOKENS)
        case 6:
            new = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, draw.randrange(2**16))).to_bytes(
                8, "little")[: max(1, min(len(part), 4))]
            part = part[: len(new)]
        case _:
            other = draw.choice(others)[1:] if others else body
            return body[:at] + other[draw.randrange(len(other) + 1) :]
    return body[:at] + new + body[at + len(part) :]


def _change_json(body: bytes, draw: Random) -> bytes | None:
    """None for what is not JSON, or nested too deep."""
    lines = body.splitlines() if body.count(b"}\n{") else [body]
    k = draw.randrange(len(lines))
    try:
        tree = [json.loads(lines[k])]
        for _ in range(1 + draw.randrange(3)):
            _change_tree(list(_places(tree)), draw)
        lines[k] = json.dumps(tree[0]).encode()
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def _change_tree(places: list[tuple[list | dict, str | int]], draw: Random) -> None:
    where, key = draw.choice(places)
    if isinstance(where, dict) and draw.random() < 0.2:
        if draw.random() < 0.5:
            del where[key]
        else:
            where[draw.choice((key + "x", "x", "", "../" + key))] = where.pop(key)
    elif draw.random() < 0.2:
        other, name = draw.choice(places)
        where[key] = deepcopy(other[name])
    elif draw.random() < 0.1:
        where[key] = [where[key]] * draw.choice((1, 2, 50))
    else:
        where[key] = deepcopy(draw.choice(VALUES))


def _keys(where: list | dict):
    return where if isinstance(where, dict) else range(len(where))


def _places(tree: list | dict) -> Iterator[tuple[list | dict, str | int]]:
    for key in _keys(tree):
        yield tree, key
        if isinstance(tree[key], list | dict):
            yield from _places(tree[key])
