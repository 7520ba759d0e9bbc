"""One GRPO update by hand: sample a group, reward it, compute advantages, and take one optimizer step.

    python examples/library/grpo_update.py --model runs/demo/base-0/export --manifest data/train.jsonl \
        --templates examples/demo/templates.toml

This is what `vcr1 train` does in a step, on one process, for one prompt and without the reference model. The model of
`bash tools/demo.sh` needs the demo's templates, because it knows few words. If all responses get the same reward, for
example 0 from an untrained model, nothing changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from vcr1_kernels import linear_grpo_loss

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.packing import Group
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.templates import build_messages, load_templates
from megatron_vcr1.model import cpu
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rewards import score
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.training.grpo.advantages import group_advantages
from megatron_vcr1.types import Sample

GROUP_SIZE = 8  # responses to the prompt
MAX_NEW_TOKENS = 64
LEARNING_RATE = 1e-5


def reward(sample: Sample, completion: str) -> float:
    """Return the paper's reward, for example format + IoU. (Captions need a judge; without one they have none.)"""
    return score(sample, completion, thinking=False).total or 0.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Take one GRPO update on the first sample of a manifest.")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--manifest", type=Path, required=True, help="a manifest; its first sample is used")
    parser.add_argument("--templates", type=Path, help="prompt templates (default: the package's own)")
    args = parser.parse_args(arguments)
    cpu.install()  # lets megatron-core run without a GPU; does nothing on a machine that has one
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    settings = RunConfig(model=ModelSection(path=args.model, dtype=dtype))
    with mesh.world(settings.parallel):  # megatron-core needs its process groups, even for one process
        update(settings, args.manifest, args.templates)


def update(settings: RunConfig, manifest: Path, templates: Path | None) -> None:
    """Print the group with its rewards, and the log-prob of each response before and after the update."""
    # The policy: a megatron-core model with the weights of the Hugging Face directory.
    config = ModelConfig.from_pretrained(settings.model.path)
    policy = build_model(config, settings.model, settings.parallel, settings.recompute).to(mesh.device())
    load_model_weights(policy, settings.model.path)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)

    # The prompt: the sample's video and question, as frames and token ids.
    processor = PromptProcessor.from_pretrained(settings.model.path, config)
    sample = read_manifest(manifest)[0]
    messages = build_messages(sample, load_templates(templates), thinking=False)
    prompt = encode_messages(messages, processor)

    # Rollout: the policy itself samples the responses. The prompt is computed once for all of them.
    tokens = SpecialTokens.from_pretrained(settings.model.path, processor, config.num_embeddings)
    engine = LocalEngine(policy, tokens, processor.decode, max_batch_responses=GROUP_SIZE)
    request = GenerationRequest(sample.id, prompt, num_responses=GROUP_SIZE, seed=0)
    (group,) = engine.generate([request], SamplingParams(MAX_NEW_TOKENS, temperature=1.0))
    responses = tuple(torch.tensor(rollout.token_ids) for rollout in group.rollouts)

    # Rewards, and advantages: (reward - mean) / standard deviation of the group. Equal rewards give advantages of 0.
    texts = [processor.decode(response) for response in responses]
    rewards = [reward(sample, text) for text in texts]
    advantages = group_advantages(rewards, divide_by_std=True)

    # One packed sequence: the prompt once, and after it the responses. A response does not attend to the others.
    batch = pack([Group(sample.id, prompt, responses)], config).to(mesh.device())
    lengths = torch.tensor(batch.response_lengths)

    def response_log_probs() -> list[float]:
        with torch.no_grad():
            log_probs = policy.log_probs(policy(batch), batch.target_ids)
        return [float(values.sum()) for values in log_probs.split(batch.response_lengths)]

    before = response_log_probs()
    result = linear_grpo_loss(
        policy(batch),  # hidden states, [response tokens, hidden_size]; the logits are never stored whole
        policy.head_weight(),
        batch.target_ids,
        # All tokens of a response have its advantage; the loss is the mean over responses of the mean over tokens.
        torch.tensor(advantages).repeat_interleave(lengths).to(mesh.device()),
        token_weights=(1 / (GROUP_SIZE * lengths)).repeat_interleave(lengths).to(mesh.device()),
        # Not given: old_log_probs (the ratio of the first update after a rollout is 1) and ref_log_probs (the policy is
        # still the reference, so the KL term has no gradient yet).
        kl_coef=0.0,
    )
    result.loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()

    print("  reward  advantage  log-prob before    after  response")
    for row in zip(rewards, advantages, before, response_log_probs(), texts, strict=True):
        print("{:8.3f} {:10.3f} {:16.3f} {:8.3f}  {!r}".format(*row))


if __name__ == "__main__":
    main()
