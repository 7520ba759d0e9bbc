"""The format reward (VideoChat-R1, section 3.2): does a completion have the form that its prompt asks for?"""

from __future__ import annotations

import re
from itertools import pairwise

from megatron_vcr1.rewards.parsing import UnparsableError, first_glue, last_answer, parse_boxes, parse_spans
from megatron_vcr1.types import GroundedChoiceTarget, TrackingTarget, VideoSample


def format_fault(sample: VideoSample, completion: str, *, thinking: bool) -> str | None:
    """What is wrong with the form, in a few words; None if it is right.

    The blocks follow one another with white space between them and nothing around them: ``<think>`` if asked to think,
    ``<answer>``, and for grounded QA ``<glue>``. Tracking and grounded QA also need boxes and spans that can be read.
    As in the published reward, a block may hold anything, tags too.
    """
    grounded = isinstance(sample.target, GroundedChoiceTarget)
    tags = [*(["think"] if thinking else []), "answer", *(["glue"] if grounded else [])]
    return _blocks_fault(completion.strip(), tags) or _payload_fault(sample, completion)


def _blocks_fault(text: str, tags: list[str]) -> str | None:
    """Whether ``text`` matches ``<a>.*</a>\\s*<b>.*</b>...`` in whole, in linear time.

    Each seam between two blocks is taken where it first appears, which leaves the most room for the next: if any choice
    of seams matches, this one does.
    """
    opening, closing = f"<{tags[0]}>", f"</{tags[-1]}>"
    if not text.startswith(opening):
        return f"text before {opening}" if opening in text else f"no {opening}"
    position = len(opening)
    for before, after in pairwise(tags):
        seam = re.compile(rf"</{before}>\s*+<{after}>").search(text, position)
        if seam is None:
            return f"no <{after}> right after </{before}>"
        position = seam.end()
    if not text.endswith(closing):
        return f"text after {closing}" if closing in text[position:] else f"<{tags[-1]}> not closed"
    return None


def _payload_fault(sample: VideoSample, completion: str) -> str | None:
    try:
        match sample.target:
            case TrackingTarget(boxes):
                parse_boxes(last_answer(completion), len(boxes))
            case GroundedChoiceTarget():
                parse_spans(first_glue(completion))
    except UnparsableError as fault:
        return str(fault)
    return None
