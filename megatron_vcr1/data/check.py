"""Checks of a manifest: its rows, spans that end after the video, and optionally the videos themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from megatron_vcr1.data.manifest import BadRow, scan_manifest
from megatron_vcr1.types import VideoSample

if TYPE_CHECKING:  # a check of the rows alone needs no decoders
    from megatron_vcr1.data.video_process import VideoReader


@dataclass(frozen=True, slots=True)
class BadVideo:
    """A sample whose video cannot be read, or is too short for its annotation."""

    id: str
    video: str
    reason: str


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """The result of a check.

    Attributes:
        manifest: path of the manifest.
        num_rows: number of rows, good and bad.
        num_samples_by_task: number of good rows by task.
        num_overruns: number of samples with a span that ends after the video.
        bad_rows: rows that are not valid samples.
        videos_decoded: whether the videos were decoded.
        bad_videos: samples whose video cannot be used.
    """

    manifest: str
    num_rows: int
    num_samples_by_task: dict[str, int]
    num_overruns: int
    bad_rows: list[BadRow]
    videos_decoded: bool
    bad_videos: list[BadVideo]

    @property
    def passed(self) -> bool:
        """Whether the manifest has samples and no problem was found."""
        return bool(self.num_samples_by_task) and not self.bad_rows and not self.bad_videos

    def as_json(self) -> dict[str, Any]:
        """Convert the result to a JSON object."""
        return asdict(self)


def check_manifest(
    path: Path,
    *,
    decode_videos: bool,
    num_workers: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda videos, total: videos,
) -> ManifestCheck:
    """Check a manifest.

    Args:
        path: the manifest.
        decode_videos: whether to decode every video as training does.
        num_workers: number of videos that are decoded in parallel.
        progress: function that wraps the iterator over the videos, given their number, to show progress.

    Raises:
        ManifestError: the file cannot be read.
    """
    rows = list(scan_manifest(path))
    samples = [row for row in rows if isinstance(row, VideoSample)]
    return ManifestCheck(
        manifest=str(path),
        num_rows=len(rows),
        num_samples_by_task=dict(Counter(str(sample.task) for sample in samples)),
        num_overruns=sum(map(_has_overrun, samples)),
        bad_rows=[row for row in rows if isinstance(row, BadRow)],
        videos_decoded=decode_videos,
        bad_videos=list(_bad_videos(samples, num_workers, progress)) if decode_videos else [],
    )


def _bad_videos(
    samples: Sequence[VideoSample],
    num_workers: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Iterator[BadVideo]:
    """Decode every video once and yield the samples that cannot be used.

    Each decoding subprocess (`VideoReader`) is used by one thread at a time: a thread takes a reader from the queue for
    a video, and puts it back. The readers are closed after the threads have finished.
    """
    from megatron_vcr1.data.video_process import VideoReader

    samples_of_video: dict[str | tuple[str, ...], list[VideoSample]] = {}
    for sample in samples:
        samples_of_video.setdefault(sample.video, []).append(sample)
    readers: SimpleQueue[VideoReader] = SimpleQueue()

    def check(samples: list[VideoSample]) -> list[BadVideo]:
        reader = readers.get()
        try:
            return _check_video(samples, reader)
        finally:
            readers.put(reader)

    with ExitStack() as stack, ThreadPoolExecutor(num_workers) as pool:
        for _ in range(num_workers):
            readers.put(stack.enter_context(VideoReader()))
        for bad_videos in progress(pool.map(check, samples_of_video.values()), len(samples_of_video)):
            yield from bad_videos


def _check_video(samples: list[VideoSample], reader: VideoReader) -> list[BadVideo]:
    """Decode the video that all these samples share; return the samples that cannot be used."""
    from megatron_vcr1.data.video import VideoError

    video = samples[0].video
    try:
        duration_s = reader.read_frames(video, num_threads=1).duration_s
    except VideoError as error:
        return [BadVideo(sample.id, str(video), error.reason) for sample in samples]
    bad_videos = []
    for sample in samples:
        spans = sample.intervals if sample.clip is None else (sample.clip,)
        if late := [span.start_s for span in spans if span.start_s >= duration_s]:
            reason = f"lasts {duration_s:.2f} s, but an annotated span starts at {late[0]} s"
            bad_videos.append(BadVideo(sample.id, str(video), reason))
    return bad_videos


def _has_overrun(sample: VideoSample) -> bool:
    """Return whether a span ends after the video. This is tolerated: many published annotations are rounded up."""
    return sample.duration_s is not None and any(span.end_s > sample.duration_s for span in sample.intervals)
