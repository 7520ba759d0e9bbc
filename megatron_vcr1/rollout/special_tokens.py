"""Which tokens end a response, and which may never stand in one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids with a meaning of their own in generation.

    Attributes:
        end: a response ends with any of these.
        never_sampled: what stands for pictures. The model was not trained to write them, and a response that held them
            could not be scored.
    """

    end: frozenset[int]
    never_sampled: tuple[int, ...]

    @classmethod
    def from_pretrained(cls, model_dir: Path, processor: PromptProcessor) -> SpecialTokens:
        """End tokens of generation_config.json; where it has none, the tokenizer's.

        Raises:
            UserError: the file is damaged, or neither names an end token.
        """
        vocabulary = processor.tokenizer.get_vocab()
        vision = {vocabulary[token] for token in processor.vision_tokens if token in vocabulary}
        vision |= {processor.image_token_id, processor.video_token_id}
        end = _configured_end_tokens(model_dir / "generation_config.json")
        if not end and processor.tokenizer.eos_token_id is not None:
            end = frozenset([processor.tokenizer.eos_token_id])
        if not end:
            raise UserError(
                f"{model_dir}: neither generation_config.json nor the tokenizer names an end token; "
                'add {"eos_token_id": ...} as generation_config.json'
            )
        return cls(end, tuple(sorted(vision)))


def _configured_end_tokens(path: Path) -> frozenset[int]:
    if not path.is_file():
        return frozenset()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in token_ids):
        raise UserError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return frozenset(token_ids)
