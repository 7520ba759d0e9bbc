"""Images and videos of requests are decoded in other processes, whose failures cost one request each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from PIL import Image

from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.video import VideoError, read_frames
from megatron_vcr1.serving import decoding
from megatron_vcr1.serving.decoding import Decoders
from tests.data.video_clips import write_clip
from tests.serving.requests import ServerProcess, ask, picture, text, video


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(1)
    yield decoders
    decoders.close()


def kill_decoder(decoders: Decoders) -> None:
    process = decoders._readers[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)  # as the kernel does if memory runs out


def test_images_and_videos_are_those_of_the_readers(decoders: Decoders, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", num_frames=6)
    photo = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 90).save(photo)
    with decoders.borrow() as readers:
        assert torch.equal(readers["read"](clip, factor=28).frames, read_frames(clip).frames)
        assert torch.equal(readers["read_image"](str(photo)), read_image(str(photo)))
        with pytest.raises(VideoError, match=r"gone\.png: no such file"):
            readers["read_image"](str(tmp_path / "gone.png"))
        kill_decoder(decoders)
        with pytest.raises(VideoError, match=r"photo\.png: the decoder crashed \(SIGKILL\)"):
            readers["read_image"](str(photo))
        assert readers["read_image"](str(photo)).shape == (40, 50, 3)


def test_a_request_has_a_time_limit(decoders: Decoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "REQUEST_TIME_LIMIT_S", 0.0)
    with decoders.borrow() as readers:
        with pytest.raises(VideoError, match=r"a\.png: decoding the request's images and videos takes more than 0 s"):
            readers["read_image"]("a.png")
        with pytest.raises(VideoError, match=r"0\.jpg: decoding"):
            readers["read"](["0.jpg", "1.jpg"])


def test_decoding_has_a_memory_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "MAX_MEMORY_BYTES", 64 << 20)
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("RGB", (100, 100)).save(small)
    Image.new("RGB", (8000, 8000)).save(large)  # 192 MB
    decoders = Decoders(1)
    with decoders.borrow() as readers:
        with pytest.raises(VideoError, match=r"large\.png: decoding it needs more memory than there is"):
            readers["read_image"](str(large))
        assert readers["read_image"](str(small)).shape == (100, 100, 3)
    decoders.close()


@pytest.mark.xdist_group("serving")  # one worker, one server
def test_the_server_outlives_its_decoders(server: ServerProcess, client: openai.OpenAI) -> None:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture()}}, text("what?")]
    expected = ask(client, *parts).choices[0].message.content
    decoders = psutil.Process(server.process.pid).children()
    assert decoders
    for decoder in decoders:
        decoder.kill()
    # One request only: the decoder that is used last is used next, however many the requests before have started.
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\]: the decoder crashed"):
        ask(client, *parts)
    assert ask(client, *parts).choices[0].message.content == expected
    with pytest.raises(openai.BadRequestError, match=r"content\[0\]: damaged, or not a video"):
        ask(client, video("data:video/mp4;base64,AAAA"))
