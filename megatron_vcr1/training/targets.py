"""What SFT teaches: the tokens of the right answer, up to the token that ends the assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PromptTemplates, target_text
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import VideoSample


def completion_text(sample: VideoSample, templates: PromptTemplates, *, thinking: bool) -> str:
    """The answer as the sample's prompt asks for it; with thinking, behind the sample's own."""
    answer = target_text(sample, templates)
    return f"<think>{sample.thinking}</think>\n{answer}" if thinking else answer


def check_thinking(sources: Sequence[DataSource], samples: Sequence[Sequence[VideoSample]]) -> None:
    """Raises UserError if a source's prompts ask for reasoning that its samples do not have."""
    for source, some in zip(sources, samples, strict=True):
        if source.thinking and (without := [sample.id for sample in some if not sample.thinking]):
            raise UserError(
                f"{source.manifest}: {len(without)} of {len(some)} samples have no 'thinking' to learn from, the first "
                f"is {without[0]}; set thinking = false for this source, which trains on answers alone, or add it"
            )


class TargetEncoder:
    """Tokens of completions, with what the chat template puts behind an assistant's turn."""

    def __init__(self, processor: PromptProcessor) -> None:
        """Raises UserError if the chat template writes an assistant's turn in another way than it opens one."""
        self._processor = processor
        self.end_token_id = _end_of_turn(processor)

    def encode(self, text: str) -> Tensor:
        """int64 [num_tokens], the last one the end token."""
        return torch.cat((self._processor.tokenize(text), torch.tensor([self.end_token_id])))


def _end_of_turn(processor: PromptProcessor) -> int:
    """The first token that the chat template writes behind an assistant's words."""
    words = "answer"
    question = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": words}]}
    opened = processor.render([question])
    closed = processor.render([question, answer], add_generation_prompt=False)
    if not closed.startswith(opened + words) or closed == opened + words:
        raise UserError(
            "the chat template does not close an assistant's turn that it opens for generation; use the model's own"
        )
    return int(processor.tokenize(closed.removeprefix(opened + words))[0])
