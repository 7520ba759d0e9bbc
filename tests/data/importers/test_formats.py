from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.errors import UserError
from tests.data.importers.importing import issues, run, write


def test_limit_chooses_at_random_and_keeps_the_order(tmp_path: Path) -> None:
    rows = [{"video": f"{index}.mp4", "instruction": "How good?", "answer": "low"} for index in range(200)]
    annotations = write(tmp_path / "quality.json", rows)
    ids = [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=1)[0]]
    assert len(ids) == 50 and ids == sorted(ids)
    assert ids == [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=1)[0]]
    assert ids != [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=2)[0]]
    assert 60 < sum(ids) / 50 < 140  # spread over the whole file


def test_limit_per_video_keeps_as_many_samples_of_each_video(tmp_path: Path) -> None:
    content = {f"v{index}": _activity(*[[0, 1]] * (index % 3 + 1)) for index in range(60)}
    annotations = write(tmp_path / "train.json", content)
    samples, _ = run("activitynet", annotations, limit_per_video=1, seed=1)
    assert [sample.media[0].path for sample in samples] == [f"v{index}.mp4" for index in range(60)]
    assert {sample.id[-1] for sample in samples} == {"0", "1", "2"}  # not always the first one
    assert samples != run("activitynet", annotations, limit_per_video=1, seed=2)[0]
    assert len(run("activitynet", annotations, limit_per_video=2)[0]) == 20 + 40 + 40
    assert len(run("activitynet", annotations, limit_per_video=1, limit=7)[0]) == 7


def test_clips_of_a_file_are_one_video_and_samples_of_text_are_none(tmp_path: Path) -> None:
    question = {"task": "numeric", "query": "how many?", "target": {"value": 1}}
    media = [{"video": "a.mp4", "clip": [0, 1]}, {"video": "a.mp4", "clip": [1, 2]}, {}, {}]
    rows = write(tmp_path / "rows.json", [question | {"id": str(index)} | medium for index, medium in enumerate(media)])
    samples, _ = run("huggingface", rows, limit_per_video=1)
    assert [len(sample.media) for sample in samples] == [1, 0, 0]


