"""Pickles are read as plain data: nothing that they name is imported, called or changed."""

from __future__ import annotations

import collections
import os
import pickle
import random
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_vcr1.checkpoint.plain_pickle import Node, Pairs, load_plain
from megatron_vcr1.errors import UserError


@dataclass
class _Record:
    number: int
    child: Any = None


class _Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self._reduced = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_pickle_reads_them(protocol: int) -> None:
    value = [
        None,
        True,
        False,
        0,
        255,
        -1,
        70_000,
        2**40,
        1.5,
        "text",
        "x" * 300,
        (),
        (1,),
        (1, 2, 3, 4),
        [],
        ["a", [2]],
    ]
    assert load_plain(pickle.dumps(value, protocol), "f") == value


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_dictionaries_and_sets_become_lists(protocol: int) -> None:
    assert load_plain(pickle.dumps({"a": 1, (2,): {}}, protocol), "f") == [("a", 1), ((2,), [])]
    ordered = load_plain(pickle.dumps(collections.OrderedDict(a=1), protocol), "f")
    assert (ordered.function.path, ordered.items) == ("collections.OrderedDict", [("a", 1)])


def test_instances_become_names_with_their_state() -> None:
    record = load_plain(pickle.dumps(_Record(1, _Record(2))), "f")
    assert record.function.path == f"{__name__}._Record"
    (_, number), (_, child) = record.state
    assert number == 1
    assert isinstance(child, Node)
    assert dict(child.state) == {"number": 2, "child": None}


def test_a_module_that_a_pickle_names_is_not_imported() -> None:
    node = load_plain(b"\x80\x02cnot_a_module.inner\nfunction\n)R.", "f")
    assert node.function.path == "not_a_module.inner.function"
    assert "not_a_module" not in sys.modules


def test_nothing_is_called(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for calls in (_Calls(os.system, f"touch {ran}"), _Calls(open, str(ran), "w"), _Calls(eval, "1/0")):
        for protocol in (2, 4):
            assert isinstance(load_plain(pickle.dumps(calls, protocol), "f"), Node)
    assert not ran.exists()


def test_build_on_a_class_does_not_change_the_class() -> None:
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    state = pickle.dumps((None, {"state_dict_metadata": "changed"}), 2)[2:-1]
    with pytest.raises(UserError, match="finds no Node"):
        load_plain(b"\x80\x02" + name + state + b"b.", "f")
    assert not hasattr(Metadata, "state_dict_metadata")
    pickle.loads(b"\x80\x02" + name + state + b"b.")  # the module pickle does change it
    assert Metadata.state_dict_metadata == "changed"  # type: ignore[comparison-overlap]
    del Metadata.state_dict_metadata


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "no STOP": b"\x80\x02N",
        "two values": b"\x80\x02NN.",
        "no value": b"\x80\x02.",
        "only a mark": b"\x80\x02(.",
        "BUILD without an instance": b"\x80\x02]}b.",
        "BUILD twice": b"\x80\x02ca\nb\n)R}b}b.",
        "REDUCE of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
        "REDUCE of a call": b"\x80\x02ca\nb\n)R)R.",
        "arguments of a call that are a list": b"\x80\x02ca\nb\n]R.",
        "memo that was not set": b"\x80\x02h\x05.",
        "SETITEMS with a key alone": b"\x80\x02}(Nu.",
        "SETITEM in a list": b"\x80\x02]NNs.",
        "APPEND to a dictionary": b"\x80\x02}Na.",
        "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
        "persistent id": b"\x80\x02Pid\n.",
        "INST": b"\x80\x02(ios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\no.",
        "EXT1": b"\x80\x02\x82\x01.",
        "DUP": b"\x80\x02N2.",
        "length beyond the end": b"\x80\x02X\xff\xff\xff\x7fa.",
        "negative LONG4": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "not a pickle": b"PK\x03\x04" * 10,
    }.items(),
    ids=lambda item: item[0],
)
def test_hostile_and_damaged_pickles_are_refused(data: tuple[str, bytes]) -> None:
    with pytest.raises(UserError, match="f: refused or damaged"):
        load_plain(data[1], "f")


def test_deep_and_self_referring_values_cost_no_more_than_the_file() -> None:
    deep = load_plain(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "f")
    assert isinstance(deep, list)
    while deep:  # free it level by level: the interpreter's own clean-up of a deep list is recursive
        deep = deep[0]
    laughs: list[Any] = []
    for _ in range(200):
        laughs = [laughs] * 10  # 10 ** 200 values, if they were not shared
    data = pickle.dumps(laughs)
    tracemalloc.start()  # not the memory of the process, whose peak may be an earlier test's
    try:
        assert isinstance(load_plain(data, "f"), list)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    itself = load_plain(b"\x80\x02]q\x00h\x00a.", "f")
    assert itself[0] is itself


def test_random_damage_gives_data_or_a_user_error() -> None:
    whole = pickle.dumps(Metadata({"a": [1, 2, (3, 4)]}, storage_data={"b": 1.5}, storage_meta=StorageMeta("x")))
    chance = random.Random(0)
    outcomes = collections.Counter()  # type: ignore[var-annotated]
    for _ in range(5_000):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            load_plain(bytes(damaged[: chance.randrange(1, len(damaged) + 1)]), "f")
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 1_000


def test_pairs_are_a_list() -> None:
    assert isinstance(load_plain(pickle.dumps({}), "f"), Pairs)
