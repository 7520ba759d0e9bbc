from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vcr1.data.importers.cleaning import VideoFolder
from megatron_vcr1.data.importers.formats import ImportReport, import_dataset
from megatron_vcr1.data.importers.questions import MVBENCH_FOLDERS
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import (
    Box,
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    Interval,
    QualityTarget,
    TrackingTarget,
    VideoSample,
)

NOWHERE = VideoFolder(None)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def run(name: str, *annotations: Path, videos: VideoFolder = NOWHERE, **options: Any) -> Any:
    return import_dataset(name, annotations, videos, **options)


def issues(report: ImportReport) -> list[tuple[str, str, str]]:
    return [(issue.row_id, issue.problem, issue.action) for issue in report.issues]


@pytest.fixture
def charades(tmp_path: Path) -> tuple[Path, Path]:
    text = write(
        tmp_path / "train.txt",
        "AAA 1.0 4.0##a person sits ## down.\nAAA 5.0 2.0##inverted\nBBB 8.0 12.5##past the end\n"
        "BBB 11.0 12.0##after the end\nBBB 1.0 2.0## \n",
    )
    return text, write(tmp_path / "lengths.csv", "id,length,subject\nAAA,10.0,x\nBBB,10.5,y\n")


def test_charades_text_repairs_and_skips_with_a_reason_for_each(charades: tuple[Path, Path]) -> None:
    samples, report = run("charades_sta", *charades)
    assert samples == [
        VideoSample("AAA_0", "AAA.mp4", GroundingTarget(Interval(1, 4)), "a person sits ## down.", duration_s=10.0),
        VideoSample("BBB_0", "BBB.mp4", GroundingTarget(Interval(8, 10.5)), "past the end", duration_s=10.5),
    ]
    assert issues(report) == [
        ("AAA_1", "inverted_span", "skipped"),
        ("BBB_0", "span_past_end", "repaired"),
        ("BBB_1", "span_after_end", "skipped"),
        ("BBB_2", "empty_query", "skipped"),
    ]
    assert report.num_rows == 5 == report.num_samples + sum(issue.action == "skipped" for issue in report.issues)
    kept, report = run("charades_sta", *charades, keep_overruns=True)
    assert kept[1].intervals == (Interval(8, 12.5),)
    assert ("BBB_0", "span_past_end", "kept") in issues(report)


def test_a_byte_order_mark_is_no_part_of_a_name(charades: tuple[Path, Path], tmp_path: Path) -> None:
    expected = run("charades_sta", *charades)
    for path in charades:
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert run("charades_sta", *charades) == expected
    content = tmp_path / "train.json"
    content.write_text('{"AAA": {"duration": 10, "timestamps": [[1, 4]], "sentences": ["a"]}}', encoding="utf-8-sig")
    assert [sample.id for sample in run("activitynet", content)[0]] == ["AAA_0"]


def test_charades_json_gives_the_same_samples_as_text(charades: tuple[Path, Path], tmp_path: Path) -> None:
    content = {
        "AAA": {
            "duration": 10.0,
            "timestamps": [[1.0, 4.0], [5.0, 2.0]],
            "sentences": ["a person sits ## down.", "inverted"],
        },
        "BBB": {
            "duration": 10.5,
            "timestamps": [[8.0, 12.5], [11.0, 12.0], [1.0, 2.0]],
            "sentences": ["past the end", "after the end", " "],
        },
    }
    from_json = run("charades_sta", write(tmp_path / "train.json", content))
    assert from_json == run("charades_sta", *charades)


def test_videos_are_found_under_any_suffix_and_missing_ones_skip_their_rows(
    charades: tuple[Path, Path], tmp_path: Path
) -> None:
    write(tmp_path / "videos/AAA.webm", "")
    samples, report = run("charades_sta", *charades, videos=VideoFolder(str(tmp_path / "videos")))
    assert [sample.video for sample in samples] == [str(tmp_path / "videos/AAA.webm")]
    assert [row for row, problem, _ in issues(report) if problem == "missing_video"] == ["BBB_0", "BBB_1"]
    assert report.videos_checked


