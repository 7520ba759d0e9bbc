"""Every command and snippet of the documents works on a tiny model without a GPU, or says what it needs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import build_parser, main, split_overrides
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import section_classes
from megatron_vcr1.data.manifest import read_manifest, write_manifest
from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.data.scenes import PAPER_TASKS
from megatron_vcr1.data.templates import load_templates
from tests.docs.pages import ROOT, Block, blocks, pages
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("docs")

MODEL = "models/Qwen2.5-VL-7B-Instruct"
LAUNCHERS = ("torchrun --nproc-per-node 8 --no-python ", "torchrun --nproc-per-node 4 --no-python ")
PROGRAMS = ("vcr1", "python")
# Commands that are run elsewhere, and where.
ELSEWHERE = {
    "source .venv/bin/activate": "the shell of a reader",
    "bash tools/demo.sh": "tests/examples/demo/test_main.py",
    "bash tools/test.sh": "this run",
    "bash tools/gpu_check.sh": "needs a GPU",
    "vcr1 serve": "tests/serving/test_server.py",
    "curl http://127.0.0.1:8000": "tests/serving/test_server.py",
    "torchrun --nproc-per-node 4 --no-python vcr1 score": "tests/evaluation/test_log_probs.py",
    "python -m pytest": "this run",
    "python tools/benchmark_kernels.py": "tests/kernels",
    "vcr1 data import got10k": "tests/data",
    "python make_clips.py": "tests/docs/test_own_task.py",
    "vcr1 data check clips/": "tests/docs/test_own_task.py",
    "vcr1 train counting.toml": "tests/docs/test_own_task.py",
    "vcr1 evaluate counting.toml": "tests/docs/test_own_task.py",
    "vcr1 report runs/counting": "tests/docs/test_own_task.py",
    "vcr1 data import nextgqa": "tests/data",
}

# What makes an example small enough for a test: no GPUs, short responses, one step.
SMALL_MODEL = ["--model.dtype", "float32", "--parallel.tensor", "1", "--parallel.sequence_parallel", "false"]
SMALL_MODEL += ["--rollout.engine", "local", "--data.templates", "templates.toml", "--data.num_workers", "0"]
SMALL_MODEL += ["--data.max_frames", "4", "--data.total_pixels", "3136", "--data.min_pixels", "784"]
SMALL_RUN = ["--train.num_steps", "1", "--train.prompts_per_step", "3", "--grpo.group_size", "2"]
SMALL_RUN += ["--rollout.max_new_tokens", "4", "--logging.tensorboard", "false"]
ADDED = {
    "vcr1 data synthesize": ["--num-videos", "6", "--num-test-videos", "1"],
    "vcr1 train examples/configs/grpo": [*SMALL_MODEL, *SMALL_RUN],
    "vcr1 train examples/configs/laptop.toml": ["--train.num_steps", "1", "--rollout.max_new_tokens", "4"],
    "vcr1 evaluate examples": [*SMALL_MODEL, "--judge.kind", "lexical", "--evaluate.max_new_tokens", "4"],
    "vcr1 generate": ["--dtype", "float32", "--max-new-tokens", "4"],
    "vcr1 score": ["--dtype", "float32"],
}
WRITTEN = (
    "data/test.jsonl",
    "charades.jsonl",
    "data/own/test.jsonl",
    "runs/laptop/report.html",
    "runs/grpo_joint/report.html",
    "metrics.json",
    "scores.jsonl",
    "exported",
)


def commands(block: Block) -> list[str]:
    """The command lines of a bash block, without comments, one per line."""
    lines = block.text.replace("\\\n", "").splitlines()
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)))]


def matching(command: str, table: dict[str, object]) -> list[str]:
    """The keys of the table that the command begins with."""
    return [start for start in table if command.startswith(start)]


BASH = [block for block in blocks("bash") if block.is_run]
COMMANDS = list(dict.fromkeys(command for block in BASH for command in commands(block)))


def without_launcher(command: str) -> str:
    for launcher in LAUNCHERS:
        command = command.removeprefix(launcher)
    return command


def test_every_command_is_run_or_named() -> None:
    assert len(COMMANDS) > 15
    unknown = [
        command
        for command in COMMANDS
        if without_launcher(command).split()[0] not in PROGRAMS and not matching(command, ELSEWHERE)
    ]
    assert not unknown, "run it here, or write `# needs a GPU` (a cluster, the network) in the block's first line"
    for where in ELSEWHERE.values():
        assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/.]+", where))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's working folder: the repository's tools and examples, a tiny model, annotations and videos."""
    path = tmp_path_factory.mktemp("reader")
    workspace.create(path, tasks=list(PAPER_TASKS), num_videos=6)
    (path / "models").mkdir()
    (path / "model").rename(path / MODEL)
    (path / "runs/demo/base-0").mkdir(parents=True)  # what the demo leaves
    (path / "runs/demo/base-0/export").symlink_to(path / MODEL)
    for name in ("examples", "tools"):
        (path / name).symlink_to(ROOT / name)
    samples = {sample.task: sample for sample in read_manifest(path / "data/train.jsonl")}
    grounding = samples["temporal_grounding"]
    shutil.copy(grounding.media[0].path, path / "clip.mp4")
    (path / "videos").mkdir()
    shutil.copy(grounding.media[0].path, path / "videos/AAAA.mp4")
    (path / "clips").mkdir()
    events = []
    for name in ("garden.mp4", "kitchen.mp4", "street.mp4"):
        shutil.copy(grounding.media[0].path, path / "clips" / name)
        events.append({"video": name, "sentence": "the kettle boils", "start": 1.0, "end": 2.5})
    (path / "events.json").write_text(json.dumps(events))
    (path / "charades_sta_train.txt").write_text("AAAA 1.0 5.0##a person opens the door.\n")
    (path / "Charades_v1_train.csv").write_text("id,length\nAAAA,12.0\n")
    manifests = {
        "charades_sta_train": "temporal_grounding",
        "got10k_train": "tracking",
        "nextgqa_val": "grounded_qa",
        "charades_sta_test": "temporal_grounding",
        "activitynet_test": "temporal_grounding",
        "nextgqa_test": "grounded_qa",
        "got10k_val": "tracking",
        "videomme": "multiple_choice_qa",
        "mvbench": "multiple_choice_qa",
        "perception_test_val": "multiple_choice_qa",
        "vidtab_quality_test": "quality",
        "dream1k": "captioning",
    }
    for name, task in manifests.items():
        category = "short/1" if name == "videomme" else ""
        write_manifest(path / f"data/{name}.jsonl", [replace(samples[task], category=category)])
    write_manifest(path / "test.jsonl", [grounding])
    answer = {"id": grounding.id, "output": "<answer>1.0 to 3.0</answer>"}
    (path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "when?"}]
    request = {"id": "1", "messages": [{"role": "user", "content": content}], "response": "at 2.0 s"}
    (path / "requests.jsonl").write_text(json.dumps(request) + "\n")
    return path


