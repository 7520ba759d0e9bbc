"""Functions that turn the samples of a run into prompts, in the training process or in its decoding workers.

Decoding workers import this module, so it must not import the model or megatron-core.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import CheckPromptFn, prepare_sample
from megatron_vcr1.data.templates import PromptTemplates
from megatron_vcr1.data.video import VideoFrames, VideoPath, read_frames
from megatron_vcr1.data.video_cache import VideoCache
from megatron_vcr1.data.video_process import VideoReader

_BYTES_PER_MB = 1 << 20


def build_prepare_fns(
    section: DataSection, templates: PromptTemplates, processor: PromptProcessor, check: CheckPromptFn | None = None
) -> list[PrepareFn]:
    """Build a function for each source that decodes and encodes its samples; the sources share cached videos."""
    reader = CachedVideoReader(section)
    return [
        build_prepare_fn(section, templates, processor, reader, thinking=source.thinking, check=check)
        for source in section.sources
    ]


def build_prepare_fn(
    section: DataSection,
    templates: PromptTemplates,
    processor: PromptProcessor,
    reader: CachedVideoReader,
    *,
    thinking: bool,
    check: CheckPromptFn | None = None,
) -> PrepareFn:
    """Build the function that decodes and encodes a sample with the settings of [data].

    It can be pickled if `check` can be.
    """
    return partial(
        prepare_sample,
        templates=templates,
        processor=processor,
        thinking=thinking,
        max_tokens=section.max_prompt_tokens,
        check=check,
        video_options=video_options(section),
        read=reader.read_frames,
        read_image=reader.read_image,
    )


def video_options(section: DataSection) -> dict[str, float]:
    """Return the options of `read_frames` that [data] sets; the others have the defaults of the model's rules."""
    names = ("fps", "min_frames", "max_frames", "total_pixels", "min_pixels")
    return {name: value for name in names if (value := getattr(section, name)) is not None}


class CachedVideoReader:
    """Reads videos and images with the settings of [data]; videos through a cache that all readers of a process share.

    It can be pickled. In the training process it decodes itself. In a decoding worker it decodes in a subprocess that
    the worker starts (`VideoReader`), so that a decoder that crashes or hangs costs one sample, not the run.
    """

    def __init__(self, section: DataSection) -> None:
        self._in_worker = section.num_workers > 0
        self._backend = section.backend
        self._cache_bytes = section.video_cache_mb * _BYTES_PER_MB

    def read_frames(self, path: VideoPath, **options: Any) -> VideoFrames:
        """Run `data.video.read_frames` with the section's backend."""
        return _cache_of_process(self._in_worker, self._backend, self._cache_bytes).read_frames(path, **options)

    def read_image(self, path: str) -> Tensor:
        """Run `data.images.read_image`."""
        return _subprocess_of_worker().read_image(path) if self._in_worker else read_image(path)


@cache
def _subprocess_of_worker() -> VideoReader:
    """Create the reader of this decoding worker once: its videos and images are decoded in the same subprocess."""
    return VideoReader()


@lru_cache(maxsize=1)  # a call with other settings replaces the cache, so that memory stays bounded
def _cache_of_process(in_worker: bool, backend: str, max_bytes: int) -> VideoCache:
    """Create the cache of this process once. Training and evaluation share it, and so the videos that it holds."""
    read = _subprocess_of_worker().read_frames if in_worker else read_frames
    num_threads = 1 if in_worker else torch.get_num_threads()  # the workers run in parallel already
    return VideoCache(max_bytes, partial(read, backend=backend, num_threads=num_threads))
