"""Texts that are cut at stop texts, and texts that are streamed token by token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_vcr1.serving.responses import StreamedText, cut_at_stop


@pytest.mark.parametrize(
    "stop, expected",
    [((), "a b c b"), (("b",), "a "), (("c", "b c"), "a "), (("x",), "a b c b"), (("a",), "")],
)
def test_a_text_is_cut_at_the_first_stop(stop: tuple[str, ...], expected: str) -> None:
    assert cut_at_stop("a b c b", stop) == expected


def decode_bytes(token_ids: Sequence[int]) -> str:
    """Decode tokens of one byte each."""
    return bytes(token_ids).decode(errors="replace")


def decode_words(token_ids: Sequence[int]) -> str:
    """Decode tokens of one character each, with spaces between them; token 0 is a special token without a text."""
    return " ".join(chr(token) for token in token_ids if token)


def stream(text: StreamedText, token_ids: Sequence[int]) -> list[str]:
    return [text.add(token) for token in token_ids]


def test_every_token_is_returned_at_once() -> None:
    assert stream(StreamedText(decode_words, ()), b"abc") == ["a", " b", " c"]
    euro = "\u20ac".encode()  # three bytes
    assert stream(StreamedText(decode_bytes, ()), b"a" + euro + b"b") == ["a", "", "", "\u20ac", "b"]


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    text = StreamedText(decode_bytes, ("bcd", "xy"))
    assert stream(text, b"abbcxcbcd") == ["a", "", "b", "", "bc", "xc", "", "", ""]
    assert text.rest("abbcxc") == ""
    text = StreamedText(decode_bytes, ("bcd",))
    assert stream(text, b"abc") == ["a", "", ""]
    assert text.rest("abc") == "bc"  # the response ends without the stop text


@pytest.mark.parametrize("decode", [decode_bytes, decode_words])
def test_the_pieces_are_the_whole_text(decode: Any) -> None:
    rng = random.Random(0)
    for _ in range(300):
        token_ids = [rng.choice([*b"abc ", 0, *"\u00e9\U0001f600".encode()]) for _ in range(rng.randrange(1, 20))]
        stop = tuple("".join(rng.choices("abc ", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3)))
        text = StreamedText(decode, stop)
        pieces = "".join(stream(text, token_ids))
        whole = cut_at_stop(decode(token_ids), stop)
        assert pieces + text.rest(whole) == whole
