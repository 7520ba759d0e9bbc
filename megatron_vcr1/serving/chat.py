"""OpenAI's chat completions, as far as they are served: what a request may say, and what an answer looks like."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_vcr1.rollout.engine import SamplingParams


class RefusedRequest(ValueError):
    """The client's request is at fault, and the message says how."""


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Url(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(BaseModel):
    """As SGLang and vLLM take it."""

    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class VideoReading(BaseModel):
    """What of vLLM's ``media_io_kwargs.video`` is followed: frames a second, and the most frames."""

    fps: float | None = Field(default=None, gt=0)
    num_frames: int | None = Field(default=None, ge=2)

    def options(self) -> dict[str, float]:
        """As options of a video part, see `encode_messages`."""
        options: dict[str, float] = {}
        if self.fps is not None:
            options["fps"] = self.fps
        if self.num_frames is not None:
            options |= {"max_frames": self.num_frames, "min_frames": min(4, self.num_frames)}
        return options


class MediaReading(BaseModel):
    video: VideoReading = VideoReading()


_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "stream": (False,),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
"""Keys of OpenAI's, SGLang's and vLLM's that would change an answer and are not followed here, and the values with
which they change nothing."""


class ChatRequest(BaseModel):
    """The body of a request. Keys that change nothing here (user, metadata ...) may be there too."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    n: int = Field(default=1, ge=1, le=128)
    seed: int = Field(default_factory=lambda: secrets.randbits(64))
    """Of a request that names none, another one each time."""
    stop: str | list[str] | None = None
    media_io_kwargs: MediaReading = MediaReading()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """OpenAI's optional keys may be null, which is what leaving them out means."""
        if not isinstance(body, dict):
            return body
        for key, neutral in _NEUTRAL.items():
            if body.get(key) is not None and body[key] not in neutral:
                raise ValueError(f"{key} is not served here")
        return {key: value for key, value in body.items() if value is not None}

    def sampling(self, max_new_tokens: int, repetition_penalty: float) -> SamplingParams:
        """How to draw the answer.

        Args:
            max_new_tokens: for a request that names no limit, and the most that one may name.
            repetition_penalty: for a request that names none.
        """
        wanted = self.max_completion_tokens or self.max_tokens or max_new_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        top_k = max(self.top_k, 0)  # -1 is all, for SGLang and vLLM
        penalty = self.repetition_penalty or repetition_penalty
        return SamplingParams(min(wanted, max_new_tokens), self.temperature, self.top_p, top_k, stop, penalty)


def parse_request(body: bytes) -> ChatRequest:
    """Raises RefusedRequest for anything that is no request, with the key at fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise RefusedRequest(f"{where}: {detail['msg']}" if where else detail["msg"]) from None


def completion(model: str, choices: Sequence[tuple[str, str]], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The answer's body.

    Args:
        choices: text and finish reason of each response.
    """
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": reason,
                "logprobs": None,
            }
            for index, (text, reason) in enumerate(choices)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }


def error_body(message: str, kind: str) -> Mapping[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
