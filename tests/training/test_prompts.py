from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.prepared_samples import prepare_or_explain
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import check_prompt
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.prompts import PromptStream
from tests.model import tiny
from tests.training import workspace

pytestmark = pytest.mark.one_lane


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("prompts"), num_videos=4)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _processor(folder: Path) -> PromptProcessor:
    return PromptProcessor.from_pretrained(folder / "model", ModelConfig.from_pretrained(folder / "model"))


def _stream(folder: Path, config_of_targets: ModelConfig | None = None, **data: Any) -> PromptStream:
    section = workspace.config(folder, "grpo").data
    manifest = folder / "data" / "train.jsonl"
    both = [{"manifest": manifest, "thinking": False}, {"manifest": manifest, "thinking": True}]
    section = type(section).model_validate(section.model_dump() | {"sources": both} | data)
    return PromptStream(
        section,
        _processor(folder),
        seed=0,
        check_prompt=partial(check_prompt, config=ModelConfig.from_pretrained(folder / "model"), num_new_tokens=8),
        config_of_targets=config_of_targets,
    )


def test_each_source_has_its_own_thinking_setting(folder: Path) -> None:
    processor = _processor(folder)
    prompts = _stream(folder).take(8)
    assert sorted((prompt.source, prompt.sample.id) for prompt in prompts) == [
        (source, f"train_00000{index}") for source in (0, 1) for index in range(4)
    ]
    for prompt in prompts:
        text = processor.decode(prompt.prompt.token_ids).replace(" ", "")
        assert ("think:when?" in text) == (prompt.source == 1) and "when?" in text


def test_ids_of_a_sample_differ_between_epochs(folder: Path) -> None:
    stream = _stream(folder)
    prompts = [prompt for _ in range(4) for prompt in stream.take(4)]
    assert [prompt.position for prompt in prompts] == list(range(16))
    assert len({prompt.id for prompt in prompts}) == 16
    assert stream.epoch_size == 8


def test_decoding_processes_do_not_import_megatron_core(folder: Path, tmp_path: Path) -> None:
    """A second and 100 MB per process. They import what they unpickle: the functions that prepare samples."""
    data = workspace.config(folder, "sft").data
    prepare_fns = []
    for family in tiny.FAMILIES:
        tiny.create(family, tmp_path / family)
        model = ModelConfig.from_pretrained(tmp_path / family)
        stream = _stream(folder, config_of_targets=model, sources=data.model_dump()["sources"])
        prepare_fns += [prepare for prepare, _ in stream.sources(data)]
        prepare_fns.append(partial(prepare_or_explain, prepare=partial(check_prompt, config=model)))
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); print('megatron.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(prepare_fns), capture_output=True, check=True
    )
    assert done.stdout == b"False\n"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_continues_from_its_state(folder: Path, num_workers: int) -> None:
    whole = [prompt.id for prompt in _stream(folder).take(12)]
    first = _stream(folder, num_workers=num_workers)
    assert [prompt.id for prompt in first.take(5)] == whole[:5]
    state = json.loads(json.dumps(first.state_dict()))  # as a checkpoint stores it
    second = _stream(folder, num_workers=num_workers)
    second.load_state_dict(state)
    assert [prompt.id for prompt in second.take(7)] == whole[5:]


def test_close_ends_the_decoding_processes(folder: Path) -> None:
    before = set(multiprocessing.active_children())
    stream = _stream(folder, num_workers=1)
    stream.take(1)
    (worker,) = set(multiprocessing.active_children()) - before
    stream.close()
    assert not worker.is_alive()


def test_unreadable_samples_are_reported_once(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(folder / "data" / row["video"])
    rows[1]["video"] = "nowhere.mp4"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = _stream(folder, sources=[{"manifest": tmp_path / "train.jsonl"}])
    prompts = stream.take(4)
    assert len(prompts) == 4 and rows[1]["id"] not in {prompt.sample.id for prompt in prompts}
    skipped = stream.take_skipped()
    assert {sample.id for sample in skipped} == {rows[1]["id"]} and "nowhere.mp4" in skipped[0].reason
    assert stream.take_skipped() == []


@pytest.mark.parametrize("key", ["query", "thinking"])
def test_a_prompt_or_target_beyond_the_range_of_positions_is_skipped(folder: Path, tmp_path: Path, key: str) -> None:
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"video": str(folder / "data" / row["video"]), "thinking": "w"}
    rows[1][key] = "w" * 512  # a token each
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"manifest": tmp_path / "train.jsonl", "thinking": True}]
    config_of_targets = ModelConfig.from_pretrained(folder / "model") if key == "thinking" else None
    stream = _stream(folder, config_of_targets, sources=sources, num_workers=1)
    assert rows[1]["id"] not in {prompt.sample.id for prompt in stream.take(4)}
    target = r" and its target of 5\d\d tokens" if key == "thinking" else ""
    reason = re.compile(f"sample {rows[1]['id']}{target}: its rotary positions")
    skipped = stream.take_skipped()
    assert skipped and all(reason.match(each.reason) for each in skipped)
    stream.close()


def test_a_thinking_edition_is_refused(folder: Path) -> None:
    processor = _processor(folder)
    template = processor.chat_template + "{% if add_generation_prompt %}<think>\n{% endif %}"
    with pytest.raises(UserError, match="take the Instruct edition"):
        PromptStream(workspace.config(folder, "grpo").data, replace(processor, chat_template=template), seed=0)


def test_gpu_decoding_excludes_worker_processes(folder: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.num_workers = 0"):
        _stream(folder, backend="dali-gpu", num_workers=2)
