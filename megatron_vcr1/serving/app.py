"""The HTTP routes: they read requests, prepare prompts in threads, and wait for the batcher's responses."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.frame_rules import PixelOptions
from megatron_vcr1.data.messages import MessageError
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.serving.batching import Batcher, PendingPrompt, ServerStopping
from megatron_vcr1.serving.chat import RefusedRequest, StreamOptions, parse_request
from megatron_vcr1.serving.decoding import Decoders
from megatron_vcr1.serving.hosts import HostCheck
from megatron_vcr1.serving.media import MAX_FRAMES, request_files
from megatron_vcr1.serving.responses import (
    END_OF_STREAM,
    ChunkWriter,
    StreamedText,
    completion,
    cut_at_stop,
    error_body,
    event,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 20
MAX_BODIES_BYTES = 2 << 30
"""Maximum total size of the bodies that are being read or prepared."""

MAX_CHARACTERS_PER_TOKEN = 64
"""A text longer than this times the longest prompt is refused before it is tokenized. Text has about 4 characters per
token, and tokenizing takes time in proportion to the length."""

_DRAIN_S = 5.0
_GONE = 499  # the client has left; nobody reads this status


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on requests.

    Attributes:
        max_prompt_tokens: longest prompt, vision tokens included.
        max_new_tokens: longest response, and the limit of a request that sets none.
        prompts_per_batch: prompts in one call of the engine.
        files: the folder that holds all files that file:// URLs may name; None allows no file:// URLs.
        repetition_penalty: the penalty of a request that sets none.
    """

    max_prompt_tokens: int
    max_new_tokens: int
    prompts_per_batch: int
    files: Path | None
    repetition_penalty: float = 1.0

    @property
    def max_in_flight(self) -> int:
        """Chat requests that are being read, prepared or generated; further ones get 503."""
        return max(256, 8 * self.prompts_per_batch)


class _Overloaded(Exception):
    """The server has no room for another request at this time."""


