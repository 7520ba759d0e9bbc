"""Pictures and videos of a request: sent along, or named below a folder that the server's owner opened."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vcr1.serving.chat import ChatRequest, ImagePart, Part, RefusedRequest, TextPart


@contextmanager
def messages_with_files(request: ChatRequest, root: Path | None) -> Iterator[list[dict[str, Any]]]:
    """The conversation as `encode_messages` takes it; files that were sent along exist for the with-block.

    Args:
        root: the folder below which ``file://`` URLs may point; None: nowhere.

    Raises:
        RefusedRequest: a URL is of another kind, or leaves the folder. Nothing is fetched over a network: a request
            could make the server ask what its sender may not.
    """
    with tempfile.TemporaryDirectory(prefix="vcr1-serve-") as folder:
        video_options = request.media_io_kwargs.video.options()
        messages = []
        number = 0
        for message in request.messages:
            parts: str | list[dict[str, Any]]
            if isinstance(message.content, str):
                parts = message.content
            else:
                parts = []
                for part in message.content:
                    number += 1
                    parts.append(_part(part, Path(folder) / str(number), root, video_options))
            messages.append({"role": message.role, "content": parts})
        yield messages


def _part(part: Part, file: Path, root: Path | None, video_options: dict[str, float]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        return {"type": "image", "image": str(_file(part.image_url.url, file, root))}
    return {"type": "video", "video": str(_file(part.video_url.url, file, root)), **video_options}


def _file(url: str, file: Path, root: Path | None) -> Path:
    if url.startswith("data:"):
        file.write_bytes(_sent_along(url))
        return file
    parsed = urlsplit(url)
    if parsed.scheme != "file" or parsed.netloc not in ("", "localhost"):
        shown = url if len(url) <= 100 else url[:97] + "..."
        raise RefusedRequest(f"{shown}: send data: URLs, or file:// URLs of this machine")
    if root is None:
        raise RefusedRequest("file:// URLs need a server that was started with --files FOLDER")
    path = Path(unquote(parsed.path)).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RefusedRequest(f"{unquote(parsed.path)}: is not below the folder that this server was given")
    return path


def _sent_along(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RefusedRequest("a data: URL must be data:KIND;base64,CONTENT")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise RefusedRequest(f"a data: URL does not hold base64: {error}") from None
