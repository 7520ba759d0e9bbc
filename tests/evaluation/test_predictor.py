from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PreparedSample, PromptTooLongError
from megatron_vcr1.evaluation.predictions import Prediction, PredictionLog
from megatron_vcr1.evaluation.predictor import Predictor
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup, Sample
from tests.data.tiny_processor import tiny_processor
from tests.evaluation.samples import choices


class Engine:
    """Responds with the sample's id, and records its batches."""

    def __init__(self, processor: PromptProcessor) -> None:
        self.processor = processor
        self.batches: list[list[str]] = []
        self.params: set[SamplingParams] = set()

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        self.batches.append([request.id for request in requests])
        self.params.add(params)
        groups = []
        for request in requests:
            token_ids = tuple(self.processor.tokenize(request.id).tolist())
            rollout = Rollout(token_ids, (0.0,) * len(token_ids), FinishReason.STOP, 0)
            groups.append(RolloutGroup(request.id, (rollout,)))
        return groups


def prepare(sample: Sample) -> PreparedSample:
    if sample.id == "bad":
        raise PromptTooLongError("the prompt is too long")
    return PreparedSample(sample, EncodedPrompt(torch.tensor([1]), ()), reduction=None)


def test_predictions_are_logged_in_order_and_batch_by_batch(tmp_path: Path) -> None:
    samples = choices("a", "bad", "c", "d", "e")
    processor = tiny_processor()
    engine = Engine(processor)
    log = PredictionLog(tmp_path / "predictions.jsonl", {sample.id: f"prompt {sample.id}" for sample in samples})
    predictor = Predictor(cast(RolloutEngine, engine), processor, prepare, max_new_tokens=7, prompts_per_batch=2)
    with mesh.world(ParallelSection()):
        assert predictor.predict(samples, log.append)
    assert engine.batches == [["a"], ["c", "d"], ["e"]]
    assert engine.params == {SamplingParams(7, temperature=0.0)}
    assert list(log.done) == [sample.id for sample in samples]
    assert log.done["c"] == Prediction("c", "c", None, 1, "stop", prompt_digest="prompt c")
    assert log.done["bad"] == Prediction("bad", None, "the prompt is too long", prompt_digest="prompt bad")


def test_a_replica_without_requests_calls_its_engine() -> None:
    engine = Engine(processor := tiny_processor())
    predictor = Predictor(cast(RolloutEngine, engine), processor, prepare, max_new_tokens=7)
    with mesh.world(ParallelSection()):
        assert predictor.predict(choices("bad"), None)
    assert engine.batches == [[]]  # colocated servers release their memory at the end of the call


def test_a_stopped_prediction_keeps_its_batches_and_shows_the_prepared_samples() -> None:
    samples, processor = choices("a", "bad", "c", "d", "e"), tiny_processor()
    engine, recorded, seen = Engine(processor), [], []
    predictor = Predictor(
        cast(RolloutEngine, engine),
        processor,
        prepare,
        max_new_tokens=7,
        prompts_per_batch=2,
        on_prepared=lambda item: seen.append(item.sample.id),
    )
    with mesh.world(ParallelSection()):
        assert not predictor.predict(samples, recorded.extend, is_stopping=lambda: len(recorded) >= 2)
    assert [prediction.id for prediction in recorded] == ["a", "bad"]
    assert seen == ["a"] and engine.batches == [["a"]]
