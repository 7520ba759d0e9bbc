"""Prediction files: JSON lines of {"id", "output"}, from any program or written batch by batch by `vcr1 evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import parse_json, read_lines
from megatron_vcr1.types import Sample

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """A stored completion for one sample.

    Attributes:
        id: id of the sample.
        output: the completion; None if the sample could not be given to the model.
        error: why there is no output.
        num_tokens, finish_reason: number of tokens of the output and why it ended, if known.
        reduction: how the video was made smaller so that the prompt fits; None if it was not, or if unknown.
        prompt_digest: digest of the prompt that was answered, if known.
        frame_size: width and height in pixels of the frames that the model saw, if known: the unit of boxes in pixels.
    """

    id: str
    output: str | None
    error: str | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None
    reduction: str | None = None
    prompt_digest: str | None = None
    frame_size: tuple[int, int] | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the JSON object of the file's line; values that are None are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Read all predictions of a file, by id.

    Raises:
        UserError: the file cannot be read, a line is not a prediction, or an id appears twice; names the line.
    """
    predictions: dict[str, Prediction] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        prediction = _parse_line(line, f"{path}:{number}")
        if prediction.id in predictions:
            raise UserError(f"{path}:{number}: id {prediction.id!r} appears twice; keep one of its lines")
        predictions[prediction.id] = prediction
    return predictions


def match_predictions(
    predictions: Mapping[str, Prediction],
    samples: Sequence[Sample],
    path: Path,
    *,
    allow_missing: bool,
    allow_extra: bool,
) -> list[Prediction]:
    """Return the prediction of each sample, in order.

    Args:
        predictions: predictions by id.
        samples: all samples of the benchmark.
        path: the predictions' file, for error messages.
        allow_missing: count a sample without a prediction as unanswered instead of raising an error.
        allow_extra: leave out predictions for other samples instead of raising an error, as long as any prediction is
            for a sample of the benchmark.

    Raises:
        UserError: predictions have other ids, or samples have no prediction; names up to five.
    """
    missing = [sample.id for sample in samples if sample.id not in predictions]
    extra = extra_ids(predictions, samples)
    if extra and (not allow_extra or len(extra) == len(predictions)):
        advice = "use other annotations" if allow_extra else "remove them, or leave them out with --allow-extra"
        raise UserError(
            f"{path}: {len(extra)} of {len(predictions)} ids do not belong to the benchmark's samples: "
            f"{_named(extra)}; {advice}"
        )
    if missing and not allow_missing:
        raise UserError(
            f"{path}: no prediction for {len(missing)} of {len(samples)} samples: {_named(missing)}; "
            "add them, or count them as wrong with --allow-missing"
        )
    return [predictions.get(sample.id) or Prediction(sample.id, None, "no prediction") for sample in samples]


def extra_ids(predictions: Mapping[str, Prediction], samples: Sequence[Sample]) -> list[str]:
    """Return the ids of predictions that belong to none of the samples."""
    ids = {sample.id for sample in samples}
    return [id for id in predictions if id not in ids]


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write a predictions file. It appears under its name when it is complete; its folder must exist."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(_lines(predictions), encoding="utf-8")
    unfinished.replace(path)


class PredictionLog:
    """The predictions file of an evaluation that can be killed and resumed. Only one process may open it.

    Opening it keeps the complete lines with outputs. It drops an incomplete last line, samples whose videos could not
    be read, and predictions for other prompts under the same ids. These samples are predicted again.

    Attributes:
        done: the predictions, by id.
        num_outdated: number of predictions that were dropped because the prompt has changed.
    """

    def __init__(self, path: Path, prompt_digests: Mapping[str, str]) -> None:
        """Open the file, or create it.

        Args:
            path: the file; its folder must exist.
            prompt_digests: digest of each sample's prompt, by id.

        Raises:
            UserError: the file holds a complete line that is not a prediction.
        """
        self._path = path
        self._prompt_digests = prompt_digests
        found = {
            prediction.id: prediction for prediction in _read_complete_lines(path) if prediction.output is not None
        }
        # Predictions of samples that are not evaluated now are kept: the next evaluation may include them again.
        self.done = {
            id: prediction
            for id, prediction in found.items()
            if prompt_digests.get(id, prediction.prompt_digest) == prediction.prompt_digest
        }
        self.num_outdated = len(found) - len(self.done)
        self.rewrite([])

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add a batch. It is on the disk when this returns."""
        predictions = [
            replace(prediction, prompt_digest=self._prompt_digests[prediction.id]) for prediction in predictions
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_lines(predictions))
            file.flush()
            os.fsync(file.fileno())
        self.done |= {prediction.id: prediction for prediction in predictions}

    def rewrite(self, ids: Sequence[str]) -> None:
        """Rewrite the file with these ids first, so that interruptions leave no trace in its order."""
        self.done = {id: self.done[id] for id in dict.fromkeys([*ids, *self.done])}
        write_predictions(self._path, self.done.values())


def _lines(predictions: Iterable[Prediction]) -> str:
    # json.dumps escapes to ASCII: a lone surrogate, which decoding tokens can produce, has no UTF-8.
    return "".join(json.dumps(prediction.as_row()) + "\n" for prediction in predictions)


def _read_complete_lines(path: Path) -> Iterable[Prediction]:
    if not path.exists():
        return
    for number, line in enumerate(read_lines(path, errors="replace"), start=1):
        if line.endswith("\n"):
            yield _parse_line(line, f"{path}:{number}")


def _parse_line(line: str, where: str) -> Prediction:
    row = parse_json(line, where)
    if not isinstance(row, dict) or "id" not in row or not {"output", "error"} & row.keys():
        raise UserError(f'{where}: needs the keys "id" and "output"')
    output = row.get("output")
    if not (output is None or isinstance(output, str)):
        raise UserError(f'{where}: "output" must be a string')
    if output is None:
        return Prediction(str(row["id"]), None, str(row.get("error") or "no output"))
    known = {key: row.get(key) for key in ("num_tokens", "finish_reason", "reduction", "prompt_digest")}
    return Prediction(str(row["id"]), output, frame_size=_frame_size(row.get("frame_size"), where), **known)


def _frame_size(value: object, where: str) -> tuple[int, int] | None:
    match value:
        case None:
            return None
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    raise UserError(f'{where}: "frame_size" must be [width, height] in pixels')


def _named(ids: Sequence[str]) -> str:
    """Join the first few ids for an error message."""
    return ", ".join(map(repr, ids[:_MAX_NAMED])) + (" ..." if len(ids) > _MAX_NAMED else "")
