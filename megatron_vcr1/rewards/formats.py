"""The format reward (VideoChat-R1, section 3.2): a completion must have the form that its prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise


def blocks_fault(completion: str, tags: Sequence[str]) -> str | None:
    """Check that a completion consists of blocks with only white space between them; return the fault, if any.

    As in the published reward, a block may contain anything, including tags. The whole text is matched against
    ``<a>.*</a>\\s*<b>.*</b>...`` in linear time.

    The first occurrence of each boundary ``</a>\\s*<b>`` is used. It leaves the most text for the following blocks, so
    if any choice of boundaries matches, this one does. A single regular expression would try all choices.
    """
    text = completion.strip()
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
