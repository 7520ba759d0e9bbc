"""The gallery: frames of samples with their target, the answered spans and boxes, and the rewards or metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vcr1.data.manifest import scan_manifest
from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.data.video import VideoError
from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.report.charts import words
from megatron_vcr1.report.frames import FilmStrip, read_strip
from megatron_vcr1.report.run_record import EvaluationResult, RunRecord, read_json_lines
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.tasks import task_of
from megatron_vcr1.tasks.row_fields import RowError
from megatron_vcr1.types import Box, Interval, Sample

MAX_TEXT = 3000
"""Maximum number of characters of a response that are shown."""

MAX_METRICS = 4
"""Maximum number of metrics that are shown with a prediction."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A response, its reward or metrics, and the spans and boxes that it states.

    Attributes:
        role: "best" or "worst"; decides the colour.
        title: heading of the response.
        text: the response, cut at MAX_TEXT characters.
        num_hidden: number of characters that were cut.
        facts: (name, value) pairs such as the number of tokens.
        parts: (part or metric, value, reason for a zero).
    """

    role: str
    title: str
    text: str
    num_hidden: int
    facts: Sequence[tuple[str, str]]
    parts: Sequence[tuple[str, str, str]]
    spans: Sequence[Interval]
    boxes: Sequence[Box | None]


@dataclass(frozen=True)
class Exhibit:
    """A sample with one or two responses.

    Attributes:
        target: the target as text.
        strips: the frames of each video and image; None for one that cannot be read.
        missing: why the frames of some are missing.
    """

    heading: str
    sample: Sample
    target: str
    answers: Sequence[Answer]
    strips: Sequence[FilmStrip | None] = ()
    missing: Sequence[str] = ()

    @property
    def true_boxes(self) -> Sequence[Box]:
        """The boxes of the target; empty if the task has none."""
        return task_of(self.sample).boxes(self.sample)

    @property
    def annotated(self) -> FilmStrip | None:
        """The frames that the spans and boxes belong to: those of the only video."""
        video = self.sample.video
        strips = zip(self.sample.media, self.strips, strict=False)  # no strips before `with_frames`
        return next((strip for medium, strip in strips if medium is video), None)

    @property
    def length_s(self) -> float:
        """Length of the time line."""
        ends = [span.end_s for span in self.sample.intervals]
        read_s = self.annotated.duration_s if self.annotated else None
        return read_s or self.sample.duration_s or max(ends, default=0.0)


def rollout_exhibits(run: RunRecord, problems: list[str]) -> Iterator[Exhibit]:
    """Yield groups of the first, a middle and the last step: for each task, the group with the largest reward spread.

    Each exhibit shows the best and the worst response of its group.
    """
    steps, templates = list(run.rollout_files), load_templates()
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else ():
        for sample, responses in _groups_with_largest_spread(run.rollout_files[step], problems):
            best, worst, number = responses[0], responses[-1], len(responses)
            if _total(best) > _total(worst):
                answers = [_answer("best", f"Best of {number}", sample, best)]
                answers += [_answer("worst", f"Worst of {number}", sample, worst)]
            else:
                answers = [_answer("best", f"One of {number} with equal rewards", sample, best)]
            heading = f"Step {step}: {words(sample.task)}"
            yield Exhibit(heading, sample, target_text(sample, templates), answers)


def evaluation_exhibits(run: RunRecord, problems: list[str]) -> Iterator[Exhibit]:
    """Yield the best, the median and the worst prediction of each benchmark, by the sum of their first metrics."""
    templates = load_templates()
    for result in run.evaluations:
        manifest = _manifest(run, result)
        if manifest is None or not manifest.is_file():
            problems.append(
                f"evaluation/{result.label}: no samples are shown, because its manifest does not exist ({manifest})"
            )
            continue
        measured = [row for row in read_json_lines(result.folder / "samples.jsonl", problems) if row.get("metrics")]
        measured.sort(key=lambda row: (-sum(islice(row["metrics"].values(), MAX_METRICS)), str(row.get("id"))))
        last = len(measured) - 1
        ranks = dict(zip((0, last // 2, last), ("best", "median", "worst"), strict=True)) if measured else {}
        chosen = {str(measured[rank].get("id")): (rank, name) for rank, name in ranks.items()}
        samples = {row.id: row for row in scan_manifest(manifest) if isinstance(row, Sample) and row.id in chosen}
        outputs = {
            str(row.get("id")): row
            for row in read_json_lines(result.folder / "predictions.jsonl", problems)
            if row.get("id") in chosen
        }
        for id, (rank, name) in chosen.items():
            if (sample := samples.get(id)) is None or not isinstance(outputs.get(id, {}).get("output"), str):
                continue
            response = {**outputs[id], "text": outputs[id]["output"], "measured": measured[rank]}
            answer = _answer("best" if rank < last else "worst", "Answer", sample, response)
            yield Exhibit(f"{result.label}: {name} of {last + 1}", sample, target_text(sample, templates), [answer])


def with_frames(exhibits: Sequence[Exhibit], reader: VideoReader) -> Iterator[Exhibit]:
    """Yield the exhibits with the frames of their videos and images, or with the reasons why there are none."""
    for exhibit in exhibits:
        strips: list[FilmStrip | None] = []
        missing = []
        for medium in exhibit.sample.media:
            try:
                strips.append(read_strip(exhibit.sample, medium, reader))
            except VideoError as error:
                strips.append(None)
                missing.append(str(error))
        yield replace(exhibit, strips=strips, missing=missing)


def answered_spans(sample: Sample, text: str) -> Sequence[Interval]:
    """Return the spans that a response states; none if the task has no spans or they cannot be parsed."""
    try:
        return task_of(sample).answered_intervals(sample, text)
    except UnparsableError:  # the reason for the zero reward is shown next to the response
        return ()


def answered_boxes(sample: Sample, text: str) -> Sequence[Box | None]:
    """Return the boxes that a response states, one per frame; none if the task has none or they cannot be parsed."""
    try:
        return task_of(sample).answered_boxes(sample, text)
    except UnparsableError:
        return ()


def _groups_with_largest_spread(path: Path, problems: list[str]) -> Iterator[tuple[Sample, list[Row]]]:
    """Yield each task's group with the largest reward spread: its sample and its responses, the best first."""
    spreads: dict[str, float] = {}
    faults: list[str] = []
    groups: dict[str, tuple[Sample, list[Row]]] = {}
    for row in read_json_lines(path, problems):
        try:
            sample = sample_from_row(row.get("sample"))
            responses = sorted(row["responses"], key=_total, reverse=True)
        # What reading a row of another form raises. The report names the fault instead of ending.
        except (RowError, KeyError, TypeError, AttributeError, ValueError) as error:
            faults.append(str(error))
            continue
        if responses:
            spread = _total(responses[0]) - _total(responses[-1])
            if spread > spreads.get(sample.task, -1.0):
                spreads[sample.task], groups[sample.task] = spread, (sample, responses)
    if faults:
        problems.append(f"{path.name}: {len(faults)} groups cannot be read and are left out; the first: {faults[0]}")
    yield from groups.values()


