from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_vcr1.data.frame_rules import PixelOptions
from megatron_vcr1.model.families.registry import FAMILIES
from megatron_vcr1.serving import media
from megatron_vcr1.serving.app import ChatApp, Limits
from megatron_vcr1.serving.batching import Batcher
from megatron_vcr1.serving.chat import ChatRequest, RefusedRequest
from megatron_vcr1.serving.media import MAX_FRAMES, request_files
from tests.data.tiny_processor import tiny_processor
from tests.data.video_clips import write_clip
from tests.serving.requests import picture, picture_file, text, video


def convert(part: dict[str, Any], root: Path | None, **keys: Any) -> dict[str, Any]:
    """Convert a part; `read` holds the contents of the files that it names."""
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": [text("x"), part]}], **keys})
    with request_files(root, max_pixels=10**7) as files:
        (message,) = files.convert(request)
        converted = message["content"][1]
        paths = converted[converted["type"]]
        read = [Path(path).read_bytes() for path in ([paths] if isinstance(paths, str) else paths)]
    assert not files.folder.exists()
    return {**converted, "read": read}


def test_contents_of_data_urls_are_files_for_the_length_of_the_request() -> None:
    converted = convert({"type": "image_url", "image_url": {"url": picture()}}, None)
    assert converted["read"] == [picture_file()]


def test_frames_keep_their_order_and_rate() -> None:
    contents = [picture_file(seed, "JPEG") for seed in range(12)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(content).decode() for content in contents)
    converted = convert(video(url), None)
    assert (converted["read"], converted["image_fps"]) == (contents, 2.0)
    converted = convert(video(url), None, media_io_kwargs={"video": {"fps": 5, "num_frames": 12}})
    assert (converted["image_fps"], converted["fps"], converted["max_frames"]) == (5, 5, 12)


@pytest.mark.parametrize("most, options", [(MAX_FRAMES, {}), (4, {"max_frames": 4})])
def test_more_frames_than_are_read_are_refused(most: int, options: dict[str, Any]) -> None:
    url = "data:video/jpeg;base64," + ",".join(["AAAA"] * (most + 1))
    with pytest.raises(RefusedRequest, match=rf"messages\[0\].content\[1\]: {most + 1} frames; at most {most} are"):
        convert(video(url, **options), None)


def test_options_of_a_part_override_those_of_the_request(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a b.mp4", num_frames=4)
    shared = {"media_io_kwargs": {"video": {"fps": 5, "num_frames": 12}}}
    converted = convert(video(clip.as_uri(), fps=1), tmp_path, **shared)
    assert (converted["fps"], converted["max_frames"], converted["video"]) == (1, 12, str(clip))


@pytest.mark.parametrize(
    "url, message",
    [
        ("file:///a%00b", "null character"),
        ("file:///etc/hostname", "is not below the folder"),
        ("file:{folder}/pipe", "neither a file nor a folder"),
        ("ftp://localhost/a", "send data: URLs"),
        ("data:video/mp4;base64,\u00e4", "does not hold base64"),
        ("file://[::1/a.mp4", "send data: URLs"),
        ("file:{folder}/" + "a" * 5000, "File name too long"),
        ("file:{folder}/circle/a.mp4", "circle|symbolic links"),
        ("file:{folder}/frames", "is not below the folder"),
    ],
)
def test_bad_urls_are_refused_with_their_place(tmp_path: Path, url: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").symlink_to("/etc/hostname")
    with pytest.raises(RefusedRequest, match=rf"messages\[0\].content\[1\]: .*{message}"):
        convert(video(url.format(folder=f"//{tmp_path}")), tmp_path)


def test_a_folder_outside_is_refused_before_its_files_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "list_images", lambda folder: pytest.fail(f"{folder} is listed"))
    (tmp_path / "files").mkdir()
    with pytest.raises(RefusedRequest, match="is not below the folder"):
        convert(video(tmp_path.as_uri()), tmp_path / "files")


def test_file_urls_need_a_folder_of_files(tmp_path: Path) -> None:
    with pytest.raises(RefusedRequest, match="--files FOLDER"):
        convert(video((tmp_path / "a.mp4").as_uri()), None)


@pytest.mark.parametrize(
    "options",
    [{"total_pixels": 10**9}, {"max_frames": 10**6}, {"min_pixels": 10**6}, {"min_frames": 9, "max_frames": 8}],
)
def test_options_beyond_a_prompt_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RefusedRequest, match=r"messages\[0\].content\[1\]: (.* asks for|min_frames 9 is above)"):
        convert(video((tmp_path / "a.mp4").as_uri(), **options), tmp_path)


def test_the_default_budget_of_the_model_may_be_asked_for(tmp_path: Path) -> None:
    rules = FAMILIES["qwen3_vl"].media.frames
    budget = rules.with_defaults(PixelOptions()).total_pixels
    assert budget is not None
    limits = Limits(4096, 8, 4, tmp_path)
    app = ChatApp("tiny", replace(tiny_processor(16), frame_rules=rules), cast(Batcher, None), limits)
    for total_pixels, message in (
        (budget, "gone.mp4"),
        (2 * budget, f"total_pixels {2 * budget} asks for {4 * budget}"),
    ):
        part = video((tmp_path / "gone.mp4").as_uri(), total_pixels=total_pixels)
        body = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
        with pytest.raises(RefusedRequest, match=message):
            app._prepare(body)
    app.close()
