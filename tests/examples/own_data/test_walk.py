"""The walk from a folder of clips to a trained model and its report, command by command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from string import Template
from typing import Any

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.data.manifest import read_manifest
from tests.training import workspace

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples/own_data/walk.sh"
REAL_CLIPS = ("llamafactory_4.mp4", "torchcodec_h265_video.mp4")


def commands(**values: str) -> list[list[str]]:
    """Return the words of each `vcr1` command of the script; `settings` holds the words of its settings."""
    lines = [line.removeprefix("${LAUNCH:-} ") for line in SCRIPT.read_text().splitlines()]
    found = []
    for line in lines:
        if line.startswith("vcr1 "):
            text = line.replace('"${settings[@]}"', values["settings"])
            found.append(shlex.split(Template(text).substitute(values))[1:])
    return found


def table(folder: Path, clips: Path) -> Path:
    """Put clips into a folder, and write a table of their events; also of real clips if there are any."""
    rows: list[dict[str, Any]] = []
    clips.mkdir()
    for sample in read_manifest(folder / "data/train.jsonl"):
        (span,) = sample.intervals
        video = str(sample.media[0].path)
        shutil.copy(video, clips)
        event = {"video": Path(video).name, "sentence": sample.query, "start": span.start_s, "end": span.end_s}
        rows += [event, {**event, "end": span.end_s + 100}]  # the second one ends after its clip
    if real := os.environ.get("VCR1_REALDATA"):
        for name in REAL_CLIPS:
            shutil.copy(Path(real) / "videos" / name, clips)
            rows.append({"video": name, "sentence": "something moves", "start": 0.1, "end": 0.8})
    rows.append({"video": "lost.mp4", "sentence": "a lost clip", "start": 1, "end": 2})
    path = folder / "events.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_folder_of_clips_becomes_a_model_with_answers_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.create(tmp_path, num_videos=8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    events = table(tmp_path, tmp_path / "clips")
    settings = "--model.path model --model.dtype float32"
    settings += " --data.templates templates.toml --data.max_frames 4 --data.total_pixels 3136 --data.min_pixels 784"
    settings += " --data.num_workers 0 --train.num_steps 2 --logging.tensorboard false --evaluate.max_new_tokens 4"
    video = str(tmp_path / "clips" / json.loads(events.read_text())[0]["video"])
    config = "examples/configs/own_data_one_gpu.toml"
    values = {"clips": "clips", "table": "events.json", "out": "own", "video": video, "query": "a dog barks"}
    walk = commands(config=config, settings=settings, **values)
    assert [words[0] for words in walk] == ["data", "data", "data", "train", "evaluate", "generate", "report"]
    printed = []
    for words in walk:
        assert main(words) == 0, f"vcr1 {shlex.join(words)}\n{capsys.readouterr().err}"
        printed.append(capsys.readouterr())
    report = json.loads(Path("own/all.jsonl.report.json").read_text())
    assert report["issue_counts"] == {"span_past_end (repaired)": 8, "missing_video (skipped)": 1}
    assert "0 bad rows" in printed[2].out and "end" not in printed[2].out.split("bad rows")[1]
    parts = {name: read_manifest(f"own/{name}.jsonl") for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == report["num_samples"]
    result = json.loads(Path("own/sft/evaluation/test/metrics.json").read_text())
    assert result["num_samples"] == len(parts["test"]) and result["differs_from_training"] == []
    run_dir = Path("own/sft").absolute()
    assert (result["model"], result["training_run"]) == (str(run_dir / "export"), str(run_dir))
    assert (result["thinking"], result["templates"]) == (False, "templates.toml")
    assert result["video"]["total_pixels"] == 3136
    assert printed[5].out.strip() and "own/sft/report.html" in printed[6].out
    assert "evaluation/test: asks" not in Path("own/sft/report.html").read_text()

    prompt = ["generate", "--run", "own/sft", "--video", video, "--query", "a dog barks", "--json"]
    assert main(prompt) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "when? a dog barks"
    assert main([*prompt, "--thinking", "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "think: when? a dog barks"

    # The same weights with other prompts: said before it starts, in the result and in the report.
    other = ["evaluate", "--run", "own/sft", "--manifest", "own/test.jsonl", "--evaluate.thinking", "true"]
    shutil.rmtree("own/sft/evaluation")
    assert main(other) == 0
    difference = "asks with thinking, but the model was trained without thinking"
    assert json.loads(Path("own/sft/evaluation/test/metrics.json").read_text())["differs_from_training"] == [difference]
    assert main(["report", "own/sft"]) == 0
    assert difference in Path("own/sft/report.html").read_text()
