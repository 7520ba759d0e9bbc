"""Generates a model's predictions for a benchmark by greedy decoding, in batches distributed over the replicas."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

from tqdm import tqdm

from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.data.workers import decode_ahead
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.evaluation.prepared_samples import prepare_or_explain
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.parallel.prompts import broadcast_prompts
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.types import Sample


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model's engine, and the settings of its prompts and outputs.

    Attributes:
        prepare: builds a sample's prompt. If it raises VideoError or PromptTooLongError, the sample gets a prediction
            without output.
        max_new_tokens: longest output.
        prompts_per_batch: samples that a replica generates for at a time.
        num_workers: processes that decode ahead; `prepare` is pickled for them.
        on_prepared: called with every prepared sample of this replica, in order, before its output is generated. On
            replica leaders the prompt has its frames.
    """

    engine: RolloutEngine
    processor: PromptProcessor
    prepare: PrepareFn
    max_new_tokens: int
    prompts_per_batch: int = 32
    num_workers: int = 0
    on_prepared: Callable[[PreparedSample], None] | None = None

    def predict(
        self,
        samples: Sequence[Sample],
        record: Callable[[Sequence[Prediction]], None] | None,
        *,
        label: str | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Generate predictions for the samples and record them batch by batch. All ranks call it.

        A prediction does not depend on the replica that generates it.

        Args:
            samples: the samples, the same on all ranks.
            record: receives the predictions of each batch, on the first rank of the job; None on all other ranks.
            label: label of the progress bar; None shows no bar.
            is_stopping: called before each batch, on all ranks together. If it returns True, on all ranks, nothing
                more is generated.

        Returns:
            Whether all samples have predictions: False if `is_stopping` returned True.
        """
        num_replicas = mesh.num_replicas()
        size = num_replicas * self.prompts_per_batch
        rounds = [samples[start : start + size] for start in range(0, len(samples), size)]
        shards = [batch[mesh.replica_index() :: num_replicas] for batch in rounds]
        bar_is_hidden = label is None or record is None
        with (
            closing(self._prepare_ahead([sample for shard in shards for sample in shard])) as prompts,
            tqdm(total=len(samples), unit="sample", desc=label, disable=bar_is_hidden) as bar,
        ):
            for batch, shard in zip(rounds, shards, strict=True):
                if is_stopping():
                    return False
                # The replica leader takes the next prompts; the other ranks of the replica receive them.
                number = len(shard)
                prepared = broadcast_prompts(lambda number=number: list(islice(prompts, number)))  # type: ignore[misc]
                predicted = self._generate(prepared)
                mine = {prediction.id: prediction for prediction in predicted} if mesh.is_output_rank() else {}
                gathered = collectives.gather_objects(mine)  # all ranks call it
                predictions = {id: prediction for part in gathered for id, prediction in part.items()}
                if record is not None:
                    record([predictions[sample.id] for sample in batch])
                bar.update(len(batch))
        return True

    def _prepare_ahead(self, samples: Sequence[Sample]) -> Generator[PreparedSample | Prediction, None, None]:
        """Yield prepared samples in order. Only replica leaders iterate; decoding starts with the first item."""
        make = partial(prepare_or_explain, prepare=self.prepare)
        yield from decode_ahead(make, samples, num_workers=self.num_workers)

    def _generate(self, prepared: Sequence[PreparedSample | Prediction]) -> list[Prediction]:
        """Return the replica's predictions in order; samples that could not be prepared have theirs already."""
        ready = [item for item in prepared if isinstance(item, PreparedSample)]
        if self.on_prepared is not None:
            for item in ready:
                self.on_prepared(item)
        requests = [GenerationRequest(item.sample.id, item.prompt, num_responses=1) for item in ready]
        params = SamplingParams(self.max_new_tokens, temperature=0.0)
        # Without requests, too: colocated servers release their memory at the end of the call.
        groups = self.engine.generate(requests, params)
        predictions = {item.id: item for item in prepared if isinstance(item, Prediction)}
        for item, group in zip(ready, groups, strict=True):
            (rollout,) = group.rollouts
            predictions[group.id] = Prediction(
                group.id,
                self.processor.decode(rollout.token_ids),
                num_tokens=len(rollout.token_ids),
                finish_reason=str(rollout.finish_reason),
                reduction=item.reduction,
                frame_size=_frame_size(item),
            )
        return [predictions[item.sample.id if isinstance(item, PreparedSample) else item.id] for item in prepared]


def _frame_size(item: PreparedSample) -> tuple[int, int] | None:
    """Return the width and height of the frames of the prompt's only video or image; None if there are several."""
    if len(item.prompt.vision) != 1:
        return None
    _, height, width, _ = item.prompt.vision[0].frames.shape
    return width, height
