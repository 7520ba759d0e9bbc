"""One call for megatron-core's pipeline schedules: microbatches in, the last stage's results out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

Microbatch = TypeVar("Microbatch")
Result = TypeVar("Result")


def forward_only(
    model: nn.Module, microbatches: Sequence[Microbatch], collect: Callable[[Microbatch, Tensor], Result]
) -> list[Result]:
    """Run every microbatch through the pipeline without gradients.

    Args:
        model: this rank's stage; called with a microbatch.
        microbatches: the same on every stage of a pipeline.
        collect: gets a microbatch and the last stage's output for it.

    Returns:
        What `collect` returned, in order, on the last stage; an empty list on the others.
    """

    def forward_step(data: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Callable[..., Result]]:
        microbatch = next(data)
        return stage(microbatch), lambda output, non_loss_data: collect(microbatch, output)

    with torch.no_grad():
        return _run(forward_step, model, microbatches, forward_only=True, collect_non_loss_data=True)


def forward_backward(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    loss: Callable[[Microbatch, Tensor], tuple[Tensor, Result]],
) -> list[Result]:
    """Forward and backward over all microbatches; gradients accumulate.

    Args:
        model: this rank's stage; called with a microbatch.
        microbatches: the same on every stage of a pipeline.
        loss: gets a microbatch and the last stage's output, returns a scalar whose **sum** over microbatches is
            differentiated, and metrics.

    Returns:
        The metrics of each microbatch on the last stage; an empty list on the others.
    """

    # megatron-core divides losses by numbers of tokens, in the end; our losses are normalised by global ones already.
    no_tokens = torch.zeros((), dtype=torch.int)

    def forward_step(data: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        microbatch = next(data)

        def counted_loss(output: Tensor) -> tuple[Tensor, Tensor, Result]:
            value, metrics = loss(microbatch, output)
            return value, no_tokens, metrics

        return stage(microbatch), counted_loss

    return _run(forward_step, model, microbatches, forward_only=False, collect_non_loss_data=False)


def _run(
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
        seq_length=1,  # packed lengths differ: the stages tell each other the shape (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
