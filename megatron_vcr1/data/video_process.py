"""`read_frames` and `read_image` in a subprocess: a decoder that crashes or hangs costs one video, not the run.

Lifetime of the subprocess: `VideoReader` starts it at the first request and again after a crash. It ends

- when its parent closes the request pipe, which the kernel also does if the parent is killed,
- by SIGALRM, whose timer it sets before each video: the kernel delivers the signal even while a C library hangs,
- by SIGKILL from `VideoReader.close`.

It ignores Ctrl-C, and the job scheduler's signals are blocked in it (`block_job_signals_in_children`), so that it
decodes for as long as the training process needs it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from megatron_vcr1.data.frame_rules import PER_FRAME_RULES, rules_from_json, rules_to_json
from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.signals import block_job_signals_in_children
from megatron_vcr1.data.video import TIME_LIMIT_S, VideoError, VideoFrames, VideoPath, read_frames
from megatron_vcr1.data.video_types import OptionError

GRACE_S = 1.0
"""Seconds from the time limit, which the decoding loop checks itself, to the alarm that ends the process."""


class VideoReader:
    """Reads videos and images in one subprocess.

    Requests and results are JSON lines on pipes; the raw pixels follow a result. A reader is not thread-safe: give each
    thread its own. Several readers in parallel scale best with `num_threads=1`.
    """

    def __init__(self, max_memory_bytes: int | None = None) -> None:
        """Create a reader; its subprocess starts with the first video or image.

        Args:
            max_memory_bytes: address space that decoding may use in addition to what the idle subprocess uses; None
                sets no limit.
        """
        self._max_memory_bytes = max_memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def read_frames(self, path: VideoPath, **options: Any) -> VideoFrames:
        """Run `megatron_vcr1.data.video.read_frames(path, **options)` in the subprocess; the frames are on the CPU.

        Raises:
            VideoError: the video cannot be read, or the decoder crashed or hung.
            OptionError: an option is out of range.
            RuntimeError: the subprocess failed for another reason; its traceback is on stderr.
        """
        if options.get("backend") == "dali-gpu":
            raise OptionError("dali-gpu decodes in the process that owns the GPU; call read_frames there")
        files = os.fspath(path) if isinstance(path, str | os.PathLike) else [os.fspath(file) for file in path]
        rules = rules_to_json(options.pop("rules", PER_FRAME_RULES))
        reply, frames = self._request({"video": files, "rules": rules, "options": options}, path)
        return VideoFrames(frames, tuple(reply["timestamps_s"]), reply["duration_s"], reply["backend"])

    def read_image(self, path: str, *, time_limit_s: float = TIME_LIMIT_S) -> Tensor:
        """Run `megatron_vcr1.data.images.read_image(path)` in the subprocess.

        Raises:
            VideoError: the image cannot be read, or the decoder crashed or hung.
            RuntimeError: the subprocess failed for another reason; its traceback is on stderr.
        """
        return self._request({"image": path, "options": {"time_limit_s": time_limit_s}}, path)[1]

    def _request(self, request: dict[str, Any], path: VideoPath) -> tuple[dict[str, Any], Tensor]:
        """Send a request; return the reply and the pixels, or raise the error that the subprocess reports."""
        process = self._process or _start(self._max_memory_bytes)
        # Forget the process until it has replied. If this call is interrupted (Ctrl-C, an exception of a signal
        # handler), an unread reply is left in the pipe, and the next request must not read it as its own.
        self._process = None
        assert process.stdin is not None and isinstance(process.stdout, io.BufferedReader)
        reply = b""
        with contextlib.suppress(BrokenPipeError):  # the process died; the missing reply is handled below
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        result = _parse_reply(json.loads(reply), process.stdout) if reply.endswith(b"\n") else None
        if result is None:
            raise _error_of_dead_process(process, path)
        self._process = process
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Kill the subprocess and wait for it."""
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start(max_memory_bytes: int | None) -> subprocess.Popen[bytes]:
    """Start the subprocess with the same module search path and with the job's signals blocked."""
    limits = [] if max_memory_bytes is None else [str(max_memory_bytes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with block_job_signals_in_children():
        return subprocess.Popen(
            [sys.executable, "-m", __name__, *limits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )


def _parse_reply(
    reply: dict[str, Any], stream: io.BufferedReader
) -> tuple[dict[str, Any], Tensor] | VideoError | OptionError | None:
    """Return the reply and the pixels, the error to raise, or None if the process died while it sent the pixels."""
    if "video_error" in reply:
        return VideoError(*reply["video_error"])
    if "option_error" in reply:
        return OptionError(reply["option_error"])
    frames = torch.empty(reply["shape"], dtype=torch.uint8)
    buffer = frames.view(-1).numpy().data
    if stream.readinto(buffer) < len(buffer):
        return None
    return reply, frames


def _error_of_dead_process(process: subprocess.Popen[bytes], path: VideoPath) -> Exception:
    """Wait for the process to end and return an error for its exit status.

    A signal means that the decoder crashed or hung, which costs one video. An exit code means an uncaught Python
    exception, which is a mistake in our code: the RuntimeError ends the run.
    """
    process.communicate()
    code = process.returncode
    if code == -signal.SIGALRM:
        return VideoError(path, "the decoder hung and was ended by the time limit")
    if code < 0:
        return VideoError(path, f"the decoder crashed ({signal.Signals(-code).name})")
    return RuntimeError(f"{path}: the video process exited with code {code}; see its traceback on stderr")


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Serve requests until the parent closes the pipe."""
    for line in requests:
        request = json.loads(line)
        limit_s = request["options"].get("time_limit_s", TIME_LIMIT_S)
        # SIGALRM has its default action here: it ends the process, even inside a C library.
        signal.setitimer(signal.ITIMER_REAL, limit_s + GRACE_S)
        try:
            reply, pixels = _read(request)
        except VideoError as error:
            reply = {"video_error": [error.file, error.reason]}
        except OptionError as error:
            reply = {"option_error": str(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        if "shape" in reply:
            replies.write(pixels.contiguous().view(-1).numpy().data)
        replies.flush()


def _read(request: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Decode a video or an image; return the reply and the pixels that follow it."""
    if "image" in request:
        image = read_image(request["image"])
        return {"shape": list(image.shape)}, image
    video = read_frames(request["video"], rules=rules_from_json(request["rules"]), **request["options"])
    reply = {
        "shape": list(video.frames.shape),
        "timestamps_s": video.timestamps_s,
        "duration_s": video.duration_s,
        "backend": video.backend,
    }
    return reply, video.frames


def _limit_memory(max_bytes: int) -> None:
    """Let allocations fail that would take the address space to `max_bytes` above what it is now."""
    with contextlib.suppress(OSError):  # only Linux has /proc
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit_bytes = num_pages * resource.getpagesize() + max_bytes
        _, hard_limit_bytes = resource.getrlimit(resource.RLIMIT_AS)
        if hard_limit_bytes != resource.RLIM_INFINITY:
            limit_bytes = min(limit_bytes, hard_limit_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def _main() -> None:
    """Serve on stdin and stdout; anything that libraries print goes to stderr instead of into the replies."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        # If memory runs out, the kernel kills this process rather than the training process.
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may ignore it, which children inherit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if len(sys.argv) > 1:
        _limit_memory(int(sys.argv[1]))
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    _main()
