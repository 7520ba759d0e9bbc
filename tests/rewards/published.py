"""The published parsing rules as plain regular expressions: an independent reference, too slow for long texts."""

from __future__ import annotations

import re


def follows_format(completion: str, tags: list[str]) -> bool:
    return re.fullmatch(r"\s*".join(f"<{tag}>.*?</{tag}>" for tag in tags), completion.strip(), re.DOTALL) is not None


def blocks(completion: str, tag: str) -> list[str]:
    return re.findall(f"<{tag}>(.*?)</{tag}>", completion, re.DOTALL)


def last_times(answer: str) -> tuple[float, float] | None:
    matches = re.findall(r"([0-9]+\.?[0-9]*) (?:to|and) ([0-9]+\.?[0-9]*)", answer)
    return (float(matches[-1][0]), float(matches[-1][1])) if matches else None
