"""Import of a dataset: selects the reader of its format, cleans its rows, and reports every issue."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.data.importers import FORMATS, captioning, grounding, questions, tracking
from megatron_vcr1.data.importers.cleaning import Issue, Row, RowCleaner, VideoFolder
from megatron_vcr1.data.importers.files import read_table
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import VideoSample

_SPLIT_FORMATS = ("got10k", "mvbench", "videomme", "perception_test", "dream1k")


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
    keep_overruns: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[VideoSample], ImportReport]:
    """Read a published dataset.

    Args:
        name: name of the format, a key of `FORMATS`.
        annotations: files or folders of the annotations.
        videos: folder of the videos.
        split: the split to read, for formats whose files contain several.
        keep_overruns: whether spans that end after the video are kept (see `RowCleaner`).
        limit: number of samples to keep, chosen at random; None keeps all.
        seed: seed of that choice.

    Returns:
        The samples, and the report of the import.

    Raises:
        UserError: a file is missing or not in this format.
    """
    if name not in FORMATS:
        raise UserError(f"{name}: unknown format; known formats are {', '.join(FORMATS)}")
    if split is not None and name not in _SPLIT_FORMATS:
        raise UserError(f"--split {split}: {name} has a file for each split; name that file in --annotations")
    for path in annotations:
        if not path.exists():
            raise UserError(f"--annotations {path}: no such file or folder")
    cleaner = RowCleaner(videos, keep_overruns)
    samples: dict[str, VideoSample] = {}
    num_rows, last_id = 0, None
    try:
        for row in _rows(name, annotations, videos, split):
            num_rows += 1
            if isinstance(row, Issue):
                cleaner.issues.append(row)
                continue
            last_id = str(row["id"])
            sample = cleaner.clean(row)
            if sample is None:
                continue
            if sample.id in samples:
                cleaner.issues.append(Issue(last_id, "repeated_id", "an earlier row has the same id", "skipped"))
            else:
                samples[sample.id] = sample
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        given = " ".join(map(str, annotations))
        where = "the first row" if last_id is None else f"the row after id {last_id}"
        problem = f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{given}: not in the format {name} ({FORMATS[name]}); {where}: {problem}") from error
    if num_rows == 0:
        raise UserError(f"{name}: no rows" + (f" in split {split}" if split else "") + "; check --annotations, --split")
    chosen = _choose(list(samples.values()), limit, seed)
    report = ImportReport(name, num_rows, len(chosen), videos.root is not None, tuple(cleaner.issues))
    return chosen, report


def _rows(name: str, annotations: tuple[Path, ...], videos: VideoFolder, split: str | None) -> Iterator[Row | Issue]:
    match name:
        case "charades_sta":
            return grounding.read_charades_sta(annotations)
        case "activitynet":
            return grounding.read_timestamps(annotations)
        case "got10k":
            return tracking.read_got10k(annotations, videos, split)
        case "nextgqa":
            return questions.read_nextgqa(annotations)
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
        case _:
            return _manifest_rows(annotations)


def _manifest_rows(annotations: tuple[Path, ...]) -> Iterator[Row]:
    """Read rows with the columns of a manifest. Null values are dropped: a table has every column in every row."""
    for path in annotations:
        for entry in read_table(path):
            row = {key: value for key, value in entry.items() if value is not None}
            target = {key: value for key, value in row["target"].items() if value is not None}
            yield {"duration_s": None, "query": "", **row, "target": target}


def _choose(samples: list[VideoSample], limit: int | None, seed: int) -> list[VideoSample]:
    """Choose samples at random, in their order: those with the smallest hashes, whatever other samples there are."""
    if limit is None or limit >= len(samples):
        return samples
    by_hash = sorted(samples, key=lambda sample: hashlib.blake2b(f"{seed}/{sample.id}".encode()).digest())
    kept = {sample.id for sample in by_hash[:limit]}
    return [sample for sample in samples if sample.id in kept]
