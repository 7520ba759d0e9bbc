"""Control tokens in the texts of users, for example `<|im_end|>`: they are encoded as text.

A chat template renders a conversation as one text, in which its own control tokens and those that a user wrote look
alike. Before rendering, the occurrences in user texts are therefore marked: a character that occurs nowhere else is
inserted after their first character. After rendering, only the template's control tokens match. The text between them
is encoded by a tokenizer without control tokens, after the marks have been removed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vcr1.data.messages import MessageError

_PRIVATE_USE = range(0xF0000, 0x10FFFE)
"""Code points that Unicode leaves to applications; texts hardly ever contain one."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the placeholders of images and videos."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vision_tokens: Sequence[str]) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        vocabulary = tokenizer.get_vocab()
        self._ids = {token: vocabulary[token] for token in {*special, *vision_tokens} if token in vocabulary}
        # Longest first, so that no token hides a longer one that begins with it.
        alternatives = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True)))
        self._split = re.compile(f"({alternatives})")
        # A lookahead also finds occurrences that overlap.
        self._starts = re.compile(f"(?={alternatives})")
        self._tokenizer = tokenizer

    def occur_in(self, text: str) -> bool:
        """Return whether a text contains a control token."""
        return bool(self._ids) and self._starts.search(text) is not None

    def encode_as_text(self, text: str) -> list[int]:
        """Return the token ids of a text; its control tokens are encoded as text."""
        token_ids: list[int] = self._text_tokenizer.encode(text).ids
        return token_ids

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """Mark the control tokens in the texts of a conversation.

        Returns:
            The conversation, and the mark for `encode_rendered`; None if no text contains a control token.

        Raises:
            MessageError: the texts contain every private-use character.
        """
        texts = list(_all_texts(messages))
        if not any(map(self.occur_in, texts)):
            return [dict(message) for message in messages], None
        used = {ord(character) for text in texts for character in text}
        mark = next((code for code in _PRIVATE_USE if code not in used), None)
        if mark is None:
            raise MessageError("the text contains all private-use characters of Unicode; shorten it")
        return [self._mark_message(message, chr(mark)) for message in messages], chr(mark)

    def encode_rendered(self, text: str, mark: str) -> list[int]:
        """Return the token ids of a rendered conversation whose texts were marked by `mark`."""
        token_ids: list[int] = []
        for piece in self._split.split(text):
            if piece in self._ids:
                token_ids.append(self._ids[piece])
            else:
                token_ids += self._text_tokenizer.encode(piece.replace(mark, ""), add_special_tokens=False).ids
        return token_ids

    @cached_property
    def _text_tokenizer(self) -> Any:
        """A copy of the tokenizer that encodes control tokens as text.

        `tokenizer(..., split_special_tokens=True)` changes the tokenizer itself, which other threads may be using. The
        copy is made when the first text needs it: a vocabulary takes about 100 MB.
        """
        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)  # type: ignore[attr-defined]
        backend.add_special_tokens(list(self._ids))
        backend.encode_special_tokens = True
        return backend

    def _mark_message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        marked = {key: self._mark_value(value, mark) for key, value in message.items() if key != "content"}
        content = message["content"]
        if isinstance(content, str):
            return {**marked, "content": self._mark_texts([content], mark)[0]}
        parts: list[Any] = []
        for is_text, run in groupby(content, key=_is_text):
            run_parts = list(run)
            if is_text:
                texts = self._mark_texts([part["text"] for part in run_parts], mark)
                run_parts = [{**part, "text": text} for part, text in zip(run_parts, texts, strict=True)]
            parts += run_parts
        return {**marked, "content": parts}

    def _mark_value(self, value: Any, mark: str) -> Any:
        """Mark the texts of other keys, which a chat template may render: the role, a name, tool calls."""
        if isinstance(value, str):
            return self._mark_texts([value], mark)[0]
        if isinstance(value, Mapping):
            return {key: self._mark_value(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark_value(item, mark) for item in value]
        return value

    def _mark_texts(self, texts: Sequence[str], mark: str) -> list[str]:
        """Mark texts that follow each other without anything between them: a control token may span several."""
        starts = [match.start() for match in self._starts.finditer("".join(texts))]
        marked, offset = [], 0
        for text in texts:
            cuts = [start + 1 - offset for start in starts if 0 <= start - offset < len(text)]
            pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            marked.append(mark.join(pieces))
            offset += len(text)
        return marked


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _all_texts(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield every text of a conversation; text parts without another part between them are joined."""
    for message in messages:
        for key, value in message.items():
            if key == "content" and not isinstance(value, str):
                for is_text, run in groupby(value, key=_is_text):
                    if is_text:
                        yield "".join(part["text"] for part in run)
            else:
                yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
