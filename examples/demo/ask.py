"""`bash tools/demo.sh --real VIDEO.mp4`: asks the trained tiny model about a video of the user."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image
from rich.console import Console

from demo.plan import Demo
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import DataSection
from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.preparation import video_options
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.video import VideoFrames, read_frames
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.rollout.special_tokens import SpecialTokens

NUM_FRAMES = 24
_FRAMES_PER_ROW = 8
_SHOWN_SIDE = 96  # pixels of a frame in the contact sheet


def ask(demo: Demo, video: Path, thing: str, console: Console) -> None:
    """Ask the joint GRPO model of the first seed when an object is visible, where it moves and in which corner it is.

    Writes the frames that the model sees to real.png.

    Raises:
        UserError: the demo has not trained the model yet.
        VideoError: the video cannot be read; the message names the file and the reason.
    """
    model_dir = demo.run_dir("grpo_joint", demo.seeds[0]) / "export"
    if not model_dir.is_dir():
        raise UserError(f"{model_dir} does not exist yet: run `bash tools/demo.sh` first")
    config = load_config(demo.config("test_others"), ("--model.path", str(model_dir)))
    model_config = ModelConfig.from_pretrained(model_dir)
    processor = PromptProcessor.from_pretrained(model_dir, model_config)
    tokens = SpecialTokens.from_pretrained(model_dir, processor, model_config.num_embeddings)
    options = _video_options(config.data)
    start_s = time.perf_counter()
    frames = read_frames(video, factor=processor.factor, rules=processor.frame_rules, **options)  # type: ignore[arg-type]
    decode_s = time.perf_counter() - start_s
    picture = demo.out / "real.png"
    _contact_sheet(frames).save(picture)
    console.print(
        f"{video}: {frames.duration_s:.1f} s. The model sees {len(frames.frames)} frames of 16 x 16 pixels "
        f"({picture}), decoded by {frames.backend} in {decode_s:.2f} s",
        markup=False,
    )
    video_part = {"type": "video", "video": str(video), **options}
    with mesh.world(config.parallel):
        model = build_model(model_config, config.model, config.parallel, config.recompute).eval()
        load_model_weights(model, model_dir)
        engine = build_engine(config, model, processor, tokens)
        for text in _prompts(thing):
            console.print(f"\n{text.splitlines()[0]}", style="bold", markup=False, highlight=False)
            content = [video_part, {"type": "text", "text": text}]
            prompt = encode_messages([{"role": "user", "content": content}], processor)
            _print_response(prompt, engine, processor, config.evaluate.max_new_tokens, console)
        engine.close()
    console.print(
        "\nThe model has 0.4 million parameters and was trained on coloured shapes only. On other videos its answers "
        "show that the pipeline runs, not what the video contains."
    )


def _prompts(thing: str) -> tuple[str, ...]:
    corners = "(A) top left\n(B) top right\n(C) bottom left\n(D) bottom right"
    return (
        f"Draw the time line, then say: when is it true that the {thing} is visible?",
        f"Follow the {thing}.",
        f"In which corner is the {thing}?\n{corners}",
    )


def _video_options(data: DataSection) -> dict[str, float]:
    options = video_options(data)
    return {**options, "max_frames": NUM_FRAMES, "max_pixels": options["min_pixels"]}


def _print_response(
    prompt: EncodedPrompt, engine: RolloutEngine, processor: PromptProcessor, max_new_tokens: int, console: Console
) -> None:
    """Print the greedy response and the time that it took."""
    if num_unknown := int((prompt.token_ids == processor.tokenizer.unk_token_id).sum()):
        console.print(f"{num_unknown} words or characters of the prompt are not in the tiny vocabulary")
    start_s = time.perf_counter()
    request, params = GenerationRequest("real", prompt, num_responses=1), SamplingParams(max_new_tokens, temperature=0)
    (group,) = engine.generate([request], params)
    seconds = time.perf_counter() - start_s
    (rollout,) = group.rollouts
    console.print(processor.decode(rollout.token_ids), highlight=False, markup=False)
    console.print(
        f"[dim]{len(prompt.token_ids)} prompt tokens, {len(rollout.token_ids)} response tokens in {seconds:.2f} s[/]"
    )


def _contact_sheet(video: VideoFrames) -> Image.Image:
    """Tile the frames, eight per row, enlarged."""
    num_frames, height, width, _ = video.frames.shape
    size = (_SHOWN_SIDE * width // max(height, width), _SHOWN_SIDE * height // max(height, width))
    sheet = Image.new("RGB", (_FRAMES_PER_ROW * size[0], -(-num_frames // _FRAMES_PER_ROW) * size[1]))
    for index, frame in enumerate(video.frames):
        enlarged = Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % _FRAMES_PER_ROW * size[0], index // _FRAMES_PER_ROW * size[1]))
    return sheet
