"""Word matching instead of a language model, for demonstrations and tests without a server."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vcr1.rewards.recall import Verdict

MAX_EVENTS = 10
"""Largest number of events of a description, as in `autodq`."""
_MIN_MATCHED_FRACTION = 0.8
"""Fraction of an event's content words that a sentence must contain to entail it: 4 of 4 words, or 4 of 5."""

_SENTENCE_END = re.compile(r"[.!?;\n]+|,? (?:and )?then\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_FUNCTION_WORDS = """
a an the this that these those it its he she they them his her their is are was were be been being am do does did has
have had of in on at to from by with as and or but while then there here into onto
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
_SUFFIXES = ("ing", "ed", "es", "s", "e")


class LexicalBackend:
    """A judge backend that treats each sentence as an event, and matches words.

    A description entails an event if one of its sentences contains the event's words. Every other verdict is neutral:
    a contradiction is never detected.
    """

    name = "lexical (word matching, no language model)"

    def extract_events(self, descriptions: Sequence[str]) -> list[tuple[str, ...] | None]:
        """Split each description into sentences, at most 10."""
        return [tuple(_sentences(description)[:MAX_EVENTS]) for description in descriptions]

    def judge_events(self, pairs: Sequence[tuple[tuple[str, ...], str]]) -> list[tuple[Verdict, ...] | None]:
        """Judge the events of each (events, description) pair."""
        return [_verdicts(events, description) for events, description in pairs]


def _verdicts(events: Sequence[str], description: str) -> tuple[Verdict, ...]:
    sentences = [_content_words(sentence) for sentence in _sentences(description)]
    return tuple(
        Verdict.ENTAILMENT
        if any(_entails(sentence, _content_words(event)) for sentence in sentences)
        else Verdict.NEUTRAL
        for event in events
    )


def _entails(sentence: set[str], event: set[str]) -> bool:
    return bool(event) and len(event & sentence) >= _MIN_MATCHED_FRACTION * len(event)


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if _content_words(sentence)]


def _content_words(text: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS}


def _stem(word: str) -> str:
    """Remove a common English suffix: "moves", "moved" and "moving" all become "mov"."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word.removesuffix(suffix)
    return word
