"""Encoded prompts match those of transformers' processors: token ids, frames, grids and seconds per grid."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vcr1_kernels import frames_to_patches

from megatron_vcr1.data.encoding import EncodedPrompt, encode_frames, encode_messages
from megatron_vcr1.data.frame_rules import PER_FRAME_RULES
from megatron_vcr1.data.messages import MessageError
from megatron_vcr1.data.processor import ModelFacts, PromptProcessor
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.errors import UserError
from tests.data.model_dirs import (
    IMAGE_SETTINGS,
    MEAN,
    QWEN_7B_TOKENS,
    STAMPED_MEDIA,
    STD,
    TOKENS,
    write_json,
    write_model_dir,
)
from tests.data.video_clips import write_clip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> PromptProcessor:
    return PromptProcessor.from_pretrained(model_dir, TOKENS)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clip.mp4 (1.6 s, 112 x 112 pixels) and photo.png (231 x 197 pixels)."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4")
    picture = np.random.default_rng(0).integers(0, 256, (197, 231, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "photo.png")
    return folder


def conversation(media: Path) -> list[dict[str, Any]]:
    """Build a conversation of several turns with images, videos and non-ASCII text."""
    photo = {"type": "image", "image": str(media / "photo.png")}
    clip = {"type": "video", "video": str(media / "clip.mp4"), "fps": 10, "max_frames": 10, "min_pixels": 20 * 784}
    return [
        {"role": "user", "content": [clip, {"type": "text", "text": "Wann? 何时?"}, photo]},
        {"role": "assistant", "content": "<answer>0.40 to 1.20</answer>"},
        {"role": "user", "content": [photo | {"max_pixels": 80 * 784}, clip | {"fps": 2, "min_pixels": 16 * 784}]},
    ]


def test_pads_are_expanded_in_order(processor: PromptProcessor, media: Path) -> None:
    prompt = encode_messages(conversation(media), processor)
    assert prompt.token_ids.dtype == torch.int64
    assert [vision.grid_thw for vision in prompt.vision] == [(5, 10, 10), (1, 14, 16), (1, 14, 16), (2, 8, 8)]
    assert [vision.seconds_per_grid for vision in prompt.vision] == pytest.approx([0.32, None, None, 0.8])
    assert [tuple(vision.frames.shape) for vision in prompt.vision] == [
        (10, 140, 140, 3),
        (1, 196, 224, 3),
        (1, 196, 224, 3),
        (4, 112, 112, 3),
    ]
    pads = prompt.token_ids[(prompt.token_ids == 260) | (prompt.token_ids == 261)].tolist()
    assert pads == [261] * 125 + [260] * 56 + [260] * 56 + [261] * 32
    without_pads = prompt.token_ids[(prompt.token_ids != 260) & (prompt.token_ids != 261)]
    assert processor.decode(without_pads, skip_special_tokens=False) == processor.render(conversation(media)).replace(
        "<|video_pad|>", ""
    ).replace("<|image_pad|>", "")


def test_a_prompt_of_text_only_has_no_vision_inputs(processor: PromptProcessor) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = encode_messages(messages, processor)
    text = "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(prompt.token_ids, skip_special_tokens=False) == text
    assert prompt.vision == ()
    open_ended = encode_messages(messages, processor, add_generation_prompt=False)
    assert torch.equal(open_ended.token_ids, prompt.token_ids[: len(open_ended.token_ids)])


def test_an_image_is_resized_as_transformers_does(processor: PromptProcessor, media: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": str(media / "photo.png")}]}]
    (image,) = encode_messages(messages, processor).vision
    theirs = Qwen2VLImageProcessorPil(**IMAGE_SETTINGS)(Image.open(media / "photo.png"), return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(image.grid_thw)]
    # That processor resizes with Pillow, which differs by at most one of 255 levels. The tests below are exact.
    one_level = 1 / 255 / min(STD)
    torch.testing.assert_close(patches(image.frames, processor), theirs["pixel_values"], atol=one_level * 1.01, rtol=0)


def patches(
    frames: torch.Tensor,
    processor: PromptProcessor,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> torch.Tensor:
    return frames_to_patches(
        frames,
        patch_size=processor.patch_size,
        temporal_patch_size=processor.temporal_patch_size,
        merge_size=processor.merge_size,
        mean=mean,
        std=std,
    )


def test_an_odd_last_frame_fills_its_temporal_patch(processor: PromptProcessor) -> None:
    video = VideoFrames(torch.zeros(5, 56, 84, 3, dtype=torch.uint8), (0.0, 1.0, 2.0, 3.0, 4.0), 5.0, "images")
    encoded = encode_frames(video, processor)
    assert encoded.grid_thw == (3, 4, 6)
    assert encoded.num_tokens(processor.merge_size) == 18
    assert encoded.seconds_per_grid == 2.0


def test_the_reader_is_given_the_options_and_the_factor(processor: PromptProcessor) -> None:
    seen = {}

    def read(path: str, **options: Any) -> VideoFrames:
        seen.update(options, path=path)
        return VideoFrames(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), (0.0, 0.5), 1.0, "images")

    part = {"type": "video", "video": "a.mp4", "fps": 3, "start_s": 1.5, "end_s": 4}
    encode_messages([{"role": "user", "content": [part]}], processor, read=read)
    assert seen == {"path": "a.mp4", "fps": 3, "start_s": 1.5, "end_s": 4, "factor": 28, "rules": PER_FRAME_RULES}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "audio": "a.wav"}, r"messages\[0\]\.content\[1\]: type is 'audio'"),
        ({"type": "video", "path": "a.mp4"}, r"content\[1\]: the key 'video' is missing"),
        (
            {"type": "video", "video": "a.mp4", "nframes": 8},
            "unknown key 'nframes'; video parts may have fps, min_frames",
        ),
        (
            {"type": "image", "image": "a.png", "fps": 2},
            "unknown key 'fps'; image parts may have min_pixels, max_pixels",
        ),
        ("Hi", r"messages\[0\]\.content: must be a string or a list"),
        ({"type": "text", "text": 3}, r"content\[1\]: text is 3; it must be a string"),
        ({"type": "text"}, r"content\[1\]: the key 'text' is missing"),
        ({"type": "text", "text": "\ud800"}, r"content\[1\]: surrogates not allowed at character 0"),
        ({"type": "video", "video": 3}, r"content\[1\]: video is 3; it must be a path or a list of paths"),
        ({"type": "video", "video": []}, r"content\[1\]: video is \[\]; it must be a path or a list of paths"),
        ({"type": "image", "image": ["a.png"]}, r"content\[1\]: image is .*; it must be a path$"),
        ({"type": "video", "video": "a.mp4", "fps": "1"}, r"content\[1\]: fps is '1'; it must be a number"),
        ({"type": "video", "video": "a.mp4", "fps": None}, r"content\[1\]: fps is None; it must be a number"),
        ({"type": "video", "video": "a.mp4", "fps": True}, r"content\[1\]: fps is True; it must be a number"),
        ({"type": "video", "video": "a.mp4", "fps": math.nan}, r"content\[1\]: fps is nan; it must be a number"),
        ({"type": "video", "video": "a.mp4", "max_frames": 2.5}, r"max_frames is 2\.5; it must be an integer"),
        ({"type": "video", "video": "a.mp4", "max_frames": 10**400}, r"max_frames is 1.*; it must be an integer"),
        ({"type": "video", "video": "a.mp4", "fps": -1}, r"content\[1\]: fps must be above 0"),
        ({"type": "image", "image": "gone.png"}, r"gone\.png: no such file"),
        ({"type": "video", "video": "gone.mp4"}, r"gone\.mp4: no such file"),
    ],
)
def test_bad_parts_are_named(processor: PromptProcessor, part: Any, message: str) -> None:
    with pytest.raises((MessageError, VideoError), match=message):
        encode_messages([{"role": "user", "content": [{"type": "text", "text": "Look:"}, part]}], processor)


def test_a_message_without_content_is_named(processor: PromptProcessor) -> None:
    with pytest.raises(MessageError, match=r"messages\[1\]: needs the keys 'role' and 'content'"):
        encode_messages([{"role": "user", "content": "Hi"}, {"role": "assistant"}], processor)


def test_other_keys_of_a_message_are_checked(processor: PromptProcessor) -> None:
    nested: Any = "x"
    for _ in range(900):
        nested = [nested]
    for message, error in (
        ({"role": ["user"], "content": "x"}, r"role is \['user'\]; it must be a string"),
        ({"role": "user", "content": "x", "name": "\ud800"}, r"messages\[0\]\.name: surrogates not allowed"),
        ({"role": "user", "content": "x", "tool_calls": nested}, r"messages\[0\]\.tool_calls: nested too deeply"),
    ):
        with pytest.raises(MessageError, match=error):
            encode_messages([message], processor)


def test_a_mistake_in_the_code_is_not_taken_for_a_bad_message(processor: PromptProcessor) -> None:
    def read(path: str, **options: Any) -> VideoFrames:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake") as raised:
        encode_messages([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], processor, read=read)
    assert not isinstance(raised.value, MessageError)


def test_a_template_without_vision_tokens_is_refused(processor: PromptProcessor, media: Path) -> None:
    text_only = replace(processor, chat_template="{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(MessageError, match="0 vision tokens for 4 images and videos"):
        encode_messages(conversation(media), text_only)


# transformers' processors import torchvision. Its wheel for CUDA works with a CPU build of torch only if two of its
# operators are declared first, so this script runs in a process of its own.
TRANSFORMERS_SCRIPT = """
import json, sys
import torch
from torch import library
if torch.version.cuda is None:
    torchvision = library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

