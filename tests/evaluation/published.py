"""The published scoring rules, implemented from their definitions, as an independent reference.

NExT-GQA's TempGQA; lmms-eval's tasks charades_sta, mvbench and videomme; the GOT-10k toolkit; Tarsier's DREAM-1K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

Span = tuple[float, float]


def grounding_scores(predicted: Sequence[Span | None], truth: Sequence[Span]) -> dict[str, float]:
    """Return the mean IoU over the hull, and the fractions that reach each threshold."""
    ious = []
    for span, target in zip(predicted, truth, strict=True):
        if span is None:
            ious.append(0.0)
            continue
        both = max(min(span[1], target[1]) - max(span[0], target[0]), 0.0)
        ious.append(both / (max(span[1], target[1]) - min(span[0], target[0])))
    return {"mIoU": sum(ious) / len(ious)} | {
        f"R@{bound}": sum(iou >= bound for iou in ious) / len(ious) for bound in (0.3, 0.5, 0.7)
    }


def nextgqa_scores(
    spans: Mapping[str, Span], truth: Mapping[str, Sequence[Span]], right: Mapping[str, bool]
) -> dict[str, float]:
    """Use the best annotated span of each question, separately for IoU and IoP; Acc@GQA needs an IoP of 0.5."""
    totals = dict.fromkeys(["Acc@GQA", "mIoP", "IoP@0.3", "IoP@0.5", "mIoU (single span)", "IoU@0.3", "IoU@0.5"], 0.0)
    for question, targets in truth.items():
        start, end = spans[question]
        best_iou = best_iop = 0.0
        for target_start, target_end in targets:
            overlap = min(end, target_end) - max(start, target_start)  # negative if they are disjoint
            best_iou = max(best_iou, overlap / (max(end, target_end) - min(start, target_start)))
            best_iop = max(best_iop, overlap / (end - start))
        totals["mIoP"] += best_iop
        totals["mIoU (single span)"] += best_iou
        for bound in (0.3, 0.5):
            totals[f"IoP@{bound}"] += best_iop >= bound
            totals[f"IoU@{bound}"] += best_iou >= bound
        totals["Acc@GQA"] += best_iop >= 0.5 and right[question]
    return {name: total / len(truth) for name, total in totals.items()}


def toolkit_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """GOT-10k: IoU of [left, top, width, height] in a 1 x 1 frame, without the first frame of each sequence.

    Args:
        predicted, truth: [num_sequences, num_frames, 4] as x0, y0, x1, y1.
    """

    def cut(corners: np.ndarray) -> np.ndarray:
        left_top = corners[..., :2].clip(0, 1)
        size = (corners[..., 2:] - corners[..., :2]).clip(0, 1 - left_top)
        return np.concatenate([left_top, left_top + size], axis=-1)

    first, second = cut(predicted[:, 1:].reshape(-1, 4)), cut(truth[:, 1:].reshape(-1, 4))
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    both = np.prod(sides.clip(0), axis=1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (first, second)]
    ious = both / (areas[0] + areas[1] - both + np.finfo(float).eps)
    return {"AO": ious.mean(), "SR@0.5": (ious > 0.5).mean(), "SR@0.75": (ious > 0.75).mean()}


def videomme_letter(answer: str) -> str:
    """Read an answer like lmms-eval's Video-MME: remove some openings, then take the first of A to D."""
    for opening in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
        answer = answer.replace(opening, "")
    found = re.search("[ABCD]", answer)
    return found[0] if found else ""


def mvbench_letter(answer: str) -> str:
    """Read an answer like lmms-eval's MVBench: a letter with or without its option's text, as "B. text" or "(B)"."""
    if opening := re.match(r"([A-E])\.\s*\S", answer.strip(), re.IGNORECASE):
        return opening[1].upper()
    found = re.search(r"\b([a-e])\b", re.sub(r"[()]", " ", answer).lower())
    return found[1].upper() if found else answer


def autodq_scores(
    recalls: Mapping[str, Sequence[float]], precisions: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """DREAM-1K: average within each source, then over the sources, and compute their F1."""
    recall = float(np.average([np.average(values) for values in recalls.values()]))
    precision = float(np.average([np.average(values) for values in precisions.values()]))
    return {"F1": 2 * recall * precision / (recall + precision), "recall": recall, "precision": precision}


def recall_at_one(predicted: Sequence[Span], truth: Sequence[Sequence[Span]], threshold: float) -> float:
    """QVHighlights: the fraction of queries whose first window has this IoU with the true window that it fits best."""
    best = [max(_hull_iou(span, target) for target in targets) for span, targets in zip(predicted, truth, strict=True)]
    return float(np.mean(np.array(best) >= threshold))


def lmms_eval_span(text: str) -> Span | None:
    """Read an answer like lmms-eval's Charades-STA: the first "number - number", where "to" stands for the dash."""
    found = re.search(r"(\d+\.*\d*)\s*-\s*(\d+\.*\d*)", text.lower().replace("to", "-"))
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return min(first, second), max(first, second)


def vtimellm_iou(answer: str, target: Span) -> float:
    """VTimeLLM: the IoU of the first "from 12 to 34" in percent with a target in fractions, to two decimals."""
    found = re.search(r"(\d\d) (?:to|and) (\d\d)", answer)
    return round(_hull_iou((int(found[1]) / 100, int(found[2]) / 100), target), 2) if found else 0.0


def _hull_iou(span: Span, target: Span) -> float:
    both = max(min(span[1], target[1]) - max(span[0], target[0]), 0.0)
    return both / (max(span[1], target[1]) - min(span[0], target[0]))
