from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import torch

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data import preparation
from megatron_vcr1.data.preparation import CachedVideoReader, build_prepare_fn
from megatron_vcr1.data.prompts import prepare_sample
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.types import Image
from tests.data.prompt_samples import sample
from tests.data.tiny_processor import tiny_processor
from tests.data.video_clips import write_clip


def test_all_readers_of_a_process_share_its_cache(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    videos = [CachedVideoReader(DataSection(video_cache_mb=64)).read_frames(str(clip)) for _ in range(2)]
    assert videos[0] is videos[1]
    assert CachedVideoReader(DataSection(video_cache_mb=0)).read_frames(str(clip)) is not videos[0]


def test_images_are_decoded_in_the_subprocess_of_a_worker(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    path = str(tmp_path / "glass.png")
    PIL.Image.fromarray(pixels).save(path)
    here, there = (CachedVideoReader(DataSection(num_workers=number)).read_image(path) for number in (0, 1))
    assert torch.equal(here, there)
    process = preparation._subprocess_of_worker()._process
    assert process is not None and process.poll() is None
    prepare = build_prepare_fn(
        DataSection(num_workers=1),
        load_templates(),
        tiny_processor(),
        CachedVideoReader(DataSection(num_workers=1)),
        thinking=False,
    )
    photo = sample("quality", media=(Image(path),))
    prepared = prepare(photo)
    direct = prepare_sample(photo, load_templates(), tiny_processor(), thinking=False, max_tokens=10_000)
    assert torch.equal(prepared.prompt.vision[0].frames, direct.prompt.vision[0].frames)
