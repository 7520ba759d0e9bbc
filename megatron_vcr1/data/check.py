"""Checks of a manifest: its rows, spans that end after the video, and optionally the videos and images themselves."""

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
from megatron_vcr1.data.templates import video_arguments
from megatron_vcr1.types import Image, Interval, Medium, Sample, Video, count_media

if TYPE_CHECKING:  # a check of the rows alone needs no decoders
    from megatron_vcr1.data.video_process import VideoReader


_TOLERANCE_S = 0.01
"""Annotations are rounded to hundredths of a second."""


@dataclass(frozen=True, slots=True)
class BadMedium:
    """A sample with a video or image that cannot be read, or a video that is too short for its annotation."""

    id: str
    path: str
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
        num_samples_by_media: number of good rows by their media, such as "1 video" or "2 videos, 1 image".
        num_overruns: number of samples with a span that ends after the row's `duration_s`.
        bad_rows: rows that are not valid samples.
        media_decoded: whether the videos and images were decoded.
        bad_media: samples with a video or image that cannot be used.
        late_spans: samples with a span that ends after the decoded video.
    """

    manifest: str
    num_rows: int
    num_samples_by_task: dict[str, int]
    num_samples_by_media: dict[str, int]
    num_overruns: int
    bad_rows: list[BadRow]
    media_decoded: bool
    bad_media: list[BadMedium]
    late_spans: list[LateSpan]

    @property
    def passed(self) -> bool:
        """Whether the manifest has samples and no problem was found."""
        return bool(self.num_samples_by_task) and not self.bad_rows and not self.bad_media

    def as_json(self) -> dict[str, Any]:
        """Convert the result to a JSON object."""
        return asdict(self)


def check_manifest(
    path: Path,
    *,
    decode_media: bool,
    num_workers: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda files, total: files,
) -> ManifestCheck:
    """Check a manifest.

    Args:
        path: the manifest.
        decode_media: whether to decode every video and image as training does.
        num_workers: number of files that are decoded in parallel.
        progress: function that wraps the iterator over the files, given their number, to show progress.

    Raises:
        ManifestError: the file cannot be read.
    """
    rows = list(scan_manifest(path))
    samples = [row for row in rows if isinstance(row, Sample)]
    found = list(_check_media(samples, num_workers, progress)) if decode_media else []
    return ManifestCheck(
        manifest=str(path),
        num_rows=len(rows),
        num_samples_by_task=dict(Counter(sample.task for sample in samples)),
        num_samples_by_media=dict(Counter(count_media(sample.media) or "text alone" for sample in samples)),
        num_overruns=sum(map(_has_overrun, samples)),
        bad_rows=[row for row in rows if isinstance(row, BadRow)],
        media_decoded=decode_media,
        bad_media=[bad for bad in found if isinstance(bad, BadMedium)],
        late_spans=[late for late in found if isinstance(late, LateSpan)],
    )


def _check_media(
    samples: Sequence[Sample],
    num_workers: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Iterator[BadMedium | LateSpan]:
    """Decode every video and image once; yield the samples that cannot be used, and those whose spans are too long.

    Each decoding subprocess (`VideoReader`) is used by one thread at a time: a thread takes a reader from the queue for
    a file, and puts it back. The readers are closed after the threads have finished.
    """
    from megatron_vcr1.data.video_process import VideoReader

    uses: dict[Medium, list[tuple[Sample, Medium]]] = {}
    for sample in samples:
        for medium in sample.media:
            uses.setdefault(_decoded_medium(medium), []).append((sample, medium))
    readers: SimpleQueue[VideoReader] = SimpleQueue()

    def check(medium: Medium, uses: list[tuple[Sample, Medium]]) -> list[BadMedium | LateSpan]:
        reader = readers.get()
        try:
            return _check_medium(medium, uses, reader)
        finally:
            readers.put(reader)

    with ExitStack() as stack, ThreadPoolExecutor(num_workers) as pool:
        for _ in range(num_workers):
            readers.put(stack.enter_context(VideoReader()))
        for found in progress(pool.map(check, uses, uses.values()), len(uses)):
            yield from found


def _decoded_medium(medium: Medium) -> Medium:
    """Return what is decoded to check a medium: the image, or the whole video of a clip. Clips of a video share it."""
    if isinstance(medium, Image):
        return medium
    return Video(medium.path, image_fps=video_arguments(medium, {}).get("image_fps"))


def _check_medium(medium: Medium, uses: list[tuple[Sample, Medium]], reader: VideoReader) -> list[BadMedium | LateSpan]:
    """Decode an image or a whole video; return what is wrong with each sample that shows it or a clip of it."""
    from megatron_vcr1.data.video import VideoError

    try:
        if isinstance(medium, Image):
            reader.read_image(medium.path)
            return []
        path = medium.path
        options = {} if medium.image_fps is None else {"image_fps": medium.image_fps}
        duration_s = reader.read_frames(path, num_threads=1, **options).duration_s
    except VideoError as error:
        return [BadMedium(sample.id, str(medium.path), error.reason) for sample, _ in uses]
    found: list[BadMedium | LateSpan] = []
    for sample, video in uses:
        spans = _spans(sample, video)
        if late := [span.start_s for span in spans if span.start_s >= duration_s]:
            reason = f"lasts {duration_s:.2f} s, but an annotated span starts at {late[0]} s"
            found.append(BadMedium(sample.id, str(video.path), reason))
        elif (end_s := max((span.end_s for span in spans), default=0.0)) > duration_s + _TOLERANCE_S:
            found.append(LateSpan(sample.id, str(video.path), end_s, duration_s))
    return found


def _spans(sample: Sample, medium: Medium) -> Sequence[Interval]:
    """Return the spans of time that must be within a whole video: its clip, or else the target's."""
    if isinstance(medium, Image):
        return ()
    if medium.clip is not None:
        return (medium.clip,)
    return sample.intervals if medium is sample.video else ()


def _has_overrun(sample: Sample) -> bool:
    """Return whether a span ends after the video. This is tolerated: many published annotations are rounded up."""
    return sample.duration_s is not None and any(span.end_s > sample.duration_s for span in sample.intervals)
