"""Finds the answer in an output, also in an output without the tags that the prompts ask for.

A model that was not trained to use the tags may answer with "B" alone. Benchmarks do not measure the format, so an
output without any tag is the answer as a whole. An output with some of the tags but without an answer, for example one
that was cut within its reasoning, has no answer: a letter in the reasoning does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vcr1.rewards.choices import parse_choice
from megatron_vcr1.rewards.parsing import UnparsableError, last_answer

_TAGS = ("<think>", "</think>", "<answer>", "<glue>")  # a chat template may open <think> in the prompt


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


def read_choice(output: str, options: Sequence[str]) -> str:
    """Return the letter of the option that an output chooses; `parse_choice` also reads it for the reward.

    Raises:
        UnparsableError: there is no answer, or it does not choose one option.
    """
    return parse_choice(read_answer(output), options)