def test_real_charades_has_one_sample_for_each_of_its_videos(realdata: Path) -> None:
    """5,338 videos, of which two have only a query with an inverted span."""
    annotations = realdata / "annotations/charades_sta/videochat_r1_train.json"
    assert len(json.loads(annotations.read_text())) == 5338
    samples, _ = run("charades_sta", annotations, limit_per_video=1)
    assert len(samples) == len({sample.media[0].path for sample in samples}) == 5336


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nonsense", [], "unknown format; known formats are own, charades_sta"),
        ("activitynet", {"v": {"duration": 5}}, r"not in the format activitynet .* 'timestamps' is missing"),
        ("activitynet", [1, 2], "expected a JSON object with one entry for each video, got a list"),
        ("vidtab_quality", {"a": 1}, "expected a JSON list of rows, got an object"),
        ("perception_test", [{}], "expected a JSON object with one entry"),
        ("got10k", {}, "expected a JSON list of rows"),
        ("vidtab_quality", [["a"]], "not in the format vidtab_quality .* first row, a.json, row 1"),
        ("activitynet", {"v": {"duration": "9", "timestamps": [[1, 2]], "sentences": ["x"]}}, "first row, v_0"),
        ("activitynet", "{", "not JSON"),
        ("vidtab_quality", [], "no rows"),
        ("mvbench", [], "is not one of MVBench's sub-tasks"),
        ("nextgqa", [{"id": "a"}], r"not in the format nextgqa .* is missing"),
    ],
)
def test_wrong_files_are_user_errors(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(name, write(tmp_path / "a.json", content))


def _quality(name: object, **changes: Any) -> dict[str, Any]:
    return {"video": name, "instruction": "How good?", "answer": "low"} | changes


def _choice(**changes: Any) -> dict[str, Any]:
    return {"question": "q?", "candidates": ["x", "y"], "answer": "x", "video": "a.mp4"} | changes


def _glue(id: str, **changes: Any) -> dict[str, Any]:
    row = {"id": id, "video": "a.mp4", "duration": 9, "question": "q?", "type": "CW", "glue": [[1, 2]]}
    return row | {"options": ["(A) x", "(B) y"], "answer": "(A)"} | changes


def _dream(index: int, **changes: Any) -> dict[str, Any]:
    prompt = {"content": [{"video": {"video_file": f"{index}.mp4"}}]}
    answer = {"content": [{"reference": "A dog barks."}]}
    row = {"idx": index, "vid": index, "dataset": "d", "messages": [prompt, answer]}
    return row | {"extra_info": {"duration": 5, "events": ["A dog barks."]}} | changes


def _perception(*answers: Any) -> dict[str, Any]:
    questions = [
        {"id": number, "question": "q?", "options": ["x", "y"], "area": "a", "answer_id": answer}
        for number, answer in enumerate(answers)
    ]
    return {"metadata": {"split": "valid", "num_frames": 30, "frame_rate": 10}, "mc_question": questions}


def _activity(*spans: Any, duration: Any = 9) -> dict[str, Any]:
    return {"duration": duration, "timestamps": list(spans), "sentences": ["a dog barks"] * len(spans)}


def _box_row(name: str, gt: Any) -> dict[str, Any]:
    return {"path": f"/d/{name}", "object": "dog", "gt": gt}


BOXES = [[0.1, 0.1, 0.5, 0.5]] * 8
MALFORMED_AMONG_GOOD = [  # format, file, its content, ids of the good rows, ids of the malformed rows
    (
        "activitynet",
        "a.json",
        {
            "a": _activity([1, 2], ["1", "2"], None, [1], [1, 2, 3], {"x": 1}, [None, 2], [3, 4]),
            "b": _activity([1, 2], duration="nine"),
            "c": 5,
            "d": _activity([1, 2], duration=None),
            "e": {"duration": 9, "timestamps": [[1, 2]], "sentences": []},
            "f": {"duration": 9, "timestamps": [[1, 2]], "sentences": [None]},
        },
        ["a_0", "a_7", "d_0"],
        ["a_1", "a_2", "a_3", "a_4", "a_5", "a_6", "b_0", "c", "e", "f_0"],
    ),
    (
        "vidtab_quality",
        "a.json",
        [_quality("a.mp4"), _quality(None), _quality("c.mp4", instruction=3), None, _quality("e.mp4", answer=[1])],
        ["a"],
        ["a.json, row 2", "c", "a.json, row 4", "e"],
    ),
    (
        "mvbench",
        "action_count.json",
        [_choice(), _choice(start="1", end="2"), {}, _choice(candidates=None), _choice(start=1, end=2), "text"],
        ["action_count_0", "action_count_4"],
        ["action_count_1", "action_count_2", "action_count_3", "action_count_5"],
    ),
    (
        "nextgqa",
        "a.json",
        [_glue("a"), _glue("b", glue=None), _glue("c", answer=None), _glue("d", glue=[[1]]), {"id": "e"}, _glue("f")],
        ["a", "f"],
        ["b", "c", "d", "e"],
    ),
    (
        "dream1k",
        "a.jsonl",
        [_dream(0), _dream(1, messages=[]), _dream(2, extra_info=None), _dream(3)],
        ["dream_0", "dream_3"],
        ["dream_1", "dream_2"],
    ),
    ("carebench", "a.json", [{"video": "a.mp4", "caption": "x"}, {"video": "b.mp4"}, 3], ["a"], ["b", "a.json, row 3"]),
    (
        "perception_test",
        "a.json",
        {"a": _perception(0, "1", -1, None, 1), "b": None, "c": _perception(9)},
        ["a_0", "a_4"],
        ["a_1", "a_2", "a_3", "b", "c_0"],
    ),
    (
        "got10k",
        "a.json",
        [
            _box_row("a", BOXES),
            _box_row("b", "x"),
            _box_row("c", [[1]] * 8),
            {"path": 3},
            _box_row("e", BOXES),
            _box_row("f", BOXES[:6]),
        ],
        ["a", "e"],
        ["b", "c", "a.json, row 4", "f"],
    ),
    (
        "huggingface",
        "a.jsonl",
        [
            {"id": "a", "task": "quality", "video": "a.mp4", "query": "q?", "target": {"label": "low"}},
            {"id": "b", "task": "quality", "video": "a.mp4", "query": 3, "target": {"label": "low"}},
            {"id": "c", "task": "quality", "video": "a.mp4", "query": "q?", "target": None},
            {"task": "quality"},
            {"id": "e", "task": "temporal_grounding", "video": 1, "query": "q?", "target": {"interval": [1, 2]}},
        ],
        ["a"],
        ["b", "c", "a.jsonl, row 4", "e"],
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "good", "malformed"), MALFORMED_AMONG_GOOD)
def test_a_malformed_row_among_good_ones_is_skipped_and_listed(
    tmp_path: Path, name: str, file: str, content: Any, good: list[str], malformed: list[str]
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in content) if file.endswith("jsonl") else content
    samples, report = run(name, write(tmp_path / file, text))
    assert [sample.id for sample in samples] == good
    skipped = [issue for issue in report.issues if issue.action == "skipped"]
    assert [issue.row_id for issue in skipped] == malformed
    assert {issue.problem for issue in skipped} == {"invalid_row"}
    assert report.issue_counts()["invalid_row (skipped)"] == len(malformed)
    assert report.num_rows == len(good) + len(malformed)


def test_a_line_that_is_not_json_among_good_ones_is_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"video": f"{number}.mp4", "caption": "x"}) for number in range(3)]
    samples, report = run("carebench", write(tmp_path / "a.jsonl", "\n".join([lines[0], "{", *lines[1:]])))
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    assert issues(report) == [("a.jsonl, row 2", "invalid_row", "skipped")]


