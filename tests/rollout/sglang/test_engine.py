"""A real server: its log-probs are the model's, before and after every way of changing the weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.rollout.engine import EngineError, SamplingParams
from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.rollout.sglang.engine import SglangEngine
from megatron_vcr1.rollout.sglang.http import weights_of
from megatron_vcr1.rollout.sglang.loan import LENT, MemoryLoan
from megatron_vcr1.types import FinishReason
from tests.model import tiny
from tests.rollout.sglang import model_dir
from tests.rollout.sglang.conftest import TOKENS, Serving, change, largest_difference, requests
from tests.rollout.sglang.fake_server import FakeServer

pytestmark = pytest.mark.xdist_group("sglang")

TOLERANCE = 1e-4
Start = Callable[..., SglangEngine]


def payload_files() -> set[Path]:
    return set(payload.payload_dir().iterdir())


@pytest.mark.parametrize("transport", ["inline", "file"])
def test_groups_of_text_images_and_videos(start_engine: Start, model: QwenVLModel, transport: str) -> None:
    before = payload_files()
    engine = start_engine(transport=transport)
    engine.update_weights(stream_hf_tensors(model), 0)
    asked = requests(8)
    groups = engine.generate(asked, SamplingParams(12))
    assert largest_difference(model, asked, groups) < TOLERANCE
    for request, group in zip(asked, groups, strict=True):
        # The prompt is computed once a group, but for its last token, which each response needs the logits of.
        assert group.cached_tokens == (len(request.prompt.token_ids) - 1,) * 8
        assert len({rollout.token_ids for rollout in group.rollouts}) > 4
        for rollout in group.rollouts:
            assert rollout.policy_version == 0
            assert not set(TOKENS.never_sampled) & set(rollout.token_ids)
            ended = rollout.token_ids[-1] == model_dir.END
            assert rollout.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert model_dir.END not in rollout.token_ids[:-1]
            assert ended or len(rollout.token_ids) == 12
    assert payload_files() <= before  # those of processes that were killed before are removed as well


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(12, temperature=0.6),
        SamplingParams(12, temperature=1.5, top_p=0.7),
        SamplingParams(12, top_k=5),
        SamplingParams(12, temperature=0),
    ],
    ids=["cold", "top-p", "top-k", "greedy"],
)
def test_log_probs_are_those_of_the_whole_vocabulary_at_the_temperature(
    start_engine: Start, model: QwenVLModel, params: SamplingParams
) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    asked = requests(4, ("", "v"))
    groups = engine.generate(asked, params)
    assert largest_difference(model, asked, groups, params.temperature or 1.0) < TOLERANCE
    if params.temperature == 0:
        assert all(len({rollout.token_ids for rollout in group.rollouts}) == 1 for group in groups)


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(start_engine: Start, model: QwenVLModel) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    [free] = engine.generate(requests(1, ("v",)), SamplingParams(12, temperature=0))
    words = [index for index in free.rollouts[0].token_ids if 2 <= index < 97]  # characters
    if not words:
        pytest.fail("choose another seed: the greedy response has no character")
    [stopped] = engine.generate(requests(1, ("v",)), SamplingParams(12, temperature=0, stop=(chr(words[0] + 30),)))
    expected = free.rollouts[0].token_ids[: free.rollouts[0].token_ids.index(words[0]) + 1]
    assert stopped.rollouts[0].token_ids == expected
    assert stopped.rollouts[0].finish_reason == FinishReason.STOP


@pytest.mark.parametrize("sync", ["broadcast", "tensor", "disk"])
def test_after_an_optimizer_step_and_a_sync(
    start_engine: Start, model: QwenVLModel, serving: Serving, sync: str
) -> None:
    engine = start_engine(weight_sync=sync)
    asked = requests(4)
    engine.update_weights(stream_hf_tensors(model), 1)
    before = engine.generate(asked, SamplingParams(12))
    assert largest_difference(model, asked, before) < TOLERANCE
    change(model, seed=7)
    assert largest_difference(model, asked, before) > 100 * TOLERANCE
    engine.update_weights(stream_hf_tensors(model), 2)
    after = engine.generate(asked, SamplingParams(12))
    assert largest_difference(model, asked, after) < TOLERANCE
    assert {rollout.policy_version for group in after for rollout in group.rollouts} == {2}
    assert engine.policy_version == 2
    if sync == "disk":
        folder = serving.folder / "run" / "sglang" / "weights" / "copy_0"
        assert len(list(folder.iterdir())) == 1  # the earlier one is gone


def test_weights_of_another_run_are_not_taken_for_the_policys(start_engine: Start, model: QwenVLModel) -> None:
    first = start_engine()
    first.update_weights(stream_hf_tensors(model), 0)
    second = start_engine()
    with pytest.raises(EngineError, match=r"no server has the policy's weights before the next update: .*'0@"):
        second.generate(requests(1, ("",)), SamplingParams(4))
    second.update_weights(iter(stream_hf_tensors(model)), 0)  # a stream that cannot be repeated
    second.generate(requests(1, ("",)), SamplingParams(4))
    # The first one, from which the weights were taken away, gives them again.
    assert first.generate(requests(1, ("",)), SamplingParams(4))[0].rollouts[0].policy_version == 0


def test_abort_ends_what_is_under_way(start_engine: Start, model: QwenVLModel, serving: Serving) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    errors: list[BaseException] = []

    def sample() -> None:
        try:
            engine.sample(requests(32, ("", "v")), SamplingParams(450, top_p=0.99))
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    wait_for_load(serving.url)
    engine.abort()
    thread.join(60)
    assert not thread.is_alive()
    assert "sampling was stopped" in str(errors[0])
    engine.generate(requests(1, ("",)), SamplingParams(4))


def test_an_abort_counts_before_sampling_has_begun(world: None, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": tmp_path}, "train": {"run_dir": tmp_path / "run"}})
    model_config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    with FakeServer(lambda path, body: (200, {"tp_size": 1, "weight_version": "default"})) as server:
        config = config.model_copy(update={"sglang": config.sglang.model_copy(update={"urls": (server.url,)})})
        engine = SglangEngine.start(config, model_config, TOKENS)
        engine.abort()  # the thread that is to sample has been started, and has not come to it
        with pytest.raises(EngineError, match="sampling was stopped"):
            engine.sample(requests(1, ("",)), SamplingParams(4))
        assert server.count("/generate") == 0
        engine.generate([], SamplingParams(4))  # another wish
        engine.sample([], SamplingParams(4))


def wait_for_load(url: str) -> None:
    """Until the server is computing something."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        states = httpx.get(f"{url}/server_info", timeout=30).json()["internal_states"]
        if any(state.get("num_running_reqs", state.get("last_gen_throughput", 0)) for state in states):
            return
        time.sleep(0.05)