def test_commands_run_in_reading_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        if matching(command, ELSEWHERE):
            continue
        command = without_launcher(command)
        program, *words = shlex.split(command)
        if words[0] in ("--help", "--version"):
            with pytest.raises(SystemExit, match="0"):
                main(words)
            continue
        words += [word for start in matching(command, ADDED) for word in ADDED[start]]
        run: Callable[[Sequence[str]], int] = main if program == "vcr1" else tool(words.pop(0)).main
        assert run(words) == 0, f"{command}\n{capsys.readouterr().err}"
    for name in WRITTEN:
        assert (folder / name).exists(), name
    (score,) = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    assert len(score["log_probs"]) == len(score["token_ids"]) > 0
    weights = "model.safetensors"
    assert (folder / "exported" / weights).read_bytes() == (folder / MODEL / weights).read_bytes()


def tool(path: str):
    """Import a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", [block for block in blocks("bash") if not block.is_run], ids=str)
def test_commands_for_a_cluster_name_existing_files_and_options(block: Block) -> None:
    for command in commands(block):
        words = shlex.split(command)
        for word in words:
            if re.match(r"(examples|tools)/\S+\.(sbatch|toml|py)$", word):
                assert (ROOT / word).is_file(), command
        arguments, overrides = split_overrides(words)
        if words[0] == "vcr1":
            args, unknown = build_parser().parse_known_args(arguments[1:])
            assert callable(args.run) and not unknown
        for word in words:
            if word.startswith("examples/configs/"):
                load_config(ROOT / word, overrides)


def test_python_snippets_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for block in blocks("python"):
        if not block.is_run or block.page == "docs/own_task.md":  # tests/docs/test_own_task.py runs its files
            continue
        if name := re.match(r"# file: (\S+)\n", block.text):
            (folder / name[1]).write_text(block.text)
        exec(compile(block.text, str(block), "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_snippets_are_valid_settings(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    if block.text.startswith("# a template file"):
        path.write_text(block.text)
        load_templates(path)
        return
    tables = tomllib.loads(block.text)
    text = block.text.replace('extends = "', f'extends = "{ROOT}/')  # the readers' folder is the repository
    path.write_text(text + ("" if {"model", "extends"} & tables.keys() else "\n[model]\npath = 'model'\n"))
    load_config(path)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_snippets_are_valid_rows(block: Block) -> None:
    for line in block.text.splitlines():
        row = json.loads(line)
        if "task" in row:
            sample_from_row(row)


WEIGHTS = ("language_model", "layers", "visual")  # names of weights begin like settings: model.visual.*


def test_every_setting_that_is_named_exists() -> None:
    sections = section_classes()
    named = {
        (page.name, section, key)
        for page in pages()
        for section, key in re.findall(r"`(?:--)?([a-z]+)\.([a-z_0-9]+)[` .=]", page.read_text(encoding="utf-8"))
        if section in sections and key not in ("jsonl", "py", "sbatch", "toml", *WEIGHTS)
    }
    assert len(named) > 50
    assert not {entry for entry in named if entry[2] not in sections[entry[1]].model_fields}


def test_every_file_that_is_named_exists() -> None:
    """Covers `tests/...`, `tools/...` and the like in backticks; NAME and so on are placeholders."""
    named = {
        (page, path)
        for page in pages()
        for path in re.findall(
            r"`((?:tests|tools|examples|docs|kernels|megatron_vcr1)/[\w./-]+)", page.read_text(encoding="utf-8")
        )
        if "NAME" not in path
    }
    assert len(named) > 30
    assert not [f"{page.name}: {path}" for page, path in named if not (ROOT / path).exists()]


def test_every_metric_is_explained(folder: Path) -> None:
    """The metrics of the runs that the commands left; run after `test_commands_run_in_reading_order`."""
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z_0-9]+(?:/[A-Za-z_0-9]+)*)`", page))
    rows = [json.loads(line) for file in folder.glob("runs/*/metrics.jsonl") for line in file.read_text().splitlines()]
    assert rows
    forms = (r"(reward|zero_rewards)/[a-z_]+/.*", r"time/[a-z_]+_s", r"(model_flops|mfu)/(reference|old_log_probs)")
    patterns = list(map(re.compile, forms))
    names = {name for row in rows for name in row if name != "step"}
    assert not {name for name in names - explained if not any(pattern.fullmatch(name) for pattern in patterns)}


def test_every_job_script_and_its_variables_are_explained() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    scripts = sorted((ROOT / "examples/slurm").glob("*.s*"))  # .sbatch and .sh
    for script in scripts:
        assert script.suffix == ".sh" or re.search(rf"`{re.escape(script.name)}[ `]", page), script.name
    names = {name for path in scripts for name in re.findall(r"\$\{([A-Z_]+):[-+]", path.read_text())}
    usual = {name for name in names if name.startswith(("SLURM_", "TORCH_"))} | {"OMP_NUM_THREADS"}
    assert {"CONTAINER", "VENV", "JUDGE_MODEL"} <= names
    assert not {name for name in names - usual if f"{name}=" not in page and f"`{name}`" not in page}


def test_every_configuration_is_in_the_table_of_the_page_on_training() -> None:
    table = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("\n## Configurations\n")[2]
    assert not {path.stem for path in (ROOT / "examples/configs").glob("*.toml") if f"`{path.stem}`" not in table}
