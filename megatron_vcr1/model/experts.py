"""A mixture of experts: each token is computed by a few of many small MLPs, which a router chooses for it.

The experts are split across the tensor-parallel ranks as whole experts, in order. Each rank computes the tokens of the
replica that are routed to its experts, and the results are summed over the ranks, as those of a sharded MLP are. So an
expert weight is a tensor-parallel shard like any other for gradients, optimizer and checkpoints. megatron-core's expert
parallelism would split the experts across replicas instead. All replicas would then have to compute the same number of
microbatches and sampling steps together, but they are balanced by work here.

    token -> router -> experts 1 and 3     rank 0 has experts 0 and 1, rank 1 has experts 2 and 3
    rank 0: w1 * expert1(token)   +   rank 1: w3 * expert3(token)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from vcr1_kernels import swiglu

from megatron_vcr1.model.config import ExpertsConfig, TextConfig
from megatron_vcr1.model.layer_specs import recompute_in_backward
from megatron_vcr1.parallel import mesh


def expert_mlps(text: TextConfig, config: TransformerConfig) -> dict[int, ModuleSpec]:
    """Describe the MLPs with experts of this pipeline stage, by 0-based index of the layer on the stage."""
    first_layer = get_transformer_layer_offset(config)
    specs = {}
    for index in range(get_num_layers_to_build(config)):
        experts = text.layer_experts(first_layer + index)
        if experts is not None:
            specs[index] = ModuleSpec(module=MixtureOfExperts, params={"experts": experts})
    return specs


class Router(nn.Module):
    """Chooses the experts of each token, and their weights in the sum. Every tensor-parallel rank has all of it."""

    def __init__(self, config: TransformerConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.num_per_token = experts.num_per_token
        shape = (experts.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=mesh.device()))
        # Under sequence parallelism each rank routes only its own tokens, so each has a partial gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: [tokens, 1, hidden_size].

        Returns:
            weights: [tokens, experts per token], positive, with a sum of 1 for each token.
            indices: int64 [tokens, experts per token].
        """
        logits = F.linear(hidden[:, 0], self.weight)
        values, indices = logits.softmax(-1, dtype=torch.float32).topk(self.num_per_token, dim=-1)
        return (values / values.sum(-1, keepdim=True)).to(logits.dtype), indices