REAL_COUNTS = [  # format, files, split, rows, videos or None, issues
    ("charades_sta", ["charades_sta/videochat_r1_train.json"], None, 12408, 5336, (4, 1786)),
    (
        "charades_sta",
        ["charades_sta/charades_sta_train.txt", "charades_sta/Charades_v1_train_lengths.csv"],
        None,
        12408,
        5336,
        (4, 1802),
    ),
    (
        "charades_sta",
        ["charades_sta/charades_sta_test.txt", "charades_sta/Charades_v1_test_lengths.csv"],
        None,
        3720,
        1334,
        (0, 562),
    ),
    ("charades_sta", ["charades_sta/videochat_r1_test.json"], None, 3720, 1334, (0, 562)),
    ("activitynet", ["activitynet/videochat_r1_test.json"], None, 17031, 4885, (0, 111)),
    ("nextgqa", ["nextgqa/nextgqa_val.json"], None, 3358, 567, (0, 3)),
    ("nextgqa", ["nextgqa/nextgqa_test.json"], None, 5553, 990, (0, 0)),
    ("got10k", ["got10k/videochat_r1_val.json"], None, 180, 180, (0, 0)),
    ("vidtab_quality", ["vidtab/Quality_Access_100shot.json"], None, 200, 200, (0, 0)),
    ("vidtab_quality", ["vidtab/Quality_Access_test.json"], None, 724, 724, (0, 0)),
    ("dream1k", ["dream1k/DREAM-1k.jsonl"], None, 1000, 1000, (0, 0)),
    ("dream1k", ["dream1k/DREAM-1k.jsonl"], "DREAM/videvo", 200, 200, (0, 0)),
    ("mvbench", ["mvbench"], None, 4000, None, (0, 0)),
    ("mvbench", ["mvbench"], "action_count", 200, None, (0, 0)),
    ("videomme", ["videomme/test-00000-of-00001.parquet"], None, 2700, 900, (0, 0)),
    ("videomme", ["videomme/test-00000-of-00001.parquet"], "short", 900, 300, (0, 0)),
]


@pytest.mark.parametrize(("name", "files", "split", "num_rows", "num_videos", "spans"), REAL_COUNTS)
def test_published_files_give_the_published_counts(
    realdata: Path,
    name: str,
    files: list[str],
    split: str | None,
    num_rows: int,
    num_videos: int | None,
    spans: tuple[int, int],
) -> None:
    """`spans`: number of empty or inverted spans, and number of other spans that end after their video."""
    if name == "videomme":
        pytest.importorskip("pyarrow")
    samples, report = run(name, *(realdata / "annotations" / file for file in files), split=split)
    problems = [issue.problem for issue in report.issues]
    assert (problems.count("inverted_span") + problems.count("empty_span"), problems.count("span_past_end")) == spans
    assert report.num_rows == num_rows == len(samples) + spans[0]
    assert num_videos in (None, len({sample.media[0].path for sample in samples}))
    assert {issue.action for issue in report.issues if issue.problem not in ("inverted_span", "empty_span")} <= {
        "repaired",
        "kept",
    }
