"""The prompt stream: draws prompts from the sources of [data], decodes videos ahead, and shares them in the replica."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.loader import PrepareFn, PromptLoader, SkippedSample
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.order import SampleOrder, Source
from megatron_vcr1.data.preparation import build_prepare_fns
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import CheckPromptFn, PreparedSample
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel.prompts import broadcast_prompts
from megatron_vcr1.training.targets import TargetEncoder, prepare_with_target
from megatron_vcr1.types import Sample


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """A prompt that has been drawn for a step.

    Attributes:
        position: index in the run's endless order of samples; unique in the run.
        source: index of its source in data.sources.
        reduction: how its video was downscaled to fit data.max_prompt_tokens; None if it was not.
    """

    position: int
    source: int
    sample: Sample
    prompt: EncodedPrompt
    reduction: str | None = None

    @property
    def id(self) -> str:
        """The sample's id and the position. Unique in the run, where a sample occurs once per epoch."""
        return f"{self.sample.id}@{self.position}"


class PromptStream:
    """This replica's part of the run's prompts: every `num_replicas`-th prompt.

    All ranks of the replica must call the methods together.

    Attributes:
        samples: the samples of each source.
        num_drawn: prompts drawn by all replicas since the first start of the run.
    """

    def __init__(
        self,
        section: DataSection,
        processor: PromptProcessor,
        *,
        seed: int,
        check_prompt: CheckPromptFn | None = None,
        config_of_targets: ModelConfig | None = None,
        replica_index: int = 0,
        num_replicas: int = 1,
    ) -> None:
        """Read and check the manifests. Videos are opened when prompts are drawn.

        Args:
            seed: seed of the samples' order.
            check_prompt: a sample whose prompt it refuses is skipped.
            config_of_targets: configuration of the model that is trained on the targets; None for GRPO. A sample
                is skipped if its target leaves the model's range of positions.
            replica_index, num_replicas: this rank's replica, and the number of replicas of the job.

        Raises:
            UserError: no sources, a bad manifest or template file, settings that exclude each other, or a chat template
                that supports text only or begins responses itself.
        """
        if section.backend == "dali-gpu" and section.num_workers > 0:
            raise UserError("data.backend 'dali-gpu' decodes in the training process; set data.num_workers = 0")
        self.templates = load_templates(section.templates)
        self._processor = processor
        self._check_prompt = check_prompt
        self._config_of_targets = config_of_targets
        self.samples = [read_manifest(source.manifest) for source in section.sources]
        processor.check_samples(sample for samples in self.samples for sample in samples)
        processor.check_response_start()
        self._order = SampleOrder(
            [
                Source(f"{index} {source.manifest.name}", samples, source.weight)
                for index, (source, samples) in enumerate(zip(section.sources, self.samples, strict=True))
            ],
            seed,
        )
        self._loader = PromptLoader(
            self._order,
            self._prepare_fns(section),
            rank=replica_index,
            num_ranks=num_replicas,
            num_workers=section.num_workers,
        )
        self._num_replicas = num_replicas
        self._iterator: Generator[PreparedSample, None, None] | None = None  # owns the decoding processes
        self.num_drawn = 0

    def _prepare_fns(self, section: DataSection) -> list[PrepareFn]:
        prepare_fns = build_prepare_fns(section, self.templates, self._processor, self._check_prompt)
        if self._config_of_targets is None:
            return prepare_fns
        with_target = partial(
            prepare_with_target,
            encoder=TargetEncoder(self._processor),
            config=self._config_of_targets,
            templates=self.templates,
        )
        return [
            partial(with_target, prepare=prepare, thinking=source.thinking)
            for prepare, source in zip(prepare_fns, section.sources, strict=True)
        ]

    def sources(self, data: DataSection) -> list[tuple[PrepareFn, Sequence[Sample]]]:
        """Return the function that prepares samples, and the samples, of each source; `data` says how to decode."""
        return list(zip(self._prepare_fns(data), self.samples, strict=True))

    @property
    def epoch_size(self) -> int:
        """Number of prompts in one pass over the data, over all replicas."""
        return self._order.epoch_size

    def take(self, number: int) -> list[DrawnPrompt]:
        """Draw this replica's next prompts.

        The replica leader decodes the videos and shares the prompts (`broadcast_prompts` says which ranks get frames).

        Raises:
            UserError: not a single sample can be read; on all ranks of the replica.
        """
        prompts = broadcast_prompts(lambda: list(self._draw(number)))
        self.num_drawn += number * self._num_replicas
        return prompts

    def take_skipped(self) -> list[SkippedSample]:
        """Return the samples that could not be read since the last call; on replica leaders, empty on other ranks."""
        skipped, self._loader.skipped[:] = list(self._loader.skipped), []
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as JSON values.

        It is the same for all replicas. Only replica leaders draw prompts, so checkpoints store the state of rank 0.
        """
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's position. Raises UserError if the checkpoint was written with other data."""
        self._loader.load_state_dict(state)
        self.num_drawn = state["next_position"]
        self._iterator = None  # a new iterator starts at the loader's new position

    def close(self) -> None:
        """End the decoding processes, if there are any."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _draw(self, number: int) -> Iterator[DrawnPrompt]:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        for _ in range(number):
            position = self._loader.position
            (prepared,) = islice(self._iterator, 1)
            source = self._order.source_at(position)
            yield DrawnPrompt(position, source, prepared.sample, prepared.prompt, prepared.reduction)
