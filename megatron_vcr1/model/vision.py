"""The vision tower on megatron-core layers: frames in, one feature per vision token out. Families extend `VisionTower`.

A merge unit is a square of merge_size x merge_size patches, which the merger turns into one vision token. Patches are
always ordered by merge unit: the patches of a unit are neighbours in the packed sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager
from vcr1_kernels import SegmentLayout, frames_to_patches

from megatron_vcr1.data.encoding import VisionInput
from megatron_vcr1.model.attention import AttentionLayout, RotaryTables
from megatron_vcr1.model.config import VISION_ROTARY_BASE, VisionConfig
from megatron_vcr1.model.families.base import Grid
from megatron_vcr1.model.layer_specs import block_spec, process_groups, recompute_in_backward
from megatron_vcr1.model.patch_layers import PatchEmbed, PatchMerger
from megatron_vcr1.model.vision_features import VisionFeatures
from megatron_vcr1.parallel import mesh


def patch_coordinates(grid: Grid, merge_size: int) -> Tensor:
    """Return the row and column of every patch in its frame, int64 [units, merge_size ** 2, 2]."""
    num_steps, height, width = grid
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    units = torch.stack((row, column), dim=-1).unfold(0, merge_size, merge_size).unfold(1, merge_size, merge_size)
    return units.permute(0, 1, 3, 4, 2).reshape(-1, merge_size**2, 2).repeat(num_steps, 1, 1)


def rotary_angles(coordinates: Tensor, head_dim: int) -> Tensor:
    """Compute two-axis rotary angles: half of the frequencies belong to the row, half to the column.

    Args:
        coordinates: row and column of each patch, int64 [patches, 2].
        head_dim: a multiple of 4.

    Returns:
        float32 [patches, head_dim]: the angles of all frequencies, repeated twice.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=coordinates.device) / (head_dim // 2)
    angles = (coordinates[:, :, None].float() / VISION_ROTARY_BASE**exponents).flatten(1)
    return torch.cat((angles, angles), dim=-1)


def join_inputs(inputs: Sequence[VisionInput], temporal_patch_size: int) -> list[VisionInput]:
    """Join neighbouring inputs of the same frame size into one video.

    Temporal steps do not attend to each other, so the features do not change, and many small videos together cost only
    the Python overhead of a single video. Inputs with an incomplete temporal patch are not joined: their last frame
    must be repeated.
    """
    runs: list[list[VisionInput]] = []
    key_before: object = None
    for item in inputs:
        is_whole = len(item.frames) % temporal_patch_size == 0
        key = (item.frames.shape[1:], item.frames.device) if is_whole else object()  # an object() equals nothing else
        if key == key_before:
            runs[-1].append(item)
        else:
            runs.append([item])
        key_before = key
    return [run[0] if len(run) == 1 else _join_run(run) for run in runs]


def _join_run(run: Sequence[VisionInput]) -> VisionInput:
    _, height, width = run[0].grid_thw
    num_steps = sum(item.grid_thw[0] for item in run)
    # The vision tower does not use the time between temporal patches, so it may be None.
    return VisionInput(torch.cat([item.frames for item in run]), (num_steps, height, width), seconds_per_grid=None)


class VisionTower(MegatronModule):
    """Patch embedding, transformer layers with attention within each temporal step, and patch merger.

    Families override the methods without a leading underscore.
    """

    patch_bias: ClassVar[bool] = False  # whether the patch embedding has a bias

    def __init__(self, vision: VisionConfig, config: TransformerConfig, backend: BackendSpecProvider) -> None:
        """Build this rank's shard.

        Args:
            vision: the tower's configuration.
            config: the same for megatron-core.
            backend: provides the linear layers and norms.
        """
        super().__init__(config=config)
        self.vision = vision
        self.patch_embed = PatchEmbed(vision, config, bias=self.patch_bias)
        self.decoder = self.build_layers(backend)
        self.merger = self.build_merger(backend)

    def build_layers(self, backend: BackendSpecProvider) -> MegatronModule:
        """Build the transformer layers, which `run_layers` runs."""
        return vision_block(self.config, backend, num_layers=self.vision.num_layers)

    def build_merger(self, backend: BackendSpecProvider, *, norm_of_units: bool = False) -> PatchMerger:
        """Build a patch merger, which every tensor-parallel rank applies to all patches."""
        config = dataclasses.replace(self.config, sequence_parallel=False)
        return PatchMerger(self.vision, config, backend, process_groups(config), norm_of_units=norm_of_units)

    def order_units(self, grid: Grid) -> tuple[Tensor, tuple[int, ...] | None]:
        """Choose the order in which the merge units of an image or video are packed.

        Returns:
            order: int64 [units]; order[i] is the raster index of the i-th unit. Temporal steps stay contiguous.
            windows: number of patches of each attention window, in that order; None without windowed attention.
        """
        return torch.arange(math.prod(grid) // self.vision.patches_per_token), None

    def add_positions(self, embedded: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Add learned positions, if the tower has any, to the embedded patches of all inputs.

        Args:
            embedded: [patches, hidden_size], in the order of `order_units`.
            grids: patches of each input in time, height, width.

        Returns:
            [patches, hidden_size].
        """
        return embedded

    def run_layers(self, hidden: Tensor, layout: AttentionLayout) -> list[Tensor]:
        """Run the transformer layers.

        Args:
            hidden: [patches, 1, hidden_size]; under sequence parallelism, this rank's part of the patches.
            layout: the attention's segments and RoPE tables.

        Returns:
            The hidden states that `merge` merges, shaped as `hidden`.
        """
        return [self.decoder(hidden, attention_mask=None, packed_seq_params=layout)]

    def merge(self, states: Sequence[Tensor]) -> VisionFeatures:
        """Merge the patches of the states that `run_layers` returned, [patches, hidden_size] each."""
        return VisionFeatures(self.merger(states[0]))

    def forward(self, inputs: Sequence[VisionInput]) -> VisionFeatures:
        """Encode images and videos in one packed pass.

        Args:
            inputs: at least one image or video; the frames may be on another device.

        Returns:
            The features of the vision tokens of all inputs, in order.
        """
        vision = self.vision
        inputs = join_inputs(inputs, vision.temporal_patch_size)
        grids = [item.grid_thw for item in inputs]
        steps = tuple(height * width for num_steps, height, width in grids for _ in range(num_steps))
        ordered = [self.order_units(grid) for grid in grids]
        orders = [order for order, _ in ordered]
        # Windows do not cross temporal steps, so `steps` describes the segments of full attention in this order too.
        lengths = [windows for _, windows in ordered if windows is not None]
        windows = tuple(chain.from_iterable(lengths)) if lengths else None

        def all_patches() -> Tensor:
            return torch.cat([self._patches(item, order) for item, order in zip(inputs, orders, strict=True)])

        coordinates = torch.cat(
            [patch_coordinates(grid, vision.merge_size)[order] for grid, order in zip(grids, orders, strict=True)]
        )
        # Autograd keeps no patches: they are recomputed from the frames, which are uint8 and kept anyway.
        patches = all_patches()
        with recompute_in_backward(patches, all_patches):
            embedded = self.patch_embed(patches)
        embedded = self.add_positions(embedded, grids)
        coordinates = coordinates.flatten(0, 1).to(embedded.device, non_blocking=True)
        features = self.merge(self._encode(embedded, coordinates, steps, windows))
        if windows is None:  # the units are in the order of the inputs
            return features
        starts = accumulate(map(len, orders), initial=0)
        units = torch.cat([order + start for order, start in zip(orders, starts, strict=False)])
        # The inverse permutation, from window order back to the order of the inputs.
        return features.reordered(units.argsort().to(embedded.device, non_blocking=True))

    def _patches(self, item: VisionInput, order: Tensor) -> Tensor:
        """Return the normalized patches of an input, [patches, patch_dim], with its merge units in the given order."""
        weight = self.patch_embed.weight
        return frames_to_patches(
            item.frames.to(weight.device, non_blocking=True),
            patch_size=self.vision.patch_size,
            temporal_patch_size=self.vision.temporal_patch_size,
            merge_size=self.vision.merge_size,
            mean=self.vision.pixel_mean,
            std=self.vision.pixel_std,
            unit_order=order.to(weight.device, non_blocking=True),
            dtype=weight.dtype,
        )

    def _encode(
        self, hidden: Tensor, coordinates: Tensor, steps: tuple[int, ...], windows: tuple[int, ...] | None
    ) -> list[Tensor]:
        """Run the transformer layers.

        Under sequence parallelism, the patches are padded to a multiple of the tensor-parallel ranks.

        Args:
            hidden: [patches, hidden_size].
            coordinates: row and column of each patch, int64 [patches, 2].
            steps: number of patches of each temporal step, the segments of full attention.
            windows: number of patches of each attention window; None without windowed attention.

        Returns:
            The states that `run_layers` returns, [patches, hidden_size] each.
        """
        num_patches = len(hidden)
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        padding = -num_patches % ranks
        if padding:  # the padding becomes a segment of its own, which no patch attends to
            hidden, coordinates = (F.pad(x, (0, 0, 0, padding)) for x in (hidden, coordinates))
        hidden = hidden.unsqueeze(1)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        layout = AttentionLayout(
            rope=RotaryTables.from_angles(rotary_angles(coordinates, self.vision.head_dim)),
            full=_bidirectional(steps, padding),
            windows=None if windows is None else _bidirectional(windows, padding),
        )
        states = self.run_layers(hidden, layout)
        if self.config.sequence_parallel:
            # Every rank continues with all patches and computes the same, so each receives the full gradient. In
            # backward it is only sliced, not reduced (tensor_parallel_output_grad=False).
            gather = partial(tensor_parallel.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False)
            states = [gather(state) for state in states]
        return [state.squeeze(1)[:num_patches] for state in states]

    @property
    def is_replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the whole tower and encodes a part of the frames."""
        return self.config.tensor_model_parallel_size < parallel_state.get_tensor_model_parallel_world_size()

    def sum_gradients(self) -> None:
        """Sum the gradients over the tensor-parallel ranks if each of them has encoded a part of the frames.

        All of these ranks must call it once per optimizer step, after the backward passes. megatron-core's DDP has put
        the gradients into `main_grad`.
        """
        if not self.is_replicated:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        gradients = [parameter.main_grad for parameter in self.parameters() if parameter.requires_grad]
        with _coalescing_manager(group):  # one collective
            for gradient in gradients:
                dist.all_reduce(gradient, group=group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's sharded state dict."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_replicated:
            # The layers of a whole tower do not know that other tensor-parallel ranks hold the same weights.
            for shard in nested_values(state):
                shard.replica_id = (0, mesh.frame_rank(), mesh.weight_holder_index())
        return state

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Freeze the modules of the given parts: "vision_tower" (patch embedding and layers), "merger" or both."""
        if "vision_tower" in parts:
            self.patch_embed.requires_grad_(False)
            self.decoder.requires_grad_(False)
        if "merger" in parts:
            self.merger.requires_grad_(False)


def vision_block(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    *,
    num_layers: int,
    windowed_layers: frozenset[int] = frozenset(),
) -> TransformerBlock:
    """Build consecutive layers of a vision tower, without a norm after them.

    Args:
        config: megatron-core's configuration of the tower.
        backend: provides the linear layers and norms.
        num_layers: number of layers.
        windowed_layers: 1-based numbers of the layers with windowed attention.
    """
    spec = block_spec(backend, num_layers=num_layers, causal=False, final_norm=False, windowed_layers=windowed_layers)
    return TransformerBlock(
        config,
        spec,
        post_layer_norm=False,
        pre_process=True,
        post_process=True,
        pg_collection=process_groups(config),
    )


def _bidirectional(lengths: tuple[int, ...], padding: int) -> SegmentLayout:
    return SegmentLayout.packed((*lengths, padding) if padding else lengths, causal=False)
