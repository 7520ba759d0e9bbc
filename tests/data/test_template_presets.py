"""The form of prompts for published checkpoints: order, options, queries and numbers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_vcr1.data.templates import PRESETS, build_messages, load_templates, normalized_query, template_file
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import GroundingTarget, TrackingTarget, find_task, task_names
from megatron_vcr1.types import Box, Interval
from tests.data.prompt_samples import sample

START = Box(0.093, 0.0, 0.8, 1.0)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    return tmp_path / "own.toml"


def kinds(messages: list[dict]) -> list[str]:
    return [part["type"] for part in messages[0]["content"]]


def prompt(name: str, task: str, thinking: bool = False, **changes: object) -> str:
    return load_templates(name).text_of(sample(task, **changes), thinking=thinking)


@pytest.mark.parametrize("task", task_names())
@pytest.mark.parametrize("thinking", [False, True])
def test_the_text_comes_first(task: str, thinking: bool) -> None:
    messages = {name: build_messages(sample(task), load_templates(name), thinking=thinking) for name in PRESETS}
    assert kinds(messages["videochat_r1"]) == ["text", "video"] and kinds(messages["default"]) == ["video", "text"]


@pytest.mark.parametrize("task", ["grounded_qa", "multiple_choice_qa"])
def test_options_are_the_repr_of_a_list(task: str) -> None:
    options = ("share", 'it\'s "his"\nown', "unwrap it")
    (line,) = [line for line in prompt("videochat_r1", task, options=options).splitlines() if "unwrap it" in line]
    assert ast.literal_eval(line) == ["(A) share", '(B) it\'s "his"\nown', "(C) unwrap it"]
    assert "(A) share\n(B) it's" in prompt("default", task, options=options)


def test_events_are_in_lower_case_without_a_final_period() -> None:
    event = "A person opens the Door.  "
    assert '"a person opens the door"' in prompt("videochat_r1", "temporal_grounding", query=event)
    assert event in prompt("default", "temporal_grounding", query=event)
    assert "Why is it Red?" in prompt("videochat_r1", "multiple_choice_qa", query="Why is it Red?")
    assert [normalized_query(text) for text in ("A b. ", "a..", "Why?")] == ["a b", "a.", "why?"]


def test_the_start_box_is_written_without_zeros_at_the_end() -> None:
    target = TrackingTarget((START,) * 8)
    assert "[0.093, 0.0, 0.8, 1.0]" in prompt("videochat_r1", "tracking", target=target)
    assert "[0.093, 0.000, 0.800, 1.000]" in prompt("default", "tracking", target=target)


def test_seconds_of_target_texts_keep_two_decimals() -> None:
    grounding = sample("temporal_grounding", target=GroundingTarget(Interval(6.9, 12.0)))
    numbers = load_templates("videochat_r1").numbers
    assert find_task("temporal_grounding").target_text(grounding, numbers) == "<answer>6.90 to 12.00</answer>"


@pytest.mark.parametrize(
    "decimals, text", [(0, "[0, 0, 1, 1]"), (1, "[0.1, 0.0, 0.8, 1.0]"), (6, "[0.093, 0.0, 0.8, 1.0]")]
)
def test_trimmed_coordinates(own_file: Path, decimals: int, text: str) -> None:
    own_file.write_text(f"coordinate_decimals = {decimals}\ntrim_coordinates = true")
    assert load_templates(own_file).numbers.box(START) == text


def test_a_user_can_bring_the_exact_sentences(own_file: Path) -> None:
    preset = template_file("videochat_r1")
    assert preset is not None
    own_file.write_text(preset.read_text() + "answer = 'When does \"$query\" happen?'")
    messages = build_messages(sample("temporal_grounding", query="It falls."), load_templates(own_file), thinking=False)
    assert kinds(messages) == ["text", "video"]
    assert messages[0]["content"][0]["text"] == 'When does "it falls" happen?'


@pytest.mark.parametrize(
    "content, message",
    [
        ("text_first = 1", "text_first must be true or false, got 1"),
        ("options_as_list = 'yes'", "options_as_list must be true or false"),
        ("[quality]\nnormalize_query = 3", "quality.normalize_query must be true or false, got 3"),
        ("[quality]\nnormalise = true", "[quality] must hold one or both of the strings"),
        ("text_frist = true", "key 'text_frist' is unknown; known are"),
    ],
)
def test_invalid_keys_are_named(own_file: Path, content: str, message: str) -> None:
    own_file.write_text(content)
    with pytest.raises(UserError) as raised:
        load_templates(own_file)
    assert str(raised.value).startswith(f"{own_file}: ") and message in str(raised.value)


def test_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_templates("default") == load_templates(None) == load_templates()
    with pytest.raises(UserError, match=r"videochat: neither templates of the package \(default, videochat_r1\) nor a"):
        load_templates("videochat")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("text_first = true")
    assert load_templates(Path("mine")).text_first and load_templates("./mine").text_first
    with pytest.raises(UserError, match=r"missing\.toml"):
        load_templates("missing.toml")


@pytest.mark.parametrize("thinking", [False, True])
def test_samples_can_be_asked_like_those_of_another_task(thinking: bool) -> None:
    templates = load_templates("videochat_r1")
    choice, grounded = find_task("multiple_choice_qa"), find_task("grounded_qa")
    asked = templates.asked_like(choice, grounded)
    question = sample("multiple_choice_qa")
    assert asked.text_of(question, thinking=thinking) == templates.text_of(
        sample("grounded_qa", query=question.query, options=question.options), thinking=thinking
    )
    assert "<glue>" not in templates.text_of(question, thinking=thinking), "the given templates stay as they are"
    with pytest.raises(ValueError, match=r"prompts of tracking state \$first_box, which samples of quality do"):
        templates.asked_like(find_task("quality"), find_task("tracking"))
