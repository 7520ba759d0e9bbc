"""The vision tower on megatron-core layers: frames in, one feature per vision token out. Families extend `VisionTower`.

A merge unit is a square of merge_size x merge_size patches, which the merger turns into one vision token. Patches are
always ordered by merge unit: the patches of a unit are neighbours in the packed sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from vcr1_kernels import SegmentLayout, frames_to_patches

from megatron_vcr1.data.encoding import VisionInput
from megatron_vcr1.model.attention import AttentionLayout, RotaryTables
from megatron_vcr1.model.config import VisionConfig
from megatron_vcr1.model.families.base import Grid
from megatron_vcr1.model.layer_specs import block_spec, recompute_in_backward

ROTARY_BASE = 10_000.0


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
    angles = (coordinates[:, :, None].float() / ROTARY_BASE**exponents).flatten(1)
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


class PatchEmbed(nn.Module):
    """The linear patch embedding. It equals the published 3-D convolution, whose stride is its kernel size."""

    def __init__(self, vision: VisionConfig, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.empty(vision.hidden_size, vision.patch_dim, dtype=config.params_dtype, device=device)
        )
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed flattened patches: [patches, patch_dim] -> [patches, hidden_size]."""
        return F.linear(patches, self.weight)


class PatchMerger(MegatronModule):
    """The merger: turns each merge unit of patches into one vision feature."""

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.unit_size = vision.hidden_size * vision.patches_per_token
        self.norm = build_module(
            backend.layer_norm(rms_norm=vision.normalization == "RMSNorm"),
            config=config,
            hidden_size=vision.hidden_size,
            eps=1e-6,
        )
        self.linear_fc1 = build_module(
            backend.column_parallel_linear(),
            self.unit_size,
            self.unit_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=groups.tp,
        )
        self.linear_fc2 = build_module(
            backend.row_parallel_linear(),
            self.unit_size,
            vision.out_hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=groups.tp,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Merge patches, which are ordered by merge unit: [patches, hidden_size] -> [tokens, out_hidden_size]."""
        # Each patch is normalized on its own; then the patches of a unit, which are neighbours, are concatenated.
        units = self.norm(hidden).view(-1, 1, self.unit_size)
        inner, _ = self.linear_fc1(units)
        output, _ = self.linear_fc2(F.gelu(inner))
        return output.squeeze(1)


class VisionTower(MegatronModule):
    """Patch embedding, transformer layers with attention within each temporal step, and patch merger.

    A family with attention windows overrides `order_units`, and names the layers that have them.
    """

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        *,
        windowed_layers: frozenset[int] = frozenset(),
    ) -> None:
        """Build this rank's shard.

        Args:
            vision: the tower's configuration.
            config: the same for megatron-core.
            backend: provides the linear layers and norms.
            windowed_layers: 1-based numbers of the layers with windowed attention.
        """
        super().__init__(config=config)
        self.vision = vision
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.patch_embed = PatchEmbed(vision, config)
        spec = block_spec(
            backend,
            num_layers=vision.num_layers,
            causal=False,
            final_norm=False,
            windowed_layers=windowed_layers,
        )
        self.decoder = TransformerBlock(
            config, spec, post_layer_norm=False, pre_process=True, post_process=True, pg_collection=groups
        )
        merger_config = dataclasses.replace(config, sequence_parallel=False)  # all ranks merge all patches
        self.merger = PatchMerger(vision, merger_config, backend, groups)

    def order_units(self, grid: Grid) -> tuple[Tensor, tuple[int, ...] | None]:
        """Choose the order in which the merge units of an image or video are packed.

        Returns:
            order: int64 [units]; order[i] is the raster index of the i-th unit. Temporal steps stay contiguous.
            windows: number of patches of each attention window, in that order; None without windowed attention.
        """
        return torch.arange(math.prod(grid) // self.vision.patches_per_token), None

    def forward(self, inputs: Sequence[VisionInput]) -> Tensor:
        """Encode images and videos in one packed pass.

        Args:
            inputs: at least one image or video; the frames may be on another device.

        Returns:
            [tokens, out_hidden_size]: the vision features of all inputs, in order.
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
        coordinates = coordinates.flatten(0, 1).to(embedded.device, non_blocking=True)
        features = self.merger(self._encode(embedded, coordinates, steps, windows))
        if windows is None:  # the units are in the order of the inputs
            return features
        starts = accumulate(map(len, orders), initial=0)
        units = torch.cat([order + start for order, start in zip(orders, starts, strict=False)])
        # The inverse permutation, from window order back to the order of the inputs.
        return features.index_select(0, units.argsort().to(features.device, non_blocking=True))

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
    ) -> Tensor:
        """Run the transformer layers.

        Under sequence parallelism, the patches are padded to a multiple of the tensor-parallel ranks.

        Args:
            hidden: [patches, hidden_size].
            coordinates: row and column of each patch, int64 [patches, 2].
            steps: number of patches of each temporal step, the segments of full attention.
            windows: number of patches of each attention window; None without windowed attention.

        Returns:
            [patches, hidden_size].
        """
        num_patches = len(hidden)
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        padding = -num_patches % ranks
        if padding:  # the padding becomes a segment of its own, which no patch attends to
            hidden, coordinates = (F.pad(x, (0, 0, 0, padding)) for x in (hidden, coordinates))
        hidden = hidden.unsqueeze(1)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        hidden = self.decoder(
            hidden,
            attention_mask=None,
            packed_seq_params=AttentionLayout(
                rope=RotaryTables.from_angles(rotary_angles(coordinates, self.vision.head_dim)),
                full=_bidirectional(steps, padding),
                windows=None if windows is None else _bidirectional(windows, padding),
            ),
        )
        if self.config.sequence_parallel:
            # Every rank continues with all patches and computes the same, so each receives the full gradient. In
            # backward it is only sliced, not reduced (tensor_parallel_output_grad=False).
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)[:num_patches]

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Freeze the modules of the given parts: "vision_tower" (patch embedding and layers), "merger" or both."""
        if "vision_tower" in parts:
            self.patch_embed.requires_grad_(False)
            self.decoder.requires_grad_(False)
        if "merger" in parts:
            self.merger.requires_grad_(False)


def with_zero_gradients(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return `x`, and make its backward pass give a gradient of zero to parameters that `x` does not depend on.

    A microbatch of text alone does not call the vision tower. Its loss must still have a gradient if only the tower is
    trained, and every parameter must get one for DDP to reduce its bucket during the backward pass.
    """
    return _ZeroGradients.apply(x, *(parameter for parameter in parameters if parameter.requires_grad))


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.parameters = parameters  # for their shapes only
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(p.new_zeros(()).expand_as(p) for p in ctx.parameters)


def _bidirectional(lengths: tuple[int, ...], padding: int) -> SegmentLayout:
    return SegmentLayout.packed((*lengths, padding) if padding else lengths, causal=False)
