"""The benchmark's commands on the smallest inputs; their timings are nobody's promise."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_throughput
import pytest
from throughput import measure, sweep, train

from tests.data.video_clips import write_clip

pytestmark = pytest.mark.xdist_group("gloo")

UPDATE = ["--model", "tiny", "--prompt-tokens", "130", "--group-size", "2", "--response-tokens", "4", "--rounds", "1"]


def test_train_compares_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in one process, one side after the other."""
    turns = []

    def here(arguments: list[str], *, num_processes: int, threads: int, environment: dict[str, str]) -> None:
        turns.append((arguments[arguments.index("--worker") + 1], dict(environment)))
        assert num_processes == threads == 1
        assert benchmark_throughput.main(arguments) == 0

    monkeypatch.setattr(train, "run_again", here)
    out = tmp_path / "train.json"
    assert benchmark_throughput.main(["train", *UPDATE, "--sides", "plain", "--json", str(out)]) == 0
    assert "gradient difference" in capsys.readouterr().out
    assert [side for side, _ in turns] == ["ours", "plain"] * 2
    assert all(environment for _, environment in turns[:2]) and not any(environment for _, environment in turns[2:])
    result = json.loads(out.read_text())
    plain = result["sides"]["plain"]
    assert plain["gradient_difference"] < 1e-6 < plain["largest_gradient"]
    assert plain["loss_difference"] < 1e-6
    assert result["flops"]["plain"]["total"] > result["flops"]["ours"]["total"]


def test_sync_streams_every_weight(tmp_path: Path) -> None:
    out = tmp_path / "sync.json"
    assert benchmark_throughput.main(["sync", "--model", "tiny", "--rounds", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["bytes"] == 4 * 1_545_920 and len(result["seconds"]) == 2


def test_sync_to_servers_needs_their_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_throughput.main(["sync", "--model", "tiny", "--urls", "http://127.0.0.1:1"]) == 2
    assert "--model the directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_a_prompt_has_room_for_its_video(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark_throughput.main([command, "--prompt-tokens", "10"])
    assert "--prompt-tokens: 10 have no room for a video; take at least 128" in capsys.readouterr().err


def test_a_missing_clip_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_throughput.main(["decode", "--videos", "nope.mp4"]) == 2
    assert "--videos nope.mp4: no such file" in capsys.readouterr().err


def test_decode_reads_clips(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    out = tmp_path / "decode.json"
    arguments = ["decode", "--videos", str(clip), "--backends", "pyav", "--rounds", "1", "--json", str(out)]
    assert benchmark_throughput.main(arguments) == 0
    assert json.loads(out.read_text())["backends"]["pyav"]["frames_per_s"] > 0


def test_sweep_ranks_points_and_names_those_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(point: dict[str, object], options: object) -> dict[str, object] | str:
        if point["tensor"] == 3:
            return "parallel.tensor = 3 does not divide 4 attention heads"
        took = 2.0 if point["recompute"] == "full" else 1.0
        ours = {"seconds": [took], "cpu_seconds": [took], "peak_bytes": 1e9, "product_flops_per_s": 1e9}
        case = {"num_prompts": 1, "prompt_tokens": 130, "group_size": 2, "response_tokens": 4}
        described = {"model": "tiny", "device": "cpu", "date": "today", "case": case}
        return {**described, "flops": {"ours": {"total": 5e8}}, "sides": {"ours": ours}}

    monkeypatch.setattr(sweep, "_measure", measured)
    out, png = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = ["sweep", "--tensor", "1", "3", "--recompute", "full", "none", "--json", str(out), "--plot", str(png)]
    assert benchmark_throughput.main(arguments) == 0
    assert "does not divide" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [one["point"]["recompute"] for one in document["results"]] == ["none", "full"]
    assert len(document["failed"]) == 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_spread() -> None:
    spread = measure.Spread.of([3.0, 1.0, 2.0])
    assert spread == measure.Spread(2.0, 1.0, 3.0) and spread.text(1) == "2.0 (1.0 - 3.0)"


def test_unequal_gradients_are_found(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.tensor([1.0, -2.0])}, tmp_path / "ours")
    save_file({"a": torch.tensor([1.0, -2.5])}, tmp_path / "other")
    assert train._compare(tmp_path / "ours", tmp_path / "other") == {
        "gradient_difference": 0.5,
        "largest_gradient": 2.5,
    }
    save_file({"b": torch.tensor([1.0])}, tmp_path / "other")
    with pytest.raises(RuntimeError, match="names"):
        train._compare(tmp_path / "ours", tmp_path / "other")
