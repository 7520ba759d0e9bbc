"""Question answering: NExT-GQA (CSV and JSON), MVBench, Video-MME, Perception Test; and VidTAB's quality task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vcr1.data.importers.files import (
    MALFORMED,
    MalformedRow,
    Row,
    convert_rows,
    describe,
    id_of_file,
    read_json_list,
    read_json_object,
    read_table,
    visible_files,
)
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import find_task
from megatron_vcr1.types import OPTION_LETTERS

_OPTION_LABEL = re.compile(r"(?:\(([A-G])\)|([A-G])[.):])\s*")

MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
"""Folder of each sub-task's videos in MVBench's own layout. File names are only unique within a folder."""


def read_nextgqa(annotations: tuple[Path, ...], task: str) -> Iterator[Row | MalformedRow]:
    """Read NExT-GQA: one JSON list, or the CSV file together with the gsub JSON and the video-to-path map JSON.

    Args:
        annotations: the files.
        task: grounded_qa, or multiple_choice_qa, which leaves out the spans.
    """
    # An answer given as text becomes the choice when the row is cleaned.
    keys = {"answer", *(field.key for field in find_task(task).target_fields)}
    for row in _nextgqa_rows(annotations):
        if not isinstance(row, MalformedRow):
            target = {key: value for key, value in row["target"].items() if key in keys}
            row = {**row, "task": task, "target": target}
        yield row


def _nextgqa_rows(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    if len(annotations) == 1:
        yield from convert_rows(read_json_list(annotations[0]), _nextgqa_json_row, lambda entry: str(entry["id"]))
        return
    questions, spans_of, folder_of = _nextgqa_files(annotations)
    yield from convert_rows(
        questions,
        lambda entry: _nextgqa_csv_row(entry, spans_of, folder_of),
        lambda entry: f"{entry['video_id']}_{entry['qid']}",
    )


def _nextgqa_json_row(entry: Row) -> Row:
    return _grounded_row(
        entry["id"],
        entry["video"],
        entry,
        entry["glue"],
        without_labels(entry["options"]),
        {"choice": entry["answer"].strip("()")},
    )


def _nextgqa_csv_row(entry: dict[str, str], spans_of: Row, folder_of: dict[str, str]) -> Row:
    video, question_id = entry["video_id"], entry["qid"]
    located = spans_of[video]
    return _grounded_row(
        f"{video}_{question_id}",
        f"{folder_of[video]}.mp4",
        {**entry, "duration": located["duration"]},
        located["location"][question_id],
        [entry[f"a{index}"].strip() for index in range(5)],
        {"answer": entry["answer"].strip()},
    )


def without_labels(options: list[str]) -> list[str]:
    """Remove the labels of options: ``(A) text``, ``A. text``, ``A) text`` and ``A: text`` become ``text``.

    They are labels only if every option has one; otherwise, an option may begin with a name such as "A.I.".

    Raises:
        ValueError: the labels are not in the order of the letters, so a letter may stand for either of two options.
    """
    labels = [label for option in options if (label := _OPTION_LABEL.match(option))]
    if len(labels) < len(options):
        return options
    letters = "".join(label[1] or label[2] for label in labels)
    if not OPTION_LETTERS.startswith(letters):
        raise ValueError(f"the options are labelled {', '.join(letters)}; put them in the order of their letters")
    return [label.string[label.end() :].strip() for label in labels]


def _grounded_row(
    row_id: str, video: str, entry: Row, intervals: list[list[float]], options: list[str], answer: dict[str, str]
) -> Row:
    return {
        "id": row_id,
        "task": "grounded_qa",
        "video": video,
        "duration_s": entry["duration"],
        "query": entry["question"],
        "options": options,
        "category": entry["type"],
        "target": {**answer, "intervals": intervals},
    }


def _nextgqa_files(annotations: tuple[Path, ...]) -> tuple[Iterator[tuple[str, Any]], Row, dict[str, str]]:
    """Read the three files, recognized by their content: CSV questions, spans per video, path per video."""
    csv_files = [path for path in annotations if path.suffix == ".csv"]
    json_files = [read_json_object(path) for path in annotations if path.suffix == ".json"]
    spans = [content for content in json_files if isinstance(next(iter(content.values()), None), dict)]
    folders = [content for content in json_files if isinstance(next(iter(content.values()), None), str)]
    if not len(csv_files) == len(spans) == len(folders) == 1:
        given = " ".join(map(str, annotations))
        raise UserError(
            f"--annotations {given}: expected one JSON list, or the questions' .csv, gsub_*.json and "
            "map_vid_vidorID.json together"
        )
    return read_table(csv_files[0]), spans[0], folders[0]


def read_mvbench(annotations: tuple[Path, ...], split: str | None) -> Iterator[Row | MalformedRow]:
    """Read MVBench: the folder of its 20 JSON files, or some of them; a split is a sub-task, the file's stem."""
    for file in (
        file for path in annotations for file in (visible_files(path, (".json",)) if path.is_dir() else [path])
    ):
        sub_task = file.stem
        if split not in (None, sub_task):
            continue
        if sub_task not in MVBENCH_FOLDERS:
            raise UserError(f"{file}: {sub_task} is not one of MVBench's sub-tasks: {', '.join(MVBENCH_FOLDERS)}")
        for index, (_, entry) in enumerate(read_json_list(file)):
            row_id = f"{sub_task}_{index}"
            try:
                yield _mvbench_row(row_id, sub_task, entry)
            except MALFORMED as error:
                yield MalformedRow(row_id, describe(error))


