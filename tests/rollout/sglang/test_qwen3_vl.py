"""A real server with a Qwen3-VL: its log-probs equal the model's, before and after a weight sync."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.rollout.engine import SamplingParams
from tests.rollout.sglang.conftest import change, largest_difference, load, requests, serve, start_with

pytestmark = pytest.mark.xdist_group("sglang")

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_log_probs_of_text_images_and_videos_with_time_stamps(
    world: None, sglang_python: Path, tmp_path: Path, family: str
) -> None:
    """Each temporal patch of a video is a run of pads; DeepStack's features are in the server's cache, too."""
    with serve(family, tmp_path, sglang_python) as serving:
        config = serving.config(weight_sync="tensor")
        model, engine = load(config), start_with(config)
        sent = requests(4, ("", "i", "v", "vv", "ivv"), timestamps=True)
        for version in (1, 2):
            engine.update_weights(stream_hf_tensors(model), version)
            groups = engine.generate(sent, SamplingParams(12))
            assert largest_difference(model, sent, groups) < TOLERANCE
            for request, group in zip(sent, groups, strict=True):
                assert group.cached_tokens == (len(request.prompt.token_ids) - 1,) * 4
            change(model, seed=7)  # also the vision tower: features in the server's cache are of other weights now
            assert largest_difference(model, sent, groups) > 100 * TOLERANCE
        engine.close()
