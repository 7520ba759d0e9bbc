"""examples/transformers_inference.py answers as `vcr1 generate` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.data.manifest import read_manifest
from tests.training import workspace

EXAMPLE = Path(__file__).parents[2] / "examples/transformers_inference.py"

# The wheel of torchvision for CUDA works with a CPU build of torch if two of its operators are declared first.
SCRIPT = """
import runpy, sys
import torch
from torch import library
if torch.version.cuda is None:
    torchvision = library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("max_frames", [8, 24])
def test_plain_transformers_give_the_same_answer(
    tmp_path: Path, torchvision_path: Path, capsys: pytest.CaptureFixture[str], max_frames: int
) -> None:
    """With 24 frames, the video covers more time than space, where the positions of transformers 5 differ."""
    workspace.create(tmp_path, num_videos=1)
    video = str(read_manifest(tmp_path / "data/train.jsonl")[0].media[0].path)
    options = ["--model", str(tmp_path / "model"), "--video", video, "--prompt", "when does it happen?"]
    options += ["--max-frames", str(max_frames), "--total-pixels", "60000"]
    options += ["--max-new-tokens", "12"]
    assert main(["generate", *options, "--dtype", "float32", "--repetition-penalty", "1", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    search_path = os.pathsep.join([str(torchvision_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT, str(EXAMPLE), *options]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": search_path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == ours["text"] and ours["text"]
