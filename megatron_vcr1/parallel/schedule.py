"""megatron-core's pipeline schedule as two functions, `forward_only` and `forward_backward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

Microbatch = TypeVar("Microbatch")
Result = TypeVar("Result")


def _unchanged(microbatch: Any) -> Any:
    return microbatch


def forward_only(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    collect: Callable[[Microbatch, Tensor], Result],
    *,
    model_input: Callable[[Microbatch], Any] = _unchanged,
) -> list[Result]:
    """Run every microbatch through the pipeline without gradients. All ranks of a replica must call it.

    Args:
        model: this rank's stage; it is called with `model_input(microbatch)`.
        microbatches: the same microbatches on every rank of the replica.
        collect: called with each microbatch and the last stage's output for it.
        model_input: returns the part of a microbatch that the model is called with. Default: the whole microbatch.

    Returns:
        The results of `collect`, in order, on the last stage; an empty list on the other stages.
    """

    def forward_step(data: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Callable[..., Result]]:
        microbatch = next(data)
        return stage(model_input(microbatch)), lambda output, non_loss_data: collect(microbatch, output)

    with torch.no_grad():
        return _run_schedule(forward_step, model, microbatches, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    loss: Callable[[Microbatch, Tensor], tuple[Tensor, Result]],
    *,
    model_input: Callable[[Microbatch], Any] = _unchanged,
) -> list[Result]:
    """Run forward and backward over all microbatches and accumulate the gradients. All ranks of a replica must call it.

    Args:
        model: this rank's stage; it is called with `model_input(microbatch)`.
        microbatches: the same microbatches on every rank of the replica.
        loss: called with a microbatch and the last stage's output for it; returns a scalar, whose **sum** over all
            microbatches is differentiated, and metrics.
        model_input: returns the part of a microbatch that the model is called with. Default: the whole microbatch.

    Returns:
        The metrics of each microbatch, in order, on the last stage; an empty list on the other stages.
    """

    # megatron-core divides the gradients by the total number of tokens at the end, unless that is 0. Our losses are
    # normalized by global counts already, so we report 0 tokens.
    no_tokens = torch.zeros((), dtype=torch.int)

    def forward_step(data: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        microbatch = next(data)

        def loss_and_num_tokens(output: Tensor) -> tuple[Tensor, Tensor, Result]:
            value, metrics = loss(microbatch, output)
            return value, no_tokens, metrics

        return stage(model_input(microbatch)), loss_and_num_tokens

    return _run_schedule(forward_step, model, microbatches, forward_only=False, collect_non_loss_data=False)


def _run_schedule(
    forward_step: Callable[..., Any],
    model: nn.Module,
    microbatches: Sequence[Any],
    *,
    forward_only: bool,
    collect_non_loss_data: bool,
) -> list[Any]:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=1,  # unused: packed lengths differ, so the stages send each other the shape (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
