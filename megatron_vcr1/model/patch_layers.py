"""The first and the last layer of a vision tower: the patch embedding and the patch merger."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_vcr1.model.config import VisionConfig


def new_parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """Create a parameter, filled with random numbers if the configuration asks for that, otherwise undefined."""
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    if config.perform_initialization:
        config.init_method(parameter)
    return parameter


class PatchEmbed(nn.Module):
    """The linear patch embedding. It equals the published 3-D convolution, whose stride is its kernel size."""

    def __init__(self, vision: VisionConfig, config: TransformerConfig, *, bias: bool) -> None:
        super().__init__()
        self.weight = new_parameter(config, vision.hidden_size, vision.patch_dim)
        self.bias = new_parameter(config, vision.hidden_size) if bias else None

    def forward(self, patches: Tensor) -> Tensor:
        """Embed flattened patches: [patches, patch_dim] -> [patches, hidden_size]."""
        return F.linear(patches, self.weight, self.bias)


class PatchMerger(MegatronModule):
    """The merger: turns each merge unit of patches into one vision feature."""

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        groups: ProcessGroupCollection,
        *,
        norm_of_units: bool = False,
    ) -> None:
        """Build this rank's shard.

        Args:
            vision: the tower's configuration.
            config: the same for megatron-core, without sequence parallelism.
            backend: provides the linear layers and norms.
            groups: process groups.
            norm_of_units: normalize the concatenated patches of a unit; otherwise each patch on its own.
        """
        super().__init__(config=config)
        self.unit_size = vision.hidden_size * vision.patches_per_token
        self.norm_of_units = norm_of_units
        self.norm = build_module(
            backend.layer_norm(rms_norm=vision.normalization == "RMSNorm"),
            config=config,
            hidden_size=self.unit_size if norm_of_units else vision.hidden_size,
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
        # The patches of a unit, which are neighbours, are concatenated before or after the norm.
        normalized = self.norm(hidden.reshape(-1, self.unit_size) if self.norm_of_units else hidden)
        units = normalized.view(-1, 1, self.unit_size)
        inner, _ = self.linear_fc1(units)
        output, _ = self.linear_fc2(F.gelu(inner))
        return output.squeeze(1)
