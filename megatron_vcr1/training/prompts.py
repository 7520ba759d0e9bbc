"""From the manifests of [data] to the prompts of a step: drawn in order, decoded ahead, shared by a copy's ranks."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.loader import PromptLoader, SampleOrder, SkippedSample, Source
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.preparation import preparations
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PreparedSample, load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.prompts import broadcast_prompts
from megatron_vcr1.types import VideoSample


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """A prompt of a step.

    Attributes:
        position: in the run's endless order of samples; no other prompt of the run has it.
        source: index in data.sources.
        reduction: how its video was made smaller to fit into data.max_prompt_tokens; None if it was not.
    """

    position: int
    source: int
    sample: VideoSample
    prompt: EncodedPrompt
    reduction: str | None = None

    @property
    def id(self) -> str:
        """Unique in the run, where a sample comes again each epoch."""
        return f"{self.sample.id}@{self.position}"


class PromptStream:
    """This replica's share of the prompts: every `num_replicas`-th. All its ranks call the methods together.

    Attributes:
        samples: of each source.
        num_drawn: prompts that were taken since the run's first start, over all copies of the model.
    """

    def __init__(self, section: DataSection, processor: PromptProcessor, *, seed: int) -> None:
        """Reads and checks the manifests; videos are opened when prompts are taken.

        Raises:
            UserError: no sources, a bad manifest or template file, or settings that exclude each other.
        """
        if section.backend == "dali-gpu" and section.num_workers > 0:
            raise UserError("data.backend 'dali-gpu' decodes in the training process; set data.num_workers = 0")
        self.templates = load_templates(section.templates)
        self.samples = [read_manifest(source.manifest) for source in section.sources]
        order = SampleOrder(
            [
                Source(f"{index} {source.manifest.name}", samples, source.weight)
                for index, (source, samples) in enumerate(zip(section.sources, self.samples, strict=True))
            ],
            seed,
        )
        self._order = order
        self._loader = PromptLoader(
            order,
            preparations(section, self.templates, processor),
            rank=mesh.replica_index(),
            num_ranks=mesh.num_replicas(),
            num_workers=section.num_workers,
        )
        self._iterator: Generator[PreparedSample, None, None] | None = None
        self.num_drawn = 0

    @property
    def epoch_size(self) -> int:
        """Prompts of one pass over the data, over all copies of the model."""
        return self._order.epoch_size

    def take(self, number: int) -> list[DrawnPrompt]:
        """The next prompts of this copy; frames as `broadcast_prompts` has them.

        Raises:
            UserError: no sample at all can be used; on all ranks of the copy.
        """
        prompts = broadcast_prompts(lambda: list(self._draw(number)))
        self.num_drawn += number * mesh.num_replicas()
        return prompts

    def take_skipped(self) -> list[SkippedSample]:
        """Samples that could not be used since the last call; on the copy's first rank, nothing on the others."""
        skipped, self._loader.skipped[:] = list(self._loader.skipped), []
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; of the job's first rank."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a checkpoint. Raises UserError if the data are not the checkpoint's."""
        self._loader.load_state_dict(state)
        self.num_drawn = state["next_position"]
        self._iterator = None

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
