from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcr1.data.importers.questions import MVBENCH_FOLDERS, without_labels
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import ChoiceTarget, GroundedChoiceTarget, QualityTarget
from megatron_vcr1.types import Interval, Sample, Video
from tests.data.importers.importing import issues, run, write


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


def test_nextgqa_csv_rows_become_samples_with_every_problem_reported(tmp_path: Path) -> None:
    samples, report = run("nextgqa", *nextgqa_files(tmp_path))
    assert samples[0] == Sample(
        "48_1",
        (Video("1104/48.mp4", 90.0),),
        GroundedChoiceTarget("C", (Interval(13.8, 29.8), Interval(0, 90))),
        "why did the boy sit",
        ("share", "approach", "rest", "play", "gesture"),
        category="CW",
    )
    assert isinstance(samples[1].target, GroundedChoiceTarget) and samples[1].target.choice == "B"
    assert issues(report) == [
        ("48_1", "negative_start", "repaired"),
        ("48_1", "span_past_end", "repaired"),
        ("48_2", "ambiguous_answer", "kept"),
        ("48_3", "answer_not_in_options", "skipped"),
    ]


def test_a_bad_span_of_nextgqa_is_removed_and_a_row_without_a_good_span_is_skipped(tmp_path: Path) -> None:
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


def test_nextgqa_is_imported_as_plain_multiple_choice(tmp_path: Path) -> None:
    grounded, _ = run("nextgqa", *nextgqa_files(tmp_path))
    plain, report = run("nextgqa", *nextgqa_files(tmp_path), task="multiple_choice_qa")
    assert plain == [replace(sample, target=ChoiceTarget(sample.target.choice)) for sample in grounded]
    assert {problem for _, problem, _ in issues(report)} == {"ambiguous_answer", "answer_not_in_options"}
    with pytest.raises(UserError, match="--task quality: for nextgqa, it can be grounded_qa or multiple_choice_qa"):
        run("nextgqa", *nextgqa_files(tmp_path), task="quality")
    with pytest.raises(UserError, match="--task quality: for activitynet, it can be left out"):
        run("activitynet", *nextgqa_files(tmp_path), task="quality")


def test_missing_files_of_nextgqa_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"questions' .csv, gsub_\*.json and map_vid_vidorID.json together"):
        run("nextgqa", *nextgqa_files(tmp_path)[:2])


def test_mvbench_rows_become_samples_with_clips_and_folders(tmp_path: Path) -> None:
    timed = {"video": "Z.mp4", "question": "what?", "candidates": ["x", "y"], "answer": "y", "start": 1.5, "end": 17.0}
    write(tmp_path / "json/action_sequence.json", [timed])
    write(tmp_path / "json/episodic_reasoning.json", [{**timed, "video": "clip_1", "fps": 3}])
    write(tmp_path / "json/state_change.json", [{**timed, "candidates": ["y"]}])
    samples, report = run("mvbench", tmp_path / "json")
    assert samples[0].media == (Video("star/Charades_v1_480/Z.mp4", 15.5, Interval(1.5, 17.0)),)
    assert (samples[0].target, samples[0].category) == (ChoiceTarget("B"), "action_sequence")
    assert samples[1].video is not None and samples[1].video.image_fps == 3.0
    assert issues(report) == [("state_change_0", "single_option", "kept")]
    only, _ = run("mvbench", tmp_path / "json", split="state_change")
    assert [sample.id for sample in only] == ["state_change_0"]
    assert len(MVBENCH_FOLDERS) == 20


def test_mvbench_rows_without_a_clip_may_have_null_times(tmp_path: Path) -> None:
    row = {"video": "Z.mp4", "question": "what?", "candidates": ["x", "y"], "answer": "y", "start": None, "end": None}
    (sample,), _ = run("mvbench", write(tmp_path / "action_sequence.json", [row]))
    assert sample.media == (Video("star/Charades_v1_480/Z.mp4"),)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["(A) a cat", "(B) A.I."], ["a cat", "A.I."]),
        (["A) a cat", "B: a dog"], ["a cat", "a dog"]),
        (["Stanford", "A.I. lab"], ["Stanford", "A.I. lab"]),
    ],
)
def test_labels_of_options_are_removed_and_names_are_not(options: list[str], texts: list[str]) -> None:
    assert without_labels(options) == texts


def test_labels_in_another_order_than_that_of_the_letters_are_refused() -> None:
    with pytest.raises(ValueError, match="the options are labelled B, A"):
        without_labels(["B. a dog", "A. a cat"])


def test_perception_test_rows_of_a_split_become_samples(tmp_path: Path) -> None:
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
        Sample(
            "video_7_4",
            (Video("video_7.mp4", 3.0),),
            ChoiceTarget("C"),
            "where?",
            ("left", "right", "behind"),
            category="physics",
        )
    ]


def test_vidtab_quality_rows_become_samples(tmp_path: Path) -> None:
    rows = write(tmp_path / "quality.json", [{"video": "7.mp4", "instruction": "How good?", "answer": "low quality"}])
    assert run("vidtab_quality", rows)[0] == [Sample("7", (Video("7.mp4"),), QualityTarget("low quality"), "How good?")]


def test_videos_of_the_same_name_in_two_folders_are_two_samples(tmp_path: Path) -> None:
    rows = [{"video": f"{folder}/7.mp4", "instruction": "How good?", "answer": "low quality"} for folder in "ab"]
    samples, report = run("vidtab_quality", write(tmp_path / "quality.json", rows))
    assert [sample.id for sample in samples] == ["a_7", "b_7"] and not report.issues


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
