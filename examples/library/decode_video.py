"""Decode a video as training does, and save the frames that the model would see.

python examples/library/decode_video.py clip.mp4 --out frames
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from megatron_vcr1.data.video import read_frames


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Save the frames of a video that the model would see.")
    parser.add_argument("video", help="a video file, a URL or a folder of images")
    parser.add_argument("--out", type=Path, default=Path("frames"), help="folder for the PNG files")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second")
    parser.add_argument("--max-frames", type=int, default=32)
    args = parser.parse_args(arguments)

    video = read_frames(args.video, fps=args.fps, max_frames=args.max_frames)
    num_frames, height, width, _ = video.frames.shape
    print(f"{num_frames} frames of {width} x {height} from {video.duration_s:.1f} s, decoded by {video.backend}")

    args.out.mkdir(parents=True, exist_ok=True)
    for frame, time_s in zip(video.frames, video.timestamps_s, strict=True):
        file = args.out / f"{time_s:08.2f}s.png"
        Image.fromarray(frame.cpu().numpy()).save(file)
        print(file)


if __name__ == "__main__":
    main()
