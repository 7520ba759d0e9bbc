"""Finds the answer in an output, also in an output without the tags that the prompts ask for.

A model that was not trained to use the tags may answer with "B" alone. Benchmarks do not measure the format, so an
output without any tag is the answer as a whole. An output with some of the tags but without an answer, for example one
that was cut within its reasoning, has no answer: a letter in the reasoning does not count.
"""

from __future__ import annotations

import re

from megatron_vcr1.rewards.parsing import UnparsableError, last_answer, parse_choice
from megatron_vcr1.types import OPTION_LETTERS

_TAGS = ("<think>", "<answer>", "<glue>")
_LONE_LETTER = re.compile(rf"(?<![A-Za-z])[{OPTION_LETTERS}](?![A-Za-z])")


def is_tagged(output: str) -> bool:
    """Return whether an output uses any of the tags that the prompts ask for."""
    return any(tag in output for tag in _TAGS)


def read_answer(output: str) -> str:
    """Return the content of the last ``<answer>``, stripped; the whole output if it has no tags.

    Raises:
        UnparsableError: the output has tags but no answer, or its answer is empty.
    """
    answer = last_answer(output) if is_tagged(output) else output.strip()
    if not answer:
        raise UnparsableError("empty answer")
    return answer


def read_choice(output: str) -> str:
    """Return the letter of the chosen option: the first isolated letter, as in "(B)", "B. The cat" and "Answer: B".

    Without an isolated letter, return the first capital letter of an option, which is all that published scripts look
    for.

    Raises:
        UnparsableError: the answer contains no letter of an option.
    """
    answer = read_answer(output)
    lone = _LONE_LETTER.search(answer)
    return lone[0] if lone else parse_choice(answer)
