"""How the samples of a run become prompts: what training's loader calls, in its own process or in decoding ones.

Decoding processes import this module, so it leaves the model and megatron-core alone.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data.loader import Prepare
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import PromptTemplates, prepare_sample
from megatron_vcr1.data.video import VideoFrames, VideoPath, read_frames
from megatron_vcr1.data.video_cache import VideoCache
from megatron_vcr1.data.video_process import VideoReader

_BYTES_PER_MB = 1 << 20


def preparations(section: DataSection, templates: PromptTemplates, processor: PromptProcessor) -> list[Prepare]:
    """What decodes and encodes the samples of each source; they share the videos that they have read."""
    decoder = Decoder(section)
    return [preparation(section, templates, processor, decoder, thinking=source.thinking) for source in section.sources]


def preparation(
    section: DataSection, templates: PromptTemplates, processor: PromptProcessor, decoder: Decoder, *, thinking: bool
) -> Prepare:
    """What decodes and encodes samples as [data] says; it can be sent to another process."""
    return partial(
        prepare_sample,
        templates=templates,
        processor=processor,
        thinking=thinking,
        max_tokens=section.max_prompt_tokens,
        video_options={
            "fps": section.fps,
            "min_frames": section.min_frames,
            "max_frames": section.max_frames,
            "total_pixels": section.total_pixels,
            "min_pixels": section.min_pixels,
        },
        read=decoder.read_frames,
    )


class Decoder:
    """Reads videos: in the training process itself, or, sent to a worker, by a process that the worker starts, so that
    a decoder that crashes or hangs costs one video.
    """

    def __init__(self, section: DataSection) -> None:
        self._in_worker = section.num_workers > 0
        self._backend = section.backend
        self._cache_bytes = section.video_cache_mb * _BYTES_PER_MB

    def read_frames(self, path: VideoPath, **options: Any) -> VideoFrames:
        """`data.video.read_frames` with the section's backend."""
        return _cache_of_process(self._in_worker, self._backend, self._cache_bytes).read_frames(path, **options)


@lru_cache(maxsize=1)  # with other settings a cache takes the place of the last one: memory stays bounded
def _cache_of_process(in_worker: bool, backend: str, max_bytes: int) -> VideoCache:
    """The videos that this process keeps, whatever reads them: what was decoded to train is there to evaluate."""
    read = VideoReader().read_frames if in_worker else read_frames
    num_threads = 1 if in_worker else torch.get_num_threads()  # workers are parallel already
    return VideoCache(max_bytes, partial(read, backend=backend, num_threads=num_threads))
