"""How many numbers each rank holds: exact, from the model's tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from cluster_plan.job import Layout
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout

# Divided over tensor-parallel ranks; all other tensors are whole on each.
_DIVIDED = re.compile(
    r"(word_embeddings\.weight|output_layer\.weight|linear_(qkv|fc1)\.(weight|bias)|linear_(proj|fc2)\.weight)$"
)


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Numbers that a rank of one pipeline stage holds."""

    vision: int  # tower and merger
    text: int  # layers and norms
    embedding: int  # and head

    @property
    def total(self) -> int:
        return self.vision + self.text + self.embedding


@dataclass(frozen=True, slots=True)
class _Tensor:
    key: str
    size: int
    is_divided: bool
    layer: int | None  # of the language model

    def on_a_rank(self, ranks: int) -> int:
        """Fewer key-value heads than ranks are divided, too: ranks gather the projection's output, not its weight."""
        return self.size // ranks if self.is_divided else self.size


@cache
def _tensors(config: ModelConfig) -> tuple[_Tensor, ...]:
    found = []
    for key, tensor in model_layout(config).items():
        layer = re.match(r"language_model\.decoder\.layers\.(\d+)\.", key)
        size = math.prod(tensor.shape)
        found.append(_Tensor(key, size, _DIVIDED.search(key) is not None, int(layer[1]) if layer else None))
    return tuple(found)


@cache
def num_parameters(config: ModelConfig) -> int:
    """Of the whole model, tied embeddings once."""
    return sum(tensor.size for tensor in _tensors(config))


def stage_parameters(config: ModelConfig, layout: Layout) -> tuple[StageParameters, ...]:
    """What a rank of each stage holds, first to last. With tied embeddings the last stage has a copy of its own."""
    return _stage_parameters(config, layout.tensor, layout.stages(config))


@cache
def _stage_parameters(config: ModelConfig, ranks: int, stages: tuple[int, ...]) -> tuple[StageParameters, ...]:
    last = len(stages) - 1
    stage_of_layer = [stage for stage, layers in enumerate(stages) for _ in range(layers)]
    counts = [[0, 0, 0] for _ in stages]
    for tensor in _tensors(config):
        size = tensor.on_a_rank(ranks)
        if tensor.key.startswith("vision_tower."):
            counts[0][0] += size
        elif tensor.layer is not None:
            counts[stage_of_layer[tensor.layer]][1] += size
        elif "word_embeddings" in tensor.key:
            counts[0][2] += size
            if config.text.tied_embeddings and last > 0:
                counts[last][2] += size
        elif "output_layer" in tensor.key:
            counts[last][2] += size
        else:  # the last norm
            counts[last][1] += size
    return tuple(StageParameters(*of_stage) for of_stage in counts)
