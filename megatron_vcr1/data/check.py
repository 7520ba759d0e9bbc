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


_TOLERANCE_S = 0.01
"""Annotations are rounded to hundredths of a second."""


@dataclass(frozen=True, slots=True)
class BadVideo:
    """A sample whose video cannot be read, or is too short for its annotation."""

    id: str
    video: str
    reason: str


@dataclass(frozen=True, slots=True)
class LateSpan:
    """A sample with a span that ends after its decoded video, which is tolerated: annotations may be rounded up."""

    id: str
    video: str
    end_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """The result of a check.

    Attributes:
        manifest: path of the manifest.
        num_rows: number of rows, good and bad.
        num_samples_by_task: number of good rows by task.
        num_overruns: number of samples with a span that ends after the row's `duration_s`.
        bad_rows: rows that are not valid samples.
        videos_decoded: whether the videos were decoded.
        bad_videos: samples whose video cannot be used.
        late_spans: samples with a span that ends after the decoded video.
    """

    manifest: str
    num_rows: int
    num_samples_by_task: dict[str, int]
    num_overruns: int
    bad_rows: list[BadRow]
    videos_decoded: bool
    bad_videos: list[BadVideo]
    late_spans: list[LateSpan]

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
    found = list(_check_videos(samples, num_workers, progress)) if decode_videos else []
    return ManifestCheck(
        manifest=str(path),
        num_rows=len(rows),
        num_samples_by_task=dict(Counter(str(sample.task) for sample in samples)),
        num_overruns=sum(map(_has_overrun, samples)),
        bad_rows=[row for row in rows if isinstance(row, BadRow)],
        videos_decoded=decode_videos,
        bad_videos=[bad for bad in found if isinstance(bad, BadVideo)],
        late_spans=[late for late in found if isinstance(late, LateSpan)],
    )


def _check_videos(
    samples: Sequence[VideoSample],
    num_workers: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Iterator[BadVideo | LateSpan]:
    """Decode every video once; yield the samples that cannot be used, and those whose spans are too long.

    Each decoding subprocess (`VideoReader`) is used by one thread at a time: a thread takes a reader from the queue for
    a video, and puts it back. The readers are closed after the threads have finished.
    """
    from megatron_vcr1.data.video_process import VideoReader

    samples_of_video: dict[str | tuple[str, ...], list[VideoSample]] = {}
    for sample in samples:
        samples_of_video.setdefault(sample.video, []).append(sample)
    readers: SimpleQueue[VideoReader] = SimpleQueue()

    def check(samples: list[VideoSample]) -> list[BadVideo | LateSpan]:
        reader = readers.get()
        try:
            return _check_video(samples, reader)
        finally:
            readers.put(reader)

    with ExitStack() as stack, ThreadPoolExecutor(num_workers) as pool:
        for _ in range(num_workers):
            readers.put(stack.enter_context(VideoReader()))
        for found in progress(pool.map(check, samples_of_video.values()), len(samples_of_video)):
            yield from found


def _check_video(samples: list[VideoSample], reader: VideoReader) -> list[BadVideo | LateSpan]:
    """Decode the video that all these samples share; return what is wrong with each sample."""
    from megatron_vcr1.data.video import VideoError

    video = samples[0].video
    try:
        duration_s = reader.read_frames(video, num_threads=1).duration_s
    except VideoError as error:
        return [BadVideo(sample.id, str(video), error.reason) for sample in samples]
    found: list[BadVideo | LateSpan] = []
    for sample in samples:
        spans = sample.intervals if sample.clip is None else (sample.clip,)
        if late := [span.start_s for span in spans if span.start_s >= duration_s]:
            reason = f"lasts {duration_s:.2f} s, but an annotated span starts at {late[0]} s"
            found.append(BadVideo(sample.id, str(video), reason))
        elif (end_s := max((span.end_s for span in spans), default=0.0)) > duration_s + _TOLERANCE_S:
            found.append(LateSpan(sample.id, str(video), end_s, duration_s))
    return found


def _has_overrun(sample: VideoSample) -> bool:
    """Return whether a span ends after the video. This is tolerated: many published annotations are rounded up."""
    return sample.duration_s is not None and any(span.end_s > sample.duration_s for span in sample.intervals)
