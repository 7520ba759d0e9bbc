"""Reading of the chosen option in an answer to a multiple-choice question. Rewards and metrics share this reader."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vcr1.rewards.parsing import UnparsableError, with_ascii_forms
from megatron_vcr1.types import OPTION_LETTERS

_ENDS = " .,;:!?*`'\"()[]{}“”‘’。、"  # noqa: RUF001 - punctuation around an option's text
# Latin letters and digits. Scripts without spaces between words, such as Chinese, may touch an option letter.
_WORD = r"0-9A-Za-z\u00c0-\u024f"
_ANY_LETTER = f"[{OPTION_LETTERS}{OPTION_LETTERS.lower()}]"
# Words after "A" that show that it is an option and not an article.
_AFTER_OPTION = r"(?:is|was|or|and|because|since|as|but|not)\b"
_LONE_LETTER = re.compile(
    rf"(?<![{_WORD}])(?<![{_WORD}]['’.-]){_ANY_LETTER}(?![{_WORD}])"  # noqa: RUF001
    rf"(?!['’-][{_WORD}])(?!\.[A-Za-z](?![{_WORD}]))"  # noqa: RUF001 - not within a word: vitamin-C, e.g., D.C.
    rf"(?!(?<=[Aa])[^\S\n]++(?!{_AFTER_OPTION})[{_WORD}])"  # not an article: A dog
)
_DECLARATION = r"\b(?:answer|答案)[^.\n]{0,40}?(?:\b(?:is|be)\b|[:=]|是|为)"
_BEFORE_DECLARED = re.compile(
    rf"(?:{_DECLARATION}(?:\W|\b(?:option|choice)\b){{0,20}}+|\bboxed\W{{0,20}}+)(?={_ANY_LETTER}(?![{_WORD}]))",
    re.IGNORECASE,
)
_BEFORE_REJECTED = re.compile(
    r"(?:\bnot|n't|\brather than|\binstead of)\W{1,20}+(?:(?:be|option)\W{1,20}+)?", re.IGNORECASE
)
_AFTER_REJECTED = re.compile(r"\W{0,5}+(?:(?:is|was) (?:wrong|incorrect|false|not)\b|isn't\b)", re.IGNORECASE)
_DECLARATION_AT_START = re.compile(rf"(?:the\s+)?(?:\w+\s+)?{_DECLARATION}", re.IGNORECASE)
_LABEL_AT_START = re.compile(rf"\W*({_ANY_LETTER})(?![{_WORD}])")
_AFTER_LABEL = re.compile(rf"[.):\]]\W*[{_WORD}]")
_LIST_SEPARATORS = re.compile(r"(?:\W|\b(?:or|and)\b)*+", re.IGNORECASE)


def parse_choice(answer: str, options: Sequence[str]) -> str:
    """Return the letter of the option that an answer chooses.

    An option is chosen by its letter, in either case or in full-width form, or by its own text. A letter counts if it
    stands alone, as in "B", "(B) a cat" and "Answer: B"; letters within words and the article "A" do not. An answer
    that names several options chooses none, unless it declares one of them ("the answer is B") or begins with the
    label of one ("B. She takes vitamin C").

    Args:
        answer: the answer, without tags.
        options: texts of the options in the order of their letters.

    Raises:
        UnparsableError: the answer names no option, or several.
    """
    text = with_ascii_forms(answer).strip()
    letters = OPTION_LETTERS[: len(options)]
    return _choice_by_text(text, options, letters) or _choice_by_letter(_without_own_text(text, options), letters)


def _choice_by_text(text: str, options: Sequence[str], letters: str) -> str | None:
    """Return the letter of the option whose text is the whole answer, with or without its label; None otherwise."""
    if len(_plain(text)) == 1 and _plain(text).upper() in letters:
        return None  # a letter is a label, even if an option has the same text
    declaration = _DECLARATION_AT_START.match(text)
    for body in (text, text[declaration.end() :] if declaration else ""):
        chosen = [letter for letter, option in zip(letters, options, strict=True) if _plain(option) == _plain(body)]
        if len(chosen) == 1 and _plain(body):
            return chosen[0]
        label = _LABEL_AT_START.match(body)
        if label and (letter := label[1].upper()) in letters:
            own_text = _plain(options[letters.index(letter)])
            if own_text and own_text == _plain(body[label.end() :]):
                return letter
    return None


def _without_own_text(text: str, options: Sequence[str]) -> str:
    """Remove the option's text after its label at the start: its letters, as in "(B) vitamin C", choose no option."""
    label = _LABEL_AT_START.match(text)
    index = OPTION_LETTERS.index(label[1].upper()) if label else len(options)
    if label is None or index >= len(options):
        return text
    own_text = re.escape(with_ascii_forms(options[index]).strip(_ENDS))
    stated = re.compile(rf"\W*{own_text}", re.IGNORECASE).match(text, label.end())
    return text[: label.end()] + text[stated.end() :] if stated else text


def _choice_by_letter(text: str, letters: str) -> str:
    """Return the only letter that stands alone, or the one among several that is declared or begins the answer."""
    rejected = {match.end() for match in _BEFORE_REJECTED.finditer(text)}
    found = [
        match
        for match in _LONE_LETTER.finditer(text)
        if match[0].upper() in letters
        and match.start() not in rejected
        and not _AFTER_REJECTED.match(text, match.end())
    ]
    named = {match[0].upper() for match in found}
    if not named:
        raise UnparsableError("no option letter")
    if len(named) == 1:
        return named.pop()
    before_declared = {match.end() for match in _BEFORE_DECLARED.finditer(text)}
    preferred = [match for match in found if match.start() in before_declared]
    if not preferred and _LABEL_AT_START.match(text):
        labels = [match for match in found if _AFTER_LABEL.match(text, match.end())]
        preferred = labels if labels[:1] == found[:1] else []
    chosen = {match[0].upper() for match in preferred}
    if len(chosen) != 1 or any(_is_listed(text, found, match) for match in preferred):
        raise UnparsableError("several options")
    return chosen.pop()


def _is_listed(text: str, found: Sequence[re.Match[str]], letter: re.Match[str]) -> bool:
    """Return whether another letter follows in a list such as "A or B"."""
    following = next((match for match in found if match.start() > letter.start()), None)
    return (
        following is not None
        and following[0].upper() != letter[0].upper()
        and _LIST_SEPARATORS.fullmatch(text, letter.end(), following.start()) is not None
    )


def _plain(text: str) -> str:
    """Return a text for comparison: lower case, single spaces, and no punctuation around it."""
    return " ".join(with_ascii_forms(text).casefold().split()).strip(_ENDS)
