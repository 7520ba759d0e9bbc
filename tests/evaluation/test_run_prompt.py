from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.run_prompt import trained_message, trained_video_options
from megatron_vcr1.evaluation.trained_run import TrainedRun, open_run
from tests.evaluation.test_trained_run import make_run


def trained_prompt(run: TrainedRun, query: str, **options: Any) -> str:
    """Return the text of the message."""
    (part,) = trained_message(run, query, [], **options)["content"]
    return part["text"]


def test_a_query_is_written_into_the_prompt_of_the_training(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path, steps=(3,)))
    assert trained_prompt(run, "a dog", task_name="temporal_grounding") == "when? a dog"
    assert trained_prompt(run, "a dog", task_name="temporal_grounding", thinking=True) == "think: when? a dog"
    asked = trained_prompt(run, "who?", task_name="multiple_choice_qa", options=["a cat", "a dog"])
    assert asked == "which? who? (A) a cat\n(B) a dog"
    values = {"num_frames": "8", "first_box": "[0, 0, 1, 1]"}
    assert trained_prompt(run, "a dog", task_name="tracking", values=values) == "where? a dog 8 [0, 0, 1, 1]"
    assert trained_video_options(run)["total_pixels"] == run.config.data.total_pixels


def test_text_and_video_are_in_the_order_of_the_training(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=(3,))
    video = {"type": "video", "video": "a.mp4"}
    content = trained_message(open_run(run_dir), "A dog.", [video], task_name="temporal_grounding")["content"]
    assert [part["type"] for part in content] == ["video", "text"]
    settings = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(settings.replace(str(tmp_path / "templates.toml"), "videochat_r1"))
    content = trained_message(open_run(run_dir), "A dog.", [video], task_name="temporal_grounding")["content"]
    assert [part["type"] for part in content] == ["text", "video"]
    assert '"a dog"' in content[0]["text"]  # in lower case and without its final period


def test_what_the_training_leaves_open_must_be_chosen(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path, {"thinking": True}, {"thinking": False}, steps=(3,)))
    with pytest.raises(UserError, match="trained on temporal_grounding, tracking, grounded_qa; choose with --task"):
        trained_prompt(run, "a dog")
    with pytest.raises(UserError, match="choose --thinking or --no-thinking"):
        trained_prompt(run, "a dog", task_name="temporal_grounding")
    with pytest.raises(UserError, match='--task "grounding" is not one of temporal_grounding'):
        trained_prompt(run, "a dog", task_name="grounding", thinking=False)
    with pytest.raises(UserError, match="the prompt of tracking states its num_frames: add --value num_frames="):
        trained_prompt(run, "a dog", task_name="tracking", thinking=False)
    with pytest.raises(UserError, match="states its options: add --options TEXT"):
        trained_prompt(run, "who?", task_name="multiple_choice_qa", thinking=False)
