from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data.templates import PromptTemplates, build_messages, load_templates, target_text
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import NumberFormat, task_names
from megatron_vcr1.types import Image, Interval, Sample, Video
from tests.data.prompt_samples import ANSWERS, sample, text_of
from tests.rewards.samples import BOXES


@pytest.fixture(scope="module")
def templates() -> PromptTemplates:
    return load_templates()


@pytest.mark.parametrize("task", task_names())
@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_contain_the_query_and_an_example_of_the_form(
    templates: PromptTemplates, task: str, thinking: bool
) -> None:
    text = text_of(build_messages(sample(task), templates, thinking=thinking))
    assert ("<think>" in text) == thinking
    assert "<answer>" in text and text == text.strip()
    assert ("<glue>" in text) == (task == "grounded_qa")
    assert ("$5 for {this}?" in text) == (task != "captioning")
    assert ("(A) a $dog\n(B) a cat" in text) == (task in ("grounded_qa", "multiple_choice_qa"))
    if task == "tracking":
        assert "8 frames" in text and "[0.100, 0.250, 0.500, 0.750]" in text and "0.510" not in text


@pytest.mark.parametrize("task", ANSWERS)
def test_the_target_text_of_each_task(templates: PromptTemplates, task: str) -> None:
    assert target_text(sample(task), templates) == ANSWERS[task]


def test_the_tracking_target_parses_back_to_its_boxes(templates: PromptTemplates) -> None:
    text = target_text(sample("tracking"), templates)
    assert text.startswith("<answer>[[0.100, 0.250, 0.500, 0.750], [")
    numbers = [float(number) for number in re.findall(r"\d\.\d+", text)]
    expected = [value for box in BOXES for value in (box.x0, box.y0, box.x1, box.y1)]
    assert numbers == pytest.approx(expected, abs=5e-4)


def test_options_of_the_sample_override_those_of_the_run(templates: PromptTemplates) -> None:
    def video_part(sample: Sample) -> dict[str, Any]:
        options = {"fps": 1.0, "max_frames": 64}
        (message,) = build_messages(sample, templates, thinking=False, video_options=options)
        return message["content"][0]

    plain = {"type": "video", "video": "a.mp4", "fps": 1.0, "max_frames": 64}
    assert video_part(sample("quality")) == plain
    assert video_part(sample("tracking")) == {**plain, "min_frames": 8, "max_frames": 8}
    frames = tuple(f"{index}.jpg" for index in range(8))
    listed = video_part(sample("tracking", video=frames, duration_s=2.0))
    assert (listed["video"], listed["image_fps"]) == (list(frames), 4.0)
    clipped = video_part(sample("quality", clip=Interval(2.0, 5.5)))
    assert clipped == {**plain, "start_s": 2.0, "end_s": 5.5}


def test_media_are_placed_where_the_query_and_the_options_mark_them(templates: PromptTemplates) -> None:
    media = (Image("a.png"), Video("a.mp4", clip=Interval(1, 2)), Video("b.mp4"))
    asked = sample("multiple_choice_qa", media=media, query="Is <image> in", options=("<video>", "<video>"))
    limits = [{"max_pixels": 1}, {"total_pixels": 2}, {"total_pixels": 3}]
    (message,) = build_messages(asked, templates, thinking=False, video_options={"fps": 1.0}, limits=limits)
    before, image, between, first, newline, second, after = message["content"]
    assert before["text"].endswith("Is ") and between["text"].endswith("(A) ") and newline["text"] == "\n(B) "
    assert image == {"type": "image", "image": "a.png", "max_pixels": 1}
    clip = {"start_s": 1, "end_s": 2}
    assert first == {"type": "video", "video": "a.mp4", "fps": 1.0, "total_pixels": 2, **clip}
    assert second == {"type": "video", "video": "b.mp4", "fps": 1.0, "total_pixels": 3}
    assert "<answer>" in after["text"]


