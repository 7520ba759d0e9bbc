"""Which divisions of a model among ranks are possible, decided before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vcr1.config.schema import ParallelSection, RecomputeSection
from megatron_vcr1.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that decide how it can be divided."""

    num_layers: int  # of the language model, as the next four
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    vision_num_heads: int
    vision_ffn_hidden_size: int


def check_layout(shape: ModelShape, parallel: ParallelSection, recompute: RecomputeSection, world_size: int) -> None:
    """Refuse a layout that cannot run.

    Args:
        shape: the model.
        parallel: how it is to be divided.
        recompute: which activations are computed again.
        world_size: number of ranks.

    Raises:
        UserError: one line for each problem, with the key to change and values that work.
    """
    problems = [
        *_tensor_problems(shape, parallel),
        *_stage_problems(shape.num_layers, parallel, recompute),
        *_world_problems(parallel, world_size),
    ]
    if problems:
        raise UserError("\n".join(problems))


def layers_per_stage(num_layers: int, parallel: ParallelSection) -> tuple[int, ...]:
    """Language-model layers of each pipeline stage, first to last.

    Raises:
        UserError: the layers that the first and last stage leave over do not divide evenly among the others.
    """
    first = () if parallel.first_stage_layers is None else (parallel.first_stage_layers,)
    last = () if parallel.last_stage_layers is None else (parallel.last_stage_layers,)
    num_even_stages = parallel.pipeline - len(first) - len(last)
    num_even_layers = num_layers - sum(first) - sum(last)
    if parallel.pipeline == 1 and (first or last):
        raise UserError(
            "parallel.first_stage_layers and parallel.last_stage_layers: unset them, or set parallel.pipeline > 1"
        )
    if num_even_stages == 0 and num_even_layers == 0:
        return first + last
    if num_even_stages > 0 and num_even_layers > 0 and num_even_layers % num_even_stages == 0:
        return first + (num_even_layers // num_even_stages,) * num_even_stages + last
    raise UserError(
        f"parallel.pipeline: {num_layers} layers, first stage {_or_even(first)}, last stage {_or_even(last)}, "
        f"do not make {parallel.pipeline} stages; {_stage_advice(num_layers, parallel.pipeline)}"
    )


def fitting_tensor_sizes(shape: ModelShape) -> list[int]:
    """Values of `parallel.tensor` that the model can be divided by."""
    return [size for size in range(1, shape.num_heads + 1) if not any(_undivided(shape, size))]


def _undivided(shape: ModelShape, tensor: int) -> Iterator[str]:
    """What of the model does not divide among `tensor` ranks."""
    counts = {
        "attention heads": shape.num_heads,
        "FFN features": shape.ffn_hidden_size,
        "vocabulary entries": shape.vocab_size,
        "vision heads": shape.vision_num_heads,
        "vision FFN features": shape.vision_ffn_hidden_size,
    }
    yield from (f"{count} {name}" for name, count in counts.items() if count % tensor)
    # Fewer key-value heads than ranks are replicated: each then serves a whole number of ranks.
    if shape.num_kv_heads % tensor and tensor % shape.num_kv_heads:
        yield f"{shape.num_kv_heads} key-value heads"


def _tensor_problems(shape: ModelShape, parallel: ParallelSection) -> Iterator[str]:
    if undivided := list(_undivided(shape, parallel.tensor)):
        sizes = ", ".join(str(size) for size in fitting_tensor_sizes(shape))
        yield f"parallel.tensor = {parallel.tensor} does not divide {' nor '.join(undivided)}; it can be {sizes}"


def _stage_problems(num_layers: int, parallel: ParallelSection, recompute: RecomputeSection) -> Iterator[str]:
    try:
        stages = layers_per_stage(num_layers, parallel)
    except UserError as error:
        yield str(error)
        return
    if recompute.granularity == "full" and any(layers % recompute.num_layers for layers in stages):
        yield (
            f"recompute.num_layers = {recompute.num_layers} does not divide the layers of every pipeline stage "
            f"({', '.join(map(str, stages))}); 1 always does"
        )


def _world_problems(parallel: ParallelSection, world_size: int) -> Iterator[str]:
    ranks_per_replica = parallel.tensor * parallel.pipeline
    if world_size % ranks_per_replica:
        yield (
            f"{world_size} ranks do not divide into replicas of parallel.tensor * parallel.pipeline = "
            f"{ranks_per_replica} ranks; launch a multiple of {ranks_per_replica}, or lower one of the two"
        )


def _or_even(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if layers else "even"


def _stage_advice(num_layers: int, pipeline: int) -> str:
    """A division that works. The first stage also runs the vision tower: it gets an even share or less where it can."""
    if pipeline > num_layers:
        return f"set it to at most {num_layers}"
    if num_layers % pipeline == 0:
        return f"unset both for {num_layers // pipeline} layers on each"
    choices = range(num_layers - (pipeline - 1), 0, -(pipeline - 1))  # the other stages get 1, 2, ... layers each
    even_share = num_layers / pipeline
    first = min(choices, key=lambda layers: (layers > even_share, abs(layers - even_share)))
    others = (num_layers - first) // (pipeline - 1)
    return f"parallel.first_stage_layers = {first} alone would leave {others} to each other stage"
