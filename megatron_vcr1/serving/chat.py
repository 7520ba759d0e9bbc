"""The requests of OpenAI's chat completions, as far as this server supports them.

Every key of a request is either followed, known to change nothing, or refused. A key is never ignored silently: an
evaluation would then measure something else than it asked for.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from megatron_vcr1.rollout.engine import SamplingParams

MAX_VISION_PARTS = 512
"""Images and videos in one request."""


class RefusedRequest(ValueError):
    """A request that the client has to change; the message says what is wrong."""


class _Object(BaseModel):
    """An object of a request. A null value means the same as leaving the key out, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class TextPart(_Object):
    """A text in a message."""

    type: Literal["text"]
    text: str


class Url(_Object):
    """The address of an image or a video."""

    url: str
    detail: Literal["auto", "high"] = "auto"
    """OpenAI's image detail. Images are always read at full resolution, so "low" is refused."""


def _check_url(value: Any) -> Any:
    """Explain the most common mistake: a bare string where OpenAI's format has an object."""
    if isinstance(value, dict):
        return value
    raise ValueError('must be an object with the key "url", for example {"url": "data:image/png;base64,..."}')


class VideoUrl(Url):
    """The address of a video, with the reading options that SGLang takes here."""

    fps: float | None = Field(default=None, gt=0, le=1000)
    max_frames: int | None = Field(default=None, ge=2)


UrlField = Annotated[Url, BeforeValidator(_check_url)]
VideoUrlField = Annotated[VideoUrl, BeforeValidator(_check_url)]


class ImagePart(_Object):
    """An image, optionally with bounds on its number of pixels after resizing."""

    type: Literal["image_url"]
    image_url: UrlField
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    modalities: Literal["image", "multi-images"] = "image"
    """A hint of SGLang's clients for other models; it changes nothing."""

    def options(self) -> dict[str, float]:
        """Return the options of an image part as `encode_messages` takes them."""
        return self.model_dump(exclude={"type", "image_url", "modalities"}, exclude_none=True)


class VideoPart(_Object):
    """A video, in the format of vLLM and SGLang, optionally with Qwen's reading options."""

    type: Literal["video_url"]
    video_url: VideoUrlField
    fps: float | None = Field(default=None, gt=0, le=1000)
    min_frames: int | None = Field(default=None, ge=2)
    max_frames: int | None = Field(default=None, ge=2)
    total_pixels: int | None = Field(default=None, ge=1)
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)

    def options(self) -> dict[str, float]:
        """Return the options of a video part as `encode_messages` takes them; they override those beside its URL."""
        options = self.video_url.model_dump(exclude={"url", "detail"}, exclude_none=True)
        options |= self.model_dump(exclude={"type", "video_url"}, exclude_none=True)
        return options | _frame_limits(self.min_frames, options.get("max_frames"))


_PART_TYPES = ("text", "image_url", "video_url")


