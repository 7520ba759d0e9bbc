"""Damaged and hostile files for every reader: no crash, hang, traceback or growth.

The test suite tries a few hundred inputs. VCR1_FUZZ=20000 tries that many.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_vcr1.rollout.sglang.payload import INLINE_PREFIX, MediaItem, PatchSettings, Payload, pack_inline
from tests.data.manifest_rows import ROWS
from tests.data.model_dirs import write_model_dir
from tests.data.video_clips import draw, write_clip
from tests.fuzz.readers import READERS

NUM_INPUTS = int(os.environ.get("VCR1_FUZZ", "280"))
INPUTS_PER_PROCESS = 1000
ROOT = Path(__file__).parents[2]
UNCHECKED_READERS = ("chat.json",)
"""Readers that are slow to import. Run them by hand with tests.fuzz.readers."""
CHECKED_READERS = [name for name in READERS if name not in UNCHECKED_READERS]


def _write_configs(folder: Path) -> None:
    write_model_dir(folder)
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 64, "vocab_size": 300, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | text | rope | {"vision_config": vision}))
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "settings.toml").write_text((ROOT / "examples/configs/grpo_joint.toml").read_text())
    (folder / "templates.toml").write_text((ROOT / "examples/demo/templates.toml").read_text())


def _write_rows(folder: Path) -> None:
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    predictions = [{"id": f"a{number}", "output": "<answer>1 to 2</answer>"} for number in range(5)]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, predictions)))
    content = [{"type": "video", "video": "a.mp4", "fps": 2.0}, {"type": "text", "text": "when?"}]
    messages = [{"role": "user", "content": content}]
    requests = [{"id": f"a{number}", "messages": messages, "response": [1, 2]} for number in range(3)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    picture = io.BytesIO()
    Image.fromarray(draw(5)).save(picture, "png")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0.5,
        "stop": ["a"],
        "n": 2,
    }
    (folder / "chat.json").write_text(json.dumps(chat | {"max_tokens": 5, "seed": 1, "top_p": 0.9}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file for every reader."""
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    _write_configs(folder)
    _write_rows(folder)
    media = (MediaItem(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), True, 0),)
    settings = PatchSettings(14, 2, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    packed = pack_inline(Payload(media, torch.zeros(3, 4, dtype=torch.long), settings, "1"))
    (folder / "payload.safetensors").write_bytes(base64.b64decode(packed.removeprefix(INLINE_PREFIX)))
    for name in READERS:
        if name.startswith("image."):
            Image.fromarray(draw(5)).save(folder / name)
    codecs = {"mpg": "mpeg1video", "webm": "libvpx", "avi": "mpeg4", "flv": "flv1"}
    for name in READERS:
        suffix = name.removeprefix("video.")
        if suffix in ("gif", "png", "webp", "avif"):
            frames = [Image.fromarray(draw(number)) for number in range(6)]
            frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=200)
        elif name.startswith("video."):  # h264 has no time stamps, and is decoded from first to last
            write_clip(folder / name, num_frames=12, codec=codecs.get(suffix, "libx264"))
    return folder


def test_mutated_files_are_read_or_refused(folder: Path) -> None:
    inputs_per_reader = max(NUM_INPUTS // len(CHECKED_READERS), 1)
    faults = []
    for seed in range(0, inputs_per_reader, INPUTS_PER_PROCESS):
        count = min(INPUTS_PER_PROCESS, inputs_per_reader - seed)
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.readers",
            str(folder),
            ",".join(CHECKED_READERS),
            str(seed),
            str(count),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        faults += [line for line in lines if line.startswith("FAULT")]
        if done.returncode != 0:
            faults.append(f"exit code {done.returncode} after {lines[-1:]}: {done.stderr[-500:]}")
        assert done.returncode != 0 or sum(line.startswith("input") for line in lines) == count * len(CHECKED_READERS)
    assert not faults, "\n".join(faults[:20])
