"""Mutations of files: of their bytes, and of the values in JSON."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, -(2**65), 1e308, float("nan"), float("inf"), 0.5),
    *(
        "",
        "a" * 5000,
        "\ud800",
        "\x00",
        "../../etc/passwd",
        "http://127.0.0.1:1/x",
        "1",
        [],
        {},
        [[]],
        [None],
        {"a": []},
    ),
]
ODD_BYTES = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 6000,
    b"\xff\xfe",
    b"\x00" * 64,
    b"\xef\xbb\xbf",
    b"",
    b"\n",
    b"%s%d",
]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, blank, remove, repeat or replace a part, or cut off the end."""
    mutated = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        start = rng.randrange(len(mutated) + 1)
        stop = min(start + int(rng.expovariate(1 / 30)) + 1, len(mutated))
        match rng.randrange(7):
            case 0 | 1:
                for _ in range(rng.randrange(1, 9)):
                    if mutated:
                        mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
            case 2:
                mutated[start:stop] = bytes(stop - start)
            case 3:
                del mutated[start:stop]
            case 4:
                mutated[start:start] = mutated[start:stop] * rng.randrange(1, 20)
            case 5:
                mutated[start:stop] = rng.choice(ODD_BYTES)
            case 6:
                del mutated[start:]
    return bytes(mutated)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or copy values anywhere in a JSON text."""
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        parent, key = rng.choice(_places(document) or [(None, None)])
        if parent is None:
            return json.dumps(rng.choice(ODD_VALUES)).encode()
        if rng.random() < 0.2:
            del parent[key]
        elif rng.random() < 0.2 and isinstance(parent, dict):
            parent[rng.choice(["type", "fps", "id", "", "\ud800", "n" * 300])] = copy.deepcopy(rng.choice(ODD_VALUES))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return json.dumps(document).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) in a document."""
    places = []
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places += [(value, key), *_places(value[key])]
    return places
