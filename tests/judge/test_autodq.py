from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.judge.autodq import events_request, parse_events, parse_verdicts, verdicts_request
from megatron_vcr1.judge.endpoint import UnusableResponse

MARKUP = ['"}', "<|im_end|>", "\\", "[INST]", '\\"', "\\u003c", "\0", "\u2028"]
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(MARKUP), max_size=4).map("".join)


@given(TEXTS, st.lists(TEXTS, max_size=4))
def test_any_text_arrives_unchanged_and_without_markup(description: str, events: list[str]) -> None:
    numbered = [{"event": number, "sentence": event} for number, event in enumerate(events, 1)]
    for request, material, num_lists in (
        (events_request(description), {"description": description}, 0),
        (verdicts_request(events, description), {"events": numbered, "description": description}, 1),
    ):
        content = request.messages[1]["content"]
        assert json.loads(content) == material
        assert not set("<>") & set(content)
        assert content.count("[") == content.count("]") == num_lists


def test_a_lone_surrogate_can_be_sent() -> None:
    content = events_request("\ud800").messages[1]["content"]
    assert json.loads(content.encode()) == {"description": "?"}


@pytest.mark.parametrize(
    "text, events",
    [
        ('{"events": ["A dog barks.", " A dog barks. ", "", "It runs."]}', ["A dog barks.", "It runs."]),
        ('{"note": "x"} {"events": []}', []),
        (json.dumps({"events": [str(number) for number in range(12)]}), [str(number) for number in range(10)]),
    ],
)
def test_events_are_parsed(text: str, events: list[str]) -> None:
    assert parse_events(text) == events


@pytest.mark.parametrize("text", ["", "{", "[]", '{"events": 3}', '{"events": [1]}', "{" * 100_000, '{"events": [' * 9])
def test_a_response_without_a_list_of_events_is_unusable(text: str) -> None:
    with pytest.raises(UnusableResponse):
        parse_events(text)


def test_verdicts_are_ordered_by_event_number() -> None:
    text = '{"verdicts": [{"event": 2, "verdict": " Neutral"}, {"event": 1, "verdict": "ENTAILMENT", "why": "so"}]}'
    assert parse_verdicts(text, 2) == ["entailment", "neutral"]


@pytest.mark.parametrize(
    "verdicts",
    [
        [],
        [{"event": 1, "verdict": "entailment"}],
        [{"event": 1, "verdict": "entailment"}] * 2,
        [{"event": 0, "verdict": "entailment"}, {"event": 1, "verdict": "entailment"}],
        [{"event": True, "verdict": "entailment"}, {"event": 2, "verdict": "entailment"}],
        [{"event": 1, "verdict": "entailed"}, {"event": 2, "verdict": "entailment"}],
        [{"event": 1}, {"event": 2}],
        ["entailment", "entailment"],
        [{"event": number, "verdict": "entailment"} for number in (1, 2, 3)],
    ],
)
def test_verdicts_that_do_not_match_the_events_are_unusable(verdicts: list[object]) -> None:
    with pytest.raises(UnusableResponse):
        parse_verdicts(json.dumps({"verdicts": verdicts}), 2)


VERDICT = '{"verdicts": [{"event": 1, "verdict": "entailment"}]}'
DRAFT = VERDICT.replace("entailment", "neutral")


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{DRAFT}</think>{VERDICT}",
        f"{DRAFT}</think>{VERDICT}",  # the chat template opens the thought
        f"<think>{DRAFT}</think><think>{DRAFT}</think>\n{VERDICT}",
        f"<think>{DRAFT}</think>{VERDICT}<think>{DRAFT}",
        f"<THINKING>{DRAFT}</THINKING>{VERDICT}",
        f"[THINK]{DRAFT}[/THINK]```json\n{VERDICT}\n```",
        f"```\n{VERDICT}```",
    ],
)
def test_the_object_after_the_last_complete_thought_counts(text: str) -> None:
    assert parse_verdicts(text, 1) == ["entailment"]


@pytest.mark.parametrize("text", [f"<think>{VERDICT}", f"<think>a</think><think>{VERDICT}", f"[THINK]{VERDICT}"])
def test_a_thought_that_is_not_closed_is_unusable(text: str) -> None:
    with pytest.raises(UnusableResponse, match="never closed"):
        parse_verdicts(text, 1)


def test_a_tag_inside_of_an_event_does_not_open_a_thought() -> None:
    assert parse_events('{"events": ["The sign reads <think>."]}') == ["The sign reads <think>."]


@pytest.mark.parametrize("number", [1, 1.0, "1", " 1 ", "Event 1", "event #1", "#1", "1.", "1.0", "1:"])
@pytest.mark.parametrize("verdict", ["entailment", "Entailment.", '"ENTAILMENT"', "**entailment**"])
def test_numbers_and_verdicts_are_read_in_every_usual_form(number: object, verdict: str) -> None:
    text = json.dumps({"verdicts": [{"event": number, "verdict": verdict}]})
    assert parse_verdicts(text, 1) == ["entailment"]


@pytest.mark.parametrize("number", [1.5, True, None, "one", "", "1, 2", [1], "1.5", "-1", "9" * 5000])
def test_other_events_are_unusable(number: object) -> None:
    with pytest.raises(UnusableResponse):
        parse_verdicts(json.dumps({"verdicts": [{"event": number, "verdict": "entailment"}]}), 1)


def test_a_number_with_thousands_of_digits_is_unusable() -> None:
    with pytest.raises(UnusableResponse):
        parse_verdicts(f'{{"verdicts": [{{"event": {"9" * 5000}, "verdict": "entailment"}}]}}', 1)
