"""Generation settings of a model directory: end tokens, tokens that are never sampled, and the repetition penalty."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError

_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids that generation treats specially.

    Attributes:
        end: end tokens; a response ends with any of them.
        never_sampled: placeholders of images and videos. The model was not trained to write them, and a response that
            contained them could not be scored.
    """

    end: frozenset[int]
    never_sampled: tuple[int, ...]

    @classmethod
    def from_pretrained(cls, model_dir: Path, processor: PromptProcessor) -> SpecialTokens:
        """Read the end tokens from generation_config.json, or from the tokenizer if the file names none.

        Raises:
            UserError: the file is not valid, or neither of the two names an end token.
        """
        vocabulary = processor.tokenizer.get_vocab()
        vision = {vocabulary[token] for token in processor.vision_tokens if token in vocabulary}
        vision |= {processor.image_token_id, processor.video_token_id}
        end = _configured_end_tokens(model_dir)
        if not end and processor.tokenizer.eos_token_id is not None:
            end = frozenset([processor.tokenizer.eos_token_id])
        if not end:
            raise UserError(
                f"{model_dir}: neither generation_config.json nor the tokenizer names an end token; "
                'add {"eos_token_id": ...} as generation_config.json'
            )
        return cls(end, tuple(sorted(vision)))


def _configured_end_tokens(model_dir: Path) -> frozenset[int]:
    value = _generation_config(model_dir).get("eos_token_id")
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in token_ids):  # `isinstance` would accept true and false
        raise UserError(f"{model_dir / _FILE}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return frozenset(token_ids)


def read_repetition_penalty(model_dir: Path) -> float:
    """Read the repetition penalty from generation_config.json; 1 (no penalty) if the file does not set one.

    Raises:
        UserError: the file is not valid.
    """
    value = _generation_config(model_dir).get("repetition_penalty")
    if value is None:
        return 1.0
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{model_dir / _FILE}: repetition_penalty is {value!r}; it must be a number above 0")
    return float(value)


def _generation_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / _FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read as a JSON object: it is a {type(content).__name__}")
    return content