def _check_part(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must be an object, for example {"type": "text", "text": "..."}')
    if value.get("type") not in _PART_TYPES:
        shown = repr(value.get("type"))[:80]
        raise ValueError(f"type {shown} is not supported; use 'text', 'image_url' or 'video_url'")
    return value


def _check_content(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a text or a list of parts")
    return value


# Tags of unions appear in pydantic's error locations; `_location` removes those in angle brackets.
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")],
    Discriminator(lambda part: f"<{part['type']}>"),
    BeforeValidator(_check_part),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(lambda content: "<string>" if isinstance(content, str) else "<parts>"),
    BeforeValidator(_check_content),
]


class Message(_Object):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless_keys(cls, value: Any) -> Any:
        """Drop the participant's name, and the empty lists that OpenAI's client writes into assistant messages."""
        if not isinstance(value, dict):
            return value
        empty = ("tool_calls", "annotations")
        return {key: item for key, item in value.items() if key != "name" and not (key in empty and item == [])}


class VideoReading(_Object):
    """vLLM's ``media_io_kwargs.video``: frames per second and the largest number of frames, for all videos."""

    fps: float | None = Field(default=None, gt=0, le=1000)
    num_frames: int | None = Field(default=None, ge=2)

    def options(self) -> dict[str, float]:
        """Return the options of a video part as `encode_messages` takes them."""
        options: dict[str, float] = {} if self.fps is None else {"fps": self.fps}
        return options | _frame_limits(None, self.num_frames)


class MediaReading(_Object):
    """vLLM's ``media_io_kwargs``."""

    video: VideoReading = VideoReading()


def _frame_limits(min_frames: int | None, max_frames: int | None) -> dict[str, float]:
    """Complete a frame limit: a maximum below the default minimum of 4 frames lowers the minimum too."""
    if min_frames is not None and max_frames is not None and min_frames > max_frames:
        raise RefusedRequest(f"min_frames {min_frames} is above max_frames {max_frames}")
    if max_frames is None:
        return {}
    return {"max_frames": max_frames, "min_frames": min(4, max_frames) if min_frames is None else min_frames}


_HARMLESS = frozenset(
    {
        "model",  # the server has one model, whatever name the client uses
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "priority",
        "request_id",
        "return_flat_raw_top_logprobs_b64",
        "rid",
    }
)
"""Keys that change nothing in the response of this server, whatever their value."""

_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "do_sample": (True,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "routed_experts_start_len": (0,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "stream_reasoning": (True,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_audio_in_video": (False,),
    "use_beam_search": (False,),
}
"""Known keys of OpenAI, SGLang and vLLM that this server does not follow, with the values that change nothing."""


class StreamOptions(_Object):
    """OpenAI's options of a streamed response."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False
    """Random padding of the events against eavesdroppers; this server never writes it."""


class ChatRequest(_Object):
    """The body of a request."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    n: int = Field(default=1, ge=1, le=128)
    seed: int = Field(default_factory=lambda: secrets.randbits(64))
    """Seed of the sampling; a request without one gets a different seed each time."""
    stop: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=64)]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    media_io_kwargs: MediaReading = MediaReading()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported_keys(cls, body: Any) -> Any:
        """Drop the keys that change nothing, and name a key that would change the response and is not supported."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        kept = {}
        for key, value in body.items():
            if value is None or key in _HARMLESS:
                continue
            if key.startswith("return_") and value is False:
                continue  # asks SGLang and vLLM to leave something out that this server never returns
            if key not in _NEUTRAL:
                kept[key] = value  # a field of this class, or an unknown key, which pydantic refuses
            elif value not in _NEUTRAL[key]:
                raise ValueError(f"{key}: this value is not supported here; leave the key out")
        return kept

    @model_validator(mode="after")
    def _limit_vision_parts(self) -> ChatRequest:
        count = sum(isinstance(part, ImagePart | VideoPart) for part in self.parts())
        if count > MAX_VISION_PARTS:
            raise ValueError(f"messages: {count} images and videos; at most {MAX_VISION_PARTS} are supported")
        return self

    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        """Return the parts of all messages, without contents that are strings."""
        return [part for message in self.messages if not isinstance(message.content, str) for part in message.content]

    def num_characters(self) -> int:
        """Return the length of all texts of the conversation."""
        strings = sum(len(message.content) for message in self.messages if isinstance(message.content, str))
        return strings + sum(len(part.text) for part in self.parts() if isinstance(part, TextPart))

    def sampling(self, max_new_tokens: int, repetition_penalty: float) -> SamplingParams:
        """Return the sampling parameters of the responses.

        Args:
            max_new_tokens: the server's limit, which also applies to a request without a limit.
            repetition_penalty: the penalty of a request that sets none.

        Raises:
            RefusedRequest: a value is out of the engine's range.
        """
        requested = self.max_completion_tokens or self.max_tokens or max_new_tokens
        top_k = max(self.top_k, 0)  # SGLang and vLLM write -1 for all tokens
        penalty = self.repetition_penalty or repetition_penalty
        try:
            return SamplingParams(
                min(requested, max_new_tokens), self.temperature, self.top_p, top_k, self.stop_texts, penalty
            )
        except ValueError as error:  # its check of the values
            raise RefusedRequest(str(error)) from None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a response."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def parse_request(body: bytes) -> ChatRequest:
    """Parse and validate the body of a request.

    Deep nesting and very long numbers are safe: pydantic's JSON parser limits both.

    Raises:
        RefusedRequest: the body is not a valid request; the message names the key.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        where, reason = _location(detail["loc"]), detail["msg"]
        if detail["type"] == "extra_forbidden":
            reason = "unknown key; this server would not follow it"
        elif detail["type"] == "value_error":
            reason = str(detail["ctx"]["error"])
        raise RefusedRequest(f"{where}: {reason}" if where else reason) from None


def _location(loc: Sequence[int | str]) -> str:
    """Write pydantic's error location as a path: messages[0].content[1].image_url.url."""
    path = ""
    for item in loc:
        if isinstance(item, int):
            path += f"[{item}]"
        elif not item.startswith("<"):
            path += f".{item[:80]}" if path else item[:80]
    return path
