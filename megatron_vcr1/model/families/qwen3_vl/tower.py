"""The vision tower of Qwen3-VL: learned positions, and features of several of its layers (DeepStack)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_vcr1.model.attention import AttentionLayout
from megatron_vcr1.model.families.base import Grid
from megatron_vcr1.model.families.qwen3_vl.config import Qwen3VisionConfig, segment_bounds
from megatron_vcr1.model.patch_layers import new_parameter
from megatron_vcr1.model.vision import VisionTower, vision_block
from megatron_vcr1.model.vision_features import VisionFeatures


class ModuleSequence(MegatronModule):
    """A list of megatron-core modules. Unlike nn.ModuleList, it keeps their sharding in checkpoints."""

    def __init__(self, config: TransformerConfig, modules: Iterable[MegatronModule]) -> None:
        super().__init__(config=config)
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """Iterate over the modules."""
        return iter(self.children())


class DeepStackTower(VisionTower):
    """A vision tower that also returns the merged patches of several layers.

    Its layers are divided into segments, blocks that end where a feature is taken, because full recomputation returns
    no states from within a block.
    """

    patch_bias = True
    vision: Qwen3VisionConfig

    def __init__(self, vision: Qwen3VisionConfig, config: TransformerConfig, backend: BackendSpecProvider) -> None:
        super().__init__(vision, config, backend)
        self.position_embedding = new_parameter(config, vision.positions_per_side**2, vision.hidden_size)
        mergers = (self.build_merger(backend, norm_of_units=True) for _ in vision.deepstack_layers)
        self.deepstack_mergers = ModuleSequence(config, mergers)

    def build_layers(self, backend: BackendSpecProvider) -> MegatronModule:
        segments = (
            vision_block(dataclasses.replace(self.config, num_layers=end - start), backend, num_layers=end - start)
            for start, end in segment_bounds(self.vision)
        )
        return ModuleSequence(self.config, segments)

    def add_positions(self, embedded: Tensor, grids: Sequence[Grid]) -> Tensor:
        # All temporal steps of an input have the same positions.
        inputs = embedded.split([math.prod(grid) for grid in grids])
        parts = [
            part.view(num_steps, height * width, -1) + self._positions(height, width).to(embedded.dtype)
            for part, (num_steps, height, width) in zip(inputs, grids, strict=True)
        ]
        return torch.cat([part.flatten(0, 1) for part in parts])

    def _positions(self, height: int, width: int) -> Tensor:
        """Interpolate the learned positions to the patches of a temporal step, float32 [patches, hidden_size].

        The corners of the two grids coincide. Patches are ordered by merge unit.
        """
        side, merge = self.vision.positions_per_side, self.vision.merge_size
        table = self.position_embedding.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        positions = F.interpolate(table, size=(height, width), mode="bilinear", align_corners=True)[0]
        units = positions.view(-1, height // merge, merge, width // merge, merge).permute(1, 3, 2, 4, 0)
        return units.flatten(0, 3)

    def run_layers(self, hidden: Tensor, layout: AttentionLayout) -> list[Tensor]:
        states = []
        for segment in self.decoder:
            hidden = segment(hidden, attention_mask=None, packed_seq_params=layout)
            states.append(hidden)
        return states

    def merge(self, states: Sequence[Tensor]) -> VisionFeatures:
        # If the last layer is a DeepStack layer, its state is merged in both ways.
        features = [merger(state) for merger, state in zip(self.deepstack_mergers, states, strict=False)]
        return VisionFeatures(self.merger(states[-1]), torch.stack(features) if features else None)

    def freeze(self, parts: tuple[str, ...]) -> None:
        super().freeze(parts)
        if "vision_tower" in parts:
            self.position_embedding.requires_grad_(False)
        if "merger" in parts:
            self.deepstack_mergers.requires_grad_(False)
