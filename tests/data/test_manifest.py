from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcr1.data.manifest import (
    BadRow,
    ManifestError,
    RowError,
    read_manifest,
    row_from_sample,
    sample_from_row,
    scan_manifest,
    write_manifest,
)
from megatron_vcr1.types import VideoSample

ROWS: list[dict[str, Any]] = [
    {
        "id": "grounding",
        "task": "temporal_grounding",
        "video": "a.mp4",
        "duration_s": 12.5,
        "query": "a person opens a door",
        "target": {"interval": [1.5, 4.0]},
    },
    {
        "id": "tracking",
        "task": "tracking",
        "video": ["f/1.jpg", "f/2.jpg"],
        "duration_s": None,
        "query": "cat",
        "target": {"boxes": [[0.0, 0.1, 0.5, 0.6], [0.1, 0.2, 0.6, 1.0]]},
    },
    {
        "id": "grounded",
        "task": "grounded_qa",
        "video": "s3://bucket/b.mp4",
        "duration_s": 30.0,
        "query": "why?",
        "target": {"choice": "B", "intervals": [[0.0, 1.0], [2.0, 3.0]]},
        "options": ["for fun", "by mistake"],
        "category": "CW",
    },
    {
        "id": "choice",
        "task": "multiple_choice_qa",
        "video": "c.mp4",
        "duration_s": 5.0,
        "query": "how many?",
        "target": {"choice": "A"},
        "options": ["1", "2"],
        "clip": [3.0, 8.0],
        "image_fps": 3.0,
    },
    {
        "id": "caption",
        "task": "captioning",
        "video": "d.mp4",
        "duration_s": 5.0,
        "query": "",
        "target": {"caption": "Ein Hund bellt — laut.", "events": ["A dog barks."]},
    },
    {
        "id": "quality",
        "task": "quality",
        "video": "e.mp4",
        "duration_s": None,
        "query": "how good is it?",
        "target": {"label": "low quality"},
    },
]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_rows_survive_the_round_trip(row: dict[str, Any]) -> None:
    assert row_from_sample(sample_from_row(row)) == row


def test_written_manifest_is_read_back_with_videos_beside_it(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "in.jsonl", ROWS)
    samples = read_manifest(manifest)
    assert samples[0].video == str(tmp_path / "a.mp4")
    assert samples[1].video == (str(tmp_path / "f/1.jpg"), str(tmp_path / "f/2.jpg"))
    assert samples[2].video == "s3://bucket/b.mp4"
    write_manifest(tmp_path / "out.jsonl", samples)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == ROWS  # below the manifest's folder: relative again
    write_manifest(tmp_path / "elsewhere" / "out.jsonl", samples)
    assert read_manifest(tmp_path / "elsewhere" / "out.jsonl") == samples


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", ROWS)

    def broken() -> Any:
        yield sample_from_row(ROWS[0])
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError):
        write_manifest(manifest, broken())
    assert len(read_manifest(manifest)) == len(ROWS)


def changed(index: int, **changes: Any) -> dict[str, Any]:
    return {**ROWS[index], **changes}


