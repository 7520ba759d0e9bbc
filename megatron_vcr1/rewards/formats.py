"""The format reward (VideoChat-R1, section 3.2): a completion must have the form that its prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence


def blocks_fault(completion: str, tags: Sequence[str]) -> str | None:
    """Check that a completion is one block of each tag, with only white space between them; return the fault, if any.

    The reasoning may mention the tags of the other blocks, which contain no tags themselves. Published code lets ``.*``
    stand for the content of a block, which accepts two whole turns.

    Args:
        completion: any text.
        tags: names of the blocks in order, "think" among them if the prompt asks for reasoning.
    """
    rest = completion.strip()
    for before, tag in zip([None, *tags], tags, strict=False):
        opening = f"<{tag}>"
        if not rest.startswith(opening):
            if before is not None:
                return f"no {opening} right after </{before}>"
            return f"text before {opening}" if opening in rest else f"no {opening}"
        content, closing, rest = rest.removeprefix(opening).partition(f"</{tag}>")
        if not closing:
            return f"{opening} not closed"
        refused = ("think",) if tag == "think" else ("think", "answer", "glue", *tags)
        if within := re.search(f"</?(?:{'|'.join(refused)})>", content):
            return f"{within[0]} inside {opening}"
        rest = rest.lstrip()
    if not rest:
        return None
    return "a second turn" if rest.startswith(f"<{tags[0]}>") else f"text after </{tags[-1]}>"
