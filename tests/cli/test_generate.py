from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.evaluation import single_prompt
from megatron_vcr1.rollout.engine import SamplingParams
from tests.evaluation.test_trained_run import make_run


@pytest.mark.parametrize("options, expected", [((), 1.05), (("--repetition-penalty", "1"), 1.0)])
def test_the_models_repetition_penalty_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: float
) -> None:
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    used: list[SamplingParams] = []
    monkeypatch.setattr(single_prompt, "generate_response", lambda run, message, params, **_: used.append(params))
    assert main(["generate", "--model", str(tmp_path), "--prompt", "When?", *options]) == 0
    assert [params.repetition_penalty for params in used] == [expected]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--fps", "1"), "--fps is for videos"),
        (("--image", "a.png", "--max-frames", "4"), "--max-frames is for videos"),
        (("--temperature", "-1"), "temperature"),
        (("--repetition-penalty", "0"), "repetition_penalty must be above 0"),
    ],
)
def test_invalid_options_are_refused(
    tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(tmp_path), "--prompt", "When?", *options]) == 2
    assert message in capsys.readouterr().err


def test_videos_and_images_come_before_the_text_in_the_given_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[object] = []
    monkeypatch.setattr(single_prompt, "generate_response", lambda run, message, *_, **__: messages.append(message))
    options = ["--image", "a.png", "--video", "b.mp4", "--image", "c.png", "--fps", "1"]
    assert main(["generate", "--model", str(tmp_path), "--prompt", "When?", *options]) == 0
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "video", "video": "b.mp4", "fps": 1.0},
        {"type": "image", "image": "c.png"},
        {"type": "text", "text": "When?"},
    ]
    assert messages == [{"role": "user", "content": parts}]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "name either a --model or a --run"),
        (("--model", "a", "--run", "b", "--prompt", "x"), "name either a --model or a --run"),
        (("--model", "a"), "--prompt is missing"),
        (("--model", "a", "--query", "x"), "--query: it is written into the prompt of a run; give --run"),
        (("--run", "absent", "--query", "x"), "--run absent: no config.toml in it"),
    ],
)
def test_model_and_prompt_are_named_once(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_gives_model_prompt_and_settings_and_options_override_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path, steps=(3,))
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(single_prompt, "generate_response", lambda *args, **_: calls.append(args))
    arguments = ["generate", "--run", str(run_dir), "--video", "a.mp4", "--query", "a dog", "--task"]
    assert main([*arguments, "temporal_grounding"]) == 0
    assert main([*arguments, "temporal_grounding", "--fps", "1", "--repetition-penalty", "1.1"]) == 0
    (run, message, params), (_, other_message, other_params) = calls
    video, text = message["content"]
    assert (run.model.path, run.model.dtype) == (run_dir / "checkpoints/step_3", "float32")
    assert text["text"] == "when? a dog"
    assert (video["fps"], video["max_frames"], video["total_pixels"]) == (2.0, 8, 4 * 28 * 28)
    assert (params.max_new_tokens, params.repetition_penalty) == (1024, 1.0)
    assert (other_message["content"][0]["fps"], other_params.repetition_penalty) == (1.0, 1.1)
