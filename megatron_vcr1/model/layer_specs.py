"""The modules that layers are built from: TransformerEngine's if it is installed, otherwise the local ones below.

The local modules use TransformerEngine's fused parameter names, so both backends read and write the same checkpoints.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from vcr1_kernels import rms_norm, swiglu

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.attention import AttentionLayout, PackedAttention, PackedSelfAttention
from megatron_vcr1.parallel import mesh

logger = logging.getLogger(__name__)


class RMSNorm(nn.RMSNorm):
    """RMSNorm of vcr1_kernels, with the attribute that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        set_sequence_parallel_attribute(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension; [..., hidden_size] to the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, with the attribute that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        set_sequence_parallel_attribute(self, config)


def set_sequence_parallel_attribute(module: nn.Module, config: TransformerConfig) -> None:
    """Mark the parameters of a norm, so that megatron-core sums their gradients over the tensor-parallel ranks.

    Under sequence parallelism each rank normalizes only its part of the tokens, so each has a partial gradient.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _parameter_device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def process_groups(config: TransformerConfig) -> ProcessGroupCollection:
    """Return megatron-core's process groups for the modules of a configuration.

    A vision tower that every tensor-parallel rank holds whole is configured for one rank: this rank alone.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if config.tensor_model_parallel_size < groups.tp.size():
        groups.tp = mesh.own_group()
    return groups


class PackedMLP(MLP):
    """megatron-core's MLP with vcr1_kernels' SwiGLU, which adds its output bias itself.

    megatron-core's MLP returns the bias parameter for the layer to add. Under ``recompute_modules=["mlp"]``, the bias
    becomes an output of the checkpointed function and gets an autograd history of its own, and backward then recurses
    through all layers and microbatches.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, **kwargs: Any) -> None:
        # Newer layers of megatron-core pass process groups and a name in `kwargs`, which are not needed here.
        group = process_groups(config).tp
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)
        # TransformerEngine's layer always returns its bias. On the CPU it is cheaper to add it in place once than in
        # SwiGLU, which adds it again in backward.
        self.linear_fc1.returns_bias = config.gated_linear_unit and _parameter_device(config).type == "cuda"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Apply the MLP; [tokens, 1, hidden_size] to the same shape, and None for a bias."""
        inner, inner_bias = self.linear_fc1(hidden_states)
        if self.config.gated_linear_unit:
            activation = partial(swiglu, bias=inner_bias)
        else:
            activation = self.activation_func
            inner = inner if inner_bias is None else inner + inner_bias
        activated = activation(inner)
        # linear_fc2 saves its input for backward; the activation saves `inner`, from which it is recomputed.
        with recompute_in_backward(activated, lambda: activation(inner.detach())):
            output, bias = self.linear_fc2(activated)
        return (output if bias is None else output + bias), None


@contextmanager
def recompute_in_backward(result: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Stop autograd from saving a tensor in the with-block; backward recomputes it instead.

    Use it for tensors that are cheap to compute from inputs that are saved anyway.

    Trap: a weight that is saved in the with-block reaches the backward pass without its Python attributes, such as
    `main_grad`. The linear layers tolerate that: they keep their own reference to `main_grad`, and return None instead
    of an empty tensor as the weight's gradient.

    Args:
        result: the tensor; it may be saved under any shape.
        compute: recomputes it, from detached inputs.
    """
    start, size = result.data_ptr(), result.numel()

    # Tensors are compared by address and size, since layers may save a view of `result`.
    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.data_ptr() == start and tensor.numel() == size else tensor

    def unpack(saved: Tensor | torch.Size) -> Tensor:
        return saved if isinstance(saved, Tensor) else compute().view(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class TokenSelectingLayer(TransformerLayer):
    """The last layer of the language model. After its attention it computes only the tokens that the layout selects.

    The other tokens are needed only as keys and values of this attention.
    """

    def _forward_attention(
        self, hidden_states: Tensor, *, packed_seq_params: AttentionLayout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        output_with_bias = self.self_attention(hidden_states, attention_mask=None, packed_seq_params=packed_seq_params)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        # The attention has returned the selected tokens only, so the residual is reduced to them too.
        with self.bias_dropout_add_exec_handler():
            return add(output_with_bias, packed_seq_params.select(hidden_states), self.hidden_dropout), None


class FeatureAddingLayer(TransformerLayer):
    """A language layer that adds the layout's vision features to its output; see `LayerFeatures`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run the layer; [tokens, 1, hidden_size] to the same shape, and megatron-core's context."""
        hidden, context = super().forward(*args, **kwargs)
        features = kwargs["packed_seq_params"].features
        return (hidden if features is None else features.add(hidden, self.layer_number)), context


class InPlaceBiasColumnParallelLinear(ColumnParallelLinear):
    """A ColumnParallelLinear that adds its bias in place, or returns it to a caller that sets `returns_bias`.

    megatron-core's writes the sum with the bias to a new tensor, unless it returns the bias.
    """

    returns_bias = False

    def __init__(self, *args: Any, skip_bias_add: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=True, **kwargs)  # the bias is returned, and `forward` adds it

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the layer: [tokens, 1, input_size] -> [tokens, 1, output_size / ranks], and the bias if not added."""
        output, bias = super().forward(input_, *args, **kwargs)
        if bias is None or self.returns_bias:
            return output, bias
        return output.add_(bias), None


class LayerNormColumnParallelLinear(InPlaceBiasColumnParallelLinear):
    """A norm followed by a column-parallel linear layer, with TransformerEngine's parameter names.

    It saves only the norm's input for backward, and recomputes the norm's output.
    """

    layer_norm_bias: Tensor | None

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        # The norm module itself is not kept: only its parameters, under TransformerEngine's names.
        norm = (RMSNorm if config.normalization == "RMSNorm" else LayerNorm)(config, input_size)
        self.layer_norm_weight = norm.weight
        self.register_parameter("layer_norm_bias", getattr(norm, "bias", None))

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the norm; [..., input_size] to the same shape."""
        epsilon = self.config.layernorm_epsilon
        if self.layer_norm_bias is None:
            return rms_norm(x, self.layer_norm_weight, epsilon)
        return F.layer_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.layer_norm_bias, epsilon)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the norm and the linear layer; shapes as in InPlaceBiasColumnParallelLinear."""
        normalized = self.normalize(input_)
        with recompute_in_backward(normalized, lambda: self.normalize(input_.detach())):
            return super().forward(normalized, *args, **kwargs)


class LocalBackend(LocalSpecProvider):
    """The local backend: megatron-core's parallel linear layers, and norms of torch and vcr1_kernels."""

    def column_parallel_linear(self) -> type:
        return InPlaceBiasColumnParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm if rms_norm else LayerNorm


def choose_backend(requested: Literal["auto", "local", "transformer_engine"]) -> BackendSpecProvider:
    """Choose the backend of the layers, and log it.

    Args:
        requested: the setting model.layer_spec. "auto" chooses TransformerEngine if it is installed and there is a GPU.

    Raises:
        UserError: TransformerEngine is requested by name but not installed or without a GPU, or it does not load.
    """
    reason = "as requested" if requested == "local" else _missing_for_transformer_engine()
    if reason is None:
        return transformer_engine_backend()
    if requested == "transformer_engine":
        raise UserError(
            f"model.layer_spec is 'transformer_engine', but {reason}; install it on a machine with GPUs as "
            "docs/install.md describes, or set model.layer_spec = 'local'"
        )
    logger.info("layers: local (%s)", reason)
    return LocalBackend()


def _missing_for_transformer_engine() -> str | None:
    """Return why TransformerEngine cannot be used here; None if it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    return None if torch.cuda.is_available() else "transformer_engine needs a GPU"


def transformer_engine_backend() -> BackendSpecProvider:
    """Load TransformerEngine's modules; no other module of the package imports it.

    Raises:
        UserError: TransformerEngine does not load.
    """
    try:
        # Import it before megatron-core does. megatron-core treats a TransformerEngine that fails to load as if it were
        # not installed, and fails later with an error that hides the cause.
        import transformer_engine.pytorch
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"transformer_engine is installed but does not load: {error}; install a build for this torch and CUDA, or "
            "set model.layer_spec = 'local'"
        ) from error
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    logger.info("layers: transformer_engine %s", transformer_engine.__version__)
    return TESpecProvider()


def block_spec(
    backend: BackendSpecProvider,
    *,
    num_layers: int,
    causal: bool,
    final_norm: bool,
    qk_norm: bool = False,
    windowed_layers: frozenset[int] = frozenset(),
    adds_features: bool = False,
    selects_tokens: bool = False,
    mlps: Mapping[int, ModuleSpec] = MappingProxyType({}),
) -> TransformerBlockSubmodules:
    """Describe the layers of one tower on this pipeline stage.

    Args:
        backend: provides the linear layers and norms.
        num_layers: number of layers on this stage.
        causal: whether attention is causal.
        final_norm: whether an RMSNorm follows the tower's last layer.
        qk_norm: whether an RMSNorm over each head precedes the rotary positions of queries and keys.
        windowed_layers: 1-based numbers of the layers with windowed attention.
        adds_features: whether the layers are `FeatureAddingLayer`s, except for one that selects tokens.
        selects_tokens: whether the last of these layers is a `TokenSelectingLayer`.
        mlps: other MLPs than `PackedMLP`, by 0-based index of the layer on this stage.
    """
    # megatron-core passes the layer number when it builds a layer.
    attention = partial(PackedAttention, windowed_layers=windowed_layers)
    layer = FeatureAddingLayer if adds_features else TransformerLayer
    layers = []
    for index in range(num_layers):
        layer_spec = partial(_layer_spec, backend, causal=causal, qk_norm=qk_norm, mlp=mlps.get(index))
        if selects_tokens and index == num_layers - 1:
            last = partial(PackedAttention, selects_tokens=True)
            layers.append(layer_spec(attention=last, layer=TokenSelectingLayer))
        else:
            layers.append(layer_spec(attention=attention, layer=layer))
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=backend.layer_norm(rms_norm=True) if final_norm else None
    )


def _layer_spec(
    backend: BackendSpecProvider,
    *,
    causal: bool,
    qk_norm: bool,
    attention: partial[PackedAttention],
    layer: type[TransformerLayer],
    mlp: ModuleSpec | None,
) -> ModuleSpec:
    head_norm = backend.layer_norm(rms_norm=True, for_qk=True) if qk_norm else IdentityOp
    norm_linear = backend.column_parallel_layer_norm_linear()
    self_attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=norm_linear,
            core_attention=attention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    # The first layer of a PackedMLP includes the norm before it.
    norm = IdentityOp if mlp is None else backend.layer_norm(rms_norm=True)
    packed_mlp = ModuleSpec(
        module=PackedMLP,
        submodules=MLPSubmodules(linear_fc1=norm_linear, linear_fc2=backend.row_parallel_linear()),
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp or packed_mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
