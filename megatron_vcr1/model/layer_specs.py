"""Which modules the layers are made of: TransformerEngine's where it is installed, megatron-core's own otherwise.

Both give the same checkpoint keys (TransformerEngine's fused names), so a checkpoint does not tell which one wrote it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from vcr1_kernels import rms_norm, swiglu

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.attention import AttentionLayout, PackedAttention

logger = logging.getLogger(__name__)


class RMSNorm(nn.RMSNorm):
    """vcr1_kernels' RMSNorm, marked so that its gradient is summed over the ranks of a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        set_sequence_parallel_attribute(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, marked in the same way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(config))
        set_sequence_parallel_attribute(self, config)


def set_sequence_parallel_attribute(module: nn.Module, config: TransformerConfig) -> None:
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _parameter_device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


class PackedMLP(MLP):
    """megatron-core's MLP with vcr1_kernels' SwiGLU inside, which adds its output bias itself.

    megatron-core's own hands the bias parameter out, to be added by the layer. Under ``recompute_modules=["mlp"]`` it
    becomes an output of the checkpointed function and gets a history of its own: backward then recurses through all
    layers and microbatches.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """[rows, 1, hidden_size] to the same shape."""
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        activation = swiglu if self.config.gated_linear_unit else self.activation_func
        activated = activation(inner)
        with recompute_in_backward(activated, lambda: activation(inner.detach())):
            output, bias = self.linear_fc2(activated)
        return (output if bias is None else output + bias), None


@contextmanager
def recompute_in_backward(result: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Within, autograd keeps nothing of a result for the backward pass, which computes it again.

    For results that cost next to nothing, of inputs that are kept anyhow. A weight that is saved within comes back
    without its Python attributes: the layers hold on to its `main_grad` themselves, and return no gradient of it where
    they would have returned an empty one.
    """
    start, size = result.data_ptr(), result.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.data_ptr() == start and tensor.numel() == size else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else compute().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class TokenSelectingLayer(TransformerLayer):
    """The last layer: behind its attention it computes nothing but the rows that the layout selects.

    Nothing reads the other rows but as keys and values of this attention.
    """

    def _forward_attention(
        self, hidden_states: Tensor, *, packed_seq_params: AttentionLayout, **kwargs: Any
    ) -> tuple[Tensor, None]:
        output_with_bias = self.self_attention(hidden_states, attention_mask=None, packed_seq_params=packed_seq_params)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(output_with_bias, packed_seq_params.select(hidden_states), self.hidden_dropout), None


class InPlaceBiasColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's, which would write the sum with its bias, or have it written, to a new tensor."""

    def __init__(self, *args: Any, skip_bias_add: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=True, **kwargs)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[rows, 1, input_size] to [rows, 1, this rank's output_size]; never leaves the bias to the caller."""
        output, bias = super().forward(input_, *args, **kwargs)
        return (output if bias is None else output.add_(bias)), None


class LayerNormColumnParallelLinear(InPlaceBiasColumnParallelLinear):
    """A norm and the linear layer behind it, under the names of TransformerEngine's; keeps the norm's input alone."""

    layer_norm_bias: Tensor | None

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = (RMSNorm if config.normalization == "RMSNorm" else LayerNorm)(config, input_size)
        self.layer_norm_weight = norm.weight
        self.register_parameter("layer_norm_bias", getattr(norm, "bias", None))

    def normalize(self, x: Tensor) -> Tensor:
        """[..., input_size] to the same shape."""
        epsilon = self.config.layernorm_epsilon
        if self.layer_norm_bias is None:
            return rms_norm(x, self.layer_norm_weight, epsilon)
        return F.layer_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.layer_norm_bias, epsilon)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As InPlaceBiasColumnParallelLinear."""
        normed = self.normalize(input_)
        with recompute_in_backward(normed, lambda: self.normalize(input_.detach())):
            return super().forward(normed, *args, **kwargs)


class LocalBackend(LocalSpecProvider):
    """megatron-core's parallel linears, torch's norms."""

    def column_parallel_linear(self) -> type:
        return InPlaceBiasColumnParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm if rms_norm else LayerNorm


def choose_backend(requested: Literal["auto", "local", "transformer_engine"]) -> BackendSpecProvider:
    """The layers' backend, named in the log.

    Raises:
        UserError: TransformerEngine was asked for by name and there is none, or no GPU; or it is there and broken.
    """
    missing = "as asked" if requested == "local" else _missing_for_transformer_engine()
    if missing is None:
        return transformer_engine_backend()
    if requested == "transformer_engine":
        raise UserError(
            f"model.layer_spec is 'transformer_engine', but {missing}; examples/README.md has its installation on a "
            "machine with GPUs; or use 'local'"
        )
    logger.info("layers: local (%s)", missing)
    return LocalBackend()


def _missing_for_transformer_engine() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    return None if torch.cuda.is_available() else "transformer_engine needs a GPU"


def transformer_engine_backend() -> BackendSpecProvider:
    """The one door to TransformerEngine. Raises UserError if it does not load."""
    try:
        import transformer_engine.pytorch  # megatron-core would take a broken one for none, and fail later
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"transformer_engine is installed and does not load: {error}; install one for this torch and CUDA, or set "
            "model.layer_spec = 'local'"
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
    windowed_layers: frozenset[int] = frozenset(),
    selects_tokens: bool = False,
) -> TransformerBlockSubmodules:
    """Layers of one tower's share on this stage.

    Args:
        num_layers: on this pipeline stage.
        windowed_layers: 1-based numbers of the layers that attend within windows.
        selects_tokens: the last of them is a `TokenSelectingLayer`.
    """
    layer_spec = partial(_layer_spec, backend, causal=causal)
    layers = [layer_spec(attention=partial(PackedAttention, windowed_layers=windowed_layers))] * num_layers
    if selects_tokens:
        layers[-1] = layer_spec(attention=partial(PackedAttention, selects_tokens=True), layer=TokenSelectingLayer)
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=backend.layer_norm(rms_norm=True) if final_norm else None
    )


def _layer_spec(
    backend: BackendSpecProvider,
    *,
    causal: bool,
    attention: partial[PackedAttention],
    layer: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    norm_linear = backend.column_parallel_layer_norm_linear()
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=norm_linear,
            core_attention=attention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=PackedMLP,
        submodules=MLPSubmodules(linear_fc1=norm_linear, linear_fc2=backend.row_parallel_linear()),
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
