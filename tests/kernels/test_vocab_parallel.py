"""Ops on a vocabulary that is sharded across two and four gloo ranks match one process with the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from vcr1_kernels import linear_grpo_loss, linear_log_probs, log_probs_from_logits

from tests.gloo import WORLD_SIZE, GlooPool

NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 23, 64, 8


pytestmark = pytest.mark.xdist_group("gloo")


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = 3 * normal(NUM_TOKENS, VOCAB_SIZE)
    logits[2, :40] = -torch.inf  # all logits of this token are -inf in two of four shards
    return {
        "logits": logits,
        "hidden": normal(NUM_TOKENS, HIDDEN_SIZE),
        "weight": normal(VOCAB_SIZE, HIDDEN_SIZE),
        "target_ids": torch.randint(40, VOCAB_SIZE, (NUM_TOKENS,), generator=generator),
        "advantages": normal(NUM_TOKENS),
        "token_weights": normal(NUM_TOKENS).abs(),
        "old_log_probs": normal(NUM_TOKENS) - 4,
        "ref_log_probs": normal(NUM_TOKENS) - 4,
        "segment_ids": torch.arange(NUM_TOKENS) // 5,
    }


def _compute(num_shards: int) -> dict[str, Tensor]:
    """Run every vocabulary-parallel op and its backward on this rank's shard. One shard means no process group."""
    group, shard = None, slice(None)
    if num_shards > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        subgroups = [range(first, first + num_shards) for first in range(0, WORLD_SIZE, num_shards)]
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in subgroups])
        shard_size = VOCAB_SIZE // num_shards
        shard = slice(dist.get_rank(group) * shard_size, (dist.get_rank(group) + 1) * shard_size)
    inputs = _inputs()
    target_ids = inputs["target_ids"]
    logits = inputs["logits"][:, shard].contiguous().requires_grad_()
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"][shard].clone().requires_grad_()
    probe = torch.linspace(-1, 1, NUM_TOKENS, dtype=torch.float64)
    results: dict[str, Tensor] = {}

    # The name of a gradient says how it is sharded: "shard dim N" is concatenated along N, all others are equal on all
    # ranks.
    def record(name: str, outputs: tuple[Tensor, ...], loss: Tensor, leaves: dict[str, Tensor]) -> None:
        results.update({f"{name} output {i}": output.detach() for i, output in enumerate(outputs)})
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.update({f"{name} {leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)})

    options: dict[str, Any] = {"temperature": 0.7, "group": group, "return_entropy": True}
    log_probs, entropy = log_probs_from_logits(logits, target_ids, **options)
    record("logits", (log_probs, entropy), (probe * (log_probs + 2 * entropy)).sum(), {"shard dim 1": logits})
    log_probs, entropy = linear_log_probs(hidden, weight, target_ids, **options)
    leaves = {"whole": hidden, "shard dim 0": weight}
    record("linear", (log_probs, entropy), (probe * (log_probs + 2 * entropy)).sum(), leaves)
    objective = {k: inputs[k] for k in ("advantages", "token_weights", "old_log_probs", "ref_log_probs", "segment_ids")}
    for level in ("token", "sequence"):
        result = linear_grpo_loss(
            hidden, weight, target_ids, importance_level=level, entropy_coef=0.1, **objective, **options
        )
        record(level, (result.loss, result.log_probs, *result.tokens), result.loss, leaves)
    return results


@pytest.mark.parametrize("num_shards", [2, 4])
def test_sharded_ops_match_one_process(num_shards: int, gloo_pool: GlooPool) -> None:
    expected = _compute(1)
    by_rank = gloo_pool.run(_compute, num_shards)
    for name, whole in expected.items():
        shards = [results[name] for results in by_rank[:num_shards]]
        if "shard dim" in name:
            shards = [torch.cat(shards, dim=int(name[-1]))]
        for shard in shards:
            torch.testing.assert_close(
                shard, whole, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