def test_media_without_marks_come_first(templates: PromptTemplates) -> None:
    for media in ((Video("a.mp4"), Video("b.mp4"), Image("a.png")), ()):
        (message,) = build_messages(sample("multiple_choice_qa", media=media), templates, thinking=False)
        assert [part["type"] for part in message["content"]] == [*(medium.kind for medium in media), "text"]


def test_a_query_in_lower_case_has_the_marks_of_the_query() -> None:
    media = (Image("a.png"), Image("b.png"))
    templates = PromptTemplates(normalized=frozenset(["quality"]))
    asked = sample("quality", media=media, query="<image> or <image>: WHAT is an <IMAGE>.")
    (message,) = build_messages(asked, templates, thinking=False)
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert len(message["content"]) - len(texts) == 2 and ": what is an <IMAGE>" in texts[-1]


WHOLE_FILE = """
time_decimals = 1

[temporal_grounding]
think = "When is this, for $$5: $query"

[grounded_qa]
answer = "$query\\n$options"

[captioning]
answer = "Describe it."
"""


def edited(tmp_path: Path, old: str, new: str) -> Path:
    assert old in WHOLE_FILE
    path = tmp_path / "templates.toml"
    path.write_text(WHOLE_FILE.replace(old, new), encoding="utf-8")
    return path


def test_a_users_file_replaces_texts_and_precision_and_inherits_the_rest(tmp_path: Path) -> None:
    mine, default = load_templates(edited(tmp_path, "", "")), load_templates()
    grounding = sample("temporal_grounding")
    assert text_of(build_messages(grounding, mine, thinking=True)) == "When is this, for $5: $5 for {this}?"
    assert target_text(grounding, mine) == "<answer>12.5 to 17.0</answer>"
    assert build_messages(grounding, mine, thinking=False) == build_messages(grounding, default, thinking=False)
    for thinking in (False, True):
        tracking = build_messages(sample("tracking"), mine, thinking=thinking)
        assert tracking == build_messages(sample("tracking"), default, thinking=thinking)
    assert mine.numbers == NumberFormat(time_decimals=1, coordinate_decimals=3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[captioning]", "[captoining]", "'captoining' is unknown; known are temporal_grounding, "),
        ("time_decimals = 1", "space = 1", "'space' is unknown"),
        ("time_decimals = 1", "time_decimals = 2.5", "time_decimals must be a whole number from 0 to 6, got 2.5"),
        (": $query", ": $qeury", r"temporal_grounding.think: placeholder 'query' is missing"),
        ("$options", "$options $first_box", r"grounded_qa.answer: placeholder 'first_box' is unknown"),
        (
            "$query\\n$options",
            "$options $query",
            r"grounded_qa.answer: write \$query once, and \$options once after it",
        ),
        (": $query", ": $query ${query}", r"temporal_grounding.think: write \$query once"),
        ("$options", "$ 5", "stray dollar sign"),
        ("$options", "<video> $options", "contains <video>; only the query and the options of a sample mark places"),
        ("[captioning]\nanswer", "[captioning]\nanwser", r"\[captioning\] must hold one or both of the strings"),
        ("[captioning]\nanswer", "captioning", r"\[grounded_qa\] must hold"),
        ('"Describe it."', "7", r"captioning.answer must be a string"),
        ("[captioning]", "[captioning", "not valid TOML"),
    ],
)
def test_mistakes_in_a_template_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_templates(edited(tmp_path, old, new))


def test_a_missing_template_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.toml: cannot be read"):
        load_templates(tmp_path / "absent.toml")


def test_a_byte_order_mark_is_ignored_and_hostile_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("\ufeff" + WHOLE_FILE, encoding="utf-8")
    assert load_templates(tmp_path / "t.toml").answer["captioning"].template == "Describe it."
    (tmp_path / "t.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UserError, match=r"t\.toml: not TOML that can be read"):
        load_templates(tmp_path / "t.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="not a regular file"):
        load_templates(tmp_path / "pipe.toml")
