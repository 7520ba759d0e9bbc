"""The exact number of parameters on each rank, computed from the shapes of the model's tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import hf_shapes, model_layout
from megatron_vcr1.planning.job import Layout

# These tensors are sharded across tensor-parallel ranks, except for a whole vision tower; all others are replicated.
_SHARDED = re.compile(
    r"(word_embeddings\.weight|output_layer\.weight|linear_(qkv|fc1)\.(weight|bias)|linear_(proj|fc2)\.weight)$"
)


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Number of parameters on a rank of one pipeline stage."""

    vision: int  # vision tower and merger
    text: int  # layers and norms
    embedding: int  # embedding and head

    @property
    def total(self) -> int:
        return self.vision + self.text + self.embedding


@cache
def _sizes(config: ModelConfig) -> dict[str, int]:
    """Return the parameters of every tensor in training, the padding of the vision MLP included."""
    return {key: math.prod(tensor.shape) for key, tensor in model_layout(config).items()}


@cache
def num_parameters(config: ModelConfig) -> int:
    """Return the parameters of the whole published model; tied embeddings count once."""
    return sum(map(math.prod, hf_shapes(model_layout(config)).values()))


def stage_parameters(config: ModelConfig, layout: Layout) -> tuple[StageParameters, ...]:
    """Return the parameters on a rank of each stage, first to last.

    With tied embeddings, the last stage holds a second copy of the embedding matrix.
    """
    return _stage_parameters(config, layout.tensor, layout.of_vision.tensor, layout.stages(config))


@cache
def _stage_parameters(
    config: ModelConfig, text_ranks: int, vision_ranks: int, stages: tuple[int, ...]
) -> tuple[StageParameters, ...]:
    last = len(stages) - 1
    stage_of_layer = [stage for stage, num_layers in enumerate(stages) for _ in range(num_layers)]
    counts = [[0, 0, 0] for _ in stages]  # vision, text, embedding
    for key, size in _sizes(config).items():
        # The QKV weight is sharded even if there are fewer key-value heads than ranks: then the ranks gather the
        # projection's output, not its weight.
        num_ranks = vision_ranks if key.startswith("vision_tower.") else text_ranks
        size = size // num_ranks if _SHARDED.search(key) else size
        layer = re.match(r"language_model\.decoder\.layers\.(\d+)\.", key)
        if key.startswith("vision_tower."):
            counts[0][0] += size
        elif layer:
            counts[stage_of_layer[int(layer[1])]][1] += size
        elif "word_embeddings" in key:
            counts[0][2] += size
            if config.text.tied_embeddings and last > 0:
                counts[last][2] += size
        elif "output_layer" in key:
            counts[last][2] += size
        else:  # the final norm
            counts[last][1] += size
    return tuple(StageParameters(*stage_counts) for stage_counts in counts)
