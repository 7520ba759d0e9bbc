"""The responses to chat completions in OpenAI's format: whole ones, streamed ones, and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

END_OF_STREAM = "data: [DONE]\n\n"
_CONTEXT_TOKENS = 8
"""Tokens before a new one that are decoded together with it: a tokenizer may write a space between two tokens."""


def completion(model: str, choices: Sequence[tuple[str, str]], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Return the body of a response.

    Args:
        model: the served name of the model.
        choices: text and finish reason of each sampled response.
        prompt_tokens: number of tokens of the prompt.
        new_tokens: number of sampled tokens of all choices, stop texts included.
    """
    return {
        **_header(model, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": reason,
                "logprobs": None,
            }
            for index, (text, reason) in enumerate(choices)
        ],
        "usage": _usage(prompt_tokens, new_tokens),
    }


class ChunkWriter:
    """Writes the chunks of a streamed response as server-sent events."""

    def __init__(self, model: str) -> None:
        self._header = _header(model, "chat.completion.chunk")

    def delta(self, index: int, delta: Mapping[str, str], finish_reason: str | None = None) -> str:
        """Return the event with a part of one choice's message."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**self._header, "choices": [choice], "usage": None})

    def usage(self, prompt_tokens: int, new_tokens: int) -> str:
        """Return the event with the numbers of tokens, as in `completion`."""
        return event({**self._header, "choices": [], "usage": _usage(prompt_tokens, new_tokens)})


def event(body: Mapping[str, Any]) -> str:
    """Return a server-sent event with a JSON object."""
    return f"data: {json.dumps(body)}\n\n"


class StreamedText:
    """The text of a response while its tokens arrive, in pieces that never have to be taken back.

    A piece ends before an incomplete character, and before what may be the beginning of a stop text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = stop
        self._tokens: list[int] = []  # the context: the latest tokens, of which the last may be incomplete
        self._context = ""  # text of the context
        self._held = ""  # text that has not been returned
        self._has_stopped = False  # a stop text was found
        self._num_returned = 0

    def add(self, token_id: int) -> str:
        """Add the next token; return the piece of text that is complete now, which may be empty."""
        self._tokens.append(token_id)
        text = self._held + self._complete_text()[len(self._context) :]
        self._held = "" if self._has_stopped else cut_at_stop(text, self._stop)
        self._has_stopped |= len(self._held) < len(text)
        self._tokens = self._tokens[-_CONTEXT_TOKENS:]
        self._context = self._complete_text()
        piece = self._held[: len(self._held) - self._length_of_stop_prefix()]
        self._held = self._held[len(piece) :]
        self._num_returned += len(piece)
        return piece

    def _complete_text(self) -> str:
        """Decode the tokens without the last character if it is incomplete."""
        return self._decode(self._tokens).removesuffix("\ufffd")

    def rest(self, text: str) -> str:
        """Return what is left of the response's whole text."""
        return text[self._num_returned :]

    def _length_of_stop_prefix(self) -> int:
        """Return the length of the longest end of the held text with which a stop text begins."""
        lengths = (
            length
            for text in self._stop
            for length in range(1, min(len(text), len(self._held) + 1))
            if self._held.endswith(text[:length])
        )
        return max(lengths, default=0)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first occurrence of any stop text; the whole text if there is none."""
    found = [position for position in map(text.find, stop) if position >= 0]
    return text[: min(found)] if found else text


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return the body of an error response in OpenAI's format."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _header(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
