"""How many numbers each rank holds: exact, from the model's tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from cluster_plan.job import Layout
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout

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


@cache
def num_parameters(config: ModelConfig) -> int:
    """Of the whole model, tied embeddings once."""
    return sum(math.prod(tensor.shape) for tensor in model_layout(config).values())


@cache
def stage_parameters(config: ModelConfig, layout: Layout) -> tuple[StageParameters, ...]:
    """What a rank of each stage holds, first to last. With tied embeddings the last stage has a copy of its own."""
    last = layout.pipeline - 1
    stage_of_layer = [stage for stage, layers in enumerate(layout.stages(config)) for _ in range(layers)]
    counts = [[0, 0, 0] for _ in range(layout.pipeline)]
    for key, tensor in model_layout(config).items():
        size = _on_a_rank(tensor, layout.tensor)
        if key.startswith("vision_tower."):
            counts[0][0] += size
        elif "word_embeddings" in key:
            counts[0][2] += size
            if config.text.tied_embeddings and last > 0:
                counts[last][2] += size
        elif "output_layer" in key:
            counts[last][2] += size
        elif match := re.search(r"decoder\.layers\.(\d+)\.", key):
            counts[stage_of_layer[int(match[1])]][1] += size
        else:  # the last norm
            counts[last][1] += size
    return tuple(StageParameters(*of_stage) for of_stage in counts)


def _on_a_rank(tensor: TensorLayout, ranks: int) -> int:
    """Fewer key-value heads than ranks are divided, too: ranks gather the projection's output, not its weight."""
    size = math.prod(tensor.shape)
    return size // ranks if _DIVIDED.search(tensor.key) else size