def without(index: int, key: str) -> dict[str, Any]:
    return {name: value for name, value in ROWS[index].items() if name != key}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], r"expected a JSON object, got \[1, 2\]"),
        (without(0, "duration_s"), "key 'duration_s' is missing; add it"),
        (changed(0, qeury="x"), "key 'qeury' is unknown; remove it or correct its name"),
        (changed(0, task="grounding"), "key 'task': \"grounding\" is not one of temporal_grounding, tracking"),
        (changed(0, id=7), "key 'id': expected text, got 7"),
        (changed(0, video=7), "key 'video': expected a path or a list"),
        (changed(0, video=[1]), r"key 'video\[0\]': expected text"),
        (changed(0, duration_s="12"), "key 'duration_s': expected a number, got \"12\""),
        (changed(0, duration_s=10**400), "key 'duration_s': the number is too large"),
        (changed(0, duration_s=True), "key 'duration_s': expected a number"),
        (changed(0, query=None), "key 'query': expected text, got null"),
        (changed(0, query="a \ud83d b"), "key 'query': half a character at position 2; repair the text"),
        (changed(2, options=["a", "\ude00"]), r"key 'options\[1\]': half a character at position 0"),
        (changed(0, target=[1, 2]), "key 'target': expected an object"),
        (changed(0, target={}), "key 'target.interval' is missing; temporal_grounding needs it"),
        (changed(0, target={"interval": [1, 2], "end": 2}), "key 'target.end' is unknown"),
        (changed(0, target={"interval": [1]}), r"key 'target.interval': expected \[start_s, end_s\], got \[1\]"),
        (changed(0, target={"interval": [4, 1]}), "key 'target.interval': an interval needs 0 <= start < end"),
        (changed(0, target={"interval": [12.5, 13]}), "interval starts at 12.5 s, after the video's 12.5 s"),
        (changed(1, target={"boxes": [[0, 0, 640, 480]] * 2}), r"'target.boxes\[0\]'.*divide pixels"),
        (changed(1, target={"boxes": [[0, 0, 1, 1]] * 7}), "even number of frames"),
        (changed(2, target={"choice": "C", "intervals": [[0, 1]]}), "'C' is not one of the options' letters AB"),
        (changed(2, options="AB"), "key 'options': expected a list"),
        (changed(3, clip=[8, 3]), "key 'clip': an interval needs"),
        (changed(4, target={"caption": "x", "events": "y"}), "key 'target.events': expected a list"),
    ],
)
def test_bad_rows_name_the_key_and_the_remedy(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        sample_from_row(row)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["A", "tracking"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["interval", "boxes", "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(row=st.sampled_from(ROWS), key=st.sampled_from(list(ROWS[3])), value=JSON_VALUES, in_target=st.booleans())
def test_whatever_a_row_holds_it_is_a_sample_or_a_row_error(
    row: dict[str, Any], key: str, value: Any, in_target: bool
) -> None:
    mutated = {**row, "target": dict.fromkeys(row["target"], value)} if in_target else {**row, key: value}
    try:
        sample = sample_from_row(mutated)
    except RowError:
        return
    assert sample_from_row(row_from_sample(sample)) == sample


def test_the_error_names_file_and_line_of_every_bad_row(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [ROWS[0], changed(1, query=" "), ROWS[0], ROWS[2]])
    with manifest.open("a") as file:
        file.write('\n{"id": \n')
    with pytest.raises(ManifestError) as error:
        read_manifest(manifest)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{manifest}: 3 bad rows"
    assert lines[1].startswith(f"  {manifest}, line 2: query is empty; tracking needs one")
    assert lines[2] == f"  {manifest}, line 3: key 'id': 'grounding' is already on line 1; make ids unique"
    assert lines[3].startswith(f"  {manifest}, line 6: not JSON")


def test_scan_goes_on_after_bad_rows(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [changed(0, task="x"), ROWS[1]])
    bad, good = scan_manifest(manifest)
    assert isinstance(bad, BadRow) and (bad.line, bad.id) == (1, "grounding")
    assert isinstance(good, VideoSample) and good.id == "tracking"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "1" * 5000 + "}"], ids=["brackets", "digits"])
def test_json_that_python_refuses_is_a_bad_row(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(f"{line}\n{json.dumps(ROWS[1])}\n")
    bad, good = scan_manifest(tmp_path / "m.jsonl")
    assert isinstance(bad, BadRow) and bad.line == 1 and "not JSON that can be read" in bad.problem
    assert isinstance(good, VideoSample)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", ROWS)
    manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
    assert len(read_manifest(manifest)) == len(ROWS)


def test_many_bad_rows_are_counted_and_missing_or_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"25 bad rows(.|\n)*and 5 more: see `vcr1 data check"):
        read_manifest(write_rows(tmp_path / "m.jsonl", [{}] * 25))
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(ManifestError, match=r"absent\.jsonl: there is no such manifest; vcr1 data import makes"):
        read_manifest(tmp_path / "absent.jsonl")
    (tmp_path / "video.jsonl").write_bytes(b"\x00\xff\xfe\x81")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(tmp_path / "video.jsonl")