def test_videos_are_found_through_fsspec(charades: tuple[Path, Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://charades/BBB.mp4", "wb") as file:
        file.write(b"x")
    samples, _ = run("charades_sta", *charades, videos=VideoFolder("memory://charades"))
    assert [sample.video for sample in samples] == ["memory://charades/BBB.mp4"]


def test_activitynet(tmp_path: Path) -> None:
    content = {"v_1": {"duration": 55.15, "timestamps": [[0, 4.14]], "sentences": [" Two men talk."]}}
    samples, report = run("activitynet", write(tmp_path / "val.json", content))
    assert samples == [
        VideoSample("v_1_0", "v_1.mp4", GroundingTarget(Interval(0, 4.14)), "Two men talk.", duration_s=55.15)
    ]
    assert report.issues == ()


def got10k_sequence(folder: Path, num_frames: int, boxes: list[str]) -> None:
    for frame in range(num_frames):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(folder / f"{frame + 1:08d}.jpg")
    write(folder / "groundtruth.txt", "\n".join(boxes) + "\n")
    write(folder / "meta_info.ini", "[METAINFO]\nanno_fps: 10Hz\nobject_class: sloth\nresolution: (200, 100)\n")


def test_got10k_folders(tmp_path: Path) -> None:
    root = tmp_path / "GOT-10k"
    got10k_sequence(root / "val/GOT_1", 15, [f"{index},20.0,40,50" for index in range(15)])
    got10k_sequence(root / "val/GOT_2", 15, ["170,20,40,50"] * 15)  # 5 px wide of the 200 px frame is outside
    got10k_sequence(root / "val/GOT_3", 15, ["10,20,40,50"] * 14 + ["0,0,0,0"])  # absent in the last frame
    got10k_sequence(root / "val/GOT_4", 15, ["10,20,40,50"])  # as in the test split
    got10k_sequence(root / "val/GOT_5", 15, ["10,20,40,50"] * 15)
    write(root / "val/GOT_5/absence.label", "0\n" * 14 + "1\n")
    samples, report = run("got10k", root, split="val")
    assert [sample.id for sample in samples] == ["GOT_1", "GOT_2"]
    assert isinstance(samples[0].target, TrackingTarget)
    assert samples[0].target.boxes == tuple(
        Box(left / 200, 0.2, (left + 40) / 200, 0.7) for left in (0, 2, 4, 6, 8, 10, 12, 14)
    )
    assert [Path(frame).stem for frame in samples[0].video] == [f"{number:08d}" for number in range(1, 16, 2)]
    assert (samples[0].query, samples[0].duration_s) == ("sloth", 1.5)
    assert samples[1].target == TrackingTarget((Box(0.85, 0.2, 1.0, 0.7),) * 8)
    assert sorted(set(issues(report))) == [
        ("GOT_2", "box_outside_frame", "repaired"),
        ("GOT_3", "empty_box", "skipped"),
        ("GOT_4", "incomplete_sequence", "skipped"),
        ("GOT_5", "object_absent", "skipped"),
    ]


def test_got10k_json_lists_frames_where_the_sequences_are(tmp_path: Path) -> None:
    entry = {"path": "/elsewhere/val/GOT_1", "object": "sloth", "gt": [[0.1, 0.0, 0.8, 0.797]] * 8}
    annotations = write(tmp_path / "val.json", [entry, {**entry, "path": "/elsewhere/val/GOT_2"}])
    samples, _ = run("got10k", annotations)
    assert samples[0].video == "GOT_1/"
    got10k_sequence(tmp_path / "videos/GOT_1", 8, [])
    got10k_sequence(tmp_path / "videos/GOT_2", 7, [])
    samples, report = run("got10k", annotations, videos=VideoFolder(str(tmp_path / "videos")))
    assert [len(sample.video) for sample in samples] == [8]
    assert issues(report) == [("GOT_2", "too_few_frames", "skipped")]


def nextgqa_files(folder: Path) -> list[Path]:
    header = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    rows = "48,2697,640,480,why did the boy sit,rest ,1,CW,share,approach,rest ,play,gesture\n"
    rows += "48,2697,640,480,what is it,dog,2,TN,cat,dog,dog,bird,cow\n48,1,1,1,what,ox,3,TN,cat,dog,cow,bird,hen\n"
    spans = {"48": {"duration": 90, "location": {"1": [[13.8, 29.8], [-0.1, 95.0]], "2": [[1, 2]], "3": [[1, 2]]}}}
    return [
        write(folder / "val.csv", header + rows),
        write(folder / "gsub_val.json", spans),
        write(folder / "map.json", {"48": "1104/48"}),
    ]


def test_nextgqa_csv(tmp_path: Path) -> None:
    samples, report = run("nextgqa", *nextgqa_files(tmp_path))
    assert samples[0] == VideoSample(
        "48_1",
        "1104/48.mp4",
        GroundedChoiceTarget("C", (Interval(13.8, 29.8), Interval(0, 90))),
        "why did the boy sit",
        ("share", "approach", "rest", "play", "gesture"),
        duration_s=90.0,
        category="CW",
    )
    assert isinstance(samples[1].target, GroundedChoiceTarget) and samples[1].target.choice == "B"
    assert issues(report) == [
        ("48_1", "negative_start", "repaired"),
        ("48_1", "span_past_end", "repaired"),
        ("48_2", "ambiguous_answer", "kept"),
        ("48_3", "answer_not_in_options", "skipped"),
    ]


def test_nextgqa_json_and_a_bad_one_of_several_spans(tmp_path: Path) -> None:
    entry = {
        "id": "48_1",
        "video": "1104/48.mp4",
        "question": "why?",
        "options": ["(A) share", "(B) rest "],
        "duration": 90,
        "glue": [[5.0, 1.0], [13.8, 29.8]],
        "type": "CW",
        "answer": "(B)",
    }
    only_bad = {**entry, "id": "48_2", "glue": [[5.0, 1.0], [95.0, 96.0]]}
    samples, report = run("nextgqa", write(tmp_path / "val.json", [entry, only_bad]))
    assert samples[0].options == ("share", "rest")
    assert samples[0].target == GroundedChoiceTarget("B", (Interval(13.8, 29.8),))
    assert issues(report) == [("48_1", "inverted_span", "repaired"), ("48_2", "no_usable_span", "skipped")]


def test_mvbench_clips_and_folders(tmp_path: Path) -> None:
    timed = {"video": "Z.mp4", "question": "what?", "candidates": ["x", "y"], "answer": "y", "start": 1.5, "end": 17.0}
    write(tmp_path / "json/action_sequence.json", [timed])
    write(tmp_path / "json/episodic_reasoning.json", [{**timed, "video": "clip_1", "fps": 3}])
    write(tmp_path / "json/state_change.json", [{**timed, "candidates": ["y"]}])
    samples, report = run("mvbench", tmp_path / "json")
    assert samples[0].video == "star/Charades_v1_480/Z.mp4"
    assert (samples[0].clip, samples[0].duration_s) == (Interval(1.5, 17.0), 15.5)
    assert (samples[0].target, samples[0].category) == (ChoiceTarget("B"), "action_sequence")
    assert (samples[0].image_fps, samples[1].image_fps) == (None, 3.0)
    assert issues(report) == [("state_change_0", "single_option", "kept")]
    only, _ = run("mvbench", tmp_path / "json", split="state_change")
    assert [sample.id for sample in only] == ["state_change_0"]
    assert len(MVBENCH_FOLDERS) == 20


def test_perception_test(tmp_path: Path) -> None:
    question = {
        "id": 4,
        "question": "where?",
        "options": ["left", "right", "behind"],
        "answer_id": 2,
        "area": "physics",
    }
    metadata = {"split": "valid", "num_frames": 90, "frame_rate": 30.0}
    content = {
        "video_7": {"metadata": metadata, "mc_question": [question]},
        "video_8": {"metadata": {**metadata, "split": "train"}, "mc_question": [question]},
    }
    samples, _ = run("perception_test", write(tmp_path / "all.json", content), split="valid")
    assert samples == [
        VideoSample(
            "video_7_4",
            "video_7.mp4",
            ChoiceTarget("C"),
            "where?",
            ("left", "right", "behind"),
            duration_s=3.0,
            category="physics",
        )
    ]


def test_captions_and_quality(tmp_path: Path) -> None:
    captions = write(tmp_path / "metadata.json", [{"video": "v_30.mp4", "caption": "A man cooks."}])
    assert run("carebench", captions)[0] == [VideoSample("v_30", "v_30.mp4", CaptionTarget("A man cooks."))]
    rows = write(tmp_path / "quality.json", [{"video": "7.mp4", "instruction": "How good?", "answer": "low quality"}])
    assert run("vidtab_quality", rows)[0] == [VideoSample("7", "7.mp4", QualityTarget("low quality"), "How good?")]


def test_huggingface_tables_of_every_kind(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "id": "a",
            "task": "temporal_grounding",
            "video": "a.mp4",
            "duration_s": 9.0,
            "query": "a dog barks",
            "target": {"interval": [1.0, 2.0], "label": None},
        },
        {
            "id": "b",
            "task": "quality",
            "video": "b.mp4",
            "duration_s": None,
            "query": "how good?",
            "target": {"interval": None, "label": "low quality"},
        },
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    saved = tmp_path / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    lines = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    expected = [
        VideoSample("a", "a.mp4", GroundingTarget(Interval(1, 2)), "a dog barks", duration_s=9.0),
        VideoSample("b", "b.mp4", QualityTarget("low quality"), "how good?"),
    ]
    for source in (tmp_path / "rows.parquet", saved, lines, write(tmp_path / "rows.json", rows)):
        assert run("huggingface", source)[0] == expected, source


def test_repeated_and_invalid_rows_are_reported(tmp_path: Path) -> None:
    row = {"id": "a", "task": "quality", "video": "a.mp4", "query": "how?", "target": {"label": "good"}}
    rows = write(tmp_path / "rows.json", [row, row, {**row, "id": "b", "target": {}}, {**row, "id": "c", "fps": 2}])
    samples, report = run("huggingface", rows)
    assert [sample.id for sample in samples] == ["a"]
    assert issues(report) == [
        ("a", "repeated_id", "skipped"),
        ("b", "invalid_row", "skipped"),
        ("c", "invalid_row", "skipped"),
    ]
    assert report.issue_counts() == {"invalid_row (skipped)": 2, "repeated_id (skipped)": 1}


def test_limit_is_a_seeded_choice_in_the_original_order(tmp_path: Path) -> None:
    rows = [{"video": f"{index}.mp4", "instruction": "How good?", "answer": "low"} for index in range(200)]
    annotations = write(tmp_path / "quality.json", rows)
    ids = [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=1)[0]]
    assert len(ids) == 50 and ids == sorted(ids)
    assert ids == [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=1)[0]]
    assert ids != [int(sample.id) for sample in run("vidtab_quality", annotations, limit=50, seed=2)[0]]
    assert 60 < sum(ids) / 50 < 140  # from all over the file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nonsense", [], "unknown format; known are charades_sta"),
        ("activitynet", {"v": {"duration": 5}}, r"not in the format activitynet .* 'timestamps' is missing"),
        ("activitynet", [1, 2], "not in the format activitynet"),
        ("activitynet", "{", "cannot be read as JSON"),
        ("vidtab_quality", [], "no rows"),
        ("mvbench", [], "is none of MVBench's sub-tasks"),
        ("nextgqa", [{"id": "a"}], r"not in the format nextgqa .* is missing"),
    ],
)
def test_wrong_files_are_user_errors(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(name, write(tmp_path / "a.json", content))


def test_wrong_sets_of_files_are_user_errors(tmp_path: Path, charades: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"one file each of .txt, .csv, or one .json"):
        run("charades_sta", charades[0])
    with pytest.raises(UserError, match=r"questions' .csv, gsub_\*.json and map_vid_vidorID.json together"):
        run("nextgqa", *nextgqa_files(tmp_path)[:2])
    with pytest.raises(UserError, match="charades_sta has a file for each split"):
        run("charades_sta", *charades, split="train")
    with pytest.raises(UserError, match="no sequence folders"):
        run("got10k", tmp_path)
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        run("activitynet", tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"expected a \.json, \.jsonl, \.parquet"):
        run("carebench", charades[0])
    write(tmp_path / "bad.txt", "AAA 1.0##no end\n")
    with pytest.raises(UserError, match=r"line 'AAA 1.0##no end' is not"):
        run("charades_sta", tmp_path / "bad.txt", charades[1])


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
    """``spans``: how many are inverted, and how many others end after their video."""
    if name == "videomme":
        pytest.importorskip("pyarrow")
    samples, report = run(name, *(realdata / "annotations" / file for file in files), split=split)
    problems = [issue.problem for issue in report.issues]
    assert (problems.count("inverted_span"), problems.count("span_past_end")) == spans
    assert report.num_rows == num_rows == len(samples) + spans[0]
    assert num_videos in (None, len({sample.video for sample in samples}))
    assert {issue.action for issue in report.issues if issue.problem != "inverted_span"} <= {"repaired", "kept"}


def test_real_nextgqa_csv_and_json_agree(realdata: Path) -> None:
    folder = realdata / "annotations/nextgqa"
    for split, num_different in (("val", 0), ("test", 1)):  # one test answer is the text of two options
        from_json, _ = run("nextgqa", folder / f"nextgqa_{split}.json")
        csv_files = [folder / f"{split}.csv", folder / f"gsub_{split}.json", folder / "map_vid_vidorID.json"]
        from_csv, report = run("nextgqa", *csv_files)
        csv_by_id = {sample.id: sample for sample in from_csv}
        different = [sample.id for sample in from_json if csv_by_id[sample.id] != sample]
        ambiguous = [issue.row_id for issue in report.issues if issue.problem == "ambiguous_answer"]
        assert len(from_csv) == len(from_json)
        assert different == ambiguous and len(different) == num_different


def test_real_nextgqa_validation_has_339_questions_with_several_spans(realdata: Path) -> None:
    samples, _ = run("nextgqa", realdata / "annotations/nextgqa/nextgqa_val.json")
    assert sum(len(sample.intervals) > 1 for sample in samples) == 339
