"""Arguments that several commands share."""

from __future__ import annotations

import benchmark_throughput
import pytest


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_a_prompt_needs_room_for_a_video(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark_throughput.main([command, "--prompt-tokens", "10"])
    assert "--prompt-tokens: 10 tokens are too few for a prompt with a video" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rounds", "--tensor", "--group-size"])
def test_numbers_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark_throughput.main(["train", option, "0"])
    assert f"{option}: 0 is not above 0" in capsys.readouterr().err
