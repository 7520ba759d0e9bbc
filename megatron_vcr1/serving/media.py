"""The images and videos of a request: sent in data: URLs, or named by file:// URLs in the folder of --files."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vcr1.data.resize import TEMPORAL_PATCH_SIZE
from megatron_vcr1.data.video_images import list_images
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.serving.chat import ChatRequest, ImagePart, RefusedRequest, TextPart, VideoPart

MAX_FRAMES = 768
"""Maximum number of frames of a video that is sent as images; `read_frames` has the same default for video files."""

_DEFAULT_FPS = 2.0
_FRAMES_HEADER = "data:video/jpeg;base64"


@dataclass(slots=True)
class RequestFiles:
    """The files of one request and their places in it.

    Attributes:
        folder: a temporary folder for the contents of data: URLs.
        root: the folder that holds all files that ``file://`` URLs may name; None allows no such URLs.
        max_pixels: maximum number of pixels that the options of an image or a video may ask for.
        places: for each file, its place in the request and the name to show for it.
    """

    folder: Path
    root: Path | None
    max_pixels: int
    places: dict[str, str] = field(default_factory=dict)

    def explain(self, error: VideoError) -> str:
        """Return the error's message with the place in the request instead of the name of a temporary file."""
        place = self.places.get(error.file) or self.places.get(str(Path(error.file).parent))  # a folder of frames
        return f"{place}: {error.reason}" if place else str(error).replace(str(self.folder), "the request")

    def convert(self, request: ChatRequest) -> list[dict[str, Any]]:
        """Return the messages in the format of `encode_messages`, after writing the files that were sent along."""
        shared = request.media_io_kwargs.video.options()
        messages = []
        for index, message in enumerate(request.messages):
            content: str | list[dict[str, Any]]
            if isinstance(message.content, str):
                content = message.content
            else:
                content = [
                    self._convert_part(part, f"messages[{index}].content[{number}]", shared)
                    for number, part in enumerate(message.content)
                ]
            messages.append({"role": message.role, "content": content})
        return messages

    def _convert_part(
        self, part: TextPart | ImagePart | VideoPart, place: str, shared: dict[str, float]
    ) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        try:
            if isinstance(part, ImagePart):
                options = part.options()
                for name in ("min_pixels", "max_pixels"):
                    self._check_pixels(options.get(name, 0), f"{name} {options.get(name, 0):.0f}")
                image = self._file(part.image_url.url, place)
                return {"type": "image", "image": image, **options}
            options = shared | part.options()
            if options:
                total_pixels = options.get("total_pixels", 0)
                # total_pixels counts one frame of each temporal patch.
                self._check_pixels(TEMPORAL_PATCH_SIZE * total_pixels, f"total_pixels {total_pixels:.0f}")
                max_frames, min_pixels = options.get("max_frames", MAX_FRAMES), options.get("min_pixels", 28 * 28)
                self._check_pixels(
                    max_frames * min_pixels, f"max_frames {max_frames:.0f} x min_pixels {min_pixels:.0f}"
                )
            if part.video_url.url.startswith(f"{_FRAMES_HEADER},"):
                return {"type": "video", **self._frames(part.video_url.url, place, options)}
            video = self._file(part.video_url.url, place)
            return {"type": "video", "video": video, **options}
        except RefusedRequest as error:
            raise RefusedRequest(f"{place}: {error}") from None

    def _check_pixels(self, num_pixels: float, option: str) -> None:
        """Refuse an option that asks for more pixels than the longest prompt, or the default options, can have."""
        if num_pixels > self.max_pixels:
            raise RefusedRequest(f"{option} asks for {num_pixels:.0f} pixels; at most {self.max_pixels} are allowed")

    def _file(self, url: str, place: str) -> str:
        """Return the local path of a URL."""
        if url.startswith("data:"):
            file = str(self._write(_data_url_content(url)))
            self.places[file] = place
            return file
        # Nothing is fetched over a network: clients could use the server to reach addresses that they cannot reach.
        try:
            parsed = urlsplit(url)
        except ValueError:  # of a malformed host; urlsplit checks nothing else
            parsed = urlsplit("")
        if parsed.scheme != "file" or parsed.netloc not in ("", "localhost"):
            raise RefusedRequest(f"{_shortened(url)}: send data: URLs, or file:// URLs of this machine")
        if self.root is None:
            raise RefusedRequest("file:// URLs need a server that was started with --files FOLDER")
        name = unquote(parsed.path)
        if "\0" in name:
            raise RefusedRequest("the file's name contains a null character")
        try:
            path = _resolve_below(Path(name), self.root)
        except OSError as error:  # for example, a name that is too long
            raise RefusedRequest(f"{_shortened(name)}: {error.strerror}") from None
        except RuntimeError:  # before Python 3.13, `resolve` raises it for links in a circle
            raise RefusedRequest(f"{_shortened(name)}: its symbolic links lead in a circle") from None
        self.places[str(path)] = f"{place}: {name}"
        return str(path)

    def _frames(self, url: str, place: str, options: dict[str, float]) -> dict[str, Any]:
        """Convert a video that is sent as JPEG frames, as vLLM and SGLang take it: every frame is used.

        The frames are shown at `fps` frames per second, 2 by default.
        """
        header, _, payload = url.partition(",")
        contents = payload.split(",")
        most = int(options.get("max_frames", MAX_FRAMES))
        if len(contents) > most:
            raise RefusedRequest(f"{len(contents)} frames; at most {most} are read, so send fewer")
        files = []
        for number, content in enumerate(contents):
            frame = f"{place}, frame {number}"
            try:
                file = str(self._write(_data_url_content(f"{header},{content}")))
            except RefusedRequest as error:
                raise RefusedRequest(f"frame {number}: {error}") from None
            self.places[file] = frame
            files.append(file)
        return {"video": files, "image_fps": options.get("fps", _DEFAULT_FPS), **options}

    def _write(self, content: bytes) -> Path:
        path = self.folder / str(len(self.places))  # every file that is written gets a place right after
        path.write_bytes(content)
        return path


@contextmanager
def request_files(root: Path | None, max_pixels: int) -> Iterator[RequestFiles]:
    """Provide the files of one request; those that were sent along are deleted at the end of the with-block.

    Args:
        root: the folder that holds all files that ``file://`` URLs may name; None allows no such URLs.
        max_pixels: maximum number of pixels after resizing that the options of an image or a video may ask for.
    """
    with tempfile.TemporaryDirectory(prefix="vcr1-serve-") as folder:
        yield RequestFiles(Path(folder), root, max_pixels)


def _resolve_below(path: Path, root: Path) -> Path:
    """Resolve the links of a path, and check that it is a file or a folder of frames below `root`.

    The frames of a folder may be links, too; they must not lead out of `root` either.
    """
    resolved, root = path.resolve(), root.resolve()
    outside = RefusedRequest(f"{_shortened(str(path))}: is not below the folder that this server was given")
    if not resolved.is_relative_to(root):  # before its files are listed, which takes long for a large folder
        raise outside
    if resolved.is_dir() and not all(Path(frame).resolve().is_relative_to(root) for frame in list_images(resolved)):
        raise outside
    if resolved.exists() and not (resolved.is_file() or resolved.is_dir()):  # reading a pipe would never end
        raise RefusedRequest(f"{_shortened(str(path))}: is neither a file nor a folder of frames")
    return resolved


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _data_url_content(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RefusedRequest("a data: URL must be data:KIND;base64,CONTENT")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside of ASCII
        raise RefusedRequest(f"a data: URL does not hold base64: {error}") from None
