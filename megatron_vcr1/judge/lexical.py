"""Word matching in a language model's place: for demonstrations and tests, where no server is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vcr1.rewards.recall import Verdict

MAX_EVENTS = 10
_ENTAILED_SHARE = 0.8
"""Of an event's content words, those that one sentence must hold. All but one of five or more."""

_SENTENCE_END = re.compile(r"[.!?;\n]+|,? (?:and )?then\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_FUNCTION_WORDS = """
a an the this that these those it its he she they them his her their is are was were be been being am do does did has
have had of in on at to from by with as and or but while then there here into onto
"""
_EMPTY_WORDS = frozenset(_FUNCTION_WORDS.split())
_SUFFIXES = ("ing", "ed", "es", "s", "e")


class LexicalReader:
    """Sentences are events, and an event is entailed by a sentence that holds its words. It knows no contradiction."""

    name = "lexical (word matching, no language model)"

    def extract_events(self, descriptions: Sequence[str]) -> list[tuple[str, ...] | None]:
        return [tuple(_sentences(description)[:MAX_EVENTS]) for description in descriptions]

    def judge_events(self, questions: Sequence[tuple[tuple[str, ...], str]]) -> list[tuple[Verdict, ...] | None]:
        return [_verdicts(events, description) for events, description in questions]


def _verdicts(events: Sequence[str], description: str) -> tuple[Verdict, ...]:
    sentences = [_content_words(sentence) for sentence in _sentences(description)]
    return tuple(
        Verdict.ENTAILMENT
        if any(_holds(sentence, _content_words(event)) for sentence in sentences)
        else Verdict.NEUTRAL
        for event in events
    )


def _holds(sentence: set[str], event: set[str]) -> bool:
    return bool(event) and len(event & sentence) >= _ENTAILED_SHARE * len(event)


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if _content_words(sentence)]


def _content_words(text: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in _EMPTY_WORDS}


def _stem(word: str) -> str:
    """Cuts an English ending off: "moves", "moved" and "moving" meet at "mov"."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word.removesuffix(suffix)
    return word
