"""Predictions: lines of {"id", "output"}, from any program, or written batch by batch by an evaluation that may die."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.types import VideoSample

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered to one sample.

    Attributes:
        output: None if the sample could not be put to the model.
        error: why not.
        num_tokens, finish_reason: of the output, where they are known.
        reduction: how the sample's video was made smaller for the prompt to fit; None if it was not, or is not known.
        asked: digest of the question that it answers, where that is known.
    """

    id: str
    output: str | None
    error: str | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None
    reduction: str | None = None
    asked: str | None = None

    def as_row(self) -> dict[str, Any]:
        """The line's object; without what is not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_predictions(path: Path) -> dict[str, Prediction]:
    """All lines, by id.

    Raises:
        UserError: the file cannot be read, a line is none of a prediction, or an id comes twice; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some programs begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    predictions: dict[str, Prediction] = {}
    # Not splitlines: JSON texts may hold line separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        prediction = _parse_line(line, f"{path}:{number}")
        if prediction.id in predictions:
            raise UserError(f"{path}:{number}: id {prediction.id!r} has a line already; keep one of them")
        predictions[prediction.id] = prediction
    return predictions


def match_predictions(
    predictions: Mapping[str, Prediction], samples: Sequence[VideoSample], path: Path, *, allow_missing: bool
) -> list[Prediction]:
    """The prediction of each sample, in order.

    Args:
        allow_missing: a sample without one is unanswered, instead of an error.

    Raises:
        UserError: there are predictions of other ids, or none of some samples; names up to five.
    """
    missing = [sample.id for sample in samples if sample.id not in predictions]
    extra = predictions.keys() - {sample.id for sample in samples}
    if extra:
        named = _named([id for id in predictions if id in extra])
        raise UserError(
            f"{path}: {len(extra)} ids are none of the benchmark's samples: {named}; are they of this file?"
        )
    if missing and not allow_missing:
        raise UserError(
            f"{path}: no prediction for {len(missing)} of {len(samples)} samples: {_named(missing)}; "
            "add them, or count them as wrong with --allow-missing"
        )
    return [predictions.get(sample.id) or Prediction(sample.id, None, "no prediction") for sample in samples]


class PredictionLog:
    """The predictions file of an evaluation that goes on where it was killed. For one process.

    Opening it takes over the whole lines with outputs, and drops the rest: a line cut in the middle, samples whose
    videos could not be read, and answers to other questions under the same ids. These samples are asked again.

    Attributes:
        done: the answers, by id.
        num_outdated: answers that were dropped because they are to other questions.
    """

    def __init__(self, path: Path, asked: Mapping[str, str]) -> None:
        """
        Args:
            asked: digest of each sample's question, by id.
        """
        self._path = path
        self._asked = asked
        answers = {one.id: one for one in _salvage(path) if one.output is not None}
        self.done = {id: one for id, one in answers.items() if asked.get(id, one.asked) == one.asked}
        self.num_outdated = len(answers) - len(self.done)
        self.arrange([])

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Adds a batch; it is on the disk when this returns."""
        predictions = [replace(one, asked=self._asked[one.id]) for one in predictions]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_lines(predictions))
            file.flush()
            os.fsync(file.fileno())
        self.done |= {one.id: one for one in predictions}

    def arrange(self, ids: Sequence[str]) -> None:
        """Writes the file anew, these ids first: however often an evaluation was killed, its file ends up the same."""
        self.done = {id: self.done[id] for id in dict.fromkeys([*ids, *self.done])}
        unfinished = self._path.with_name(self._path.name + ".part")
        unfinished.write_text(_lines(self.done.values()), encoding="utf-8")
        unfinished.replace(self._path)


def _lines(predictions: Iterable[Prediction]) -> str:
    # ASCII: half of a character, which a tokenizer can leave behind, has no UTF-8.
    return "".join(json.dumps(one.as_row()) + "\n" for one in predictions)


def _salvage(path: Path) -> Iterable[Prediction]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                yield _parse_line(line, f"{path}:{number}")


def _parse_line(line: str, where: str) -> Prediction:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or "id" not in row or not {"output", "error"} & row.keys():
        raise UserError(f'{where}: needs the keys "id" and "output"')
    output = row.get("output")
    if not (output is None or isinstance(output, str)):
        raise UserError(f'{where}: "output" must be a text')
    if output is None:
        return Prediction(str(row["id"]), None, str(row.get("error") or "no output"))
    known = {key: row.get(key) for key in ("num_tokens", "finish_reason", "reduction", "asked")}
    return Prediction(str(row["id"]), output, **known)


def _named(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:_MAX_NAMED])) + (" ..." if len(ids) > _MAX_NAMED else "")
