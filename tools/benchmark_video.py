"""Time video reading: our backends against decord2, torchcodec and qwen-vl-utils, as far as they are installed.

Every backend does the same job in a process of its own: open the file, decode frames at 2 a second, resize them within
Qwen's budget. The backends take turns on each clip, so that the ratio between them holds on a busy machine too.

    python tools/benchmark_video.py --repeats 5 --json video.json
    python tools/benchmark_video.py --videos clips/*.mp4 --backends pyav dali-gpu torchcodec
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BACKENDS = ("pyav", "dali-cpu", "dali-gpu", "decord2", "torchcodec", "qwen-vl-utils")
OURS = ("pyav", "dali-cpu", "dali-gpu")
PACKAGES = ("av", "torch", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "decord2", "torchcodec", "qwen-vl-utils")
TOTAL_PIXELS = 3584 * 28 * 28
MIN_PIXELS = 16 * 28 * 28

ReadClip = Callable[[str], int]
"""Decode and resize a clip's frames; returns how many."""


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        serve(arguments.worker, arguments.threads)
        return
    if missing := [str(clip) for clip in arguments.videos or () if not clip.is_file()]:
        sys.exit(f"benchmark_video: no such file: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        clips = arguments.videos or [write_clip(Path(folder) / "synthetic.mp4", arguments.seconds)]
        workers = start_workers(arguments.backends, arguments.threads)
        results = measure(workers, [str(clip) for clip in clips], arguments.repeats)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": installed_versions(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "clips": [Path(clip).name for clip in clips],
        "backends": results,
    }
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", type=Path, help="files to read (default: one synthetic 854x480 clip)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the synthetic clip (default: %(default)s)")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds over the clips (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="decoder threads of a process (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_clip(path: Path, seconds: int) -> Path:
    """H.264, 854x480 at 30 frames a second, a keyframe every 60 frames: a texture that moves, and noise."""
    import av
    import numpy as np

    generator = np.random.default_rng(0)
    tile = np.kron(generator.integers(0, 256, (60, 107, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "g": "60"})
        stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
        for index in range(seconds * 30):
            picture = np.roll(tile, (index // 2, index), axis=(0, 1))[:480, :854]
            picture = picture ^ generator.integers(0, 8, picture.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = index, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Worker:
    """A process that reads clips with one backend."""

    def __init__(self, backend: str, threads: int) -> None:
        self._backend = backend
        command = [sys.executable, __file__, "--worker", backend, "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.missing: str | None = self._reply()["missing"]

    def read(self, clip: str) -> dict[str, float]:
        """Seconds, processor seconds, frames and the peak memory so far in MB."""
        assert self._process.stdin is not None
        print(clip, file=self._process.stdin, flush=True)
        return self._reply()

    def close(self) -> None:
        self._process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the {self._backend} process ended early; its messages are above")
        return json.loads(line)


def start_workers(backends: Sequence[str], threads: int) -> dict[str, Worker]:
    """One process for each backend that is installed; the others are named with the reason."""
    workers = {}
    for backend in backends:
        worker = Worker(backend, threads)
        if worker.missing is None:
            workers[backend] = worker
        else:
            print(f"{backend}: left out ({worker.missing})", file=sys.stderr)
            worker.close()
    if not workers:
        sys.exit("none of the backends is installed")
    return workers


def measure(workers: dict[str, Worker], clips: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, after one round that warms up."""
    samples: dict[str, list[list[dict[str, float]]]] = {backend: [] for backend in workers}
    for round_number in range(repeats + 1):
        print(f"round {round_number} of {repeats}", file=sys.stderr)
        turns: dict[str, list[dict[str, float]]] = {backend: [] for backend in workers}
        for clip in clips:
            for backend, worker in workers.items():
                turns[backend].append(worker.read(clip))
        if round_number:
            for backend, turn in turns.items():
                samples[backend].append(turn)
    for worker in workers.values():
        worker.close()
    return {backend: summarize(rounds) for backend, rounds in samples.items()}


def summarize(rounds: Sequence[Sequence[dict[str, float]]]) -> dict[str, float]:
    seconds = statistics.median(sum(turn["seconds"] for turn in one_round) for one_round in rounds)
    cpu_seconds = statistics.median(sum(turn["cpu_seconds"] for turn in one_round) for one_round in rounds)
    num_clips, num_frames = len(rounds[0]), sum(turn["frames"] for turn in rounds[0])
    return {
        "clips_per_s": num_clips / seconds,
        "frames_per_s": num_frames / seconds,
        "cpu_s_per_clip": cpu_seconds / num_clips,
        "peak_mb": max(turn["peak_mb"] for one_round in rounds for turn in one_round),
        "idle_mb": rounds[0][0]["idle_mb"],
    }


def print_table(results: dict[str, dict[str, float]]) -> None:
    peers = [result["clips_per_s"] for backend, result in results.items() if backend not in OURS]
    fastest_peer = max(peers, default=float("nan"))
    print(f"{'backend':<14} {'clips/s':>8} {'frames/s':>9} {'CPU s/clip':>11} {'peak MB':>8}   x fastest peer")
    for backend, result in sorted(results.items(), key=lambda item: -item[1]["clips_per_s"]):
        speed = f"{result['clips_per_s']:8.2f} {result['frames_per_s']:9.1f} {result['cpu_s_per_clip']:11.3f}"
        print(f"{backend:<14} {speed} {result['peak_mb']:8.0f}   {result['clips_per_s'] / fastest_peer:.2f}")


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def serve(backend: str, threads: int) -> None:
    """Read the clips named on stdin, and answer on stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        read_clip = reader_of(backend, threads)
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or built for other libraries
        answer({"missing": str(error).strip().splitlines()[0]})
        return
    answer({"missing": None})
    idle_mb = peak_memory_mb()
    for line in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        num_frames = read_clip(line.rstrip("\n"))
        timing = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        answer(timing | {"frames": num_frames, "peak_mb": peak_memory_mb(), "idle_mb": idle_mb})


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reader_of(backend: str, threads: int) -> ReadClip:
    """What reads a clip with a backend; raises where it is not installed or does not load."""
    import torch

    torch.set_num_threads(threads)
    if backend in OURS:
        return _our_reader(backend, threads)
    return {"decord2": _decord_reader, "torchcodec": _torchcodec_reader, "qwen-vl-utils": _qwen_reader}[backend](
        threads
    )


def _our_reader(backend: str, threads: int) -> ReadClip:
    import torch

    from megatron_vcr1.data.video import read_frames

    if backend == "dali-gpu" and not torch.cuda.is_available():
        raise RuntimeError("no GPU")

    if backend.startswith("dali"):
        import nvidia.dali  # noqa: F401  # missing here, it is left out; missing at the first clip, it is a failure

    def read(clip: str) -> int:
        return len(read_frames(clip, backend=backend, num_threads=threads).frames)

    return read


def _decord_reader(threads: int) -> ReadClip:
    decord = import_module("decord")

    def read(clip: str) -> int:
        video = decord.VideoReader(clip, num_threads=threads)
        indices = _indices(len(video), len(video) / video.get_avg_fps())
        return _resize(video.get_batch(indices).asnumpy())

    return read


def _torchcodec_reader(threads: int) -> ReadClip:
    decoders = import_module("torchcodec.decoders")

    def read(clip: str) -> int:
        video = decoders.VideoDecoder(clip, num_ffmpeg_threads=threads, dimension_order="NHWC")
        indices = _indices(video.metadata.num_frames, video.metadata.duration_seconds)
        return _resize(video.get_frames_at(indices).data.numpy())

    return read


def _qwen_reader(threads: int) -> ReadClip:
    qwen_vl_utils = import_module("qwen_vl_utils")

    def read(clip: str) -> int:
        request = {"video": clip, "total_pixels": TOTAL_PIXELS, "min_pixels": MIN_PIXELS}
        return len(qwen_vl_utils.fetch_video(request))

    return read


def _indices(num_frames: int, duration_s: float) -> list[int]:
    """The frames that `read_frames` takes of a video with a constant rate."""
    import numpy as np

    from megatron_vcr1.data.video_types import frames_on_screen, num_sampled_frames

    num_sampled = num_sampled_frames(duration_s, num_frames, _sampling())
    return frames_on_screen(np.arange(num_frames), num_frames, num_sampled).tolist()


def _resize(frames: Any) -> int:
    """Resize frames [num_frames, height, width, 3] as `read_frames` does."""
    import torch

    from megatron_vcr1.data.resize import resize_frame

    size = _sampling().frame_size(len(frames), *frames.shape[1:3], "the clip")
    resized = torch.stack([resize_frame(torch.from_numpy(frame), *size) for frame in frames])
    return len(resized)


def _sampling() -> Any:
    from megatron_vcr1.data.resize import MAX_FRAME_PIXELS
    from megatron_vcr1.data.video_types import Sampling

    return Sampling(2.0, 4, 768, TOTAL_PIXELS, MIN_PIXELS, MAX_FRAME_PIXELS, 28)


if __name__ == "__main__":
    main()
