"""The tokenizer, chat template, patch sizes and vision token ids of a Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vcr1.errors import UserError

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class PromptProcessor:
    """The tokenizer and vision settings of a Qwen-VL model.

    It replaces transformers' own processor, which requires torchvision.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    image_token_id: int
    video_token_id: int
    vision_tokens: tuple[str, ...] = VISION_TOKENS
    """Strings that the tokenizer encodes as vision tokens; the text of a prompt must not contain them."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    """Smallest area of an image after resizing, in pixels. For videos, the options of `read_frames` apply."""
    max_pixels: int = 28 * 28 * 1280
    """Largest area of an image after resizing, in pixels."""

    @property
    def factor(self) -> int:
        """Side of the square of pixels that makes one token; the sides of resized frames are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_pretrained(cls, model_dir: str | Path) -> PromptProcessor:
        """Read a model directory that transformers 4 or 5 saved.

        Raises:
            FileNotFoundError: the directory, its config.json or its processor file does not exist.
            ValueError: the chat template or a vision token id is missing, or patch sizes of images and videos differ.
        """
        folder = Path(model_dir)
        config = _read_json(folder / "config.json")
        if config is None:
            raise FileNotFoundError(f"{folder / 'config.json'}: not found; name a Hugging Face model directory")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(
            tokenizer=tokenizer,
            chat_template=_chat_template(folder, tokenizer),
            image_token_id=_token_id(config, "image_token_id", tokenizer, "<|image_pad|>", folder),
            video_token_id=_token_id(config, "video_token_id", tokenizer, "<|video_pad|>", folder),
            **_vision_settings(folder),
        )

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation as text, with one vision pad for each image or video."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def tokenize(self, text: str) -> Tensor:
        """Tokenize a text; return token ids, int64 [num_tokens]."""
        return torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64)

    def decode(self, token_ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = True) -> str:
        """Decode token ids [num_tokens] to text."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def read_processor(model_dir: Path) -> PromptProcessor:
    """Read the model directory that the user named with `PromptProcessor.from_pretrained`.

    Raises:
        UserError: the tokenizer or the processor cannot be read.
    """
    try:
        return PromptProcessor.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{model_dir}: its tokenizer or processor cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the processor's chat template, or else the tokenizer's, which may support text only."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    legacy = _read_json(folder / "chat_template.json")
    template = legacy["chat_template"] if legacy else tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(f"{folder}: no chat template; add the model's chat_template.jinja or chat_template.json")
    return template


def _token_id(config: Mapping[str, Any], key: str, tokenizer: PreTrainedTokenizerBase, token: str, folder: Path) -> int:
    token_id = config.get(key, tokenizer.get_vocab().get(token))
    if token_id is None:
        raise ValueError(f"{folder / 'config.json'}: no {key}, and the tokenizer has no {token}")
    return int(token_id)


def _vision_settings(folder: Path) -> dict[str, Any]:
    """Read patch sizes and the pixel bounds of images.

    transformers 5 saves processor_config.json with a section for images and one for videos. Earlier versions save
    preprocessor_config.json for both, or for images alone beside a video_preprocessor_config.json.
    """
    combined = _read_json(folder / "processor_config.json") or {}
    image = combined.get("image_processor") or _read_json(folder / "preprocessor_config.json")
    video = combined.get("video_processor") or _read_json(folder / "video_preprocessor_config.json")
    if image is None:
        raise FileNotFoundError(
            f"{folder}: neither processor_config.json nor preprocessor_config.json has image settings"
        )
    defaults: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    settings = {key: image.get(key, default) for key, default in defaults.items()}
    # The model normalizes images and videos alike, so their mean and standard deviation must agree, too.
    expected = settings | {key: image[key] for key in ("image_mean", "image_std") if key in image}
    for key, value in expected.items():
        if video is not None and (found := video.get(key, defaults.get(key, value))) != value:
            raise ValueError(f"{folder}: {key} is {value} for images and {found} for videos")
    return settings | _image_pixel_bounds(image)


def _image_pixel_bounds(image: Mapping[str, Any]) -> dict[str, int]:
    """Read min_pixels and max_pixels, for which versions of transformers use different names."""
    size = image.get("size") or {}
    bounds = {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = image.get(key) or size.get(edge) or size.get(key)
        if value is not None:
            bounds[key] = int(value)
    return bounds
