"""Vision features, and their gradients, go to the right ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.feature_exchange import FeatureExchange, exchange_features
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")


def _exchange(parallel: ParallelSection, plans: list[FeatureExchange], num_features: list[int]) -> list[float]:
    """Exchange features that are [10 * rank + row], and return them, then the gradient of this rank's features."""
    mesh.initialize(parallel)
    rank = mesh.replica_group().rank()
    features = (torch.arange(num_features[rank]).double()[:, None] + 10 * rank).requires_grad_()
    received = exchange_features(features, plans[rank])
    (grad,) = torch.autograd.grad((received * (received.detach() + 1)).sum(), features)
    return torch.cat((received.detach(), grad))[:, 0].tolist()


def test_context_parallel_ranks_receive_the_features_of_their_tokens(gloo_pool: GlooPool) -> None:
    # Rank 0 encodes 3 features and needs its own 0 and 2, and rank 1's only feature before them; rank 1 needs rank 0's
    # features 1 and 1 once more.
    plans = [
        FeatureExchange(torch.tensor([0, 2, 1, 1]), (2, 2), (2, 1), None, torch.tensor([2, 0, 1]), 4),
        FeatureExchange(torch.tensor([0]), (1, 0), (2, 0), None, torch.tensor([0, 1]), 4),
    ]
    answers = gloo_pool.run(_exchange, ParallelSection(context=2), plans, [3, 1])
    # The gradient of a feature is itself + 1, summed over the tokens that have it.
    assert answers == [[10, 0, 2, 1, 4, 3], [1, 1, 11]] * 2


def test_tensor_parallel_ranks_receive_all_features_and_count_each_gradient_once(gloo_pool: GlooPool) -> None:
    # Context-parallel rank 0 (ranks 0 and 1) needs the first 3 features, rank 1 (ranks 2 and 3) the last one twice.
    # Ranks 0, 1 and 3 have encoded 1, 2 and 1 features, and rank 2 none.
    own, other = torch.tensor([0, 2, 3]), torch.tensor([1, 1])
    plans = [
        FeatureExchange(torch.tensor([0]), (1, 0), (1, 0), 2, own, 4),
        FeatureExchange(torch.tensor([0, 1]), (2, 0), (2, 0), 2, own, 4),
        FeatureExchange(torch.tensor([], dtype=torch.long), (0, 0), (0, 0), 1, other, 4),
        FeatureExchange(torch.tensor([0]), (0, 1), (0, 1), 1, other, 4),
    ]
    parallel = ParallelSection(context=2, tensor=2, vision="data")
    answers = gloo_pool.run(_exchange, parallel, plans, [1, 2, 0, 1])
    first, second = [0.0, 10.0, 11.0], [30.0, 30.0]
    assert answers == [[*first, 1], [*first, 11, 12], second, [*second, 62]]
