"""Feeds mutated files to every reader: python -m tests.fuzz.readers FOLDER READER FIRST_SEED NUM_INPUTS.

READER may be several names with commas between.
It runs in a process of its own with an address space of 4 GB. It writes the number of each input before reading it, so
that the parent knows which one crashed or hung the process: an alarm with its default action ends a hang.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_vcr1.checkpoint.safetensors_io import SafetensorsReader
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.data.image_settings import read_image_settings
from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.manifest import read_manifest, scan_manifest
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.data.video import VideoError, read_frames
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.log_probs import read_requests
from megatron_vcr1.evaluation.predictions import read_predictions
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.serving.app import ChatApp, Limits
from megatron_vcr1.serving.batching import ServerStopping
from megatron_vcr1.serving.decoding import Decoders
from tests.data.tiny_processor import tiny_processor
from tests.fuzz.mutate import mutate_bytes, mutate_json
from tests.limits import HANG_S

MAX_GROWTH_BYTES = 300e6
"""Growth of the resident memory over all inputs: allocator caches and thread stacks, but no leak. While an input is
read, only the limit of the address space counts: an image may have a canvas of many megapixels."""


class UnexpectedStatus(Exception):
    """A status that the endpoint must not answer with."""


_DECODERS = Decoders(1)


class _NoEngine:
    """A batcher that refuses every prompt: the request was valid."""

    def submit(self, pending: object) -> None:
        raise ServerStopping("no engine")


def _post(path: Path) -> None:
    """Send a chat request through the ASGI application."""
    limits = Limits(max_prompt_tokens=2000, max_new_tokens=8, prompts_per_batch=1, files=None)
    chat = ChatApp("tiny", tiny_processor(), _NoEngine(), limits)  # type: ignore[arg-type]
    chat._decoders = _DECODERS  # one process for all inputs
    app = chat.build(None)
    body, statuses = path.read_bytes(), []
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": ""},
        **{"headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)},
    }
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    if statuses not in ([400], [413], [503]):
        raise UnexpectedStatus(str(statuses))


def _unpack(path: Path) -> None:
    payload.unpack(payload.INLINE_PREFIX + base64.b64encode(path.read_bytes()).decode())


def _safetensors(path: Path) -> None:
    SafetensorsReader(path).close()


def _manifest(path: Path) -> None:
    list(scan_manifest(path))
    read_manifest(path)


READERS: dict[str, tuple[Callable[[Path], object], tuple[type[Exception], ...]]] = {
    "manifest.jsonl": (_manifest, (UserError,)),
    "predictions.jsonl": (read_predictions, (UserError,)),
    "requests.jsonl": (read_requests, (UserError,)),
    "config.json": (lambda path: ModelConfig.from_pretrained(path.parent), (UserError,)),
    "preprocessor_config.json": (lambda path: read_image_settings(path.parent, video_patch_size=14), (UserError,)),
    "model.safetensors": (_safetensors, (UserError,)),
    "payload.safetensors": (_unpack, (ValueError,)),
    "settings.toml": (load_config, (UserError,)),
    "templates.toml": (load_templates, (UserError,)),
    "chat.json": (_post, ()),
    **{
        f"image.{suffix}": (lambda path: read_image(str(path)), (VideoError,))
        for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp", "avif")
    },
    **{
        f"video.{suffix}": (lambda path: read_frames(path, fps=10, num_threads=1, time_limit_s=HANG_S), (VideoError,))
        for suffix in ("mp4", "mkv", "avi", "ts", "mpg", "webm", "flv", "gif", "h264", "png", "webp", "avif")
    },
}


def main(folder: Path, name: str, first_seed: int, num_inputs: int) -> None:
    """Read mutations of one file, and print a line per unexpected error."""
    torch.set_num_threads(1)
    read, expected = READERS[name]
    read(folder / name)  # the file itself is good: otherwise, its mutations would be refused for the same fault
    content = (folder / name).read_bytes()
    work = folder / f"mutated_{os.getpid()}_{name}"
    work.mkdir()
    for other in folder.iterdir():
        if other.is_file() and other.suffix == ".json":
            (work / other.name).write_bytes(other.read_bytes())
    path = work / name
    limit = psutil.Process().memory_info().vms + (3 << 30)  # in addition to the libraries: those of CUDA take 7 GB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    usage = descriptors = 0
    for seed in range(first_seed, first_seed + num_inputs):
        rng = random.Random(f"{name} {seed}")
        is_json = name.endswith((".json", ".jsonl"))
        if is_json and rng.random() < 0.7:
            lines = content.splitlines() if name.endswith("l") else [content]
            position = rng.randrange(len(lines))
            lines[position] = mutate_json(lines[position], rng)
            path.write_bytes(b"\n".join(lines))
        else:
            path.write_bytes(mutate_bytes(content, rng))
        print("input", name, seed, flush=True)
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            read(path)
            print("accepted")
        except expected:
            print("refused")
        except Exception as error:
            print(
                "FAULT",
                seed,
                json.dumps(traceback.format_exception(error)[-1][:300]),
                json.dumps(traceback.format_exception(error)[-2][-400:]),
            )
        signal.setitimer(signal.ITIMER_REAL, 0)
        if seed == first_seed + min(50, num_inputs // 2):
            usage = psutil.Process().memory_info().rss
            descriptors = len(os.listdir("/proc/self/fd"))
    growth = psutil.Process().memory_info().rss - usage
    now_open = len(os.listdir("/proc/self/fd"))
    if growth > MAX_GROWTH_BYTES or now_open > descriptors + 5:
        print("FAULT", name, "growth", growth, "bytes;", descriptors, "to", now_open, "descriptors")


if __name__ == "__main__":
    for name in sys.argv[2].split(","):
        main(Path(sys.argv[1]), name, int(sys.argv[3]), int(sys.argv[4]))
