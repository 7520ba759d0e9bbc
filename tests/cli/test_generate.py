from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.evaluation import single_prompt
from megatron_vcr1.rollout.engine import SamplingParams


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
