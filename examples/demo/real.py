"""`bash tools/demo.sh --real VIDEO.mp4`: the trained tiny model on a clip of the user's own."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image
from rich.console import Console

from demo.plan import Demo
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.video import VideoFrames, read_frames
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams

NUM_FRAMES = 24
_SHOWN_SIDE = 96  # pixels of a frame in the picture


def ask(demo: Demo, video: Path, thing: str, console: Console) -> None:
    """Ask the joint model of the first seed when a thing is visible, where it goes and in which corner it is.

    Writes what the model saw to real.png.

    Raises:
        UserError: the demo has not trained the model yet.
        VideoError: the clip cannot be read; names the file and the reason.
    """
    model_dir = demo.run_dir("grpo_joint", demo.seeds[0]) / "export"
    if not model_dir.is_dir():
        raise UserError(f"{model_dir} is not there yet: run `bash tools/demo.sh` first")
    config = load_config(demo.config("test_others"), ("--model.path", str(model_dir)))
    processor = PromptProcessor.from_pretrained(model_dir)
    options = _video_options(config)
    start_s = time.perf_counter()
    frames = read_frames(video, factor=processor.factor, **options)  # type: ignore[arg-type]
    decode_s = time.perf_counter() - start_s
    picture = demo.out / "real.png"
    _contact_sheet(frames).save(picture)
    console.print(
        f"{video}: {frames.duration_s:.1f} s; {len(frames.frames)} frames of 16 x 16 pixels, which is what this model "
        f"sees of it ({picture}), read by {frames.backend} in {decode_s:.2f} s",
        markup=False,
    )
    shown = {"type": "video", "video": str(video), **options}
    with mesh.world(config.parallel):
        model = build_model(ModelConfig.from_pretrained(model_dir), config).eval()
        load_model_weights(model, model_dir)
        engine = build_engine(config, model, processor)
        for question in _questions(thing):
            console.print(f"\n{question.splitlines()[0]}", style="bold", markup=False, highlight=False)
            parts = [shown, {"type": "text", "text": question}]
            prompt = encode_messages([{"role": "user", "content": parts}], processor)
            _answer(prompt, engine, processor, config.evaluate.max_new_tokens, console)
        engine.close()
    console.print(
        "\nThe model has 0.4 million parameters and has seen nothing but coloured shapes: on other clips its answers "
        "show that the pipeline runs, not what is in the video."
    )


def _questions(thing: str) -> tuple[str, ...]:
    corners = "(A) top left\n(B) top right\n(C) bottom left\n(D) bottom right"
    return (
        f"Draw the time line, then say: when is it true that the {thing} is visible?",
        f"Follow the {thing}.",
        f"In which corner is the {thing}?\n{corners}",
    )


def _video_options(config: RunConfig) -> dict[str, float]:
    data = config.data
    return {
        "fps": data.fps,
        "max_frames": NUM_FRAMES,
        "total_pixels": data.total_pixels,
        "min_pixels": data.min_pixels,
        "max_pixels": data.min_pixels,
    }


def _answer(
    prompt: EncodedPrompt, engine: RolloutEngine, processor: PromptProcessor, max_new_tokens: int, console: Console
) -> None:
    """The most probable answer, and the time that it took."""
    if num_unknown := int((prompt.token_ids == processor.tokenizer.unk_token_id).sum()):
        console.print(f"{num_unknown} words or signs of the question are not among the few that it knows")
    start_s = time.perf_counter()
    request, params = GenerationRequest("real", prompt, num_responses=1), SamplingParams(max_new_tokens, temperature=0)
    (answered,) = engine.generate([request], params)
    seconds = time.perf_counter() - start_s
    (rollout,) = answered.rollouts
    console.print(processor.decode(rollout.token_ids), highlight=False, markup=False)
    console.print(
        f"[dim]{len(prompt.token_ids)} prompt tokens, {len(rollout.token_ids)} answered in {seconds:.2f} s[/]"
    )


def _contact_sheet(video: VideoFrames) -> Image.Image:
    """The frames side by side, eight a row, enlarged."""
    num_frames, height, width, _ = video.frames.shape
    shown = (_SHOWN_SIDE * width // max(height, width), _SHOWN_SIDE * height // max(height, width))
    sheet = Image.new("RGB", (8 * shown[0], -(-num_frames // 8) * shown[1]))
    for index, frame in enumerate(video.frames):
        enlarged = Image.fromarray(frame.numpy()).resize(shown, Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % 8 * shown[0], index // 8 * shown[1]))
    return sheet
