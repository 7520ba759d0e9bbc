"""`read_frames` in a process of its own: a decoder that crashes or never comes back costs one video, not the run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from megatron_vcr1.data.signals import children_without_signals
from megatron_vcr1.data.video import TIME_LIMIT_S, VideoError, VideoFrames, VideoPath, read_frames

GRACE_S = 1.0
"""How long after the time limit, which the decoding loop looks at itself, the process is killed."""


class VideoReader:
    """Reads videos in one process that it starts when needed, and again after a crash.

    Requests and results are JSON lines on pipes, followed by the raw frames. The process arms an alarm for each video,
    so the kernel ends it in time even inside a decoder, and it ends with its parent. Not for several threads at once:
    give each its own reader. With `num_threads=1`, readers in parallel scale best.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def read_frames(self, path: VideoPath, **options: Any) -> VideoFrames:
        """`megatron_vcr1.data.video.read_frames(path, **options)` in the other process; frames on the CPU.

        Raises:
            VideoError: as there, or the decoder crashed or hung.
            ValueError: an option is out of range.
        """
        if options.get("backend") == "dali-gpu":
            raise ValueError("dali-gpu decodes in the process that owns the GPU; call read_frames there")
        process = self._process or _start()
        self._process = None  # until it has answered: a request that is interrupted takes its process along
        files = os.fspath(path) if isinstance(path, str | os.PathLike) else [os.fspath(file) for file in path]
        assert process.stdin is not None and isinstance(process.stdout, io.BufferedReader)
        reply = b""
        with contextlib.suppress(BrokenPipeError):  # it died; the missing reply says so below
            process.stdin.write(json.dumps({"path": files, "options": options}).encode() + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        result = _result(json.loads(reply), process.stdout) if reply.endswith(b"\n") else None
        if result is None:
            raise _why_it_died(process, path)
        self._process = process
        if isinstance(result, ValueError):
            raise result
        return result

    def close(self) -> None:
        """End the process."""
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


def _start() -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with children_without_signals():
        return subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )


def _result(reply: dict[str, Any], stream: io.BufferedReader) -> VideoFrames | ValueError | None:
    """What a reply says: frames, an error to raise, or None when the frames break off."""
    if "video_error" in reply:
        return VideoError(*reply["video_error"])
    if "value_error" in reply:
        return ValueError(reply["value_error"])
    frames = torch.empty(reply["shape"], dtype=torch.uint8)
    buffer = frames.view(-1).numpy().data
    if stream.readinto(buffer) < len(buffer):
        return None
    return VideoFrames(frames, tuple(reply["timestamps_s"]), reply["duration_s"], reply["backend"])


def _why_it_died(process: subprocess.Popen[bytes], path: VideoPath) -> Exception:
    process.communicate()
    code = process.returncode
    if code == -signal.SIGALRM:
        return VideoError(path, "the decoder hung and was ended by the time limit")
    if code < 0:
        return VideoError(path, f"the decoder crashed ({signal.Signals(-code).name})")
    return RuntimeError(f"the video process ended with code {code} at {path}; its messages are on stderr")


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests until the parent closes the pipe."""
    for line in requests:
        request = json.loads(line)
        limit_s = request["options"].get("time_limit_s", TIME_LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, limit_s + GRACE_S)  # SIGALRM, unhandled, ends the process
        try:
            video = read_frames(request["path"], **request["options"])
        except VideoError as error:
            reply: dict[str, Any] = {"video_error": [error.file, error.reason]}
        except ValueError as error:
            reply = {"value_error": str(error)}
        else:
            reply = {
                "shape": list(video.frames.shape),
                "timestamps_s": video.timestamps_s,
                "duration_s": video.duration_s,
                "backend": video.backend,
            }
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        if "shape" in reply:
            replies.write(video.frames.contiguous().view(-1).numpy().data)
        replies.flush()


def _main() -> None:
    """Serve on stdin and stdout; what libraries print goes to stderr."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # a video that fills the memory ends this process, not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may have it ignored
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    _main()
