"""The one door to the `openai` client: questions with JSON answers, many at once, to an endpoint that may fail."""

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
    raise UserError("[judge] kind 'openai' needs the client: pip install 'openai>=2,<4'") from error

LEAST_FAILURES_OF_AN_OUTAGE = 4

log = logging.getLogger(__name__)


class UnusableAnswer(ValueError):
    """The model answered, but not in the form that was asked for."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request.

    Attributes:
        messages: OpenAI's chat messages.
        schema: JSON schema of the answer, for endpoints that can hold a model to one.
        parse: what makes something of the answer's text; raises UnusableAnswer, and the model is asked again.
    """

    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any]
    parse: Callable[[str], Any]


class Endpoint:
    """An OpenAI-compatible server.

    The client tries again, with growing and jittered pauses, what the network or a busy server spoilt; an unusable
    answer is asked for again at a temperature above 0. What still fails then is given up, and counted by the caller.
    Once as many requests in a row as run at a time have found no server, the remaining ones are not sent.
    """

    def __init__(self, section: JudgeSection) -> None:
        self.model = section.model
        self._section = section
        # A server of one's own asks for no key, but the client insists on one.
        api_key = os.environ.get(section.api_key_env) or "none"
        self._client = openai.OpenAI(
            base_url=section.base_url, api_key=api_key, timeout=section.timeout_s, max_retries=section.max_retries
        )
        self._has_answered = False
        self._constrained = True  # until the endpoint turns out not to know JSON schemas
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Any]]:
        """The index and the parsed answer of each question that was answered, as they come.

        Raises:
            UserError: the endpoint refuses the key or does not know the model: no request can succeed.
        """
        outage = _Outage(max(self._section.concurrency, LEAST_FAILURES_OF_AN_OUTAGE))
        pool = ThreadPoolExecutor(self._section.concurrency, thread_name_prefix="judge")
        try:
            futures = {pool.submit(self._answer, question, outage): index for index, question in enumerate(questions)}
            for future in as_completed(futures):
                if (answer := future.result()) is not None:
                    yield futures[future], answer
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        outage.report(self._section.base_url)

    def _answer(self, question: Question, outage: _Outage) -> Any | None:
        if outage.is_on():
            return None
        for attempt in range(self._section.max_retries + 1):
            try:
                text = self._complete(question, temperature=0.7 if attempt else 0.0)
                answer = question.parse(text)
            except UnusableAnswer as error:
                outage.note_answer(f"unusable answer: {error}")
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                outage.note_silence(f"{type(error).__name__}: {error}")
                return None
            except openai.APIStatusError as error:
                self._raise_if_hopeless(error)
                outage.note_answer(f"refused: {error}")
                return None
            else:
                outage.note_answer(None)
                return answer
        return None

    def _complete(self, question: Question, *, temperature: float) -> str:
        """The text of one completion; without a schema where the endpoint refuses the first request for having one."""
        if not self._constrained:
            return self._request(question, temperature, openai.omit)
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": question.schema}}
        try:
            return self._request(question, temperature, schema)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            text = self._request(question, temperature, openai.omit)
        with self._lock:
            if self._constrained:
                log.info("judge: %s refuses JSON schemas; answers are read as they come", self._section.base_url)
            self._constrained = False
        return text

    def _request(self, question: Question, temperature: float, response_format: Any) -> str:
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=question.messages,  # type: ignore[arg-type]  # TypedDicts, for the client
                temperature=temperature,
                response_format=response_format,
            )
            text = completion.choices[0].message.content
        # The client does not check what it was sent.
        except (json.JSONDecodeError, openai.APIResponseValidationError, AttributeError, IndexError, TypeError):
            raise UnusableAnswer("not a chat completion") from None
        if not isinstance(text, str):
            raise UnusableAnswer("a completion without text")
        self._has_answered = True
        return text

    def _raise_if_hopeless(self, error: openai.APIStatusError) -> None:
        """Settings that are wrong show in the first answer; later, a proxy in trouble says the same things."""
        if self._has_answered:
            return
        section = self._section
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            raise UserError(
                f"judge: {section.base_url} refuses the key; put it into the environment variable "
                f"{section.api_key_env}, or name another under judge.api_key_env ({error})"
            ) from error
        if isinstance(error, openai.NotFoundError):
            raise UserError(
                f"judge: {section.base_url} knows no model {section.model}; correct judge.model or judge.base_url "
                f"({error})"
            ) from error


class _Outage:
    """Failures in a row, over all threads, and the last one's reason."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_silent = 0
        self._last_reason: str | None = None
        self._lock = threading.Lock()

    def is_on(self) -> bool:
        return self._num_silent >= self._limit

    def note_silence(self, reason: str) -> None:
        with self._lock:
            self._num_silent += 1
            self._last_reason = reason

    def note_answer(self, reason: str | None) -> None:
        with self._lock:
            self._num_silent = 0
            self._last_reason = reason or self._last_reason

    def report(self, base_url: str) -> None:
        if self._last_reason is not None:
            gave_up = "; it is taken to be down" if self.is_on() else ""
            log.warning("judge: %s: %s%s", base_url, self._last_reason, gave_up)
