"""Ask a trained model about a video in plain transformers, with the frames, pixels and positions of its training.

It is for Qwen2-VL and Qwen2.5-VL. transformers' own processor of Qwen3-VL reads videos as training does if it is given
the settings of the training: videos_kwargs={"fps": data.fps, "size": {"shortest_edge": (as in the model's file),
"longest_edge": 2 * data.total_pixels}}; total_pixels counts one of two frames, longest_edge counts both.

It needs no part of megatron_vcr1:

pip install torch torchvision transformers av
python examples/transformers_inference.py --model runs/own_data/export --video clip.mp4 --prompt "When?"

`vcr1 generate --run RUN --json` prints the prompt that a run was trained with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import av
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

MAX_FRAME_PIXELS = 768 * 28 * 28


def read_frames(
    path: str, factor: int, fps: float, min_frames: int, max_frames: int, total_pixels: int, min_pixels: int
) -> tuple[torch.Tensor, float]:
    """Decode evenly spaced frames of a video with a constant frame rate, and resize them into the pixel budget.

    Args:
        path: the video.
        factor: patch size times merge size; both sides of a frame are multiples of it.
        fps: frames per second to sample.
        min_frames, max_frames: bounds on the number of frames.
        total_pixels: pixel budget of the video; two frames share their tokens.
        min_pixels: smallest number of pixels of a frame.

    Returns:
        uint8 [num_frames, 3, height, width], and the duration of the video in seconds.
    """
    with av.open(path) as container:
        total, rate = sum(1 for _ in container.decode(video=0)), container.streams.video[0].average_rate
    duration_s = float(total / rate)
    count = int(min(max(duration_s * fps, min_frames) + 1e-6, max_frames, total))
    count = max(count - count % 2, 2)  # two frames make one temporal patch
    wanted = [round(index * (total - 1) / (count - 1)) for index in range(count)]
    decoded = {}
    with av.open(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                decoded[index] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    frames = torch.stack([decoded[index] for index in wanted])
    max_pixels = max(min(MAX_FRAME_PIXELS, total_pixels / count * 2), int(min_pixels * 1.05))
    height, width = smart_resize(*frames.shape[2:], factor, min_pixels, int(max_pixels))
    return resize(frames, [height, width], InterpolationMode.BICUBIC, antialias=True), duration_s


def with_published_positions(get_rope_index: Callable[..., Any], video_token_id: int) -> Callable[..., Any]:
    """Wrap a model's `get_rope_index`, so that the text after a video starts one past its largest position.

    The published models were trained so, and transformers 4 does so. transformers 5 ignores the time axis there, so
    that the positions of a long video and of the text after it overlap. With transformers 4 this changes nothing.
    """

    def positions(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        index, _ = get_rope_index(input_ids, *args, **kwargs)  # [3, 1, num_tokens]
        after = int((input_ids[0] == video_token_id).nonzero()[-1]) + 1
        index[:, :, after:] += index[:, :, :after].max() + 1 - index[0, 0, after]
        return index, index.amax(dim=(0, 2))[:, None] + 1 - input_ids.shape[1]

    return positions


def answer(arguments: argparse.Namespace) -> str:
    """Return the model's greedy response."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model_type = AutoConfig.from_pretrained(arguments.model).model_type
    if model_type not in ("qwen2_vl", "qwen2_5_vl"):
        raise SystemExit(
            f"{arguments.model} is a {model_type}: use transformers' own processor, see the top of this file"
        )
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    model.model.get_rope_index = with_published_positions(model.model.get_rope_index, model.config.video_token_id)
    vision = model.config.vision_config
    frames, duration_s = read_frames(
        arguments.video,
        vision.patch_size * vision.spatial_merge_size,
        arguments.fps,
        arguments.min_frames,
        arguments.max_frames,
        arguments.total_pixels,
        arguments.min_pixels,
    )
    content = [{"type": "video", "video": arguments.video}, {"type": "text", "text": arguments.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=[text],
        videos=[frames],
        videos_kwargs={
            "do_resize": False,
            "do_sample_frames": False,
            "video_metadata": [{"fps": len(frames) / duration_s, "total_num_frames": len(frames)}],
        },
        return_tensors="pt",
    ).to(device)
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, repetition_penalty=1.0
        )
    (response,) = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return response


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a trained model about a video in plain transformers.")
    parser.add_argument("--model", required=True, help="the export of a run")
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--prompt", required=True, help="the whole prompt, as the model was trained with it")
    parser.add_argument("--fps", type=float, default=2.0, help="data.fps of the training")
    parser.add_argument("--min-frames", type=int, default=4, help="data.min_frames of the training")
    parser.add_argument("--max-frames", type=int, default=768, help="data.max_frames of the training")
    parser.add_argument("--total-pixels", type=int, default=3584 * 28 * 28, help="data.total_pixels of the training")
    parser.add_argument("--min-pixels", type=int, default=16 * 28 * 28, help="data.min_pixels of the training")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest response")
    print(answer(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
