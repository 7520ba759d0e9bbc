"""SFT targets: the tokens of a sample's target text, up to the token that ends the assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PreparedSample, PromptTooLongError
from megatron_vcr1.data.templates import PromptTemplates, target_text
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import check_prompt
from megatron_vcr1.types import Sample


def completion_text(sample: Sample, templates: PromptTemplates, *, thinking: bool) -> str:
    """Return the completion that the sample's prompt asks for.

    Args:
        thinking: put the sample's reasoning, in <think> tags, before the answer.
    """
    answer = target_text(sample, templates)
    return f"<think>{sample.thinking}</think>\n{answer}" if thinking else answer


def prepare_with_target(
    sample: Sample,
    *,
    prepare: PrepareFn,
    encoder: TargetEncoder,
    config: ModelConfig,
    templates: PromptTemplates,
    thinking: bool,
) -> PreparedSample:
    """Prepare a sample whose prompt and target are within the model's range of positions.

    Args:
        prepare: prepares the prompt.
        thinking: whether the target has the sample's reasoning.

    Raises:
        PromptTooLongError: they are not; names the sample.
    """
    prepared = prepare(sample)
    num_tokens = len(encoder.encode(completion_text(sample, templates, thinking=thinking)))
    try:
        check_prompt(prepared.prompt, config, num_tokens - 1)
    except UserError as error:
        raise PromptTooLongError(f"sample {sample.id} and its target of {num_tokens} tokens: {error}") from error
    return prepared


def check_thinking(sources: Sequence[DataSource], samples: Sequence[Sequence[Sample]]) -> None:
    """Check that every sample whose prompt asks for reasoning has reasoning to train on.

    Args:
        samples: the samples of each source.

    Raises:
        UserError: some samples of a source with thinking = true have none.
    """
    for source, source_samples in zip(sources, samples, strict=True):
        if source.thinking and (without := [sample.id for sample in source_samples if not sample.thinking]):
            raise UserError(
                f"{source.manifest}: {len(without)} of {len(source_samples)} samples have no 'thinking' to learn from "
                f"(the first is {without[0]}). Set thinking = false for this source to train on answers alone, or add "
                "'thinking' to its samples"
            )


class TargetEncoder:
    """Tokenizes completions, with the token that the chat template writes after an assistant's turn."""

    def __init__(self, processor: PromptProcessor) -> None:
        """Raises UserError if the chat template does not close the turn that it opens for generation."""
        self._processor = processor
        self.end_token_id = _end_of_turn(processor)

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a completion, the end token last; int64 [num_tokens]. Control tokens in it are text."""
        return torch.cat((self._processor.tokenize_text(text), torch.tensor([self.end_token_id])))


def _end_of_turn(processor: PromptProcessor) -> int:
    """Return the first token that the chat template writes after the assistant's text.

    Found by rendering the same conversation twice: up to the opened assistant's turn, and with the turn complete.
    """
    text = "answer"
    user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    opened = processor.render([user])
    closed = processor.render([user, assistant], add_generation_prompt=False)
    if not closed.startswith(opened + text) or closed == opened + text:
        raise UserError(
            "the chat template does not close the assistant's turn that it opens for generation; use the chat template "
            "that was published with the model"
        )
    return int(processor.tokenize(closed.removeprefix(opened + text))[0])
