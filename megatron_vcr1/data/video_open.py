"""Opening a video: which containers are read, and which of a file's streams is the video.

A file from the internet must not make this process open other files, or connect to a server. FFmpeg's playlists do
both. So FFmpeg is given a list of the formats and protocols that it may use, and refuses anything else before it opens
it. The list is part of the open call because a check after opening would be too late.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import av
from av.stream import Disposition

from megatron_vcr1.data.media_files import local_path, open_media
from megatron_vcr1.data.video_types import OUT_OF_MEMORY, Deadline, VideoError

_VIDEO_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "gxf", "wtv", "rm", "nut", "dv", "nsv"),
    *(
        "apng",
        "ivf",
        "obu",
        "gif",
        "h261",
        "h263",
        "h264",
        "hevc",
        "vvc",
        "av1",
        "vc1",
        "m4v",
        "mpegvideo",
        "cavsvideo",
        "dirac",
    ),
    *("mjpeg", "yuv4mpegpipe", "avs2", "avs3", "dhav"),
)
_IMAGE_FORMATS = ("png_pipe", "jpeg_pipe", "bmp_pipe", "webp_pipe", "webp_anim", "tiff_pipe", "ppm_pipe", "jpegxl_pipe")
_SOUND_FORMATS = ("mp3", "flac", "wav", "aac", "aiff", "ape", "wv", "tta", "dsf", "caf", "w64", "ac3", "eac3", "amr")
"""Read only to say that a file holds no video."""
FORMATS = ",".join(_VIDEO_FORMATS + _IMAGE_FORMATS + _SOUND_FORMATS)
"""FFmpeg's names of the formats that are read: each is one file. Not among them are playlists (hls, dash, concat, sdp,
...), patterns of file names (image2), captured devices and generated videos (lavfi)."""
CONTAINERS_WITHOUT_PTS = ("avi",)
"""Containers that store no presentation time stamps. FFmpeg derives them from the decoding order, which is wrong if the
stream has B-frames. Only the order in which the decoder returns the frames is right."""
STRICT_ERROR_DETECTION = "crccheck+bitstream+buffer+explode"
"""FFmpeg's err_detect flags: decoders check all that they can, and fail instead of concealing errors."""
MAX_FRAME_PIXELS = 2**26
"""Largest frame that is decoded, in pixels: 8192 x 8192. A small file may claim any size, and the decoder allocates
several frames of it."""
DEFAULT_STREAM_BONUS_PIXELS = 5_000_000
"""Pixels by which FFmpeg prefers the stream that the file marks as its default over larger ones."""

# PyAV before 19 decodes metadata strictly by default, so that a title in another encoding than UTF-8 would make a video
# unreadable. PyAV 19 removed the argument: it never fails on metadata.
_METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True)
class VideoSource:
    """An open video."""

    file: str
    container: av.container.InputContainer
    stream: av.VideoStream
    time_base: Fraction
    """Seconds per unit of the stream's time stamps."""
    deadline: Deadline

    @property
    def has_pts(self) -> bool:
        """Whether packets carry the presentation time stamps of their own frames."""
        return self.container.format.name not in CONTAINERS_WITHOUT_PTS

    @property
    def has_packet_table(self) -> bool:
        """Whether the container's header lists every packet, as MP4 and QuickTime do."""
        return self.container.format.name.startswith("mov")


@contextmanager
def open_video(file: str, deadline: Deadline, num_threads: int = 0) -> Iterator[VideoSource]:
    """Open a video's main stream; errors of FFmpeg and of the file system inside the with-block become VideoErrors."""
    try:
        with _open_container(file, deadline) as container:
            stream = _choose_stream(file, container)
            # An unknown time base is None before PyAV 19, and a false value of its own rational type since then.
            if stream.codec_context is None or not stream.time_base:
                raise VideoError(file, "damaged, or encoded with a codec that FFmpeg does not decode")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_FRAME_PIXELS:
                raise VideoError(
                    file, f"{width}x{height} frames have more than {MAX_FRAME_PIXELS} pixels; scale it down"
                )
            # FRAME threads, where the codec has them. SLICE threads lose the decoder's flags on damaged frames.
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = num_threads
            stream.codec_context.options = {"err_detect": STRICT_ERROR_DETECTION, "max_pixels": str(MAX_FRAME_PIXELS)}
            time_base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
            yield VideoSource(file, container, stream, time_base, deadline)
    except MemoryError as error:  # also FFmpeg's
        raise VideoError(file, OUT_OF_MEMORY) from error
    except FileNotFoundError as error:
        raise VideoError(file, "no such file") from error
    except OSError as error:
        raise VideoError(file, f"cannot be read ({error.strerror or error})") from error
    except av.error.ArgumentError as error:  # FFmpeg's error for a frame above max_pixels, but also for other faults
        raise VideoError(file, f"damaged, or its frames have more than {MAX_FRAME_PIXELS} pixels") from error
    except av.FFmpegError as error:
        deadline.check()  # FFmpeg reports a read that ran out of time as an ordinary error
        raise VideoError(file, f"damaged, or not a video ({error.strerror})") from error


@contextmanager
def _open_container(file: str, deadline: Deadline) -> Iterator[av.container.InputContainer]:
    with open_media(file) as stream:
        path = local_path(file)
        if path is None:
            with _open_input(file, stream, "none", deadline) as container:
                yield container
            return
        if os.fstat(stream.fileno()).st_size == 0:
            raise VideoError(file, "the file is empty")
    # FFmpeg reads a local file itself, which is faster than reading through Python. The prefix keeps it from reading a
    # protocol into a file name with a colon (concat:, subfile:).
    with _open_input(file, f"file:{path}", "file", deadline) as container:
        yield container


def _open_input(file: str, source: str | BinaryIO, protocols: str, deadline: Deadline) -> av.container.InputContainer:
    """Open a container in one of the formats that are read.

    Args:
        file: name of the video in errors.
        source: URL that FFmpeg opens, or a file object.
        protocols: FFmpeg's names of the protocols that it may use, separated by commas.
        deadline: time limit for each read.
    """
    try:
        return av.open(
            source,
            "r",
            options={"max_pixels": str(MAX_FRAME_PIXELS)},  # opening decodes the first frames
            container_options={"format_whitelist": FORMATS, "protocol_whitelist": protocols},
            timeout=deadline.remaining_s,
            **_METADATA_OPTIONS,
        )
    except av.error.ArgumentError as error:
        # FFmpeg's error for a format that is not on the list.
        reason = "damaged, or a playlist or another kind of file that is not read; give the video itself"
        raise VideoError(file, reason) from error


def _choose_stream(file: str, container: av.container.InputContainer) -> av.VideoStream:
    """Choose the stream that FFmpeg plays: the largest one, with a bonus for the default one, but no cover picture.

    Of equal ones, take the one with the most frames: an animated AVIF file also has its first frame as a stream.

    Raises:
        VideoError: the file holds no video.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        covers = ", only a cover picture" if container.streams.video else ""
        raise VideoError(file, f"no video stream{covers}")
    return max(streams, key=_preference)


def _preference(stream: av.VideoStream) -> tuple[int, int]:
    context = stream.codec_context
    if context is None:  # a codec that FFmpeg does not know
        return -1, 0
    bonus_pixels = DEFAULT_STREAM_BONUS_PIXELS * bool(stream.disposition & Disposition.default)
    return context.width * context.height + bonus_pixels, stream.frames
