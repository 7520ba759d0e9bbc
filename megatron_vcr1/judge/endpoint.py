"""Client of an OpenAI-compatible endpoint that requests JSON responses, in parallel and with retries.

This is the only file that imports the `openai` package.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.errors import UserError

try:
    import openai
except ImportError as error:
    raise UserError("[judge] kind 'openai' needs the openai package: pip install 'openai>=2,<4'") from error

MIN_OUTAGE_FAILURES = 4
"""Smallest number of consecutive failures after which the server is considered down."""

log = logging.getLogger(__name__)


class UnusableResponse(ValueError):
    """The model responded, but not in the requested form."""


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """A request for a JSON response.

    Attributes:
        messages: chat messages in OpenAI's format.
        schema: JSON schema of the response, for endpoints that support constrained decoding.
        parse: function that parses the response's text. If it raises UnusableResponse, the request is sent again.
    """

    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any]
    parse: Callable[[str], Any]


class Endpoint:
    """An OpenAI-compatible server, and the requests that are sent to it.

    The `openai` client retries network errors and busy servers with exponential backoff and jitter. If a response is
    unusable, the request is sent again, at a temperature above 0 unless the settings leave the temperature out. A
    request that still fails has no result; the caller counts these. If as many requests in a row as run in parallel (at
    least 4) fail to reach the server, the server is considered down and the remaining requests are not sent.
    """

    def __init__(self, section: JudgeSection) -> None:
        self.model = section.model
        self._section = section
        # A local server needs no key, but the client requires one.
        api_key = os.environ.get(section.api_key_env) or "none"
        self._client = openai.OpenAI(
            base_url=section.base_url, api_key=api_key, timeout=section.timeout_s, max_retries=section.max_retries
        )
        self._has_responded = False  # from the first chat completion on, the settings are known to be right
        self._supports_schemas = True  # until the endpoint refuses a request because of its JSON schema
        # Guards _supports_schemas, which all threads of the pool may change, so that the change is logged only once.
        self._lock = threading.Lock()

    def send(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Any]]:
        """Send requests in parallel; yield the index and parsed response of each successful one as it completes.

        Raises:
            UserError: the endpoint refuses the key or does not know the model, so that no request can succeed.
        """
        outage = _Outage(max(self._section.concurrency, MIN_OUTAGE_FAILURES))
        pool = ThreadPoolExecutor(self._section.concurrency, thread_name_prefix="judge")
        try:
            futures = {pool.submit(self._send, request, outage): index for index, request in enumerate(requests)}
            for future in as_completed(futures):
                if (parsed := future.result()) is not None:
                    yield futures[future], parsed
        finally:
            # This runs also if the caller stops iterating or an error ends the run. Do not wait for running requests.
            pool.shutdown(wait=False, cancel_futures=True)
        outage.report(self._section.base_url)

    def _send(self, request: JudgeRequest, outage: _Outage) -> Any | None:
        """Send a request until its response can be parsed; return the parsed response, or None if it failed."""
        if outage.detected():
            return None
        for attempt in range(self._section.max_retries + 1):
            try:
                text = self._complete(request, temperature=0.7 if attempt else 0.0)
                parsed = request.parse(text)
            except UnusableResponse as error:
                outage.record_response(f"unusable response: {error}")
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                outage.record_failure(f"{type(error).__name__}: {error}")
                return None
            except openai.APIStatusError as error:
                self._raise_if_misconfigured(error)
                outage.record_response(f"refused: {error}")
                return None
            else:
                outage.record_response(None)
                return parsed
        return None

    def _complete(self, request: JudgeRequest, *, temperature: float) -> str:
        """Return the text of a completion. If the endpoint refuses JSON schemas, this and later requests have none."""
        if not self._supports_schemas:
            return self._request(request, temperature, openai.omit)
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": request.schema}}
        try:
            return self._request(request, temperature, schema)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            # If this fails too, the schema was not the cause: the error propagates and schemas stay enabled.
            text = self._request(request, temperature, openai.omit)
        with self._lock:
            if self._supports_schemas:
                log.info("judge: %s refuses JSON schemas; responses are not constrained", self._section.base_url)
            self._supports_schemas = False
        return text

    def _request(self, request: JudgeRequest, temperature: float, response_format: Any) -> str:
        """Request one chat completion and return its text.

        Raises:
            UnusableResponse: the response is not a chat completion, or has no text.
            openai.OpenAIError: the request failed.
        """
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=request.messages,  # type: ignore[arg-type]  # the client's annotations are TypedDicts
                temperature=temperature if self._section.send_temperature else openai.omit,
                response_format=response_format,
            )
            text = completion.choices[0].message.content
        # The client does not validate what the server sends.
        except (json.JSONDecodeError, openai.APIResponseValidationError, AttributeError, IndexError, TypeError):
            raise UnusableResponse("not a chat completion") from None
        if not isinstance(text, str):
            raise UnusableResponse("the completion has no text")
        self._has_responded = True
        return text

    def _raise_if_misconfigured(self, error: openai.APIStatusError) -> None:
        """Raise a UserError if the first response shows that the settings are wrong.

        After a good response the settings are known to be right, and the error is temporary: a failing proxy returns
        the same status codes.
        """
        if self._has_responded:
            return
        section = self._section
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            raise UserError(
                f"judge: {section.base_url} refuses the key; set the environment variable "
                f"{section.api_key_env}, or name another one in judge.api_key_env ({error})"
            ) from error
        if (
            isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
            and section.send_temperature
            and "temperature" in str(error).lower()
        ):
            raise UserError(
                f"judge: {section.base_url} refuses the temperature of the requests; set judge.send_temperature = "
                f"false ({error})"
            ) from error
        if isinstance(error, openai.NotFoundError):
            raise UserError(
                f"judge: {section.base_url} does not know the model {section.model}; correct judge.model or "
                f"judge.base_url ({error})"
            ) from error


class _Outage:
    """Counts consecutive failures to reach the server, over all threads, and keeps the reason of the last failure."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_failures = 0
        self._last_reason: str | None = None
        self._lock = threading.Lock()

    def detected(self) -> bool:
        """Return whether the server is considered down."""
        return self._num_failures >= self._limit

    def record_failure(self, reason: str) -> None:
        """Record that the server could not be reached."""
        with self._lock:
            self._num_failures += 1
            self._last_reason = reason

    def record_response(self, reason: str | None) -> None:
        """Record that the server responded. `reason` says why the response is unusable; None if it is usable."""
        with self._lock:
            self._num_failures = 0
            self._last_reason = reason or self._last_reason

    def report(self, base_url: str) -> None:
        """Log the last failure or unusable response, if there was one."""
        if self._last_reason is not None:
            down = "; the server is considered down" if self.detected() else ""
            log.warning("judge: %s: %s%s", base_url, self._last_reason, down)
