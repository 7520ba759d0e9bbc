"""AutoDQ (Tarsier, arXiv 2407.00634): compares a caption with its reference event by event.

Each event of one description is judged against the other description: entailed, contradicted, or neither. Only an
entailed event counts. Recall is the entailed fraction of the reference's events, precision the entailed fraction of the
caption's events.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.judge.lexical import LexicalBackend
from megatron_vcr1.rewards.recall import Verdict, event_recall
from megatron_vcr1.tasks import task_of
from megatron_vcr1.types import Sample

Events = tuple[str, ...]
Verdicts = tuple[Verdict, ...]

log = logging.getLogger(__name__)


class JudgeBackend(Protocol):
    """The interface of a judge backend: a language model, or word matching. None in a result marks a failure."""

    @property
    def name(self) -> str:
        """Name for reports."""
        ...

    def extract_events(self, descriptions: Sequence[str]) -> list[Events | None]:
        """List the atomic events of each description, at most 10."""
        ...

    def judge_events(self, pairs: Sequence[tuple[Events, str]]) -> list[Verdicts | None]:
        """For each (events, description) pair, judge each event against the description."""
        ...


@dataclass(frozen=True, slots=True)
class CaptionVerdicts:
    """The comparison of a caption with its reference, in both directions.

    Attributes:
        reference_events: events of the reference.
        reference_verdicts: verdict on each reference event, judged against the caption.
        caption_events: events of the caption.
        caption_verdicts: verdict on each caption event, judged against the reference.
    """

    reference_events: Events
    reference_verdicts: Verdicts
    caption_events: Events
    caption_verdicts: Verdicts

    @property
    def recall(self) -> float:
        """Fraction of the reference's events that the caption entails."""
        return event_recall(self.reference_verdicts)

    @property
    def precision(self) -> float:
        """Fraction of the caption's events that the reference entails; 1 for a caption without events, as in AutoDQ."""
        return event_recall(self.caption_verdicts)


class Judge:
    """Compares captions with the references of their samples.

    The result of a caption that could not be judged is None. It must not count as 0.
    """

    def __init__(self, backend: JudgeBackend) -> None:
        self._backend = backend

    @property
    def name(self) -> str:
        """Name of the backend, for reports: results of different judges are not comparable."""
        return self._backend.name

    def recalls(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[float | None]:
        """Compute the event recall of each caption, in [0, 1]: the captioning reward (VideoChat-R1, equation 6).

        Args:
            samples: captioning samples, one per caption; responses to the same prompt repeat their sample.
            captions: captions without tags (`rewards.parsing.parse_caption`).
        """
        events = self._reference_events(samples)
        verdicts = self._judge(list(zip(events, captions, strict=True)))
        recalls = [
            None if caption_verdicts is None else event_recall(caption_verdicts) for caption_verdicts in verdicts
        ]
        _report_failures(sum(recall is None for recall in recalls), len(recalls))
        return recalls

    def compare(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[CaptionVerdicts | None]:
        """Judge each caption in both directions; the arguments are those of `recalls`."""
        reference_events = self._reference_events(samples)
        caption_events = self._extract(captions)
        references = [task_of(sample).reference(sample).text for sample in samples]
        reference_verdicts = self._judge(list(zip(reference_events, captions, strict=True)))
        caption_verdicts = self._judge(list(zip(caption_events, references, strict=True)))
        # None if any of the four parts failed.
        compared = [
            None if a is None or b is None or c is None or d is None else CaptionVerdicts(a, b, c, d)
            for a, b, c, d in zip(reference_events, reference_verdicts, caption_events, caption_verdicts, strict=True)
        ]
        _report_failures(sum(verdicts is None for verdicts in compared), len(compared))
        return compared

    def _reference_events(self, samples: Sequence[Sample]) -> list[Events | None]:
        """Return the annotated events of each reference, or those that the backend extracts from it."""
        references = [task_of(sample).reference(sample) for sample in samples]
        missing = dict.fromkeys(reference.text for reference in references if not reference.events)
        extracted = dict(zip(missing, self._extract(list(missing)), strict=True))
        return [reference.events or extracted[reference.text] for reference in references]

    def _extract(self, descriptions: Sequence[str]) -> list[Events | None]:
        return self._backend.extract_events(descriptions) if descriptions else []

    def _judge(self, pairs: Sequence[tuple[Events | None, str]]) -> list[Verdicts | None]:
        """Judge each (events, description) pair.

        Only pairs with events reach the backend. No events (an empty tuple) have no verdicts; if the extraction of the
        events failed (None), so did the verdicts.
        """
        with_events = [(events, description) for events, description in pairs if events]
        judged = iter(self._backend.judge_events(with_events) if with_events else [])
        verdicts: list[Verdicts | None] = []
        for events, _ in pairs:
            if events:
                verdicts.append(next(judged))
            else:
                verdicts.append(None if events is None else ())
        return verdicts


def build_judge(section: JudgeSection, cache: Path) -> Judge:
    """Build the judge that the settings describe.

    Args:
        section: the section [judge].
        cache: folder for a language model's responses, used unless `section.cache` is set. It may exist already, and
            several processes may share it.

    Raises:
        UserError: the settings ask for a language model, and the `openai` package is not installed.
    """
    if section.kind == "lexical":
        return Judge(LexicalBackend())
    # Imported here, because importing the endpoint fails without the optional openai package.
    from megatron_vcr1.judge.autodq import EndpointBackend
    from megatron_vcr1.judge.endpoint import Endpoint

    return Judge(EndpointBackend(Endpoint(section), section.cache or cache))


def _report_failures(num_failed: int, num_captions: int) -> None:
    if num_failed:
        log.warning("judge: %d of %d captions could not be judged", num_failed, num_captions)
