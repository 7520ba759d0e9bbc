from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import cast
from weakref import WeakSet

import pytest
import torch

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.local.wave import OnToken
from megatron_vcr1.serving.batching import Batcher, PendingPrompt, ServerStopping
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup
from tests.limits import HANG_S

COLD, WARM = SamplingParams(8, temperature=0), SamplingParams(8, temperature=1)


class Cache:
    """Stands for the KV cache of a batch."""


class Engine:
    """Records the batches; runs `on_batch` for each, and `after_tokens` when its tokens have been streamed."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], SamplingParams]] = []
        self.on_batch = lambda: None
        self.after_tokens = lambda: None
        self.caches: WeakSet[Cache] = WeakSet()

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, on_token: OnToken | None
    ) -> list[RolloutGroup]:
        cache = Cache()
        self.caches.add(cache)
        assert len(self.caches) == 1, "the memory of a failed batch is not free"
        self.batches.append(([request.seed for request in requests], params))
        self.on_batch()
        if on_token is not None:
            for index, request in enumerate(requests):
                on_token(index, 0, request.seed)
        self.after_tokens()
        return [
            RolloutGroup(request.id, (Rollout((request.seed,), (0.0,), FinishReason.STOP, 0),)) for request in requests
        ]


def pending(seed: int, params: SamplingParams = COLD) -> PendingPrompt:
    return PendingPrompt(EncodedPrompt(torch.tensor([1]), ()), params, 1, seed)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def batcher(engine: Engine) -> Batcher:
    return Batcher(cast(LocalEngine, engine), prompts_per_batch=3)


def run_until_done(batcher: Batcher, prompts: Sequence[PendingPrompt]) -> None:
    prompts[-1].result.add_done_callback(lambda _: batcher.stop())
    batcher.run()


def test_batches_share_sampling_parameters_and_respect_the_limit(engine: Engine, batcher: Batcher) -> None:
    prompts = [pending(0), pending(1, WARM), pending(2), pending(3)]
    for prompt in prompts:
        batcher.submit(prompt)
    run_until_done(batcher, prompts)
    assert engine.batches == [([0, 2], COLD), ([1], WARM), ([3], COLD)]
    assert [prompt.result.result().rollouts[0].token_ids for prompt in prompts] == [(0,), (1,), (2,), (3,)]


def test_a_cancelled_prompt_is_dropped(engine: Engine, batcher: Batcher) -> None:
    prompts = [pending(0), pending(1)]
    for prompt in prompts:
        batcher.submit(prompt)
    assert prompts[0].result.cancel()
    run_until_done(batcher, prompts)
    assert engine.batches == [([1], COLD)]


def test_an_error_of_the_engine_reaches_its_batch_and_the_next_batch_runs(engine: Engine, batcher: Batcher) -> None:
    def fail() -> None:
        engine.on_batch = lambda: None
        raise RuntimeError("out of memory")

    engine.on_batch = fail
    prompts = [pending(0), pending(1, WARM)]
    for prompt in prompts:
        batcher.submit(prompt)
    run_until_done(batcher, prompts)
    with pytest.raises(RuntimeError, match="out of memory"):
        prompts[0].result.result()
    assert prompts[1].result.result().rollouts[0].token_ids == (1,)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_batch_that_fails_is_generated_prompt_by_prompt(engine: Engine, batcher: Batcher, has_begun: bool) -> None:
    def fail() -> None:
        seeds = engine.batches[-1][0]
        if 1 in seeds:
            raise RuntimeError(f"prompts {seeds}")

    if has_begun:
        engine.after_tokens = fail
    else:
        engine.on_batch = fail
    tokens: list[tuple[int, int]] = []
    streamed = replace(pending(3), on_token=lambda response, token: tokens.append((response, token)))
    prompts = [pending(0), pending(1), streamed]
    for prompt in prompts:
        batcher.submit(prompt)
    run_until_done(batcher, prompts)
    assert [seeds for seeds, _ in engine.batches] == [[0, 1, 3], [0], [1], *([] if has_begun else [[3]])]
    assert prompts[0].result.result().rollouts[0].token_ids == (0,)
    with pytest.raises(RuntimeError, match=r"prompts \[1\]"):
        prompts[1].result.result()
    assert tokens == [(0, 3)]
    if has_begun:  # its first token was sent
        with pytest.raises(RuntimeError, match=r"prompts \[0, 1, 3\]"):
            streamed.result.result()
    else:
        assert streamed.result.result().rollouts[0].token_ids == (3,)


def test_tokens_reach_the_prompts_that_want_them(engine: Engine, batcher: Batcher) -> None:
    tokens: list[tuple[int, int]] = []
    streamed = replace(pending(7), on_token=lambda response, token: tokens.append((response, token)))
    prompts = [pending(0), streamed]
    for prompt in prompts:
        batcher.submit(prompt)
    run_until_done(batcher, prompts)
    assert tokens == [(0, 7)]


def test_an_interrupt_leaves_nobody_waiting(engine: Engine, batcher: Batcher) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.on_batch = interrupt
    prompts = [pending(seed, WARM if seed == 1 else COLD) for seed in range(5)]
    for prompt in prompts:
        batcher.submit(prompt)
    with pytest.raises(KeyboardInterrupt):
        batcher.run()
    late = pending(9)
    batcher.submit(late)
    for prompt in (*prompts, late):
        with pytest.raises(ServerStopping):
            prompt.result.result(timeout=HANG_S)


def test_stop_lets_the_running_batch_finish(engine: Engine, batcher: Batcher) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        go_on.wait()

    engine.on_batch = block
    first, second = pending(0), pending(1)
    batcher.submit(first)
    thread = threading.Thread(target=batcher.run)
    thread.start()
    started.wait()
    batcher.stop()
    batcher.submit(second)
    go_on.set()
    thread.join()
    assert first.result.result().rollouts[0].token_ids == (0,)
    with pytest.raises(ServerStopping, match="shutting down"):
        second.result.result(timeout=HANG_S)
