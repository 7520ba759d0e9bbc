"""The tokenizer, chat template, patch sizes and vision token ids of a Hugging Face model directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_vcr1.data.chat_template import JINJA_FILE, JSON_FILES, check_chat_template, read_chat_template
from megatron_vcr1.data.control_tokens import ControlTokens
from megatron_vcr1.data.cpu_limit import CpuLimitExceeded, cpu_limit
from megatron_vcr1.data.frame_rules import PER_FRAME_RULES, FrameRules
from megatron_vcr1.data.image_settings import COMBINED_FILE, IMAGE_FILE, read_image_settings
from megatron_vcr1.data.media_rules import MediaRules
from megatron_vcr1.data.messages import MessageError
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.text_files import open_regular
from megatron_vcr1.types import Sample

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_PADS = {"image": IMAGE_PAD, "video": VIDEO_PAD}
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_TOKENS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

# The files that transformers may read for a tokenizer. It reads config.json too.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
_TOKENIZER_JSON_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
_MERGES_FILE = "merges.txt"
_RENDER_LIMIT_S = 5.0


class ModelFacts(Protocol):
    """The token ids and media rules of a model; `model.config.ModelConfig` has them."""

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the embedding: token ids are below it."""

    @property
    def image_token_id(self) -> int:
        """Id of the image pad."""

    @property
    def video_token_id(self) -> int:
        """Id of the video pad."""

    @property
    def media(self) -> MediaRules:
        """Rules of the model's family for images and videos."""