class ChatApp:
    """The handlers of the routes. They run in the event loop; only `_prepare` and `_body` run in worker threads."""

    def __init__(self, name: str, processor: PromptProcessor, batcher: Batcher, limits: Limits) -> None:
        self._name = name
        self._processor = processor
        self._batcher = batcher
        self._limits = limits
        self._num_in_flight = 0
        self._bodies_bytes = 0
        # Bounds the memory and the cores that parsing and decoding use.
        num_slots = min(8, os.cpu_count() or 1)
        self._prepare_slots = anyio.CapacityLimiter(num_slots)
        self._decoders = Decoders(num_slots)

    def build(self, allowed_hosts: frozenset[str] | None) -> Starlette:
        """Return the ASGI application."""
        app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            ],
            middleware=[Middleware(HostCheck, allowed=allowed_hosts)],
            exception_handlers={HTTPException: _http_error},
        )
        app.router.redirect_slashes = False
        return app

    def close(self) -> None:
        """End the decoding processes."""
        self._decoders.close()

    async def health(self, request: Request) -> Response:
        """Report that the server is up."""
        return JSONResponse({})

    async def models(self, request: Request) -> Response:
        """List the served model."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "vcr1"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat_completions(self, request: Request) -> Response:
        """Answer a chat request, with the responses or with an error in OpenAI's format."""
        if self._num_in_flight >= self._limits.max_in_flight:
            return _overloaded(f"{self._num_in_flight} requests are in flight; try again later")
        self._num_in_flight += 1
        try:
            return await self._complete(request)
        except RefusedRequest as error:
            return _error(400, str(error))
        except HTTPException as error:
            return await _http_error(request, error)
        except _Overloaded as error:
            return _overloaded(str(error))
        except ServerStopping as error:
            return _error(503, str(error))
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except Exception as error:  # logged where it happened, in `_complete` or in the batcher
            return _error(500, f"{type(error).__name__}: {error}")
        finally:
            self._num_in_flight -= 1

    async def _complete(self, request: Request) -> Response:
        body = await self._read_body(request)
        num_bytes = len(body)
        try:
            pending, stream = await anyio.to_thread.run_sync(self._prepare, body, limiter=self._prepare_slots)
        except RefusedRequest:
            raise
        except Exception:  # a mistake in the code: the client gets 500, and the log says where
            logger.exception("a request could not be prepared")
            raise
        finally:
            self._bodies_bytes -= num_bytes
            del body
        if stream is not None:
            events = self._stream(pending, include_usage=stream.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._batcher.submit(pending)
        rollouts = asyncio.wrap_future(pending.result)
        left = asyncio.create_task(_wait_until_disconnected(request))
        try:
            futures: set[asyncio.Future[Any]] = {rollouts, left}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if not rollouts.done():
                raise ClientDisconnect
            group = rollouts.result()
        finally:
            left.cancel()
            rollouts.cancel()  # tells the batcher; without effect on a result that is there
        choices = [
            (self._text(rollout.token_ids, pending.params.stop), str(rollout.finish_reason))
            for rollout in group.rollouts
        ]
        new_tokens = sum(len(rollout.token_ids) for rollout in group.rollouts)
        return JSONResponse(completion(self._name, choices, len(pending.prompt.token_ids), new_tokens))

    async def _stream(self, pending: PendingPrompt, *, include_usage: bool) -> AsyncIterator[str]:
        """Yield the events of a streamed response. The iterator is closed early if the client leaves."""
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()  # (response, token); None after the last one

        # Called in the device's thread, and in that of the event loop if the result is cancelled.
        def put(item: tuple[int, int] | None) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, item)

        pending = replace(pending, on_token=lambda response, token_id: put((response, token_id)))
        pending.result.add_done_callback(lambda _: put(None))
        chunks = ChunkWriter(self._name)
        texts = [StreamedText(self._processor.decode, pending.params.stop) for _ in range(pending.num_responses)]
        self._num_in_flight += 1  # `chat_completions` counts the request only until it has returned this iterator
        try:
            self._batcher.submit(pending)
            for index in range(pending.num_responses):
                yield chunks.delta(index, {"role": "assistant", "content": ""})
            while (token := await tokens.get()) is not None:
                if piece := texts[token[0]].add(token[1]):
                    yield chunks.delta(token[0], {"content": piece})
            rollouts = pending.result.result().rollouts
            for index, rollout in enumerate(rollouts):
                if piece := texts[index].rest(self._text(rollout.token_ids, pending.params.stop)):
                    yield chunks.delta(index, {"content": piece})
                yield chunks.delta(index, {}, str(rollout.finish_reason))
            if include_usage:
                yield chunks.usage(len(pending.prompt.token_ids), sum(len(rollout.token_ids) for rollout in rollouts))
        except Exception as error:  # the status has been sent, so the error is an event
            if pending.result.cancel() or pending.result.exception() is not error:  # the batcher has logged its own
                logger.exception("a response could not be streamed")
            status = 503 if isinstance(error, ServerStopping) else 500
            yield event(error_body(f"{type(error).__name__}: {error}", status))
        finally:
            pending.result.cancel()  # without effect on a result that is there
            self._num_in_flight -= 1
        yield END_OF_STREAM

    async def _read_body(self, request: Request) -> bytes:
        """Read the body within the limits. Its length counts in `_bodies_bytes` until the caller subtracts it.

        Raises:
            HTTPException: the body is too large (413). The connection is closed: the rest of the body is not read.
            _Overloaded: other requests' bodies take up all the memory for them.
            ClientDisconnect: the client has left.
        """
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > MAX_BODY_BYTES:
            await _drain(request)
            raise _too_large()
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                self._bodies_bytes += len(chunk)
                if num_bytes > MAX_BODY_BYTES:  # a body that is sent in chunks declares no length
                    raise _too_large()
                if self._bodies_bytes > MAX_BODIES_BYTES:
                    raise _Overloaded("the bodies of the requests in flight are too large together; try again later")
                chunks.append(chunk)
        except BaseException:
            self._bodies_bytes -= num_bytes
            raise
        return b"".join(chunks)

    def _prepare(self, body: bytes) -> tuple[PendingPrompt, StreamOptions | None]:
        """Parse a request, decode its images and videos, and tokenize it. Runs in a worker thread.

        Returns:
            The prompt; and how to stream the response, None if it is not to be streamed.

        Raises:
            RefusedRequest: the request or one of its files is invalid.
        """
        request = parse_request(body)
        limits, processor = self._limits, self._processor
        max_characters = MAX_CHARACTERS_PER_TOKEN * limits.max_prompt_tokens
        if request.num_characters() > max_characters:
            raise RefusedRequest(
                f"the texts have {request.num_characters()} characters; at most {max_characters} are supported, "
                f"and {limits.max_prompt_tokens} tokens"
            )
        max_pixels = max(
            limits.max_prompt_tokens * processor.factor**2 * processor.temporal_patch_size,
            processor.frame_rules.most_pixels(MAX_FRAMES, PixelOptions()),  # the default options are always allowed
        )
        with request_files(limits.files, max_pixels) as files, self._decoders.borrow() as readers:
            try:
                params = request.sampling(limits.max_new_tokens, limits.repetition_penalty)
                messages = files.convert(request)
                prompt = encode_messages(messages, processor, max_vision_tokens=limits.max_prompt_tokens, **readers)
            except VideoError as error:
                raise RefusedRequest(files.explain(error)) from None
            except MessageError as error:
                raise RefusedRequest(str(error)) from None
        num_tokens = len(prompt.token_ids)
        if num_tokens > limits.max_prompt_tokens:
            raise RefusedRequest(
                f"the prompt has {num_tokens} tokens; at most {limits.max_prompt_tokens} are supported "
                "(--max-prompt-tokens)"
            )
        stream = request.stream_options if request.stream else None
        return PendingPrompt(prompt, params, request.n, request.seed), stream

    def _text(self, token_ids: Sequence[int], stop: Sequence[str]) -> str:
        """Decode a response and cut it before the first stop text."""
        text = cut_at_stop(self._processor.decode(token_ids), stop)
        with_special_tokens = self._processor.decode(token_ids, skip_special_tokens=False)
        before = cut_at_stop(with_special_tokens, stop)
        if len(before) < len(with_special_tokens):
            # A stop text may hold special tokens, which the text for the client leaves out.
            for token in self._processor.tokenizer.all_special_tokens:
                before = before.replace(token, "")
            text = min(text, before, key=len)
        return text


async def _wait_until_disconnected(request: Request) -> None:
    """Return when the client has left. The body must have been read to its end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _drain(request: Request) -> None:
    """Read and drop a body for a few seconds.

    A connection that is closed while the client still sends is reset, and the client may lose the response.
    """
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for _ in request.stream():
                pass
    except (TimeoutError, ClientDisconnect):
        pass


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(message, status), status, headers)


def _overloaded(message: str) -> Response:
    return _error(503, message, {"Retry-After": "1"})


def _too_large() -> HTTPException:
    message = f"the body is too large: at most {MAX_BODY_BYTES >> 20} MiB; name large files by file:// URLs (--files)"
    return HTTPException(413, message, {"Connection": "close"})


async def _http_error(request: Request, error: Any) -> Response:
    """Format the errors of starlette's router like every other error."""
    message = error.detail
    if error.status_code in (404, 405):
        path = request.url.path[:200]
        message = f"{request.method} {path}: use GET /v1/models, GET /health or POST /v1/chat/completions"
    return _error(error.status_code, message, dict(error.headers or {}))
