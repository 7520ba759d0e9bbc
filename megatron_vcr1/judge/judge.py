"""AutoDQ (Tarsier, arXiv 2407.00634): descriptions are compared event by event.

A description's events are judged against the other description: entailed, contradicted, or neither. Only entailment
counts. Recall is the entailed share of the reference's events, precision that of the caption's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.judge.lexical import LexicalReader
from megatron_vcr1.rewards.recall import Verdict, event_recall
from megatron_vcr1.types import CaptionTarget, VideoSample

Events = tuple[str, ...]
Verdicts = tuple[Verdict, ...]

log = logging.getLogger(__name__)


class Reader(Protocol):
    """What reads texts: a language model, or word matching. None stands for a text that it could not read."""

    @property
    def name(self) -> str: ...

    def extract_events(self, descriptions: Sequence[str]) -> list[Events | None]:
        """The atomic events of each description, at most 10."""
        ...

    def judge_events(self, questions: Sequence[tuple[Events, str]]) -> list[Verdicts | None]:
        """How each question's description bears on each of its events."""
        ...


@dataclass(frozen=True, slots=True)
class CaptionVerdicts:
    """A caption beside its reference.

    Attributes:
        reference_events, caption_events: what was judged.
        reference_verdicts: how the caption bears on each event of the reference.
        caption_verdicts: how the reference bears on each event of the caption.
    """

    reference_events: Events
    reference_verdicts: Verdicts
    caption_events: Events
    caption_verdicts: Verdicts

    @property
    def recall(self) -> float:
        return event_recall(self.reference_verdicts)

    @property
    def precision(self) -> float:
        """1 for a caption without events, as in AutoDQ."""
        return event_recall(self.caption_verdicts)


class Judge:
    """Reads captions beside their samples' references. What could not be judged is None: it is not worth 0."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def name(self) -> str:
        """Who judged, for reports: figures of different judges do not compare."""
        return self._reader.name

    def recalls(self, samples: Sequence[VideoSample], captions: Sequence[str]) -> list[float | None]:
        """Event recall of each caption, in [0, 1]: the captioning reward (VideoChat-R1, equation 6).

        Args:
            samples: of captioning, one for each caption; responses to one prompt repeat their sample.
            captions: without tags (`rewards.parsing.parse_caption`).
        """
        events = self._reference_events(samples)
        verdicts = self._judge(list(zip(events, captions, strict=True)))
        recalls = [None if one is None else event_recall(one) for one in verdicts]
        _report_failures(sum(recall is None for recall in recalls), len(recalls))
        return recalls

    def compare(self, samples: Sequence[VideoSample], captions: Sequence[str]) -> list[CaptionVerdicts | None]:
        """Both directions for each caption, as `recalls` takes them."""
        reference_events = self._reference_events(samples)
        caption_events = self._extract(captions)
        references = [_target(sample).caption for sample in samples]
        of_reference = self._judge(list(zip(reference_events, captions, strict=True)))
        of_caption = self._judge(list(zip(caption_events, references, strict=True)))
        compared = [
            None if a is None or b is None or c is None or d is None else CaptionVerdicts(a, b, c, d)
            for a, b, c, d in zip(reference_events, of_reference, caption_events, of_caption, strict=True)
        ]
        _report_failures(sum(one is None for one in compared), len(compared))
        return compared

    def _reference_events(self, samples: Sequence[VideoSample]) -> list[Events | None]:
        """As annotated, or else as the judge reads them in the reference."""
        targets = [_target(sample) for sample in samples]
        missing = dict.fromkeys(target.caption for target in targets if not target.events)
        read = dict(zip(missing, self._extract(list(missing)), strict=True))
        return [target.events or read[target.caption] for target in targets]

    def _extract(self, descriptions: Sequence[str]) -> list[Events | None]:
        return self._reader.extract_events(descriptions) if descriptions else []

    def _judge(self, questions: Sequence[tuple[Events | None, str]]) -> list[Verdicts | None]:
        """Asks nothing about no events: of them, nothing is missed."""
        answerable = [(events, description) for events, description in questions if events]
        answers = iter(self._reader.judge_events(answerable) if answerable else [])
        return [next(answers) if events else None if events is None else () for events, _ in questions]


def build_judge(section: JudgeSection, cache: Path) -> Judge:
    """The judge that the settings ask for.

    Args:
        cache: folder for a language model's answers, unless the settings name one; it may be there already, and
            several processes may share it.

    Raises:
        UserError: the `openai` client is not installed.
    """
    if section.kind == "lexical":
        return Judge(LexicalReader())
    from megatron_vcr1.judge.endpoint import Endpoint
    from megatron_vcr1.judge.reader import EndpointReader

    return Judge(EndpointReader(Endpoint(section), section.cache or cache))


def _target(sample: VideoSample) -> CaptionTarget:
    if not isinstance(sample.target, CaptionTarget):
        raise ValueError(f"sample {sample.id} is of {sample.task}; a judge reads captions")
    return sample.target


def _report_failures(num_failed: int, num_captions: int) -> None:
    if num_failed:
        log.warning("judge: %d of %d captions could not be judged", num_failed, num_captions)
