#!/usr/bin/env python3
"""Measure the peak memory of a forward and backward pass per rank, for several context-parallel sizes.

    python -m tests.model.measure_context_memory --tokens 32768 --context 1 4

For each size it starts as many processes, which compute one group: a prompt of text and 8 responses of 32 tokens. It
prints by how much the memory of the busiest process grows during the pass: activations, gathered keys and values, and
gradients of activations. Weights, their gradients and the libraries are in memory before.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import resource
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model import cpu
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from tests.model import tiny
from tests.ports import free_ports

GROUP_SIZE, RESPONSE_TOKENS = 8, 32
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2**20}
TIMEOUT_S = 600.0  # the other ranks wait for one that fails


def create_model(folder: Path) -> None:
    """Write the config.json of the model."""
    hf_config = tiny.hf_config("qwen2_5_vl").to_dict()
    hf_config["text_config"] |= SIZES
    hf_config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    hf_config["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    type(tiny.hf_config("qwen2_5_vl")).from_dict(hf_config).save_pretrained(folder)


def measure_rank(rank: int, num_ranks: int, port: int, folder: Path, num_tokens: int) -> int:
    """Run `measure` in a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cpu.install()
    with mesh.world(ParallelSection(context=num_ranks), timeout_s=TIMEOUT_S):
        return measure(num_ranks, folder, num_tokens)


def measure(num_ranks: int, folder: Path, num_tokens: int) -> int:
    """Run one pass on a rank, and return the growth of its peak memory in bytes."""
    section = ModelSection(path=folder, dtype="float32")
    config = ModelConfig.from_pretrained(folder)
    model = build_model(
        config, section, ParallelSection(context=num_ranks), RecomputeSection(), initialize_weights=True
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    prompts = [torch.randint(2, 190, (length,)) for length in (256, num_tokens)]
    for prompt in prompts:  # the first, short pass loads what the libraries load late
        group = Group("a", EncodedPrompt(prompt, ()), tiny.responses((RESPONSE_TOKENS,) * GROUP_SIZE, seed=0))
        batch = pack_for_rank([group], config)
        before = peak_bytes()
        model.log_probs(model(batch), batch.target_ids).sum().backward()
    return peak_bytes() - before


def peak_bytes() -> int:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    context = mp.get_context("spawn")
    with TemporaryDirectory() as folder:
        create_model(Path(folder))
        first: int | None = None
        for num_ranks in args.context:
            port = free_ports()
            arguments = [(rank, num_ranks, port, Path(folder), args.tokens) for rank in range(num_ranks)]
            with ProcessPoolExecutor(num_ranks, mp_context=context) as pool:  # raises if a process is killed
                ranks = [pool.submit(measure_rank, *values) for values in arguments]
                peak = max(rank.result() for rank in as_completed(ranks))
            first = first or peak
            print(f"CP {num_ranks}: {peak / 1e6:.0f} MB per rank, {peak / first:.2f} of the first", flush=True)


if __name__ == "__main__":
    main()
