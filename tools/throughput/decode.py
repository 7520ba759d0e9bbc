"""decode: frames a second through data.read_frames, by backend.

Each backend reads the same clips in a process of its own, in turns: decode 2 frames a second, resize within the model's
budget of pixels. benchmark_video.py compares with other packages, too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import benchmark_video

from megatron_vcr1.errors import UserError
from throughput.measure import add_json_argument, machine, print_table, write_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "decode",
        help="frames a second of videos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--videos", nargs="+", type=Path, help="files to read (default: one synthetic 854x480 clip)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the synthetic clip (default: %(default)s)")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=benchmark_video.OURS,
        default=list(benchmark_video.OURS),
        metavar="NAME",
        help=f"any of {', '.join(benchmark_video.OURS)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="over all clips (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="decoder threads of a process (default: %(default)s)")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for clip in args.videos or ():
        if not clip.is_file():
            raise UserError(f"--videos {clip}: no such file")
    with tempfile.TemporaryDirectory(prefix="benchmark-decode-") as folder:
        clips = args.videos or [benchmark_video.write_clip(Path(folder) / "synthetic.mp4", args.seconds)]
        workers = benchmark_video.start_workers(args.backends, args.threads)
        results = benchmark_video.measure(workers, [str(clip) for clip in clips], args.rounds)
    document = machine() | {"clips": [clip.name for clip in clips], "rounds": args.rounds, "backends": results}
    write_json(args.json, document | {"threads": args.threads})
    print_table(
        f"Decode and resize, {len(clips)} clip(s), medians of {args.rounds} rounds ({document['processor']})",
        ("", "frames/s", "clips/s", "processor s a clip", "peak MB"),
        [
            (
                name,
                f"{one['frames_per_s']:.1f}",
                f"{one['clips_per_s']:.2f}",
                f"{one['cpu_s_per_clip']:.3f}",
                f"{one['peak_mb']:.0f}",
            )
            for name, one in results.items()
        ],
    )
    return 0
