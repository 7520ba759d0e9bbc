"""What an output answers, read for a benchmark: as the rewards read it, and also without their tags.

A model that was not trained to use the tags may answer with "B" alone. It is not the format that a benchmark measures,
so an output without any of the tags is an answer as a whole. One that has some of them, and was cut within its
reasoning say, answers nothing: a letter of its reasoning is no answer.
"""

from __future__ import annotations

import re

from megatron_vcr1.rewards.parsing import UnparsableError, last_answer, parse_choice
from megatron_vcr1.types import OPTION_LETTERS

_TAGS = ("<think>", "<answer>", "<glue>")
_LONE_LETTER = re.compile(rf"(?<![A-Za-z])[{OPTION_LETTERS}](?![A-Za-z])")


def is_tagged(output: str) -> bool:
    """Whether an output uses any of the tags that the prompts ask for."""
    return any(tag in output for tag in _TAGS)


def read_answer(output: str) -> str:
    """The last ``<answer>``, stripped; the whole output if it has no tags.

    Raises:
        UnparsableError: it has tags but no answer, or nothing in it.
    """
    answer = last_answer(output) if is_tagged(output) else output.strip()
    if not answer:
        raise UnparsableError("empty answer")
    return answer


def read_choice(output: str) -> str:
    """The letter of the chosen option: the first that stands alone, as in "(B)", "B. The cat" and "Answer: B".

    Without one, the first capital letter among those of options, which is all that published scripts look for.

    Raises:
        UnparsableError: there is no such letter.
    """
    answer = read_answer(output)
    lone = _LONE_LETTER.search(answer)
    return lone[0] if lone else parse_choice(answer)
