"""Compute the log-probs of given responses to a prompt with a video.

    python examples/library/score_responses.py --model runs/demo/base-0/export --video clip.mp4 \
        --prompt "When does the circle appear?" "From 1.0 to 3.0." "From 4.0 to 6.0."

All responses share the prompt: its video is decoded once, and prompt and responses are one forward pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.packing import Group
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model import cpu
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compute the log-probs of given responses to a prompt with a video.")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--prompt", required=True, help="the question about the video")
    parser.add_argument("responses", nargs="+", help="the responses to score")
    args = parser.parse_args(arguments)

    for response, log_probs in zip(args.responses, score(**vars(args)), strict=True):
        print(f"{log_probs.sum():9.3f} in {len(log_probs)} tokens: {response}")


def score(model: Path, video: str, prompt: str, responses: list[str]) -> list[torch.Tensor]:
    """Return the log-prob of each token of each response; float32 [response_tokens] each."""
    cpu.install()  # lets megatron-core run without a GPU; does nothing on a machine that has one
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    settings = RunConfig(model=ModelSection(path=model, dtype=dtype))
    with mesh.world(settings.parallel):  # megatron-core needs its process groups, even for one process
        config = ModelConfig.from_pretrained(model)
        policy = build_model(config, settings.model, settings.parallel, settings.recompute).to(mesh.device()).eval()
        load_model_weights(policy, model)

        # Encode the prompt as the published processor does: chat template, frames, one pad token per video token.
        processor = PromptProcessor.from_pretrained(model, config)
        content = [{"type": "video", "video": video}, {"type": "text", "text": prompt}]
        encoded = encode_messages([{"role": "user", "content": content}], processor)

        # Pack the prompt once and the responses after it, in one sequence. A response does not attend to the others.
        response_ids = tuple(processor.tokenize(response) for response in responses)
        batch = pack([Group("example", encoded, response_ids)], config).to(mesh.device())
        with torch.no_grad():
            hidden = policy(batch)  # [targets, hidden_size]: one row for each response token
            log_probs = policy.log_probs(hidden, batch.target_ids)  # float32 [targets]
        return list(log_probs.cpu().split(batch.response_lengths))


if __name__ == "__main__":
    main()