def test_generation_can_be_paused_and_goes_on(start_engine: Start, model: QwenVLModel, serving: Serving) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    asked, groups = requests(4, ("v",)), []
    httpx.post(f"{serving.url}/pause_generation", json={"mode": "in_place"}, timeout=60)
    thread = threading.Thread(target=lambda: groups.extend(engine.sample(asked, SamplingParams(12))))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive() and not groups
    httpx.post(f"{serving.url}/continue_generation", json={}, timeout=60)
    thread.join(60)
    assert largest_difference(model, asked, groups) < TOLERANCE


def test_memory_is_lent_and_taken_back(start_engine: Start, model: QwenVLModel, serving: Serving) -> None:
    """The calls and their order only: without a GPU there is no memory saver, and nothing is freed."""
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    weights = weights_of(serving.url)
    loan = MemoryLoan([serving.url], None, timeout_s=60)
    for _ in range(2):  # the second of either does nothing, where SGLang would end
        loan.lend()
        assert weights_of(serving.url) == LENT + weights
    for _ in range(2):
        loan.take_back()
        assert weights_of(serving.url) == weights
    asked = requests(2, ("v",))
    assert largest_difference(model, asked, engine.generate(asked, SamplingParams(8))) < TOLERANCE


def test_memory_that_a_killed_run_left_lent_is_taken_back(
    start_engine: Start, model: QwenVLModel, serving: Serving
) -> None:
    MemoryLoan([serving.url], None, timeout_s=60).lend()
    server = serving.server()
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    asked = requests(2, ("v",))
    assert largest_difference(model, asked, engine.generate(asked, SamplingParams(8))) < TOLERANCE
    assert serving.server().pid == server.pid
