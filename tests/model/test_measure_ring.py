"""The measurement that docs/long_videos.md quotes: its ring computes the same, and what it sends is counted."""

from __future__ import annotations

import pytest
import torch

from tests.gloo import GlooPool
from tests.model.measure_ring import HEAD_DIM, METHODS, NUM_KV_HEADS, NUM_RANKS, attend

pytestmark = pytest.mark.xdist_group("gloo")


def test_a_ring_computes_the_same_and_sends_one_hop_more(gloo_pool: GlooPool) -> None:
    num_tokens = 256
    chunks, gather, ring = (gloo_pool.run(attend, method, num_tokens) for method in METHODS)
    unit = num_tokens // NUM_RANKS * 2 * NUM_KV_HEADS * HEAD_DIM * 4
    for answers in zip(chunks, gather, ring, strict=True):
        (results, sent, peak), (whole, whole_sent, whole_peak), (ring_results, ring_sent, _) = answers
        assert all(map(torch.equal, results, whole))
        for result, expected in zip(ring_results, results, strict=True):
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
        # Two gathers and a reduce-scatter. In a ring, keys travel N - 1 hops twice, and gradients N hops.
        assert sum(sent.values()) == sum(whole_sent.values()) == 3 * (NUM_RANKS - 1) * unit
        assert ring_sent["send"] == (3 * (NUM_RANKS - 1) + 1) * unit
        assert peak < whole_peak
