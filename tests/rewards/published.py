"""The published parsing rules as plain regular expressions: an independent reference, too slow for long texts."""

from __future__ import annotations

import re


def blocks(completion: str, tag: str) -> list[str]:
    return re.findall(f"<{tag}>(.*?)</{tag}>", completion, re.DOTALL)


def last_times(answer: str) -> tuple[float, float] | None:
    matches = re.findall(r"([0-9]+\.?[0-9]*)\s+(?:to|and)\s+([0-9]+\.?[0-9]*)", answer, re.IGNORECASE)
    return (float(matches[-1][0]), float(matches[-1][1])) if matches else None