model_dir, request_file, frames_file, result_file = sys.argv[1:]
request = json.load(open(request_file))
processor = AutoProcessor.from_pretrained(model_dir)
videos = [video.permute(0, 3, 1, 2) for video in load_file(frames_file).values()]
text = processor.apply_chat_template(request["messages"], add_generation_prompt=True)
result = processor(
    text=[text],
    images=[Image.open(file) for file in request["images"]],
    videos=videos,
    video_metadata=request["metadata"],
    images_kwargs=request["images_kwargs"],
    videos_kwargs=request["videos_kwargs"],
    return_tensors="pt",
)
save_file({key: torch.as_tensor(value).contiguous() for key, value in result.items()}, result_file)
"""


def run_transformers(
    torchvision_path: Path,
    model_dir: Path,
    messages: list[dict[str, Any]],
    videos: list[torch.Tensor],
    folder: Path,
    **request: Any,
) -> dict[str, torch.Tensor]:
    """Encode the messages with transformers' processor of the model, given the frames of the videos."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    request |= {"messages": messages, "images": [part["image"] for part in parts if part["type"] == "image"]}
    write_json(folder / "request.json", request)
    save_file({f"{index:03}": frames for index, frames in enumerate(videos)}, folder / "frames.safetensors")
    (folder / "script.py").write_text(TRANSFORMERS_SCRIPT)
    files = [folder / name for name in ("request.json", "frames.safetensors", "result.safetensors")]
    search_path = os.pathsep.join([str(torchvision_path), *filter(None, sys.path)])
    command = [sys.executable, folder / "script.py", model_dir, *files]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": search_path})
    return load_file(files[-1])


