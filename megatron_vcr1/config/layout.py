"""Check that a model can be split across ranks as the settings say, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.config.training_sections import GrpoSection, TrainSection
from megatron_vcr1.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model that decide which layouts are possible."""

    # Language model:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    # Vision tower:
    vision_num_heads: int
    vision_ffn_hidden_size: int
    num_experts: int = 0  # of each layer of the language model that has experts


def check_layout(shape: ModelShape, parallel: ParallelSection, recompute: RecomputeSection, world_size: int) -> None:
    """Check that a model can be split across the ranks of a job.

    Args:
        shape: sizes of the model.
        parallel: tensor-, context- and pipeline-parallel sizes.
        recompute: activation recomputation; whole blocks of layers must fit into the pipeline stages.
        world_size: number of ranks.

    Raises:
        UserError: the layout is impossible. One line per problem, with the key to change and values that work.
    """
    problems = [
        *_tensor_problems(shape, parallel),
        *_stage_problems(shape.num_layers, parallel, recompute),
        *_world_problems(parallel, world_size),
    ]
    if problems:
        raise UserError("\n".join(problems))


def check_batch_size(train: TrainSection, grpo: GrpoSection, num_replicas: int) -> None:
    """Raise UserError if a step's prompts cannot be split evenly over the replicas or into minibatches."""
    number = train.prompts_per_step
    if number % num_replicas:
        raise UserError(
            f"train.prompts_per_step = {number} cannot be split evenly over {num_replicas} data-parallel replicas; "
            f"make it a multiple of {num_replicas}"
        )
    if train.stage == "grpo" and number % grpo.num_minibatches:
        raise UserError(
            f"train.prompts_per_step = {number} is not a multiple of grpo.num_minibatches = {grpo.num_minibatches}; "
            "change one of the two"
        )


def layers_per_stage(num_layers: int, parallel: ParallelSection) -> tuple[int, ...]:
    """Return the number of language-model layers of each pipeline stage, first to last.

    The stages whose layers are not set (all but the first and the last, at least) get equal numbers of layers.

    Raises:
        UserError: the remaining layers cannot be split equally among the remaining stages.
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
        f"parallel.pipeline = {parallel.pipeline}: {num_layers} layers (first stage: {_or_equal(first)}, last stage: "
        f"{_or_equal(last)}) cannot be split into {parallel.pipeline} stages; "
        f"{_stage_advice(num_layers, parallel.pipeline)}"
    )


def possible_tensor_sizes(shape: ModelShape, vision: Literal["tensor", "data"] = "tensor") -> list[int]:
    """Return the values of `parallel.tensor` that the model can be sharded with, for a value of `parallel.vision`."""
    sections = (ParallelSection(tensor=size, vision=vision) for size in range(1, shape.num_heads + 1))
    return [section.tensor for section in sections if not any(_indivisible_sizes(shape, section))]


def _indivisible_sizes(shape: ModelShape, parallel: ParallelSection) -> Iterator[str]:
    """Yield the sizes that are not divisible by the ranks, as text for a message, such as "28 attention heads"."""
    tensor = parallel.tensor
    sizes = {
        "attention heads": shape.num_heads,
        "FFN features": shape.ffn_hidden_size,
        "vocabulary entries": shape.vocab_size,
        "experts": shape.num_experts,
    }
    if parallel.vision == "tensor":
        sizes["vision heads"] = shape.vision_num_heads
        sizes["vision FFN features"] = shape.vision_ffn_hidden_size
    yield from (f"{size} {name}" for name, size in sizes.items() if size % tensor)
    # If there are fewer key-value heads than ranks, each head is replicated on a whole number of ranks.
    if shape.num_kv_heads % tensor and tensor % shape.num_kv_heads:
        yield f"{shape.num_kv_heads} key-value heads"


def _tensor_problems(shape: ModelShape, parallel: ParallelSection) -> Iterator[str]:
    if indivisible := list(_indivisible_sizes(shape, parallel)):
        sizes = ", ".join(str(size) for size in possible_tensor_sizes(shape, parallel.vision))
        yield f"parallel.tensor = {parallel.tensor} does not divide {' nor '.join(indivisible)}; it can be {sizes}"


def _stage_problems(num_layers: int, parallel: ParallelSection, recompute: RecomputeSection) -> Iterator[str]:
    try:
        stages = layers_per_stage(num_layers, parallel)
    except UserError as error:
        yield str(error)
        return
    if recompute.granularity == "full" and any(layers % recompute.num_layers for layers in stages):
        yield (
            f"recompute.num_layers = {recompute.num_layers} does not divide the number of layers of every pipeline "
            f"stage ({', '.join(map(str, stages))}); 1 always does"
        )


def _world_problems(parallel: ParallelSection, world_size: int) -> Iterator[str]:
    if world_size % parallel.ranks_per_replica:
        sizes = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline}
        keys = [f"parallel.{name}" for name, size in sizes.items() if size > 1]
        yield (
            f"{world_size} ranks cannot be split into replicas of {' * '.join(keys)} = {parallel.ranks_per_replica} "
            f"ranks; launch a multiple of {parallel.ranks_per_replica}, or lower {' or '.join(keys)}"
        )


def _or_equal(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if layers else "an equal share"


def _stage_advice(num_layers: int, pipeline: int) -> str:
    """Suggest a split that works.

    The first stage also runs the vision tower, so the suggestion gives it an equal share of the layers or less, where
    that is possible.
    """
    if pipeline > num_layers:
        return f"set it to at most {num_layers}"
    if num_layers % pipeline == 0:
        return f"unset both for {num_layers // pipeline} layers on each stage"
    # Only the first stage differs: the other stages get 1, 2, ... layers each, and the first one the remaining layers.
    choices = range(num_layers - (pipeline - 1), 0, -(pipeline - 1))
    equal_share = num_layers / pipeline
    first = min(choices, key=lambda layers: (layers > equal_share, abs(layers - equal_share)))
    others = (num_layers - first) // (pipeline - 1)
    return f"set parallel.first_stage_layers = {first} alone, which leaves {others} layers to each other stage"
