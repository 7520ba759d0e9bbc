"""Generation settings of a model directory: end tokens, tokens that are never sampled, and the repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields

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
    def from_pretrained(cls, model_dir: Path, processor: PromptProcessor, num_embeddings: int) -> SpecialTokens:
        """Read the end tokens from generation_config.json, or from the tokenizer if the file names none.

        Args:
            model_dir: the model's directory.
            processor: the model's processor.
            num_embeddings: number of rows of the model's embedding; token ids are below it.

        Raises:
            UserError: the file is not valid, an end token has no embedding, or neither the file nor the tokenizer names
                an end token.
        """
        vocabulary = processor.tokenizer.get_vocab()
        vision = {vocabulary[token] for token in processor.vision_tokens if token in vocabulary}
        vision |= {processor.image_token_id, processor.video_token_id}
        end = _configured_end_tokens(model_dir, num_embeddings)
        if not end and processor.tokenizer.eos_token_id is not None:
            end = frozenset([processor.tokenizer.eos_token_id])
        if not end:
            raise UserError(
                f"{model_dir}: neither generation_config.json nor the tokenizer names an end token; "
                'add {"eos_token_id": ...} as generation_config.json'
            )
        return cls(end, tuple(sorted(vision)))


def _configured_end_tokens(model_dir: Path, num_embeddings: int) -> frozenset[int]:
    fields = _generation_config(model_dir)
    value = fields.values.get("eos_token_id")
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    # `type`, because isinstance accepts true and false as integers.
    if not all(type(token_id) is int and 0 <= token_id < num_embeddings for token_id in token_ids):
        raise fields.error(
            "eos_token_id",
            f"must be a token id from 0 to {num_embeddings - 1} (the model has {num_embeddings} embeddings), or a list "
            "of them",
        )
    return frozenset(token_ids)


def read_repetition_penalty(model_dir: Path) -> float:
    """Read the repetition penalty from generation_config.json; 1 (no penalty) if the file does not set one.

    Raises:
        UserError: the file is not valid.
    """
    return float(_generation_config(model_dir).number("repetition_penalty", 1.0))


def _generation_config(model_dir: Path) -> Fields:
    path = model_dir / _FILE
    return Fields.from_file(path) if path.exists() else Fields({}, path)
