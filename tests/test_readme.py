"""README.md's commands do what it says, on a tiny model and a machine without a GPU; those that do not are named."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.data.manifest import read_manifest, write_manifest
from megatron_vcr1.types import Task
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("gloo")

ROOT = Path(__file__).parents[1]
LAUNCHER = "torchrun --nproc-per-node 8 --no-python "  # left out here; tests/training/test_layouts.py has 4 processes
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    command
    for block in BLOCKS
    for line in block.replace("\\\n", "").splitlines()
    if (command := " ".join(shlex.join(shlex.split(line, comments=True)).split()).removeprefix(LAUNCHER))
]

# What a command needs that this test does not have, or the test that runs it.
ELSEWHERE = {
    "bash tools/demo.sh": "tests/examples/demo/test_main.py",
    "bash tools/test.sh": "this run",
    "torchrun --nproc-per-node 4 --no-python vcr1 score": "tests/evaluation/test_score.py, with 2 processes",
    "vcr1 serve": "tests/serving/test_server.py",
}
PROGRAMS = (".venv/bin/vcr1", "vcr1", "python")

# A laptop's share of an example: no GPUs, short answers, one step.
SMALL_MODEL = ["--model.dtype", "float32", "--parallel.tensor", "1", "--parallel.sequence_parallel", "false"]
SMALL_MODEL += ["--rollout.engine", "local", "--data.templates", "templates.toml", "--data.num_workers", "0"]
SMALL_MODEL += ["--data.max_frames", "4", "--data.total_pixels", "3136", "--data.min_pixels", "784"]
SMALL_RUN = ["--train.num_steps", "1", "--train.prompts_per_step", "3", "--grpo.group_size", "2"]
SMALL_RUN += ["--rollout.max_new_tokens", "4", "--logging.tensorboard", "false"]
ADDED = {
    "vcr1 data synthesize": ["--num-videos", "6", "--num-test-videos", "1"],
    "vcr1 train": [*SMALL_MODEL, *SMALL_RUN],
    "vcr1 evaluate examples": [*SMALL_MODEL, "--judge.kind", "lexical", "--evaluate.max_new_tokens", "4"],
    "vcr1 generate": ["--dtype", "float32", "--max-new-tokens", "4"],
    "vcr1 score": ["--dtype", "float32"],
    "python tools/convert_checkpoint.py": [],
}


def named(command: str, table: dict[str, object]) -> list[str]:
    """The keys that the command begins with."""
    return [start for start in table if command.startswith(start)]


def test_every_command_is_run_or_named() -> None:
    assert len(COMMANDS) > 15
    assert not [one for one in COMMANDS if shlex.split(one)[0] not in PROGRAMS and not named(one, ELSEWHERE)]
    assert not [start for start in [*ELSEWHERE, *ADDED] if not any(one.startswith(start) for one in COMMANDS)]
    for where in ELSEWHERE.values():
        assert all((ROOT / path).is_file() for path in re.findall(r"tests/\S+\.py", where))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has: the repository's tools and examples, the model, Charades-STA's files, and videos."""
    workspace.create(tmp_path, tasks=list(Task), num_videos=6)
    (tmp_path / "model").rename(tmp_path / "Qwen2.5-VL-7B-Instruct")
    (tmp_path / "models").symlink_to(tmp_path)  # the examples' own place of it
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    samples = {sample.task: sample for sample in read_manifest(tmp_path / "data/train.jsonl")}
    clip = samples[Task.TEMPORAL_GROUNDING].video
    shutil.copy(clip, tmp_path / "clip.mp4")
    (tmp_path / "videos").mkdir()
    shutil.copy(clip, tmp_path / "videos/AAAA.mp4")
    (tmp_path / "charades_sta_train.txt").write_text("AAAA 1.0 5.0##a person opens the door.\n")
    (tmp_path / "Charades_v1_train_lengths.csv").write_text("id,length\nAAAA,12.0\n")
    for name, task in {
        "charades_sta_train": Task.TEMPORAL_GROUNDING,
        "got10k_train": Task.TRACKING,
        "nextgqa_val": Task.GROUNDED_QA,
        "charades_sta_test": Task.TEMPORAL_GROUNDING,
        "activitynet_test": Task.TEMPORAL_GROUNDING,
        "nextgqa_test": Task.GROUNDED_QA,
        "got10k_val": Task.TRACKING,
        "videomme": Task.MULTIPLE_CHOICE_QA,
        "mvbench": Task.MULTIPLE_CHOICE_QA,
        "perception_test_val": Task.MULTIPLE_CHOICE_QA,
        "vidtab_quality_test": Task.QUALITY,
        "dream1k": Task.CAPTIONING,
    }.items():
        category = "short/1" if name == "videomme" else ""
        write_manifest(tmp_path / f"data/{name}.jsonl", [replace(samples[task], category=category)])
    grounding = samples[Task.TEMPORAL_GROUNDING]
    write_manifest(tmp_path / "test.jsonl", [grounding])
    answer = {"id": grounding.id, "output": "<answer>1.0 to 3.0</answer>"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "when?"}]
    request = {"id": "1", "messages": [{"role": "user", "content": content}], "response": "at 2.0 s"}
    (tmp_path / "requests.jsonl").write_text(json.dumps(request) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_commands_in_its_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        if named(command, ELSEWHERE):
            continue
        program, *words = shlex.split(command)
        if words == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                main(words)
            continue
        words += [word for start in named(command, ADDED) for word in ADDED[start]]
        run: Callable[[Sequence[str]], int] = main
        if program == "python":
            run = tool(words.pop(0)).main
        assert run(words) == 0, f"{command}\n{capsys.readouterr().err}"
    for written in (
        "data/test.jsonl",
        "charades.jsonl",
        "runs/joint/report.html",
        "runs/joint/evaluation/mvbench/metrics.json",
        "metrics.json",
    ):
        assert (folder / written).is_file()
    (score,) = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    assert len(score["log_probs"]) == len(score["token_ids"]) > 0
    model = "model.safetensors"
    assert (folder / "exported" / model).read_bytes() == (folder / "Qwen2.5-VL-7B-Instruct" / model).read_bytes()


def tool(path: str):
    """The module of a script in tools/."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
