"""The command line of `vcr1 plan` and of tools/plan_cluster.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import plan_cluster
import pytest

from megatron_vcr1.cli import plan
from megatron_vcr1.cli.main import main
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.model.presets import PRESETS

ROOT = Path(__file__).parents[2]
GRPO = str(ROOT / "examples/configs/grpo_joint.toml")


def test_plans_are_printed_and_written_to_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert plan_cluster.main(["--nodes", "1", "--gpu", "h100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2,254 steps" in printed and "28 attention heads" in printed and "--parallel.tensor" in printed
    document = json.loads(out.read_text())
    best = document["plans"][0]
    assert best["seconds"]["total"] == min(plan["seconds"]["total"] for plan in document["plans"])
    assert best["seconds"]["total"] == pytest.approx(
        sum(value for key, value in best["seconds"].items() if key != "total")
    )
    assert {refusal["tensor"] for refusal in document["refused"]} == {8}


def test_a_plan_does_not_wait_for_megatron_core_to_load() -> None:
    code = (
        "import sys; from megatron_vcr1.cli.main import main; main(['plan', '--model', 'qwen2.5-vl-7b']); "
        "print('megatron.core' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("cluster", [["--nodes", "2", "--gpu", "h200"], ["--nodes", "128"]], ids=" ".join)
def test_output_fits_into_80_columns_and_its_settings_are_valid(
    cluster: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--model", "qwen2.5-vl-72b", *cluster]) == 0
    lines = capsys.readouterr().out.splitlines()
    (settings,) = [line for line in lines if line.startswith("Settings: ")]
    assert not [line for line in lines if "\N{HORIZONTAL ELLIPSIS}" in line or (len(line) > 80 and line != settings)]
    options = settings.removeprefix("Settings: ").split()
    config = load_config(ROOT / "examples/configs/paper/grpo_temporal_grounding.toml", options)
    assert config.sglang.num_servers * config.sglang.tensor == 8


def test_a_cluster_that_is_too_small_is_an_error_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "qwen2.5-vl-72b", "--nodes", "1", "--gpu", "a100"]) == 1
    captured = capsys.readouterr()
    assert "no layout of 8 A100" in captured.err and "GB of 80" in captured.out


def test_growth_writes_json_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GROWTH_GPUS", (8, 16))
    out, png = tmp_path / "growth.json", tmp_path / "growth.png"
    assert main(["plan", "--growth", "--json", str(out), "--plot", str(png)]) == 0
    eight, sixteen = json.loads(out.read_text())
    assert (eight["gpus"], eight["steps"], sixteen["gpus"], sixteen["steps"]) == (8, 2254, 16, 1127)
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt-tokens", "100"], "at least 128"),
        (["--calibrate", "missing.json"], "missing.json"),
    ],
)
def test_wrong_input_exits_with_2_and_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--model", "no-such-model"]])
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2


def test_a_configuration_is_shown_beside_the_best_layouts_with_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(PRESETS["qwen2.5-vl-7b"]))
    out = tmp_path / "plan.json"
    run = [GRPO, "--model.path", str(tmp_path / "model"), "--train.num_steps", "100", "--json", str(out)]
    assert main(["plan", *run, "--nodes", "1", "--recompute.granularity", "full"]) == 0
    printed = capsys.readouterr().out
    config = load_config(Path(GRPO))
    own = f"{config.parallel.tensor} x {config.parallel.pipeline} x {8 // config.parallel.tensor}*"
    assert own in printed and "recompute.granularity = full -> " in printed
    document = json.loads(out.read_text())
    assert document["configured"]["layout"]["recompute"] == "full" and document["configured"]["steps"] == 100
    assert document["configured"]["seconds"]["total"] > document["plans"][0]["seconds"]["total"]
    best = [word for key, value in document["plans"][0]["settings"].items() for word in (f"--{key}", str(value))]
    assert main(["plan", *run, "--nodes", "1", *best]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert main(["plan", *run, "--nodes", "1", "--train.prompts_per_step", "7"]) == 1
    assert "prompts_per_step = 7 cannot be split evenly" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train.num_steps", "1"], "only with a CONFIG.toml"),
        (["run.toml", "--group-size", "4"], "--group-size: leave it out"),
        (["run.toml", "--model", "qwen2.5-vl-7b"], "--model: leave it out"),
        (["--plot", "growth.png"], "add --growth"),
        ([GRPO, "--train.num_steps", "5", "--samples", "9"], "--samples: leave it out"),
        ([str(ROOT / "examples/configs/sft_joint.toml")], "only GRPO runs"),
        ([str(ROOT / "examples/configs/grpo_one_step_off.toml")], "sglang.colocated = false: only runs with SGLang"),
        ([GRPO, "--rollout.engine", "local"], 'rollout.engine = "local": only runs with SGLang'),
        ([GRPO, "--sglang.urls", "http://a:1"], "sglang.urls: only runs with SGLang"),
    ],
)
def test_options_that_a_configuration_excludes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
