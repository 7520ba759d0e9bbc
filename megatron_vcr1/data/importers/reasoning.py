"""Training data of other reasoning models: Video-R1 and VideoChat-R1.5, each a mix of tasks in JSON files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vcr1 import text_files
from megatron_vcr1.data.importers.cleaning import Issue
from megatron_vcr1.data.importers.files import MalformedRow, Row, convert_rows, numbered_id, read_json_list, read_table
from megatron_vcr1.data.importers.questions import without_labels
from megatron_vcr1.errors import UserError

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ASCII_WORD = re.compile(r"[A-Za-z0-9]")
_LETTER = re.compile(r"\(?([A-G])(?:[).:,]|$)")  # not the article of "A man"


def read_video_r1(annotations: tuple[Path, ...]) -> Iterator[Row | Issue | MalformedRow]:
    """Read Video-R1-260k or Video-R1-COT-165k: rows of ``problem``, ``problem_type``, ``options`` and ``solution``.

    The reasoning of the second file (``process``) becomes the row's reasoning for SFT. Numerical answers are right if
    they agree to two decimals, as in Video-R1. Its graded rewards have close relatives here: mean relative accuracy for
    1 - relative error (regression), and ROUGE-L for the mean of ROUGE-1, -2 and -L (free-form) and for 1 - word error
    rate (OCR). Answers without words of ASCII letters, which ROUGE cannot compare, must be equal.
    """
    for path in annotations:
        rows: Iterator[Row | Issue | MalformedRow] = convert_rows(
            read_table(path), _video_r1_row, lambda entry: str(entry["problem_id"])
        )
        yield from rows


def _video_r1_row(entry: Row) -> Row | Issue:
    row_id, kind, medium = str(entry["problem_id"]), entry["problem_type"], entry["data_type"]
    if medium not in ("video", "image"):
        return Issue(row_id, "other_medium", f"data_type is {medium!r}", "skipped")
    target = _video_r1_target(kind, entry)
    if target is None:
        return Issue(row_id, "other_task", f"problem_type is {kind!r}", "skipped")
    return {
        "id": row_id,
        medium: str(PurePosixPath(entry["path"])),  # without the leading ./
        "duration_s": None,
        "query": entry["problem"].strip(),
        "category": f"{entry.get('data_source') or 'unknown'}/{kind}",
        **_reasoning(entry.get("process") or ""),
        **target,
    }


def _video_r1_target(kind: str, entry: Row) -> Row | None:
    """Return task, target and options of a problem; None if its type has no task."""
    answer = _inside(_ANSWER, entry["solution"])
    match kind:
        case "multiple choice":
            options = without_labels(entry["options"])
            return {"task": "multiple_choice_qa", "options": options, "target": _choice(answer, options)}
        case "numerical":
            return {"task": "numeric", "target": {"value": _number(answer), "metric": "exact", "tolerance": 0.005}}
        case "regression":
            return {"task": "numeric", "target": {"value": _number(answer), "metric": "mean_relative_accuracy"}}
        case "free-form" | "OCR":
            metric = "rouge" if _ASCII_WORD.search(answer) else "exact"
            return {"task": "free_form", "target": {"answer": answer, "metric": metric}}
    return None


def _number(answer: str) -> float:
    """Read a number, also with commas between its thousands."""
    return float(answer.replace(",", ""))


def _reasoning(process: str) -> dict[str, str]:
    """Return the text inside ``<think>`` under its key; nothing if there is none."""
    match = _THINK.search(process)
    return {"thinking": match[1].strip()} if match else {}


def read_videochat_r1_5(annotations: tuple[Path, ...]) -> Iterator[Row | Issue | MalformedRow]:
    """Read files of VideoChat-R1.5: lists of rows, or the index of such lists.

    A row has ``video``, ``question`` and, depending on its task, ``options`` and ``answer``, ``glue`` (spans in
    seconds), and ``duration``. The index is an object whose entries name the list in ``json_path``, which is looked for
    beside the index if it does not exist.
    """
    num_rows_of: Counter[str] = Counter()
    for path in (file for given in annotations for file in _listed_files(given)):
        rows: Iterator[Row | Issue | MalformedRow] = convert_rows(
            read_json_list(path), partial(_videochat_row, num_rows_of=num_rows_of)
        )
        yield from rows


def _listed_files(path: Path) -> list[Path]:
    """Return the files that an index lists; the file itself if it is a list of rows."""
    content = text_files.read_json(path)
    if not isinstance(content, dict):
        return [path]
    files = []
    for name, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise UserError(f"{path}: {name!r} names no json_path; is it a file of another format?")
        named = Path(entry["json_path"])
        beside = path.parent / named.name
        if not named.exists() and not beside.exists():
            raise UserError(f"{path}: {name!r}: neither {named} nor {beside} exists")
        files.append(named if named.exists() else beside)
    return files


def _videochat_row(entry: Row, num_rows_of: Counter[str]) -> Row | Issue:
    medium = "video" if entry.get("video") else "image"
    name = entry[medium]
    row_id = numbered_id(name, num_rows_of)
    if medium == "image" and entry.get("glue"):
        return Issue(row_id, "box_in_image", f"{name} is an image, and its answer is a box", "skipped")
    row = {"id": row_id, medium: name, "duration_s": entry.get("duration"), "query": entry["question"].strip()}
    spans = _spans(entry["glue"]) if entry.get("glue") else []
    if not entry.get("options"):
        if not spans:
            raise ValueError("the row has neither options nor spans")
        # A list of spans: the prompt of this model asks for a list, also for a single span.
        return {**row, "task": "temporal_grounding", "target": {"intervals": spans}}
    options = without_labels(entry["options"])
    choice = _choice(entry["answer"], options)
    if not spans:
        return {**row, "task": "multiple_choice_qa", "options": options, "target": choice}
    return {**row, "task": "grounded_qa", "options": options, "target": {**choice, "intervals": spans}}


def _spans(glue: Any) -> list[list[float]]:
    """Return a list of spans; the files of grounding hold a single span without the outer list."""
    return glue if isinstance(glue[0], list) else [glue]


def _choice(answer: str, options: list[str]) -> Row:
    """Return the target's key for an answer: the text of an option, or a letter as in ``B``, ``(B)`` or ``B. text``."""
    answer = answer.strip()
    if answer in options:
        return {"answer": answer}
    match = _LETTER.match(answer)
    if match is None:
        raise ValueError(f"the answer {answer!r:.40} is neither an option nor begins with the letter of one")
    return {"choice": match[1]}


def _inside(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return (match[1] if match else text).strip()
