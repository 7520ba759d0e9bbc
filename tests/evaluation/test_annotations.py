from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.annotations import read_annotations
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.tasks import task_of
from megatron_vcr1.types import Interval
from tests.evaluation.samples import captions, choices


def test_a_manifest_is_filtered_by_task_and_category(tmp_path: Path) -> None:
    samples = [*choices("a", category="short/OCR"), *captions("b")]
    write_manifest(tmp_path / "m.jsonl", samples)
    (caption,) = read_annotations(find_benchmark("dream1k"), [tmp_path / "m.jsonl"])
    assert (caption.id, caption.target) == ("b", samples[1].target)
    assert [sample.id for sample in read_annotations(find_benchmark("videomme_short"), [tmp_path / "m.jsonl"])] == ["a"]


def test_published_spans_that_end_after_the_video_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.txt").write_text("V1 2.0 40.0##a person runs\nV1 9.0 3.0##a person sits\n")
    (tmp_path / "lengths.csv").write_text("id,length\nV1,30.0\n")
    (sample,) = read_annotations(find_benchmark("charades_sta"), [tmp_path / "test.txt", tmp_path / "lengths.csv"])
    assert (sample.id, sample.intervals) == ("V1_0", (Interval(2, 40),))
    assert "1 published rows: inverted_span (skipped)" in capsys.readouterr().out


def test_perception_test_annotations_are_read(tmp_path: Path) -> None:
    question = {"id": 0, "question": "what?", "options": ["x", "y", "z"], "answer_id": 1, "area": "physics"}
    metadata = {"split": "valid", "num_frames": 300, "frame_rate": 30.0}
    (tmp_path / "valid.json").write_text(json.dumps({"v1": {"metadata": metadata, "mc_question": [question]}}))
    (sample,) = read_annotations(find_benchmark("perception_test"), [tmp_path / "valid.json"])
    assert task_of(sample).metrics(sample, "B").values == {"accuracy": 1}


def test_published_json_lines_are_not_taken_for_a_manifest(tmp_path: Path) -> None:
    content = [{"video": {"video_file": "v.mp4"}}], [{"reference": "A dog\u2028barks."}]
    row: dict[str, object] = {
        "messages": [{"content": parts} for parts in content],
        "dataset": "DREAM/movie",
        "idx": 1,
        "vid": 1,
    }
    row["extra_info"] = {"duration": 5.0, "events": ["A dog barks."]}
    (tmp_path / "dream.jsonl").write_text("\n" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (sample,) = read_annotations(find_benchmark("dream1k"), [tmp_path / "dream.jsonl"])
    assert sample.id == "dream_1"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tracking", '{"some": "json"}', "benchmark tracking needs a manifest|not a manifest"),
        ("charades_sta", "{", "1 bad rows"),
        ("dream1k", '{"id": "a", "task": "dance", "target": {}}', "'dance\\\\?\"? is not one of|bad rows"),
    ],
)
def test_a_file_that_is_neither_a_manifest_nor_published_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_annotations(find_benchmark(name), [tmp_path / "m.jsonl"])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        read_annotations(find_benchmark("charades_sta"), [tmp_path / "test.jsonl"])
