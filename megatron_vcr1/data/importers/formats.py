"""Import of a dataset: selects the reader of its format, cleans its rows, and reports every issue."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.data.importers import FORMATS, captioning, grounding, questions, reasoning, tracking
from megatron_vcr1.data.importers.cleaning import Issue, RowCleaner, VideoFolder
from megatron_vcr1.data.importers.durations import DurationProbe
from megatron_vcr1.data.importers.files import (
    MALFORMED,
    MalformedRow,
    Row,
    convert_rows,
    describe,
    read_table,
)
from megatron_vcr1.data.importers.own import ColumnMap, read_own
from megatron_vcr1.data.split import names_of_files
from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample

_SPLIT_FORMATS = ("got10k", "mvbench", "videomme", "perception_test", "dream1k")

_TASKS = {"nextgqa": ("grounded_qa", "multiple_choice_qa")}
"""Tasks that a format can be imported for, the default first, where there is a choice."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of an import.

    Attributes:
        format: name of the format.
        num_rows: number of published rows, including skipped ones.
        num_samples: number of samples in the manifest.
        videos_checked: whether the import checked that the videos exist.
        issues: all problems that were repaired, kept or skipped, in row order.
    """

    format: str
    num_rows: int
    num_samples: int
    videos_checked: bool
    issues: tuple[Issue, ...]

    def issue_counts(self) -> dict[str, int]:
        """Count issues by ``problem (action)``, most frequent first."""
        return dict(Counter(f"{issue.problem} ({issue.action})" for issue in self.issues).most_common())

    def as_json(self) -> dict[str, Any]:
        """Convert the report to a JSON object."""
        issues = [asdict(issue) for issue in self.issues]
        return {**asdict(self), "issue_counts": self.issue_counts(), "issues": issues}


def import_dataset(
    name: str,
    annotations: tuple[Path, ...],
    videos: VideoFolder,
    *,
    split: str | None = None,
    task: str | None = None,
    columns: ColumnMap | None = None,
    keep_overruns: bool = False,
    limit: int | None = None,
    limit_per_video: int | None = None,
    seed: int = 0,
) -> tuple[list[Sample], ImportReport]:
    """Read a published dataset.

    Args:
        name: name of the format, a key of `FORMATS`.
        annotations: files or folders of the annotations.
        videos: folder of the videos.
        split: the split to read, for formats whose files contain several.
        task: the task to import for, for formats that suit several; None is the format's own task.
        columns: for the format `own`, the columns of its keys. The videos of its rows are measured.
        keep_overruns: whether spans that end after the video are kept (see `RowCleaner`).
        limit: number of samples to keep, chosen at random; None keeps all.
        limit_per_video: number of samples of each video to keep, chosen at random before `limit`; None keeps all.
        seed: seed of these choices.

    Returns:
        The samples, and the report of the import.

    Raises:
        UserError: a file is missing or not in this format: the first row does not fit it, two columns of a table or two
            videos of a JSON object have the same name, or a quotation mark of a CSV file has no pair. A later row that
            does not fit is skipped and reported as an `invalid_row`.
    """
    if name not in FORMATS:
        raise UserError(f"{name}: unknown format; known formats are {', '.join(FORMATS)}")
    if split is not None and name not in _SPLIT_FORMATS:
        raise UserError(f"--split {split}: {name} has a file for each split; name that file in --annotations")
    for path in annotations:
        if not path.exists():
            raise UserError(f"--annotations {path}: no such file or folder")
    with ExitStack() as stack:
        durations = None
        if name == "own" and videos.root is not None:
            durations = DurationProbe(stack.enter_context(VideoReader()).read_frames)
        cleaner = RowCleaner(videos, keep_overruns, durations)
        published: Iterable[Row | Issue | MalformedRow]
        if name == "own":
            published = read_own(annotations, task, columns or ColumnMap({}))
        else:
            published = _rows(name, annotations, videos, split, _checked_task(name, task))
        num_rows, samples = _collect(published, cleaner, f"{name} ({FORMATS[name]})", annotations)
    if num_rows == 0:
        raise UserError(f"{name}: no rows" + (f" in split {split}" if split else "") + "; check --annotations, --split")
    chosen = _choose(_choose_per_video(samples, limit_per_video, seed), limit, seed)
    report = ImportReport(name, num_rows, len(chosen), videos.root is not None, tuple(cleaner.issues))
    return chosen, report


def _checked_task(name: str, task: str | None) -> str:
    """Return the task to import a format for; empty if the format has only one."""
    tasks = _TASKS.get(name, ())
    if task is not None and task not in tasks:
        raise UserError(f"--task {task}: for {name}, it can be {' or '.join(tasks) if tasks else 'left out'}")
    return task or next(iter(tasks), "")


def _collect(
    published: Iterable[Row | Issue | MalformedRow], cleaner: RowCleaner, format: str, annotations: tuple[Path, ...]
) -> tuple[int, list[Sample]]:
    """Clean all rows; return their number and the samples. Issues are added to those of the cleaner."""
    samples: dict[str, Sample] = {}
    num_rows = 0
    for num_rows, row in enumerate(published, start=1):
        result = row if isinstance(row, Issue | MalformedRow) else _clean(cleaner, row)
        if isinstance(result, MalformedRow):
            if num_rows == 1:
                given = " ".join(map(str, annotations))
                raise UserError(
                    f"{given}: not in the format {format}; the first row, {result.row_id}: {result.problem}"
                )
            cleaner.issues.append(Issue(result.row_id, "invalid_row", result.problem, "skipped"))
        elif isinstance(result, Issue):
            cleaner.issues.append(result)
        elif result is not None and result.id in samples:
            cleaner.issues.append(Issue(result.id, "repeated_id", "an earlier row has the same id", "skipped"))
        elif result is not None:
            samples[result.id] = result
    return num_rows, list(samples.values())


def _clean(cleaner: RowCleaner, row: Row) -> Sample | MalformedRow | None:
    """Clean a row; None if it is skipped. Values of other types than the format has make it a malformed row."""
    try:
        return cleaner.clean(row)
    except UserError:  # a package that the row's metric needs is not installed, which is no fault of the row
        raise
    except MALFORMED as error:
        return MalformedRow(str(row["id"]), describe(error))


def _rows(
    name: str, annotations: tuple[Path, ...], videos: VideoFolder, split: str | None, task: str
) -> Iterator[Row | Issue | MalformedRow]:
    match name:
        case "charades_sta":
            return grounding.read_charades_sta(annotations)
        case "activitynet":
            return grounding.read_timestamps(annotations)
        case "qvhighlights":
            return grounding.read_qvhighlights(annotations)
        case "got10k":
            return tracking.read_got10k(annotations, videos, split)
        case "nextgqa":
            return questions.read_nextgqa(annotations, task)
        case "mvbench":
            return questions.read_mvbench(annotations, split)
        case "videomme":
            return questions.read_videomme(annotations, split)
        case "perception_test":
            return questions.read_perception_test(annotations, split)
        case "vidtab_quality":
            return questions.read_vidtab_quality(annotations)
        case "carebench":
            return captioning.read_captions(annotations)
        case "dream1k":
            return captioning.read_dream1k(annotations, split)
        case "video_r1":
            return reasoning.read_video_r1(annotations)
        case "videochat_r1_5":
            return reasoning.read_videochat_r1_5(annotations)
        case _:
            return _manifest_rows(annotations)


def _manifest_rows(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    """Read rows with the columns of a manifest. Null values are dropped: a table has every column in every row."""
    for path in annotations:
        yield from convert_rows(read_table(path), _manifest_row, lambda entry: str(entry["id"]))


def _manifest_row(entry: dict[str, Any]) -> Row:
    row = {key: value for key, value in entry.items() if value is not None}
    target = {key: value for key, value in row["target"].items() if value is not None}
    # Keys that cleaning reads. A row without one of them is not a row of a manifest.
    required = {key: row[key] for key in ("id", "task")}
    return {"duration_s": None, "query": "", **row, **required, "target": target}


def _choose(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Choose samples at random, in their order: those with the smallest hashes, whatever other samples there are."""
    if limit is None or limit >= len(samples):
        return samples
    kept = {sample.id for sample in sorted(samples, key=lambda sample: _hash(sample, seed))[:limit]}
    return [sample for sample in samples if sample.id in kept]


def _choose_per_video(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Choose up to `limit` samples of each video, whatever its clip, in the same way. All samples of text are kept."""
    if limit is None:
        return samples
    num_kept: Counter[tuple[str, ...]] = Counter()
    kept = set()
    for sample in sorted(samples, key=lambda sample: _hash(sample, seed)):
        files = names_of_files(sample)
        num_kept[files] += 1
        if num_kept[files] <= limit:
            kept.add(sample.id)
    return [sample for sample in samples if sample.id in kept]


def _hash(sample: Sample, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{sample.id}".encode()).digest()