def _mvbench_row(row_id: str, sub_task: str, entry: Row) -> Row:
    clip = [entry["start"], entry["end"]] if entry.get("start") is not None else None
    return {
        "id": row_id,
        "task": "multiple_choice_qa",
        "video": f"{MVBENCH_FOLDERS[sub_task]}/{entry['video']}",
        "duration_s": clip[1] - clip[0] if clip else None,
        "clip": clip,
        "image_fps": entry.get("fps"),  # in one sub-task, videos are folders of images
        "query": entry["question"],
        "options": entry["candidates"],
        "category": sub_task,
        "target": {"answer": entry["answer"]},
    }


def read_videomme(annotations: tuple[Path, ...], split: str | None) -> Iterator[Row | MalformedRow]:
    """Read Video-MME: its parquet file; a split is a length class: short, medium or long."""
    for path in annotations:
        yield from convert_rows(
            read_table(path),
            lambda entry: _videomme_row(entry) if split in (None, entry["duration"]) else None,
            lambda entry: str(entry["question_id"]),
        )


def _videomme_row(entry: Row) -> Row:
    return {
        "id": entry["question_id"],
        "task": "multiple_choice_qa",
        "video": entry["videoID"],
        "duration_s": None,
        "query": entry["question"],
        "options": without_labels(entry["options"]),
        "category": f"{entry['duration']}/{entry['task_type']}",
        "target": {"choice": entry["answer"]},
    }


def read_perception_test(annotations: tuple[Path, ...], split: str | None) -> Iterator[Row | MalformedRow]:
    """Read Perception Test: ``{video: {metadata, mc_question: []}}``; a split is the one named in the metadata."""
    for path in annotations:
        for video, entry in read_json_object(path).items():
            try:
                metadata = entry["metadata"]
                questions = list(entry["mc_question"]) if split in (None, metadata["split"]) else []
            except MALFORMED as error:
                yield MalformedRow(video, describe(error))
                continue
            places = [(f"{video}, question {number}", question) for number, question in enumerate(questions, start=1)]
            yield from convert_rows(
                places,
                partial(_perception_row, video, metadata),
                partial(_perception_id, video),
            )


def _perception_id(video: str, question: Row) -> str:
    return f"{video}_{question['id']}"


def _perception_row(video: str, metadata: dict[str, Any], question: Row) -> Row:
    answer = question["answer_id"]
    if type(answer) is not int or not 0 <= answer < len(OPTION_LETTERS):
        raise ValueError(f"answer_id is {answer!r}; it must be the index of an option")
    return {
        "id": _perception_id(video, question),
        "task": "multiple_choice_qa",
        "video": video,
        "duration_s": metadata["num_frames"] / metadata["frame_rate"],
        "query": question["question"],
        "options": question["options"],
        "category": question["area"],
        "target": {"choice": OPTION_LETTERS[answer]},
    }


def read_vidtab_quality(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    """Read VidTAB's quality task: a JSON list of ``video``, ``instruction`` and ``answer``."""
    for path in annotations:
        yield from convert_rows(read_json_list(path), _quality_row, lambda entry: id_of_file(entry["video"]))


def _quality_row(entry: Row) -> Row:
    return {
        "id": id_of_file(entry["video"]),
        "task": "quality",
        "video": entry["video"],
        "duration_s": None,
        "query": entry["instruction"],
        "target": {"label": entry["answer"]},
    }
