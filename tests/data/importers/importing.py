"""Functions that the importers' tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vcr1.data.importers.cleaning import VideoFolder
from megatron_vcr1.data.importers.formats import ImportReport, import_dataset

UNCHECKED_VIDEOS = VideoFolder(None)


def write(path: Path, content: Any) -> Path:
    """Write a string as it is, and any other content as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def run(name: str, *annotations: Path, videos: VideoFolder = UNCHECKED_VIDEOS, **options: Any) -> Any:
    """Import annotations; by default, do not check that the videos exist."""
    return import_dataset(name, annotations, videos, **options)


def issues(report: ImportReport) -> list[tuple[str, str, str]]:
    """Return (row id, problem, action) of each issue."""
    return [(issue.row_id, issue.problem, issue.action) for issue in report.issues]