@dataclass(frozen=True)
class PromptProcessor:
    """The tokenizer and media settings of a model.

    It replaces transformers' own processor, which requires torchvision.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    image_token_id: int
    video_token_id: int
    template_kinds: frozenset[str] = frozenset({"image", "video"})
    """Kinds of parts, "image" and "video", that the chat template supports."""
    vision_tokens: tuple[str, ...] = VISION_TOKENS
    """Strings that the tokenizer encodes as vision tokens."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    """Smallest area of an image after resizing, in pixels."""
    max_pixels: int = 28 * 28 * 1280
    """Largest area of an image after resizing, in pixels."""
    frame_rules: FrameRules = PER_FRAME_RULES
    """The rules for the number and the size of a video's frames, with the pixel bounds of the model's files."""
    timestamps_as_text: bool = False
    """Whether each temporal patch of a video follows its time stamp in the text, with pads of its own."""

    @property
    def factor(self) -> int:
        """Side of the square of pixels that makes one token; the sides of resized frames are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, model: ModelFacts) -> PromptProcessor:
        """Read a model directory that transformers 4 or 5 saved.

        Args:
            model_dir: the directory.
            model: the token ids that the model's config.json defines, and the media rules of its family.

        Raises:
            UserError: a file is missing or damaged, or tokenizer and model do not fit together; names the file.
        """
        folder = Path(model_dir)
        settings = read_image_settings(folder, video_patch_size=model.media.video_patch_size)
        if settings is None:
            raise UserError(
                f"{folder}: neither {COMBINED_FILE} nor {IMAGE_FILE} has image settings; add the model's file"
            )
        template, template_file = read_chat_template(folder)
        tokenizer = _read_tokenizer(folder)
        _check_vocabulary(tokenizer, model, folder)
        template_kinds = check_chat_template(template, tokenizer.special_tokens_map, _PADS, template_file)
        min_pixels, max_pixels = settings.min_pixels, settings.max_pixels
        return cls(
            tokenizer=tokenizer,
            chat_template=template,
            template_kinds=template_kinds,
            image_token_id=model.image_token_id,
            video_token_id=model.video_token_id,
            patch_size=settings.patch_size,
            temporal_patch_size=settings.temporal_patch_size,
            merge_size=settings.merge_size,
            min_pixels=cls.min_pixels if min_pixels is None else min_pixels,
            max_pixels=cls.max_pixels if max_pixels is None else max_pixels,
            frame_rules=model.media.frames.with_file_bounds(
                settings.min_video_pixels, settings.max_video_pixels, settings.max_frame_pixels
            ),
            timestamps_as_text=model.media.timestamps_as_text,
        )

    def check_samples(self, samples: Iterable[Sample]) -> None:
        """Check that the chat template supports the kinds of media of the samples.

        Raises:
            UserError: it does not.
        """
        for kind in sorted({medium.kind for sample in samples for medium in sample.media} - self.template_kinds):
            raise UserError(
                f"the model's chat template writes no {_PADS[kind]}, and the samples have {kind}s; take {JINJA_FILE} "
                f"or {JSON_FILES[0]} of the model's publisher"
            )

    def check_response_start(self) -> None:
        """Check that responses may begin with <think>, as the prompts of training ask for.

        Raises:
            UserError: the chat template writes it at the end of the prompt, or refuses a question.
        """
        try:
            prompt = self.render([{"role": "user", "content": [{"type": "text", "text": "question"}]}])
        except MessageError as error:
            raise UserError(str(error)) from None
        if prompt.rstrip().endswith("<think>"):
            raise UserError(
                f"the model's chat template ({JINJA_FILE} or {JSON_FILES[0]}) writes <think> before every response, as "
                "that of a Thinking edition does; take the Instruct edition: prompts ask for the whole "
                "<think>...</think>"
            )

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation as text, with one vision pad for each image or video.

        Raises:
            MessageError: the chat template refuses the conversation, fails for it, or does not end.
        """
        try:
            with cpu_limit(_RENDER_LIMIT_S):
                return self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
        except CpuLimitExceeded:
            raise MessageError(
                f"the chat template does not end within {_RENDER_LIMIT_S:g} s for this conversation"
            ) from None
        except Exception as error:  # a template is a program, which may raise anything
            raise MessageError(f"the chat template fails for this conversation: {error}") from error

    def tokenize(self, text: str) -> Tensor:
        """Tokenize a text in which control tokens have their meaning; return token ids, int64 [num_tokens]."""
        return torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64)

    def tokenize_video(self, step_times_s: Sequence[float]) -> Tensor:
        """Tokenize what the pad of a video in the chat template stands for, with one pad for each run of pads.

        Args:
            step_times_s: time of each temporal patch, in seconds from the start of the clip.

        Returns:
            Token ids, int64 [num_tokens]: one pad, or a pad after the time stamp of each temporal patch.
        """
        if not self.timestamps_as_text:
            return torch.tensor([self.video_token_id])
        blocks = [f"<{time_s:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for time_s in step_times_s]
        return self.tokenize("".join(blocks))

    def tokenize_text(self, text: str) -> Tensor:
        """Tokenize a text in which control tokens such as `<|im_end|>` are plain text.

        Returns:
            Token ids, int64 [num_tokens].
        """
        if not self._control_tokens.occur_in(text):
            return self.tokenize(text)
        return torch.tensor(self._control_tokens.encode_as_text(text), dtype=torch.int64)

    def tokenize_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> Tensor:
        """Render and tokenize a conversation, with one vision pad for each image or video.

        Only the chat template writes control tokens; those in the messages' texts are encoded as text.

        Returns:
            Token ids, int64 [num_tokens].
        """
        marked, mark = self._control_tokens.mark(messages)
        text = self.render(messages if mark is None else marked, add_generation_prompt=add_generation_prompt)
        if mark is None:
            return self.tokenize(text)
        return torch.tensor(self._control_tokens.encode_rendered(text, mark), dtype=torch.int64)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.vision_tokens)

    def decode(self, token_ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = True) -> str:
        """Decode token ids [num_tokens] to text."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model directory, without running code from it.

    Raises:
        UserError: a file is missing or damaged.
    """
    # transformers would wait for a writer of a FIFO for ever, and fails in many ways for JSON of another shape.
    for name in _TOKENIZER_JSON_FILES:
        if (folder / name).exists():
            Fields.from_file(folder / name)
    if (folder / _MERGES_FILE).exists():
        os.close(open_regular(folder / _MERGES_FILE))
    if not any((folder / name).exists() for name in _VOCABULARY_FILES):
        raise UserError(f"{folder}: no tokenizer ({' or '.join(_VOCABULARY_FILES)}); add the model's tokenizer files")
    from transformers import AutoTokenizer  # takes over a second, which decoding processes need not spend

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged files make transformers and tokenizers raise anything, even a bare Exception
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}); download its files again"
        ) from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: ModelFacts, folder: Path) -> None:
    """Check that the model has an embedding for every token, and that both sides agree about the vision pads.

    The embedding may have more rows than the tokenizer has tokens: published models are padded.

    Raises:
        UserError: a token has no embedding, a pad has another id than config.json says, or a token that marks the
            temporal patches of videos is missing.
    """
    vocabulary = tokenizer.get_vocab()
    num_embeddings = model.num_embeddings
    advice = "use the tokenizer that the model was saved with, or resize the model's embedding for the added tokens"
    if beyond := sorted((token_id, token) for token, token_id in vocabulary.items() if token_id >= num_embeddings):
        token_id, token = beyond[0]
        others = "" if len(beyond) == 1 else f" (nor do {len(beyond) - 1} more)"
        raise UserError(
            f"{folder}: token {token_id} of the tokenizer, {token!r}, has no embedding{others}: the model has "
            f"{num_embeddings} embeddings (vocab_size in config.json); {advice}"
        )
    for key, text, expected in (
        ("image_token_id", IMAGE_PAD, model.image_token_id),
        ("video_token_id", VIDEO_PAD, model.video_token_id),
    ):
        where = folder / "config.json"
        if expected >= num_embeddings:
            raise UserError(
                f"{where}: {key} is {expected}, but the model has only {num_embeddings} embeddings; set it to the id "
                f"of {text}"
            )
        if vocabulary.get(text, expected) != expected:
            raise UserError(
                f"{where}: {key} is {expected}, but {text} is token {vocabulary[text]} of the tokenizer; use the "
                "tokenizer that the model was saved with"
            )
    if model.media.timestamps_as_text and (missing := [token for token in VISION_TOKENS if token not in vocabulary]):
        raise UserError(f"{folder}: the tokenizer has no token {missing[0]}; use the one that the model was saved with")
