from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.tasks import CaptionTarget
from megatron_vcr1.types import Sample, Video
from tests.data.importers.importing import run, write


def test_carebench_rows_become_samples(tmp_path: Path) -> None:
    captions = write(tmp_path / "metadata.json", [{"video": "v_30.mp4", "caption": "A man cooks."}])
    assert run("carebench", captions)[0] == [Sample("v_30", (Video("v_30.mp4"),), CaptionTarget("A man cooks."))]


@pytest.mark.parametrize(("video_file", "video"), [("<placeholder>", "12.mp4"), ("a/12.webm", "a/12.webm")])
def test_dream1k_rows_of_a_split_become_samples(tmp_path: Path, video_file: str, video: str) -> None:
    prompt = {"content": [{"video": {"video_file": video_file}}]}
    row = {
        "idx": 3,
        "vid": 12,
        "dataset": "DREAM/videvo",
        "messages": [prompt, {"content": [{"reference": "A dog barks."}]}],
        "extra_info": {"duration": 5.0, "events": ["A dog barks."]},
    }
    rows = write(tmp_path / "dream.jsonl", json.dumps(row) + "\n" + json.dumps(row | {"dataset": "DREAM/other"}) + "\n")
    target = CaptionTarget("A dog barks.", ("A dog barks.",))
    expected = Sample("dream_3", (Video(video, 5.0),), target, category="DREAM/videvo")
    assert run("dream1k", rows, split="DREAM/videvo")[0] == [expected]
