"""Compare the in-process engine with transformers' `generate` on the responses of a group.

All sides sample the same number of tokens for the same prompts with videos, from the same random weights, in turns.
"ours" computes the prompt of a group once; "ours, unshared" computes it once per response. Both decode all groups
together. "transformers" calls `generate` on a batch of copies of the prompt, group by group. Before the turns, the
greedy responses of both engines are compared. On a CPU the gain with a single group (--prompts 1) is smaller, because
every decoding step reads all weights for only 8 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.command_line import write_json
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.presets import raw_config
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.throughput.arguments import add_dtype_argument, add_repetition_arguments, add_size_arguments
from megatron_vcr1.throughput.measure import Spread, print_table, provenance, seconds
from megatron_vcr1.throughput.random_weights import write_random_model
from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.throughput.update_plain import pixel_values

HELP = "responses of a group, compared with transformers' generate"
OURS, UNSHARED, TRANSFORMERS = "ours", "ours, unshared", "transformers"
SIZES = ("num_prompts", "prompt_tokens", "group_size", "response_tokens", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_size_arguments(parser, prompts=4, response_tokens=32)
    add_dtype_argument(parser)
    add_repetition_arguments(parser, rounds=3)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-rollout-") as folder:
        model_dir = Path(folder) / "model"
        write_random_model(model_dir, raw_config(args.model), dtype=getattr(torch, args.dtype))
        case = UpdateCase(str(model_dir), None, **{name: getattr(args, name) for name in SIZES})
        with mesh.world(case.run_config.parallel):
            result = measure(case, args.rounds)
    result = provenance(args) | {"model": args.model, "rounds": args.rounds, **result}
    write_json(args.json, result)
    report(result)
    return 0


def measure(case: UpdateCase, rounds: int) -> dict[str, Any]:
    """Measure the seconds of every side, and the fraction of greedy tokens that agree."""
    ours, theirs = _Ours(case), _Transformers(case)
    sides: dict[str, Callable[[], object]] = {
        OURS: lambda: ours.generate(shared=True),
        UNSHARED: lambda: ours.generate(shared=False),
        TRANSFORMERS: lambda: theirs.generate(),
    }
    our_greedy = torch.tensor(ours.generate(shared=True, temperature=0.0))  # this also warms up
    their_greedy = theirs.generate(greedy=True).cpu()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in tqdm(range(rounds), desc="rounds"):
        for side, generate in sides.items():
            times[side].append(seconds(generate))
    num_tokens = case.num_prompts * case.group_size * case.response_tokens
    medians = {side: Spread.of(values).median for side, values in times.items()}
    return {
        **{name: getattr(case, name) for name in SIZES},
        "equal_greedy_tokens": float((our_greedy == their_greedy).double().mean()),
        "sides": {
            side: {
                "seconds": times[side],
                "seconds_per_group": median / case.num_prompts,
                "tokens_per_second": num_tokens / median,
                "speedup_over_transformers": medians[TRANSFORMERS] / median,
            }
            for side, median in medians.items()
        },
    }


class _Ours:
    """The in-process engine; no response ends early."""

    def __init__(self, case: UpdateCase) -> None:
        self._case = case
        config = ModelConfig.from_pretrained(case.model_dir)
        model = build_model(config, case.run_config.model, case.run_config.parallel, case.run_config.recompute).to(
            mesh.device()
        )
        load_model_weights(model, Path(case.model_dir))
        self._groups = case.groups(config)
        pads = (config.image_token_id, config.video_token_id)
        num_responses = case.num_prompts * case.group_size
        self._engine = LocalEngine(model, SpecialTokens(frozenset(), pads), str, max_batch_responses=num_responses)

    def generate(self, *, shared: bool, temperature: float = 1.0) -> list[list[int]]:
        """Return the token ids of all responses; with `shared`, the prompt of a group is computed once."""
        size = self._case.group_size
        requests = [
            GenerationRequest(f"{group.id}-{part}", group.prompt, size if shared else 1, seed=part)
            for group in self._groups
            for part in range(1 if shared else size)
        ]
        params = SamplingParams(self._case.response_tokens, temperature)
        groups = self._engine.generate(requests, params)
        return [list(rollout.token_ids) for group in groups for rollout in group.rollouts]


class _Transformers:
    """`generate` of transformers with SDPA attention, one group at a time, at the positions of this package."""

    def __init__(self, case: UpdateCase) -> None:
        self._case = case
        config = ModelConfig.from_pretrained(case.model_dir)
        auto = transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(case.model_dir, dtype=getattr(torch, case.dtype), attn_implementation="sdpa")
        self._model = model.to(mesh.device()).eval()
        self._pads = [config.image_token_id, config.video_token_id]
        self._inputs = [self._group_inputs(group, config) for group in case.groups(config)]

    def _group_inputs(self, group: Group, config: ModelConfig) -> dict[str, Tensor]:
        """Repeat the prompt and its video for every response."""
        repeats, num_tokens = self._case.group_size, len(group.prompt.token_ids)
        positions = pack([group], config).position_ids[:, :num_tokens]
        # transformers expects a fourth row in front: the text positions, from which it builds the attention mask.
        positions = torch.cat((torch.arange(num_tokens)[None], positions))
        token_ids = group.prompt.token_ids.expand(repeats, -1)
        (video,) = group.prompt.vision
        inputs = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "position_ids": positions[:, None].expand(-1, repeats, -1),
            "pixel_values_videos": pixel_values(video, config.vision).repeat(repeats, 1).to(self._model.dtype),
            "video_grid_thw": torch.tensor([video.grid_thw]).repeat(repeats, 1),
        }
        return {name: tensor.to(mesh.device()) for name, tensor in inputs.items()}

    def generate(self, *, greedy: bool = False) -> Tensor:
        """Return the token ids of all responses, [num_responses, response_tokens]."""
        sequences = [
            self._model.generate(
                **inputs,
                do_sample=not greedy,
                max_new_tokens=self._case.response_tokens,
                eos_token_id=None,
                pad_token_id=0,
                suppress_tokens=self._pads,
            )
            for inputs in self._inputs
        ]
        return torch.cat(sequences)[:, -self._case.response_tokens :]


def report(result: dict[str, Any]) -> None:
    rows = []
    for side, measured in result["sides"].items():
        spread = Spread.of([value / result["num_prompts"] for value in measured["seconds"]])
        speedup = f"{measured['speedup_over_transformers']:.1f}"
        rows.append((side, spread.text(), f"{measured['tokens_per_second']:.0f}", speedup))
    print_table(
        f"{result['model']}: {result['num_prompts']} prompts of {result['prompt_tokens']} tokens, "
        f"{result['group_size']} responses of {result['response_tokens']} tokens each",
        ("", "seconds per group", "tokens/s", "x transformers"),
        rows,
        caption=f"Median (range) of {result['rounds']} rounds; {result['dtype']}, {result['device']}, "
        f"{result['threads']} thread(s) of {result['processor']}; "
        f"{result['equal_greedy_tokens']:.1%} of the greedy tokens are equal",
    )
