"""The server as a process, and the requests that tests send to it."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import torch
from PIL import Image

from megatron_vcr1.data.manifest import read_manifest
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]

STALL_TIMEOUT_S = 6.0
MAX_BODY_BYTES = 8 << 20
MAX_IN_FLIGHT = 40
_PROGRAM = f"""
import sys
from megatron_vcr1.cli.main import main
from megatron_vcr1.serving import app, connections

connections.HEADER_TIMEOUT_S = connections.STALL_TIMEOUT_S = float(sys.argv.pop(1))
app.MAX_BODY_BYTES = {MAX_BODY_BYTES}
app.Limits.max_in_flight = property(lambda limits: {MAX_IN_FLIGHT})
sys.exit(main())
"""


class ServerProcess:
    """`vcr1 serve` with smaller limits, so that tests reach them soon."""

    def __init__(self, model: Path, *options: str, stall_timeout_s: float = HANG_S) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(stall_timeout_s), "serve", "--model", str(model)]
        command += ["--port", "0", "--dtype", "float32"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
        # To append, because the process has the same file position, which `errors` changes.
        self._errors = tempfile.TemporaryFile("a+")  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        assert self.process.stdout is not None
        announced = self.process.stdout.readline()
        assert announced.startswith("model: http://127.0.0.1:"), self.errors()
        self.url = announced.split()[1]
        self.port = urlsplit(self.url).port

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=HANG_S)

    def errors(self) -> str:
        """Return the text that the process has written to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """POST a body, and return the status and the body of the response."""
    request = urllib.request.Request(f"{url}/chat/completions", data=body, headers=headers or {}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=HANG_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask(client: openai.OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    settings = {"model": "model", "max_tokens": 6, "temperature": 0} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": list(parts)}], **settings)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def video(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **options}


def image(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **options}


def picture_file(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (60, 90)) -> bytes:
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind)
    return file.getvalue()


def picture() -> str:
    return "data:image/png;base64," + base64.b64encode(picture_file()).decode()


def first_video(folder: Path) -> Path:
    path = read_manifest(folder / "data" / "train.jsonl")[0].media[0].path
    assert isinstance(path, str)
    return Path(path)