def assert_equal_to_transformers(
    torchvision_path: Path, model_dir: Path, messages: list[dict[str, Any]], folder: Path, facts: ModelFacts = TOKENS
) -> None:
    processor = PromptProcessor.from_pretrained(model_dir, facts)
    videos = []

    def read(path: str, **options: Any) -> VideoFrames:
        videos.append(read_frames(path, **options))
        return videos[-1]

    prompt = encode_messages(messages, processor, read=read)
    theirs = run_transformers(
        torchvision_path,
        model_dir,
        messages,
        [video.frames for video in videos],
        folder,
        metadata=[
            {"fps": len(video.frames) / video.duration_s, "total_num_frames": len(video.frames)} for video in videos
        ],
        images_kwargs={"min_pixels": 3136, "max_pixels": processor.max_pixels},
        videos_kwargs={"do_sample_frames": False},  # the default since transformers 5.24 is True
    )
    assert_equal(prompt, theirs, processor)
    if "second_per_grid_ts" in theirs:  # Qwen2-VL's positions do not use it
        durations = [vision.seconds_per_grid for vision in prompt.vision if vision.seconds_per_grid is not None]
        seconds = torch.tensor(durations)
        torch.testing.assert_close(seconds, theirs["second_per_grid_ts"].to(seconds.dtype))


