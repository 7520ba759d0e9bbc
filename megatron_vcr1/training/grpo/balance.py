"""Balance of the data-parallel replicas: groups are dealt by their FLOPs, not by their number.

The responses of a group are as long as the policy makes them, so groups that cost the same when they were drawn differ
after the rollout, and all replicas wait for the slowest one at the gradient reduction. Dealing changes no gradient: the
weights of the loss count over all replicas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Workload, training_flops
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.balance import imbalance, longest_first
from megatron_vcr1.training.grpo.batch import PolicyGroup

MIN_GAIN = 0.02
"""Groups stay where they are if dealing would lower the slowest replica's FLOPs by a smaller fraction than this."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """This replica's groups after dealing, and the balance of all replicas.

    Attributes:
        groups: the groups to train on.
        imbalance_before: FLOPs of the replica with the most work over the mean of all replicas, before dealing.
        imbalance: the same after dealing.
    """

    groups: list[PolicyGroup]
    imbalance_before: float
    imbalance: float


def deal_by_work(groups: Sequence[PolicyGroup], config: ModelConfig, *, frozen_parts: Collection[str]) -> Dealt:
    """Deal the groups of a minibatch to the replicas so that their FLOPs are about equal.

    All ranks of the job must call it. Every rank exchanges groups with the ranks that have the same place in the other
    replicas, so the ranks of a replica have the same groups again afterwards.

    Args:
        groups: this replica's groups.
        config, frozen_parts: the model and its frozen parts, for the FLOPs.
    """
    if mesh.num_replicas() == 1:
        return Dealt(list(groups), 1.0, 1.0)
    # gloo also on GPUs: groups are CPU objects, and NCCL would create a communicator for each pair of ranks.
    process_group = parallel_state.get_data_parallel_group_gloo()
    costs: list[list[float]] = [[]] * process_group.size()
    own_costs = [training_flops(config, _workload(group, config), freeze=frozen_parts).total for group in groups]
    dist.all_gather_object(costs, own_costs, group=process_group)
    old = [replica for replica, replica_costs in enumerate(costs) for _ in replica_costs]
    flat_costs = [cost for replica_costs in costs for cost in replica_costs]
    new = longest_first(flat_costs, len(costs))
    before, after = imbalance(flat_costs, old, len(costs)), imbalance(flat_costs, new, len(costs))
    if after > before * (1 - MIN_GAIN):
        return Dealt(list(groups), before, before)
    return Dealt(_exchange(groups, old, new, process_group), before, after)


def _workload(group: PolicyGroup, config: ModelConfig) -> Workload:
    grids = [item.grid_thw for item in group.prompt.vision]
    lengths = [len(response) for response in group.responses]
    return Workload.of_group(config, len(group.prompt.token_ids), lengths, grids)


def _exchange(
    groups: Sequence[PolicyGroup], old: Sequence[int], new: Sequence[int], process_group: dist.ProcessGroup
) -> list[PolicyGroup]:
    """Send each group from its old to its new replica, and return this replica's groups in the order of all groups.

    The transfers have one order on all ranks, and a rank blocks in the first one that concerns it. So the first of the
    open transfers always has both of its ranks, and no rank waits forever.
    """
    rank = process_group.rank()
    own = iter(groups)
    dealt: list[PolicyGroup] = []
    for source, target in zip(old, new, strict=True):
        group = next(own) if source == rank else None
        if source == target == rank:
            assert group is not None
            dealt.append(group)
        elif source == rank and group is not None:
            dist.send_object_list([_on_cpu(group)], dist.get_global_rank(process_group, target), process_group)
        elif target == rank:
            box: list[PolicyGroup] = [None]  # type: ignore[list-item]
            dist.recv_object_list(box, dist.get_global_rank(process_group, source), process_group)
            dealt.append(box[0])
    return dealt


def _on_cpu(group: PolicyGroup) -> PolicyGroup:
    """Return the group with its frames on the CPU: a pickled CUDA tensor would be restored on the sender's GPU.

    Later pipeline stages have frames without content, which stay as they are.
    """
    return replace(group, prompt=group.prompt.frames_on("cpu")) if mesh.is_first_stage() else group