def _manifest(run: RunRecord, result: EvaluationResult) -> Path | None:
    """Return the manifest of a result: the one in its metrics.json, or the one of its label in the run's settings."""
    if named := result.details.get("manifest"):
        return Path(str(named))
    for source in run.setting("evaluate", "benchmarks") or ():
        if result.label == (source.get("label") or source.get("name")):
            return Path(str(source.get("manifest")))
    return None


def _answer(role: str, title: str, sample: Sample, response: Row) -> Answer:
    """Convert a response of rollouts/step_N.jsonl, or a prediction with its row of samples.jsonl under "measured"."""
    text = str(response.get("text", ""))
    facts = [
        (name, f"{value:.3g}" if isinstance(value, float) else str(value))
        for key, name in (("num_tokens", "tokens"), ("finish_reason", "finish reason"), ("advantage", "advantage"))
        if (value := response.get(key)) is not None
    ]
    return Answer(
        role=role,
        title=title,
        text=text[:MAX_TEXT],
        num_hidden=max(len(text) - MAX_TEXT, 0),
        facts=facts,
        parts=list(_metrics(response["measured"]) if "measured" in response else _parts(response.get("reward") or {})),
        spans=answered_spans(sample, text),
        boxes=answered_boxes(sample, text),
    )


def _metrics(measured: Row) -> Iterator[tuple[str, str, str]]:
    """Yield the first metrics of a prediction; the first one carries all reasons for zeros."""
    reasons = ", ".join(f"{part}: {reason}" for part, reason in (measured.get("reasons") or {}).items())
    for number, (metric, value) in enumerate(islice(measured["metrics"].items(), MAX_METRICS)):
        yield metric, f"{value:.2f}", "" if number else reasons


def _parts(reward: Row) -> Iterator[tuple[str, str, str]]:
    """Yield the parts of a reward and their total."""
    reasons = reward.get("reasons") or {}
    named = {part: value for part, value in reward.items() if part not in ("total", "reasons", "extra")}
    values: dict[str, Any] = {**named, **(reward.get("extra") or {})}
    for part, value in values.items():
        yield part, "-" if value is None else f"{value:.2f}", str(reasons.get(part, ""))
    total = reward.get("total")
    yield "total", "-" if total is None else f"{total:.2f}", ""


def _total(response: Row) -> float:
    """Return the total reward; a response without a verdict counts as 0 here."""
    return float((response.get("reward") or {}).get("total") or 0.0)
