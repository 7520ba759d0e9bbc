from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.errors import UserError
from tests.data.importers.importing import run, write


def test_limit_chooses_at_random_and_keeps_the_order(tmp_path: Path) -> None:
    rows = [{"video": f"{index}.mp4", "instruction": "How good?", "answer": "low"} for index in range(200)]
    annotations = write(tmp_path / "quality.json", rows)
    ids = [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=1)[0]]
    assert len(ids) == 50 and ids == sorted(ids)
    assert ids == [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=1)[0]]
    assert ids != [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=2)[0]]
    assert 60 < sum(ids) / 50 < 140  # spread over the whole file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nonsense", [], "unknown format; known formats are charades_sta"),
        ("activitynet", {"v": {"duration": 5}}, r"not in the format activitynet .* 'timestamps' is missing"),
        ("activitynet", [1, 2], "not in the format activitynet"),
        ("activitynet", "{", "cannot be read as JSON"),
        ("vidtab_quality", [], "no rows"),
        ("mvbench", [], "is not one of MVBench's sub-tasks"),
        ("nextgqa", [{"id": "a"}], r"not in the format nextgqa .* is missing"),
    ],
)
def test_wrong_files_are_user_errors(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(name, write(tmp_path / "a.json", content))


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
    assert num_videos in (None, len({sample.video for sample in samples}))
    assert {issue.action for issue in report.issues if issue.problem not in ("inverted_span", "empty_span")} <= {
        "repaired",
        "kept",
    }
