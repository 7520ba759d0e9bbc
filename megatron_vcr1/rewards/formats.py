"""The format reward (VideoChat-R1, section 3.2): a completion must have the form that its prompt asks for."""

from __future__ import annotations

import re
from itertools import pairwise

from megatron_vcr1.rewards.parsing import UnparsableError, first_glue, last_answer, parse_boxes, parse_spans
from megatron_vcr1.types import GroundedChoiceTarget, TrackingTarget, VideoSample


def format_fault(sample: VideoSample, completion: str, *, thinking: bool) -> str | None:
    """Check the form of a completion; return a description of the fault, or None if the form is correct.

    A completion consists of blocks with only white space between them: ``<think>`` if thinking is on, ``<answer>``, and
    for grounded QA ``<glue>``. For tracking and grounded QA, the boxes and spans must also be parsable. As in the
    published reward, a block may contain anything, including tags.
    """
    grounded = isinstance(sample.target, GroundedChoiceTarget)
    tags = [*(["think"] if thinking else []), "answer", *(["glue"] if grounded else [])]
    return _blocks_fault(completion.strip(), tags) or _payload_fault(sample, completion)


def _blocks_fault(text: str, tags: list[str]) -> str | None:
    """Match the whole text against ``<a>.*</a>\\s*<b>.*</b>...`` in linear time; return the fault, if any.

    The first occurrence of each boundary ``</a>\\s*<b>`` is used. It leaves the most text for the following blocks, so
    if any choice of boundaries matches, this one does. A single regular expression would try all choices.
    """
    opening, closing = f"<{tags[0]}>", f"</{tags[-1]}>"
    if not text.startswith(opening):
        return f"text before {opening}" if opening in text else f"no {opening}"
    position = len(opening)
    for before, after in pairwise(tags):
        boundary = re.compile(rf"</{before}>\s*+<{after}>").search(text, position)
        if boundary is None:
            return f"no <{after}> right after </{before}>"
        position = boundary.end()
    if not text.endswith(closing):
        return f"text after {closing}" if closing in text[position:] else f"<{tags[-1]}> not closed"
    return None


def _payload_fault(sample: VideoSample, completion: str) -> str | None:
    """Check that the boxes of tracking and the spans of grounded QA can be parsed; return the fault, if any."""
    try:
        match sample.target:
            case TrackingTarget(boxes):
                parse_boxes(last_answer(completion), len(boxes))
            case GroundedChoiceTarget():
                parse_spans(first_glue(completion))
    except UnparsableError as fault:
        return str(fault)
    return None
