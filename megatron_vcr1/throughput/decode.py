"""Measure video decoding: frames per second of our backends and of other packages.

Every backend does the same work in a process of its own: it opens the file, decodes 2 frames per second and resizes
them to the model's pixel budget. The backends take turns on each clip, so that their ratio is meaningful on a busy
machine. Backends that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from megatron_vcr1.command_line import positive, write_json
from megatron_vcr1.errors import UserError
from megatron_vcr1.throughput import decode_worker
from megatron_vcr1.throughput.arguments import add_repetition_arguments
from megatron_vcr1.throughput.decode_worker import BACKENDS, OURS
from megatron_vcr1.throughput.measure import print_table, provenance

HELP = "frames/s of video decoding"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--videos", nargs="+", type=Path, metavar="FILE", help="videos to read (default: one synthetic 854x480 clip)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=60, metavar="N", help="length of the synthetic clip (default: %(default)s)"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=list(BACKENDS),
        metavar="NAME",
        help=f"any of {', '.join(BACKENDS)} (default: all that are installed)",
    )
    add_repetition_arguments(parser, rounds=5)


def run(args: argparse.Namespace) -> int:
    for clip in args.videos or ():
        if not clip.is_file():
            raise UserError(f"--videos {clip}: no such file")
    with tempfile.TemporaryDirectory(prefix="benchmark-decode-") as folder:
        clips = args.videos or [write_clip(Path(folder) / "synthetic.mp4", args.seconds)]
        results = measure(start_workers(args.backends, args.threads), [str(clip) for clip in clips], args.rounds)
    document = provenance(args) | {"clips": [clip.name for clip in clips], "rounds": args.rounds, "backends": results}
    write_json(args.json, document | {"threads": args.threads})
    peers = [result["clips_per_s"] for name, result in results.items() if name not in OURS]
    columns = ("", "frames/s", "clips/s", "CPU s per clip", "peak MB", *(["x fastest peer"] if peers else []))
    rows = [
        (
            name,
            f"{result['frames_per_s']:.1f}",
            f"{result['clips_per_s']:.2f}",
            f"{result['cpu_s_per_clip']:.3f}",
            f"{result['peak_mb']:.0f}",
            *([f"{result['clips_per_s'] / max(peers):.2f}"] if peers else []),
        )
        for name, result in sorted(results.items(), key=lambda item: -item[1]["clips_per_s"])
    ]
    title = f"Decode and resize {len(clips)} clip(s), median of {args.rounds} rounds ({document['processor']})"
    print_table(title, columns, rows)
    return 0


def write_clip(path: Path, num_seconds: int) -> Path:
    """Write H.264 video, 854x480 at 30 frames/s with a keyframe every 60 frames: a moving texture with noise."""
    generator = np.random.default_rng(0)
    tile = np.kron(generator.integers(0, 256, (60, 107, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "g": "60"})
        stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
        for index in range(num_seconds * 30):
            picture = np.roll(tile, (index // 2, index), axis=(0, 1))[:480, :854]
            picture = picture ^ generator.integers(0, 8, picture.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = index, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Worker:
    """A handle to a process that reads clips with one backend.

    The process reads one path per line from stdin and answers with one JSON object per line. Its first line says
    whether the backend is installed. It ends when its stdin is closed.
    """

    def __init__(self, backend: str, threads: int) -> None:
        self._backend = backend
        self._process = subprocess.Popen(
            [sys.executable, decode_worker.__file__, backend, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.missing: str | None = self._reply()["missing"]

    def read(self, clip: str) -> dict[str, float]:
        """Read a clip; return seconds, CPU seconds, number of frames and the peak memory so far in MB."""
        assert self._process.stdin is not None
        print(clip, file=self._process.stdin, flush=True)
        return self._reply()

    def close(self) -> None:
        self._process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the {self._backend} process ended early; its messages are above")
        return json.loads(line)


def start_workers(backends: Sequence[str], threads: int) -> dict[str, Worker]:
    """Start a process for each installed backend, and print why the others are left out."""
    workers = {}
    for backend in backends:
        worker = Worker(backend, threads)
        if worker.missing is None:
            workers[backend] = worker
        else:
            print(f"{backend}: left out ({worker.missing})", file=sys.stderr)
            worker.close()
    if not workers:
        raise UserError("--backends: none of them is installed")
    return workers


def measure(workers: dict[str, Worker], clips: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, after a warm-up round."""
    samples: dict[str, list[list[dict[str, float]]]] = {backend: [] for backend in workers}
    for _ in tqdm(range(rounds + 1), desc="rounds"):
        turns: dict[str, list[dict[str, float]]] = {backend: [] for backend in workers}
        for clip in clips:
            for backend, worker in workers.items():
                turns[backend].append(worker.read(clip))
        for backend, turn in turns.items():
            samples[backend].append(turn)
    for worker in workers.values():
        worker.close()
    return {backend: summarize(turns[1:]) for backend, turns in samples.items()}


def summarize(rounds: Sequence[Sequence[dict[str, float]]]) -> dict[str, float]:
    """Summarize the readings of one backend: rounds x clips."""
    seconds = statistics.median(sum(reading["seconds"] for reading in readings) for readings in rounds)
    cpu_seconds = statistics.median(sum(reading["cpu_seconds"] for reading in readings) for readings in rounds)
    num_clips, num_frames = len(rounds[0]), sum(reading["frames"] for reading in rounds[0])
    return {
        "clips_per_s": num_clips / seconds,
        "frames_per_s": num_frames / seconds,
        "cpu_s_per_clip": cpu_seconds / num_clips,
        "peak_mb": max(reading["peak_mb"] for readings in rounds for reading in readings),
        "idle_mb": rounds[0][0]["idle_mb"],
    }
