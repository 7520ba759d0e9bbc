"""examples/library/decode_video.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.video import read_frames


def test_saved_frames_are_those_that_the_model_sees(
    load_example: Callable[[str], ModuleType], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(read_manifest(folder / "data/train.jsonl")[0].media[0].path)
    load_example("decode_video").main([video, "--out", str(tmp_path / "frames"), "--max-frames", "6"])
    expected = read_frames(video, max_frames=6)
    files = sorted((tmp_path / "frames").iterdir())
    assert [float(file.stem.removesuffix("s")) for file in files] == pytest.approx(
        list(expected.timestamps_s), abs=0.01
    )
    for file, frame in zip(files, expected.frames.numpy(), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), frame)
    assert f"{len(files)} frames of" in capsys.readouterr().out
