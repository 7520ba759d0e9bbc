from __future__ import annotations

import pytest

from megatron_vcr1.config.overrides import apply_overrides, parse_overrides
from megatron_vcr1.errors import UserError

SOURCES = {"data": {"sources": [{"manifest": "a", "weight": 2}, {"manifest": "b"}]}}


def overridden(*options: str) -> dict:
    return apply_overrides(SOURCES, parse_overrides(options))["data"]


def test_the_last_of_two_options_wins():
    options = ["--parallel.tensor", "1", "--parallel.tensor=2"]
    assert parse_overrides(options) == {("parallel", "tensor"): "2"}


def test_keys_of_list_entries():
    assert parse_overrides(["--data.sources.1.manifest=a=b"]) == {("data", "sources", 1, "manifest"): "a=b"}
    assert overridden("--data.sources.1.weight", "3") == {
        "sources": [{"manifest": "a", "weight": 2}, {"manifest": "b", "weight": "3"}]
    }
    assert SOURCES["data"]["sources"][1] == {"manifest": "b"}, "the tables themselves stay as they are"


def test_the_index_after_the_last_entry_adds_one():
    options = ["--data.sources.3.manifest", "d", "--data.sources.2.manifest", "c", "--data.sources.2.thinking=false"]
    assert overridden(*options)["sources"][2:] == [{"manifest": "c", "thinking": "false"}, {"manifest": "d"}]
    new = apply_overrides({}, parse_overrides(["--evaluate.benchmarks.0.name", "nextgqa"]))
    assert new == {"evaluate": {"benchmarks": [{"name": "nextgqa"}]}}


def test_an_empty_value_removes_the_entries():
    assert overridden("--data.sources=") == {"sources": []}
    assert overridden("--data.sources.0.manifest=c", "--data.sources", "") == {"sources": [{"manifest": "c"}]}


def test_ten_entries_are_added_in_order():
    options = [f"--data.sources.{index}.manifest={index}" for index in range(11, 1, -1)]
    assert [source["manifest"] for source in overridden(*options)["sources"]][2:] == [str(i) for i in range(2, 12)]


@pytest.mark.parametrize(
    "option, message",
    [
        (
            "--data.sources.3.manifest=x",
            "--data.sources.3.manifest: data.sources has 2 entries, so the index can be",
        ),
        ("--data.sources.0=x", "--data.sources.0: data.sources is a list of tables; give --data.sources.INDEX.KEY"),
        ("--data.sources.first.manifest=x", "--data.sources.first.manifest: data.sources is a list of tables"),
        ("--data.sources.-1.manifest=x", "--data.sources.-1.manifest: data.sources is a list of tables"),
        ("--data.sources.0.a.b=x", "--data.sources.0.a.b: data.sources is a list of tables"),
        ("--data.sources.9999999.manifest=x", "data.sources is a list of tables"),
        ("--data.sorces.0.manifest=x", "--data.sorces.0.manifest: unknown key; did you mean sources?"),
        ("--rollout.stop.0=x", "--rollout.stop.0: rollout.stop has no keys of its own; give --rollout.stop VALUE"),
        ("--data..manifest=x", "--data..manifest=x: unknown option"),
        ("--data.sources.0.manifest", "--data.sources.0.manifest needs a value"),
    ],
)
def test_invalid_options_are_named(option, message):
    with pytest.raises(UserError) as raised:
        overridden(option)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "tables", [{"data": 3}, {"data": {"sources": {"manifest": "a"}}}, {"data": {"sources": ["a"]}}]
)
def test_values_of_another_form_are_left_to_validation(tables):
    assert apply_overrides(tables, parse_overrides(["--data.sources.0.manifest=b"])) == tables