class GroupedLinear(MegatronModule):
    """A linear layer without bias for each expert of this rank.

    On Hopper and later, torch computes it in bfloat16 with one grouped GEMM. Elsewhere it loops over the experts, for
    which it waits for the GPU.

    The weight's gradient is a tensor of the model's dtype, which is then added to the gradient buffer. Those of other
    linear layers are accumulated in the buffer's float32 by the GEMM, but torch's grouped GEMM cannot do that.
    """

    def __init__(self, config: TransformerConfig, num_experts: int, input_size: int, output_size: int) -> None:
        """
        Args:
            num_experts: number of experts on this rank.
        """
        super().__init__(config)
        shape = (num_experts, output_size, input_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=mesh.device()))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        if config.perform_initialization:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                config.init_method(self.weight)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Apply the experts' layers.

        Args:
            x: [rows, input_size], sorted by expert.
            ends: int32 [experts], the end of each expert's rows.

        Returns:
            [rows, output_size].
        """
        if not len(x):  # no token is routed here; reductions wait for the weight's gradient, which is zero
            return x @ self.weight[0].t()
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's description of the weight, whose first dimension is sharded."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class MixtureOfExperts(MegatronModule):
    """The MLP of a layer with experts."""

    def __init__(self, config: TransformerConfig, *, experts: ExpertsConfig, **kwargs: Any) -> None:
        # Newer layers of megatron-core pass process groups and a name in `kwargs`, which are not needed here.
        super().__init__(config)
        self.num_ranks = parallel_state.get_tensor_model_parallel_world_size()
        num_local = experts.num_experts // self.num_ranks
        self.first_expert = num_local * parallel_state.get_tensor_model_parallel_rank()
        self.router = Router(config, experts)
        self.experts = _Experts(config, num_local, experts.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Apply the experts; [tokens, 1, hidden_size] to the same shape, and None for a bias."""
        weights, indices = self.router(hidden_states)
        if self.num_ranks == 1:
            return self._compute(hidden_states, weights, indices)[:, None], None
        # Each rank needs all tokens. Backward sums the gradients over the ranks, each of which has only its experts'.
        if self.config.sequence_parallel:
            hidden, weights, indices = map(
                tensor_parallel.gather_from_sequence_parallel_region, (hidden_states, weights, indices)
            )
            output = tensor_parallel.reduce_scatter_to_sequence_parallel_region(self._compute(hidden, weights, indices))
        else:
            hidden, weights = map(tensor_parallel.copy_to_tensor_model_parallel_region, (hidden_states, weights))
            output = tensor_parallel.reduce_from_tensor_model_parallel_region(self._compute(hidden, weights, indices))
        return output[:, None], None

    def _compute(self, hidden: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Compute the weighted sum of this rank's experts for each token.

        Args:
            hidden: [tokens, 1, hidden_size].
            weights, indices: of all experts, from the router.

        Returns:
            [tokens, hidden_size]; zeros for a token without an expert here.
        """
        num_per_token = indices.shape[1]
        sorted_experts, slots = indices.flatten().sort(stable=True)  # a slot is a token and one of its experts
        num_local = self.experts.num_experts
        local = torch.arange(self.first_expert, self.first_expert + num_local, device=hidden.device)
        ends = torch.searchsorted(sorted_experts, local, right=True)
        if self.num_ranks > 1:
            first = torch.searchsorted(sorted_experts, local[:1])
            start, stop = torch.cat((first, ends[-1:])).tolist()  # waits for the GPU: the number of rows is not known
            slots, ends = slots[start:stop], ends - first
        scales = weights.flatten().index_select(0, slots)[:, None]
        output = self.experts(hidden, slots, num_per_token, scales, ends.to(torch.int32))
        return _Combine.apply(output, slots, len(hidden), num_per_token)


class _Experts(MegatronModule):
    """The experts of this rank: gated MLPs with SwiGLU."""

    def __init__(self, config: TransformerConfig, num_experts: int, ffn_hidden_size: int) -> None:
        super().__init__(config)
        self.num_experts = num_experts
        self.linear_fc1 = GroupedLinear(config, num_experts, config.hidden_size, 2 * ffn_hidden_size)
        self.linear_fc2 = GroupedLinear(config, num_experts, ffn_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, slots: Tensor, num_per_token: int, scales: Tensor, ends: Tensor) -> Tensor:
        """Compute scale * expert(token) for each slot.

        Of the values in between, backward needs `inner` only: it computes the others again from `hidden` and `inner`.

        Trap: the argument must not be the view `hidden[:, 0]`. A view that is made under recomputation, in the forward
        function of an autograd function, claims to require a gradient but has no node in the graph. Hooks on modules,
        such as those of torch's FLOP counter, fail for it.

        Args:
            hidden: [tokens, 1, hidden_size].
            slots: int64 [rows], sorted by expert.
            num_per_token: slots per token, those of other ranks included.
            scales: [rows, 1].
            ends: int32 [experts], the end of each expert's rows.

        Returns:
            [rows, hidden_size].
        """
        tokens = hidden[:, 0]
        inputs = _Dispatch.apply(tokens, slots, num_per_token)
        with recompute_in_backward(inputs, lambda: tokens.detach().index_select(0, slots // num_per_token)):
            inner = self.linear_fc1(inputs, ends)
        activated = swiglu(inner)
        with recompute_in_backward(activated, lambda: swiglu(inner.detach())):
            scaled = activated * scales  # before the second layer, whose input is smaller than its output
        with recompute_in_backward(scaled, lambda: swiglu(inner.detach()) * scales.detach()):
            return self.linear_fc2(scaled, ends)


class _Dispatch(torch.autograd.Function):
    """Copies each token to its slots. Its gradient is summed in a fixed order, which index_select does not ensure."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, num_per_token: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.shape = (len(tokens), num_per_token)
        return tokens.index_select(0, slots // num_per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _sum_slots(grad_output, slots, *ctx.shape), None, None


class _Combine(torch.autograd.Function):
    """Sums the rows of each token's slots: the transpose of `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, num_tokens: int, num_per_token: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_per_token = num_per_token
        return _sum_slots(rows, slots, num_tokens, num_per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        return grad_output.index_select(0, slots // ctx.num_per_token), None, None, None


def _sum_slots(rows: Tensor, slots: Tensor, num_tokens: int, num_per_token: int) -> Tensor:
    """Sum rows over the slots of each token; a slot without a row counts as zeros.

    Args:
        rows: [num_rows, hidden_size].
        slots: int64 [num_rows], all different.

    Returns:
        [num_tokens, hidden_size].
    """
    by_slot = rows.new_zeros(num_tokens * num_per_token, rows.shape[1]).index_copy_(0, slots, rows)
    return by_slot.view(num_tokens, num_per_token, rows.shape[1]).sum(1)
