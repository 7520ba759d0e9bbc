"""Manifest rows of every task, for the tests of rows and of manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = [
    {
        "id": "grounding",
        "task": "temporal_grounding",
        "video": "a.mp4",
        "duration_s": 12.5,
        "query": "a person opens a door",
        "target": {"interval": [1.5, 4.0]},
    },
    {
        "id": "tracking",
        "task": "tracking",
        "video": ["f/1.jpg", "f/2.jpg"],
        "duration_s": None,
        "query": "cat",
        "target": {"boxes": [[0.0, 0.1, 0.5, 0.6], [0.1, 0.2, 0.6, 1.0]]},
    },
    {
        "id": "grounded",
        "task": "grounded_qa",
        "video": "s3://bucket/b.mp4",
        "duration_s": 30.0,
        "query": "why?",
        "target": {"choice": "B", "intervals": [[0.0, 1.0], [2.0, 3.0]]},
        "options": ["for fun", "by mistake"],
        "category": "CW",
    },
    {
        "id": "choice",
        "task": "multiple_choice_qa",
        "video": "c.mp4",
        "duration_s": 5.0,
        "query": "how many?",
        "target": {"choice": "A"},
        "options": ["1", "2"],
        "clip": [3.0, 8.0],
        "image_fps": 3.0,
    },
    {
        "id": "caption",
        "task": "captioning",
        "video": "d.mp4",
        "duration_s": 5.0,
        "query": "",
        "target": {"caption": "Ein Hund bellt — laut.", "events": ["A dog barks."]},
    },
    {
        "id": "quality",
        "task": "quality",
        "video": "e.mp4",
        "duration_s": None,
        "query": "how good is it?",
        "target": {"label": "low quality"},
    },
    {
        "id": "several",
        "task": "multiple_choice_qa",
        "videos": [{"video": "a.mp4"}, {"video": "b.mp4", "duration_s": 4.0, "clip": [1.0, 5.0]}],
        "images": ["a.png", "b.png"],
        "query": "<image><video>Which one is in <video>?",
        "target": {"choice": "B"},
        "options": ["the first one", "<image>"],
    },
    {
        "id": "image",
        "task": "multiple_choice_qa",
        "image": "a.png",
        "query": "what is it?",
        "target": {"choice": "A"},
        "options": ["a dog"],
    },
    {
        "id": "text",
        "task": "multiple_choice_qa",
        "query": "which tag shows a film in HTML?",
        "target": {"choice": "A"},
        "options": ["<video>", "<image>"],
    },
    {
        "id": "numeric",
        "task": "numeric",
        "video": "f.mp4",
        "duration_s": 8.0,
        "query": "how many cups?",
        "target": {"value": 4.0, "metric": "relative", "tolerance": 0.1},
    },
    {
        "id": "free",
        "task": "free_form",
        "video": "g.mp4",
        "duration_s": 8.0,
        "query": "what does the sign say?",
        "target": {"answer": "No entry", "metric": "exact"},
    },
]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(index: int, **changes: Any) -> dict[str, Any]:
    """Return ROWS[index] with some keys replaced or added."""
    return {**ROWS[index], **changes}


def without(index: int, key: str) -> dict[str, Any]:
    """Return ROWS[index] without a key."""
    return {name: value for name, value in ROWS[index].items() if name != key}
