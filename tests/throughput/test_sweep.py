"""The sweep over layouts."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_throughput
import pytest

from megatron_vcr1.throughput import sweep


def test_points_are_ranked_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(point: dict[str, object], options: object) -> dict[str, object] | str:
        if point["tensor"] == 3:
            return "parallel.tensor = 3 does not divide 4 attention heads"
        seconds = 2.0 if point["recompute"] == "full" else 1.0
        ours = {"seconds": [seconds], "cpu_seconds": [seconds], "peak_bytes": 1e9, "matmul_flops_per_s": 1e9}
        case = {"num_prompts": 1, "prompt_tokens": 130, "group_size": 2, "response_tokens": 4}
        described = {"model": "tiny", "device": "cpu", "date": "today", "case": case}
        return {**described, "flops": {"ours": {"total": 5e8}}, "sides": {"ours": ours}}

    monkeypatch.setattr(sweep, "_measure", measured)
    out, png = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = ["sweep", "--tensor", "1", "3", "--recompute", "full", "none", "--json", str(out), "--plot", str(png)]
    assert benchmark_throughput.main(arguments) == 0
    assert "does not divide" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [result["point"]["recompute"] for result in document["results"]] == ["none", "full"]
    assert len(document["failed"]) == 2 and document["command"].startswith("vcr1 benchmark sweep --tensor 1 3")
    assert png.read_bytes().startswith(b"\x89PNG")
