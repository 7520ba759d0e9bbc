"""GRPO's microbatches: packed groups together with everything that the objective reads for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.training.grpo.scoring import ScoredGroup, all_positions
from megatron_vcr1.training.microbatches import Microbatch, pack_microbatches

LossNormalization = Literal["sequence", "token", "constant"]


@dataclass(frozen=True, slots=True)
class PolicyGroup(Group):
    """A group to train on: every response has an advantage.

    Attributes:
        advantages: one per response.
        rollout_log_probs: for each response, the engine's log-prob of each of its tokens.
    """

    advantages: tuple[float, ...]
    rollout_log_probs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class PolicyBatch(Microbatch):
    """A microbatch and the objective's inputs. All tensors are [targets], on the device, in the order of the packing.

    Under context parallelism, these are the targets of this rank's responses; there may be none.

    Attributes:
        advantages: float32; the advantage of the token's response.
        rollout_log_probs: float32; log-probs that the engine reported when it sampled the tokens.
        segment_ids: int64; index of the token's response in the microbatch.
        weights: float32; weight of the token's loss in the optimizer step (see `token_weights`).
        ref_log_probs: float32; log-probs of the reference. None without a KL term.
        old_log_probs: float32; log-probs of the policy before the first update of the step. None if the step has only
            one update: the old policy is then the policy itself.
    """

    advantages: Tensor
    rollout_log_probs: Tensor
    segment_ids: Tensor
    weights: Tensor
    ref_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """The sizes that normalize the loss of one optimizer step, counted over all replicas."""

    num_responses: float
    num_tokens: float


def token_weights(
    response_lengths: Sequence[int], counts: Counts, normalization: LossNormalization, max_new_tokens: int
) -> Tensor:
    """Return the weight of each token's loss in the optimizer step; float32 [targets].

    'sequence' (GRPO) averages over the tokens of each response, then over responses:
    1 / (num_responses * tokens of the response). 'token' (DAPO) averages over all tokens: 1 / num_tokens. 'constant'
    (Dr.GRPO) divides each response's sum by the longest possible response: 1 / (num_responses * max_new_tokens).

    Args:
        response_lengths: number of tokens of each response of a microbatch.
        counts: of the whole optimizer step, so that the weights do not depend on the packing.
    """
    lengths = torch.tensor(response_lengths)
    match normalization:
        case "sequence":
            per_response = 1 / (counts.num_responses * lengths.double())
        case "token":
            per_response = torch.full((len(lengths),), 1 / counts.num_tokens, dtype=torch.float64)
        case "constant":
            weight = 1 / (counts.num_responses * max_new_tokens)
            per_response = torch.full((len(lengths),), weight, dtype=torch.float64)
    return per_response.float().repeat_interleave(lengths)


def split_into_minibatches(
    groups: Sequence[ScoredGroup], num_minibatches: int, *, skip_zero_advantages: bool = False
) -> list[tuple[list[PolicyGroup], Counts]]:
    """Split a step's groups into minibatches, one per optimizer step. All ranks of the job must call it.

    The groups of all replicas, in the order of their prompts' positions, are cut into `num_minibatches` consecutive
    parts. The minibatches therefore do not depend on the number of replicas; this replica may have no group in one of
    them. Groups without a scored response are left out, and so are minibatches that are empty on all replicas.

    Args:
        skip_zero_advantages: leave out groups whose advantages are all 0. If the objective has neither a KL term nor an
            entropy bonus, their loss and gradient are exactly 0. They still count in the normalization, and a minibatch
            that has only such groups stays: its optimizer step has momentum and weight decay.

    Returns:
        For each minibatch, this replica's groups and the counts over all replicas.
    """
    trainable = [group for group in groups if group.scored_indices]
    positions = all_positions(trainable)
    minibatch_of = {position: rank * num_minibatches // len(positions) for rank, position in enumerate(positions)}
    minibatches: list[list[PolicyGroup]] = [[] for _ in range(num_minibatches)]
    for group in trainable:
        minibatches[minibatch_of[group.prompt.position]].append(_policy_group(group))
    counts = _count_over_replicas(minibatches)
    if skip_zero_advantages:
        minibatches = [[group for group in minibatch if any(group.advantages)] for minibatch in minibatches]
    return [pair for pair in zip(minibatches, counts, strict=True) if pair[1].num_responses > 0]


def make_policy_batches(
    groups: Sequence[PolicyGroup],
    counts: Counts,
    model: VideoLanguageModel,
    *,
    microbatch_tokens: int,
    normalization: LossNormalization,
    max_new_tokens: int,
) -> list[PolicyBatch]:
    """Pack this replica's groups of one minibatch into microbatches on this rank's device.

    Args:
        counts: the sizes of the minibatch over all replicas.
        microbatch_tokens: token budget of a microbatch.
        normalization, max_new_tokens: as for `token_weights`.
    """
    device = mesh.device()
    batches = []
    for members, packed in pack_microbatches(groups, model, microbatch_tokens):
        lengths = [len(response) for group in members for response in group.responses]
        advantages = torch.tensor([advantage for group in members for advantage in group.advantages])
        log_probs = [value for group in members for response in group.rollout_log_probs for value in response]
        repeats = torch.tensor(lengths)
        # Values of all targets of the microbatch, of which this rank may compute a part (context parallelism).
        values = {
            "advantages": advantages.repeat_interleave(repeats),
            "rollout_log_probs": torch.tensor(log_probs),
            "weights": token_weights(lengths, counts, normalization, max_new_tokens),
        }
        own_lengths = torch.tensor(packed.response_lengths, dtype=torch.long)
        batches.append(
            PolicyBatch(
                packed,
                segment_ids=torch.arange(len(own_lengths)).repeat_interleave(own_lengths).to(device),
                **{name: packed.select_targets(value.to(device)) for name, value in values.items()},
            )
        )
    return batches


def _policy_group(group: ScoredGroup) -> PolicyGroup:
    """Return the group without the responses that have no advantage."""
    rollouts = [group.rollouts[index] for index in group.scored_indices]
    return PolicyGroup(
        group.prompt.id,
        group.prompt.prompt,
        tuple(torch.tensor(rollout.token_ids) for rollout in rollouts),
        advantages=tuple(advantage for advantage in group.advantages if advantage is not None),
        rollout_log_probs=tuple(tuple(rollout.log_probs) for rollout in rollouts),
    )


def _count_over_replicas(minibatches: Sequence[Sequence[PolicyGroup]]) -> list[Counts]:
    """Count the responses and tokens of each minibatch over all replicas."""
    local: list[float] = []
    for groups in minibatches:
        lengths = [len(response) for group in groups for response in group.responses]
        local += [len(lengths), sum(lengths)]
    # The ranks of a replica have the same groups: only its leader counts them.
    totals = collectives.sum_over_ranks(local if mesh.is_replica_leader() else [0.0] * len(local))
    return [Counts(*pair) for pair in zip(totals[::2], totals[1::2], strict=True)]