def assert_equal(
    prompt: EncodedPrompt,
    theirs: dict[str, torch.Tensor],
    processor: PromptProcessor,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> None:
    """Compare token ids, grids and normalized pixels."""
    assert prompt.token_ids.tolist() == theirs["input_ids"][0].tolist()
    for kind, grids, pixels in (
        ("image", "image_grid_thw", "pixel_values"),
        ("video", "video_grid_thw", "pixel_values_videos"),
    ):
        ours = [vision for vision in prompt.vision if (vision.seconds_per_grid is not None) == (kind == "video")]
        assert [list(vision.grid_thw) for vision in ours] == theirs[grids].tolist()
        our_pixels = torch.cat([patches(vision.frames, processor, mean, std) for vision in ours])
        torch.testing.assert_close(our_pixels, theirs[pixels], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_prompts_equal_those_of_transformers(torchvision_path: Path, tmp_path: Path, media: Path, family: str) -> None:
    messages = conversation(media)
    messages[-1]["content"][0].pop("max_pixels")  # transformers has one max_pixels for all images
    assert_equal_to_transformers(torchvision_path, write_model_dir(tmp_path / "model", family), messages, tmp_path)


@pytest.mark.parametrize("model", ["Qwen2.5-VL-7B-Instruct"])
def test_prompts_with_the_real_tokenizer_and_videos_equal_those_of_transformers(
    torchvision_path: Path, realdata: Path, tmp_path: Path, media: Path, model: str
) -> None:
    messages = conversation(media)
    for part in messages[0]["content"] + messages[2]["content"]:
        part.pop("max_pixels", None)
        if part["type"] == "video":
            part["video"] = str(realdata / "videos" / "llamafactory_3.mp4")
    model_dir = realdata / "qwen" / "Qwen2.5-VL-7B-Instruct"
    assert_equal_to_transformers(torchvision_path, model_dir, messages, tmp_path, QWEN_7B_TOKENS)


STAMPED = replace(TOKENS, media=STAMPED_MEDIA)


def test_videos_with_time_stamps_equal_those_of_transformers(
    torchvision_path: Path, tmp_path: Path, media: Path
) -> None:
    """transformers gets every frame of the videos: it chooses, resizes and stamps them itself."""
    write_clip(tmp_path / "odd.mp4", num_frames=26, size=(640, 368))  # 5 frames at 5 fps
    clips = [str(media / "clip.mp4"), str(tmp_path / "odd.mp4")]
    messages = conversation(media)
    (first, _, _), (_, second) = messages[0]["content"], messages[2]["content"]
    for part, clip in zip((first, second), clips, strict=True):
        part.clear()
        part.update({"type": "video", "video": clip, "fps": 5})
    messages[2]["content"][0].pop("max_pixels")
    model_dir = write_model_dir(tmp_path / "model", "qwen3_vl")
    processor = PromptProcessor.from_pretrained(model_dir, STAMPED)
    prompt = encode_messages(messages, processor)
    assert [vision.grid_thw[0] for vision in prompt.vision] == [4, 1, 1, 3]
    theirs = run_transformers(
        torchvision_path,
        model_dir,
        messages,
        [all_frames(clip) for clip in clips],
        tmp_path,
        metadata=[{"fps": 25, "total_num_frames": len(all_frames(clip))} for clip in clips],
        images_kwargs={},
        videos_kwargs={"fps": 5, "do_sample_frames": True},
    )
    assert_equal(prompt, theirs, processor, (0.5,) * 3, (0.5,) * 3)
    assert "<0.1 seconds><|vision_start|>" in processor.decode(prompt.token_ids, skip_special_tokens=False)


def all_frames(clip: str) -> torch.Tensor:
    with av.open(clip) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def test_every_temporal_patch_has_a_time_stamp_and_pads_of_its_own(tmp_path: Path) -> None:
    processor = PromptProcessor.from_pretrained(write_model_dir(tmp_path / "model", "qwen3_vl"), STAMPED)

    def read(path: str, **options: Any) -> VideoFrames:
        return VideoFrames(torch.zeros(5, 64, 32, 3, dtype=torch.uint8), (0.0, 0.5, 1.0, 9.6, 10.0), 11.0, "images")

    text = "at <0.2 seconds><|video_pad|>"  # a user's text is no time stamp and has no pads
    content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": text}]
    prompt = encode_messages([{"role": "user", "content": content}], processor, read=read)
    pads = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    stamped = f"<0.2 seconds>{pads}<5.3 seconds>{pads}<10.0 seconds>{pads}"
    decoded = processor.decode(prompt.token_ids, skip_special_tokens=False)
    assert f"user\n<|vision_start|>{stamped}<|vision_end|>{text}<|im_end|>" in decoded
    assert prompt.token_ids.tolist().count(261) == prompt.vision[0].num_tokens(2) == 6


def test_time_stamps_need_the_tokens_that_mark_vision(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path / "model", "qwen3_vl")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|vision_end|>", "<|seen|>"))
    with pytest.raises(UserError, match=r"model: the tokenizer has no token <\|vision_end\|>"):
        PromptProcessor.from_pretrained(folder, STAMPED)
