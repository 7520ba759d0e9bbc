from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.judge.judge import Events, Judge, Verdicts, build_judge
from megatron_vcr1.judge.lexical import LexicalBackend
from megatron_vcr1.tasks import CaptionTarget
from megatron_vcr1.types import Sample, Video


class RecordingBackend(LexicalBackend):
    """Records its arguments, and fails on descriptions that contain "unreadable"."""

    def __init__(self) -> None:
        self.extracted: list[str] = []
        self.judged: list[tuple[Events, str]] = []

    def extract_events(self, descriptions: Sequence[str]) -> list[Events | None]:
        self.extracted += descriptions
        events = super().extract_events(descriptions)
        return [None if "unreadable" in text else found for text, found in zip(descriptions, events, strict=True)]

    def judge_events(self, pairs: Sequence[tuple[Events, str]]) -> list[Verdicts | None]:
        self.judged += pairs
        verdicts = super().judge_events(pairs)
        return [None if "unreadable" in text else found for (_, text), found in zip(pairs, verdicts, strict=True)]


def sample(caption: str = "A dog barks.", events: tuple[str, ...] = ()) -> Sample:
    return Sample(id="clip", media=(Video("a.mp4"),), target=CaptionTarget(caption, events))


def test_annotated_events_are_used_and_others_are_extracted_once_per_reference() -> None:
    backend = RecordingBackend()
    samples = [sample(events=("It rains.",)), sample(), sample()]
    assert Judge(backend).recalls(samples, ["It rains.", "A dog barks.", "A cat."]) == [1.0, 1.0, 0.0]
    assert backend.extracted == ["A dog barks."]


def test_a_failure_is_none_and_leaves_the_other_captions_alone(caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge(RecordingBackend())
    assert judge.recalls([sample()] * 3, ["A dog barks.", "unreadable", "A cat."]) == [1.0, None, 0.0]
    assert "1 of 3 captions could not be judged" in caplog.text
    assert judge.recalls([sample("unreadable")], ["A dog barks."]) == [None]
    first, second = judge.compare([sample()] * 2, ["unreadable", "A dog barks."])
    assert first is None and second is not None and (second.recall, second.precision) == (1.0, 1.0)


def test_captions_without_events_are_not_sent_to_the_backend() -> None:
    backend = RecordingBackend()
    (verdicts,) = Judge(backend).compare([sample()], ["..."])
    assert verdicts is not None and (verdicts.recall, verdicts.precision) == (0.0, 1.0)
    assert [events for events, _ in backend.judged] == [("A dog barks",)]


def test_settings_select_the_backend(tmp_path: Path) -> None:
    assert build_judge(JudgeSection(kind="lexical"), tmp_path).name == LexicalBackend.name
    section = JudgeSection(kind="openai", base_url="http://127.0.0.1:9/v1", model="a-model")
    assert build_judge(section, tmp_path).name == "a-model"
