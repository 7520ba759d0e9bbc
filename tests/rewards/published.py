"""The published reward as plain regular expressions: an independent reference, too slow for long texts."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_vcr1.tasks.grounded_qa import GroundedChoiceTarget
from megatron_vcr1.tasks.multiple_choice_qa import ChoiceTarget
from megatron_vcr1.tasks.quality import QualityTarget
from megatron_vcr1.tasks.temporal_grounding import GroundingTarget
from megatron_vcr1.tasks.tracking import TrackingTarget
from megatron_vcr1.types import Box, Interval, Sample


def blocks(completion: str, tag: str) -> list[str]:
    return re.findall(f"<{tag}>(.*?)</{tag}>", completion, re.DOTALL)


def last_times(answer: str, separator: str = r"\s+") -> tuple[float, float] | None:
    """Return the last START to END; the published separator is one space."""
    number = r"(\d+\.?\d*)"
    matches = re.findall(f"{number}{separator}(?:to|and){separator}{number}", answer, re.IGNORECASE)
    return (float(matches[-1][0]), float(matches[-1][1])) if matches else None


def reward_parts(sample: Sample, completion: str, *, thinking: bool) -> dict[str, float]:
    """Compute the parts of the published reward: its behaviour, written down from its description and its outputs."""
    target = sample.target
    grounded = isinstance(target, GroundedChoiceTarget)
    tags = [*["think"] * thinking, "answer", *["glue"] * grounded]
    in_order = r"\s*".join(f"<{tag}>.*?</{tag}>" for tag in tags)
    follows = re.fullmatch(in_order, completion.strip(), re.DOTALL) is not None
    answers, glues = blocks(completion, "answer"), blocks(completion, "glue")
    match target:
        case GroundingTarget(interval):
            times = last_times(answers[-1], separator=" ") if answers else None
            return {"format": float(follows), "iou": _hull_iou(times, interval) if times else 0.0}
        case TrackingTarget(boxes):
            one_line = blocks(completion.replace("\n", ""), "answer")
            ours = _list_of_eight(answers[0]) if answers else None
            iou = _mean_iou(_list_of_eight(one_line[0]) if one_line else None, boxes)
            return {"format": float(follows and ours is not None), "iou": iou}
        case GroundedChoiceTarget(choice, intervals):
            spans = _list_of_pairs(glues[0]) if glues else None
            iou = 0.0 if spans is None else _union_iou(spans, [(span.start_s, span.end_s) for span in intervals])
            return {"format": float(follows and spans is not None), "iou": iou, "accuracy": _same(answers, choice)}
        case ChoiceTarget(choice):
            return {"format": float(follows), "accuracy": _same(answers, choice)}
        case QualityTarget(label):
            same = bool(answers) and answers[0].strip().lower() == label.strip().lower()
            return {"format": float(follows), "accuracy": float(same)}
    raise AssertionError("the published code has no reward for captions")


def first_letter(answer: str) -> str:
    """Return the first of the characters A to G after the removal of some openings; "" if there is none."""
    text = answer.strip()
    for subject in ("best answer", "correct answer", "answer", "best option", "correct option"):
        text = text.replace(f"The {subject} is", "")
        if subject == "answer":
            text = text.replace("The answer", "")
    found = re.search("[A-G]", text.replace("Best answer:Best option:", ""))
    return found[0] if found else ""


def _same(answers: list[str], choice: str) -> float:
    return float(bool(answers) and first_letter(answers[0]) == choice)


def _hull_iou(times: tuple[float, float], target: Interval) -> float:
    hull = max(times[1], target.end_s) - min(times[0], target.start_s)
    return max(min(times[1], target.end_s) - max(times[0], target.start_s), 0.0) / hull if hull > 0 else 0.0


def _list_of_pairs(glue: str) -> list[tuple[float, float]] | None:
    """Read `[(s, e), ...]` of plain decimals with white space after commas only; None if it is anything else."""
    number = r"\d+(?:\.\d+)?"
    pair = rf"\({number},\s*{number}\)"
    if not re.match(rf"\[(?:{pair}(?:,\s*{pair})*,?)?\]$", glue):
        return None
    try:
        spans = [tuple(map(float, ast.literal_eval(row))) for row in re.findall(pair, glue)]
    except (SyntaxError, ValueError):  # Python refuses numbers such as 007, and those of other scripts
        return None
    return None if any(start > end for start, end in spans) else spans


def _union_iou(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> float:
    """Compute the IoU of two unions of spans from the length between all of their edges; 1 if both are empty."""
    edges = sorted({edge for span in [*first, *second] for edge in span})
    both = either = 0.0
    for start, end in pairwise(edges):
        covered = [any(span[0] <= start and end <= span[1] for span in spans) for spans in (first, second)]
        both += (end - start) * all(covered)
        either += (end - start) * any(covered)
    return both / either if either else 1.0


def _list_of_eight(answer: str) -> list[list[float]] | None:
    try:
        rows = ast.literal_eval(answer.replace("\n", ""))
    except Exception:
        return None
    right = isinstance(rows, list) and len(rows) == 8 and all(isinstance(row, list) and len(row) == 4 for row in rows)
    return rows if right else None


def _mean_iou(rows: list[list[float]] | None, target: Sequence[Box]) -> float:
    """Average the IoU of boxes that are neither checked nor cut; 0 if a row cannot be computed with."""
    try:
        return float(np.mean([_iou(*row, box) for row, box in zip(rows or [], target, strict=True)]))
    except (TypeError, ValueError):
        return 0.0


def _iou(x0: float, y0: float, x1: float, y1: float, target: Box) -> float:
    width, height = min(x1, target.x1) - max(x0, target.x0), min(y1, target.y1) - max(y0, target.y0)
    both = max(width, 0) * max(height, 0)
    either = (x1 - x0) * (y1 - y0) + (target.x1 - target.x0) * (target.y1 - target.y0) - both
    return both / either if either else 0.0
