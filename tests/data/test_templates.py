from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data.templates import PromptTemplates, build_messages, load_templates, target_text
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Interval, Task, VideoSample
from tests.data.prompt_samples import ANSWERS, sample, text_of
from tests.rewards.samples import BOXES


@pytest.fixture(scope="module")
def templates() -> PromptTemplates:
    return load_templates()


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_contain_the_query_and_an_example_of_the_form(
    templates: PromptTemplates, task: Task, thinking: bool
) -> None:
    text = text_of(build_messages(sample(task), templates, thinking=thinking))
    assert ("<think>" in text) == thinking
    assert "<answer>" in text and text == text.strip()
    assert ("<glue>" in text) == (task == Task.GROUNDED_QA)
    assert ("$5 for {this}?" in text) == (task != Task.CAPTIONING)
    assert ("(A) a $dog\n(B) a cat" in text) == (task in (Task.GROUNDED_QA, Task.MULTIPLE_CHOICE_QA))
    if task == Task.TRACKING:
        assert "8 frames" in text and "[0.100, 0.250, 0.500, 0.750]" in text and "0.510" not in text


@pytest.mark.parametrize("task", ANSWERS)
def test_the_target_text_of_each_task(templates: PromptTemplates, task: Task) -> None:
    assert target_text(sample(task), templates) == ANSWERS[task]


def test_the_tracking_target_parses_back_to_its_boxes(templates: PromptTemplates) -> None:
    text = target_text(sample(Task.TRACKING), templates)
    assert text.startswith("<answer>[[0.100, 0.250, 0.500, 0.750], [")
    numbers = [float(number) for number in re.findall(r"\d\.\d+", text)]
    expected = [value for box in BOXES for value in (box.x0, box.y0, box.x1, box.y1)]
    assert numbers == pytest.approx(expected, abs=5e-4)


def test_options_of_the_sample_override_those_of_the_run(templates: PromptTemplates) -> None:
    def video_part(sample: VideoSample) -> dict[str, Any]:
        options = {"fps": 1.0, "max_frames": 64}
        (message,) = build_messages(sample, templates, thinking=False, video_options=options)
        return message["content"][0]

    plain = {"type": "video", "video": "a.mp4", "fps": 1.0, "max_frames": 64}
    assert video_part(sample(Task.QUALITY)) == plain
    assert video_part(sample(Task.TRACKING)) == {**plain, "min_frames": 8, "max_frames": 8}
    frames = tuple(f"{index}.jpg" for index in range(8))
    listed = video_part(sample(Task.TRACKING, video=frames, duration_s=2.0))
    assert (listed["video"], listed["image_fps"]) == (list(frames), 4.0)
    clipped = video_part(sample(Task.QUALITY, clip=Interval(2.0, 5.5)))
    assert clipped == {**plain, "start_s": 2.0, "end_s": 5.5}


def edited(tmp_path: Path, old: str, new: str) -> Path:
    original = (resources.files("megatron_vcr1.data") / "templates.toml").read_text(encoding="utf-8")
    assert old in original
    path = tmp_path / "templates.toml"
    path.write_text(original.replace(old, new), encoding="utf-8")
    return path


def test_a_users_file_replaces_texts_and_precision(tmp_path: Path) -> None:
    path = edited(tmp_path, "Find the part of the video in which this happens", "When is this, for $$5")
    path.write_text(path.read_text().replace("time_decimals = 2", "time_decimals = 1"))
    templates = load_templates(path)
    grounding = sample(Task.TEMPORAL_GROUNDING)
    assert text_of(build_messages(grounding, templates, thinking=True)).startswith('When is this, for $5: "$5 for')
    assert target_text(grounding, templates) == "<answer>12.5 to 17.0</answer>"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[quality]", "[qualtiy]", "'quality' is missing"),
        ("time_decimals = 2", "time_decimals = 2\nspace = 1", "'space' is unknown"),
        ("time_decimals = 2", "time_decimals = 2.5", "time_decimals must be a whole number from 0 to 6, got 2.5"),
        ('"$query"', '"$qeury"', r"temporal_grounding.answer: placeholder 'query' is missing"),
        ("$options", "$options $first_box", r"grounded_qa.answer: placeholder 'first_box' is unknown"),
        ("$options", "$ 5", "stray dollar sign"),
        ("[captioning]\nanswer", "[captioning]\nanwser", r"\[captioning\] must hold two strings"),
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
    text = (resources.files("megatron_vcr1.data") / "templates.toml").read_text(encoding="utf-8")
    (tmp_path / "t.toml").write_text("\ufeff" + text, encoding="utf-8")
    task = Task.QUALITY
    assert load_templates(tmp_path / "t.toml").answer[task].template == load_templates().answer[task].template
    (tmp_path / "t.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UserError, match=r"t\.toml: not TOML that can be read"):
        load_templates(tmp_path / "t.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="not a regular file"):
        load_templates(tmp_path / "pipe.toml")
