"""Answers of a model to a benchmark's samples: greedy, shared out over the copies of the model, kept batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from tqdm import tqdm

from megatron_vcr1.data.loader import Prepare, decode_ahead
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.evaluation.predictions import Prediction, PredictionLog
from megatron_vcr1.evaluation.prepared_samples import prepared_or_why_not
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.parallel.prompts import broadcast_prompts
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.types import VideoSample


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model and how it is asked.

    Attributes:
        prepare: makes a sample's prompt; what it raises as ValueError (VideoError, PromptTooLongError) is the sample's
            own fault, and noted.
        prompts_per_batch: samples that a copy of the model answers at a time.
        num_workers: processes that decode ahead; `prepare` is pickled for them.
    """

    engine: RolloutEngine
    processor: PromptProcessor
    prepare: Prepare
    max_new_tokens: int
    prompts_per_batch: int = 32
    num_workers: int = 0

    def answer(self, samples: Sequence[VideoSample], log: PredictionLog | None, label: str) -> None:
        """Answers the samples, in batches that the log has when the next one begins. Every rank of the job calls it.

        Which copy of the model answers a sample changes nothing in the answer.

        Args:
            log: on the job's first rank, and on no other.
            label: of the progress bar.
        """
        num_replicas = mesh.num_replicas()
        size = num_replicas * self.prompts_per_batch
        rounds = [samples[start : start + size] for start in range(0, len(samples), size)]
        shares = [one[mesh.replica_index() :: num_replicas] for one in rounds]
        prompts = self._prompts([sample for share in shares for sample in share])
        with tqdm(total=len(samples), unit="sample", desc=label, disable=log is None) as bar:
            for chunk, share in zip(rounds, shares, strict=True):
                number = len(share)
                prepared = broadcast_prompts(lambda number=number: list(islice(prompts, number)))  # type: ignore[misc]
                answered = self._predict(prepared)
                mine = {one.id: one for one in answered} if mesh.is_output_rank() else {}
                predictions = {name: one for part in collectives.gather_objects(mine) for name, one in part.items()}
                if log is not None:
                    log.append([predictions[sample.id] for sample in chunk])
                bar.update(len(chunk))

    def _prompts(self, samples: Sequence[VideoSample]) -> Iterator[PreparedSample | Prediction]:
        """Prepared samples in order, on a copy's first rank alone; decoding starts when the first one is asked for."""
        make = partial(prepared_or_why_not, prepare=self.prepare)
        yield from decode_ahead(make, samples, num_workers=self.num_workers)

    def _predict(self, prepared: Sequence[PreparedSample | Prediction]) -> list[Prediction]:
        """What the copy's model answers, in order; those that could not be prepared say why."""
        ready = [one for one in prepared if isinstance(one, PreparedSample)]
        requests = [GenerationRequest(one.sample.id, one.prompt, num_responses=1) for one in ready]
        params = SamplingParams(self.max_new_tokens, temperature=0.0)
        answered = self.engine.generate(requests, params) if requests else []
        predictions = {one.id: one for one in prepared if isinstance(one, Prediction)}
        for one, group in zip(ready, answered, strict=True):
            (rollout,) = group.rollouts
            output = self.processor.decode(rollout.token_ids)
            predictions[group.id] = Prediction(
                group.id,
                output,
                num_tokens=len(rollout.token_ids),
                finish_reason=str(rollout.finish_reason),
                reduction=one.reduction,
            )
        return [predictions[one.sample.id if isinstance(one, PreparedSample) else one.id] for one in prepared]
