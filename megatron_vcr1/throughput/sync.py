"""Measure the weight sync: a sharded model's weights as whole Hugging Face tensors, and their transfer to engines.

Without servers, only the stream is measured: tensors are gathered from tensor- and pipeline-parallel ranks, one by one.
With --urls, the trainer's weight sync to running SGLang servers is measured; --model must be the directory they serve.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.command_line import write_json
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.presets import PRESETS, add_model_argument, raw_config
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.throughput.arguments import add_layout_arguments, add_repetition_arguments, default_model
from megatron_vcr1.throughput.measure import Spread, print_table, provenance, run_again, seconds

HELP = "weights from the trainer to engines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, default=default_model())
    add_layout_arguments(parser)
    parser.add_argument("--urls", nargs="+", default=[], metavar="URL", help="running SGLang servers")
    parser.add_argument(
        "--method",
        choices=("broadcast", "tensor", "disk"),
        default="broadcast",
        help="see sglang.weight_sync (default: %(default)s)",
    )
    add_repetition_arguments(parser, rounds=5, threads=False)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.urls and args.model in PRESETS:
        raise UserError("--urls: --model must be the directory that the servers serve")
    num_processes = args.tensor * args.pipeline * args.replicas
    if args.worker is None and mesh.launched_world_size() == 1 and num_processes > 1:
        with tempfile.TemporaryDirectory(prefix="benchmark-sync-") as folder:
            file = Path(folder) / "result.json"
            run_again([*args.arguments, "--worker", str(file)], num_processes=num_processes)
            result: dict[str, Any] | None = json.loads(file.read_text())
    else:
        result = measure(args)
    if result is None:  # the first rank reports
        return 0
    if args.worker is not None:
        args.worker.write_text(json.dumps(result))
        return 0
    result = provenance(args) | result
    write_json(args.json, result)
    rates = Spread.of([result["bytes"] / round_s / 1e9 for round_s in result["seconds"]])
    print_table(
        f"Weights of {args.model}, {result['bytes'] / 1e9:.2f} GB, {result['num_tensors']} tensors, {result['device']}",
        ("", "seconds", "GB/s"),
        [("to the servers" if args.urls else "stream", Spread.of(result["seconds"]).text(3), rates.text())],
        f"Median (range) of {args.rounds} rounds; {args.tensor} tensor-parallel ranks x {args.pipeline} stages.",
    )
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure the seconds of each round. Call on all ranks; the first rank returns the result, the others None."""
    with _model_directory(args.model) as folder:
        run_config = _run_config(args, folder)
        config = ModelConfig.from_pretrained(folder)
        check_layout(config.shape, run_config.parallel, run_config.recompute, mesh.launched_world_size())
        with mesh.world(run_config.parallel):
            model = build_model(
                config, run_config.model, run_config.parallel, run_config.recompute, initialize_weights=True
            ).to(mesh.device())
            send = _engine_update(run_config, model, folder) if args.urls else _stream_alone(model)
            sizes = [tensor.nbytes for _, tensor in stream_hf_tensors(model)]
            send()  # warm up
            times = [seconds(send) for _ in range(args.rounds)]
            slowest = [max(values) for values in zip(*collectives.gather_objects(times), strict=True)]
            if not mesh.is_first_rank():
                return None
    layout = {key: getattr(args, key) for key in ("tensor", "pipeline", "replicas", "dtype")}
    return {
        "model": args.model,
        "layout": layout,
        "method": args.method if args.urls else None,
        "bytes": sum(sizes),
        "num_tensors": len(sizes),
        "seconds": slowest,
    }


@contextmanager
def _model_directory(model: str) -> Iterator[Path]:
    """Yield the model's directory; for a preset, a temporary one with only a config.json."""
    if model not in PRESETS:
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-sync-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw_config(model)))
        yield Path(folder)


def _run_config(args: argparse.Namespace, folder: Path) -> RunConfig:
    parallel = {key: getattr(args, key) for key in ("tensor", "pipeline", "sequence_parallel", "first_stage_layers")}
    sections: dict[str, Any] = {"model": {"path": folder, "dtype": args.dtype}, "parallel": parallel}
    if args.urls:
        sections |= {"rollout": {"engine": "sglang"}, "sglang": {"urls": args.urls, "weight_sync": args.method}}
    return RunConfig.model_validate(sections)


def _stream_alone(model: VideoLanguageModel) -> Callable[[], None]:
    def send() -> None:
        for _ in stream_hf_tensors(model):
            pass

    return send


def _engine_update(run_config: RunConfig, model: VideoLanguageModel, folder: Path) -> Callable[[], None]:
    from megatron_vcr1.rollout.build import build_engine
    from megatron_vcr1.rollout.special_tokens import SpecialTokens

    load_model_weights(model, folder)
    processor = PromptProcessor.from_pretrained(folder, model.model_config)
    tokens = SpecialTokens.from_pretrained(folder, processor, model.model_config.num_embeddings)
    engine = build_engine(run_config, model, processor, tokens)
    version = 0

    def send() -> None:
        nonlocal version
        version += 1
        engine.update_weights(stream_hf_tensors(model), version)

    return send
