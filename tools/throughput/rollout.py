"""rollout: a group's responses by the in-process engine against transformers' generate.

Both sides sample the same number of tokens for the same prompts with videos, from the same random weights, in turns.
"ours" computes a group's prompt once, "ours, prompt a response" once for each response; all groups decode together.
"transformers" is `generate` on a batch of copies of the prompt, group by group. Before the turns, greedy answers of
both are compared. On a CPU one group alone (--prompts 1) gains less: each step reads all weights for its 8 rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from model_presets import add_model_argument, raw_config
from torch import Tensor
from tqdm import tqdm

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from throughput.measure import Spread, add_json_argument, machine, print_table, prompt_tokens, seconds, write_json
from throughput.random_weights import write_random_model
from throughput.update_case import UpdateCase
from throughput.update_plain import pixel_values

OURS, UNSHARED, TRANSFORMERS = "ours", "ours, prompt a response", "transformers"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rollout",
        help="responses of a group against transformers' generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    on_gpu = torch.cuda.is_available()
    add_model_argument(parser, default="qwen2.5-vl-3b" if on_gpu else "small")
    parser.add_argument("--prompts", type=int, default=4, help="groups of a step (default: %(default)s)")
    parser.add_argument(
        "--prompt-tokens", type=prompt_tokens, default=1024, help="text and video (default: %(default)s)"
    )
    parser.add_argument("--group-size", type=int, default=8, help="responses a prompt (default: %(default)s)")
    parser.add_argument("--response-tokens", type=int, default=32, help="of each response (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if on_gpu else "float32",
        help="(default: bfloat16 with a GPU, float32 without)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's operators (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="for the weights (default: for temporary files)")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-rollout-") as folder:
        model_dir = Path(folder) / "model"
        write_random_model(model_dir, raw_config(args.model), dtype=getattr(torch, args.dtype))
        case = UpdateCase(
            str(model_dir),
            None,
            dtype=args.dtype,
            num_prompts=args.prompts,
            prompt_tokens=args.prompt_tokens,
            group_size=args.group_size,
            response_tokens=args.response_tokens,
        )
        with mesh.world(case.run_config.parallel):
            result = measure(case, args.rounds)
    result = {"machine": machine(), "model": args.model, "rounds": args.rounds, **result}
    write_json(args.json, result)
    report(result)
    return 0


def measure(case: UpdateCase, rounds: int) -> dict[str, Any]:
    """Seconds of every side's rounds, and how many of the greedy tokens agree."""
    ours, theirs = _Ours(case), _Transformers(case)
    sides: dict[str, Callable[[], object]] = {
        OURS: lambda: ours.generate(shared=True),
        UNSHARED: lambda: ours.generate(shared=False),
        TRANSFORMERS: lambda: theirs.generate(),
    }
    greedy = torch.tensor(ours.generate(shared=True, temperature=0.0)), theirs.generate(greedy=True)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in tqdm(range(rounds), desc="turns"):
        for side, generate in sides.items():
            times[side].append(seconds(generate))
    num_tokens = case.num_prompts * case.group_size * case.response_tokens
    spreads = {side: Spread.of(values) for side, values in times.items()}
    return {
        "prompts": case.num_prompts,
        "prompt_tokens": case.prompt_tokens,
        "group_size": case.group_size,
        "response_tokens": case.response_tokens,
        "dtype": case.dtype,
        "equal_greedy_tokens": float((greedy[0] == greedy[1].cpu()).double().mean()),
        "sides": {
            side: {
                "seconds": times[side],
                "seconds_a_group": one.median / case.num_prompts,
                "tokens_per_second": num_tokens / one.median,
                "speedup_over_transformers": spreads[TRANSFORMERS].median / one.median,
            }
            for side, one in spreads.items()
        },
    }


class _Ours:
    """The in-process engine, every response of full length."""

    def __init__(self, case: UpdateCase) -> None:
        self._case = case
        self._config = ModelConfig.from_pretrained(case.model_dir)
        self._model = build_model(self._config, case.run_config).to(mesh.device())
        load_model_weights(self._model, Path(case.model_dir))
        self._groups = case.groups(self._config)
        pads = (self._config.image_token_id, self._config.video_token_id)
        num_responses = case.num_prompts * case.group_size
        self._engine = LocalEngine(
            self._model, SpecialTokens(frozenset(), pads), str, max_batch_responses=num_responses
        )

    def generate(self, *, shared: bool, temperature: float = 1.0) -> list[list[int]]:
        """Token ids of all responses."""
        size = self._case.group_size
        requests = [
            GenerationRequest(f"{group.id}-{part}", group.prompt, size if shared else 1, seed=part)
            for group in self._groups
            for part in range(1 if shared else size)
        ]
        params = SamplingParams(self._case.response_tokens, temperature)
        return [list(one.token_ids) for group in self._engine.generate(requests, params) for one in group.rollouts]


class _Transformers:
    """`generate` of transformers' model with SDPA attention, a group at a time, at the package's positions."""

    def __init__(self, case: UpdateCase) -> None:
        self._case = case
        config = ModelConfig.from_pretrained(case.model_dir)
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_pretrained(case.model_dir, dtype=getattr(torch, case.dtype), attn_implementation="sdpa")
        self._model = model.to(mesh.device()).eval()
        self._pads = [config.image_token_id, config.video_token_id]
        self._inputs = [self._group_inputs(group, config) for group in case.groups(config)]

    def _group_inputs(self, group: Group, config: ModelConfig) -> dict[str, Tensor]:
        """Prompt and video once for every response."""
        copies, num_tokens = self._case.group_size, len(group.prompt.token_ids)
        positions = pack([group], config).position_ids[:, :num_tokens]
        positions = torch.cat((torch.arange(num_tokens)[None], positions))  # the first row: of the attention mask
        token_ids = group.prompt.token_ids.expand(copies, -1)
        (video,) = group.prompt.vision
        inputs = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "position_ids": positions[:, None].expand(-1, copies, -1),
            "pixel_values_videos": pixel_values(video, config.vision).repeat(copies, 1).to(self._model.dtype),
            "video_grid_thw": torch.tensor([video.grid_thw]).repeat(copies, 1),
        }
        return {name: tensor.to(mesh.device()) for name, tensor in inputs.items()}

    def generate(self, *, greedy: bool = False) -> Tensor:
        """Token ids of all responses, [responses, response_tokens]."""
        answers = [
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
        return torch.cat(answers)[:, -self._case.response_tokens :]


def report(result: dict[str, Any]) -> None:
    rows = []
    for side, one in result["sides"].items():
        spread = Spread.of([value / result["prompts"] for value in one["seconds"]])
        speed = f"{one['speedup_over_transformers']:.1f}"
        rows.append((side, spread.text(), f"{one['tokens_per_second']:.0f}", speed))
    print_table(
        f"{result['model']}: {result['group_size']} responses of {result['response_tokens']} tokens to each of "
        f"{result['prompts']} prompts of {result['prompt_tokens']} tokens",
        ("", "s a group: median (range)", "tokens/s", "times transformers"),
        rows,
        caption=f"{result['rounds']} rounds; {result['dtype']}, {result['machine']['device']}, "
        f"{result['machine']['threads']} threads of {result['machine']['processor']}; "
        f"{result['equal_greedy_tokens']:.1%} of greedy tokens equal",
    )
