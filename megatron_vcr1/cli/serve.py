"""`vcr1 serve`: arguments and start-up; the endpoint is in serving.server."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vcr1.cli.arguments import add_model_arguments, run_config


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="a model behind an OpenAI-compatible endpoint, for evaluation programs on this machine",
        description="Serve a model at http://HOST:PORT/v1/chat/completions, in one process: texts, image_url and "
        "video_url. Videos are read as in training, so that lmms-eval, for instance, measures the same model. For "
        "speed, serve an exported directory with SGLang.",
        allow_abbrev=False,
    )
    add_model_arguments(parser, divided=False)
    parser.add_argument("--name", help="the model's name for clients (default: its folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone; there is no key")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free; default: %(default)s")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="clients may name files below it by file:// (default: none)"
    )
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=16384, metavar="N", help="longest prompt; default: 16384"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer; default: %(default)s"
    )
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="requests answered together; default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted. Raises UserError for a model or an address that cannot be used."""
    from megatron_vcr1.checkpoint.load import load_model_weights
    from megatron_vcr1.data.processor import read_processor
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.model.config import ModelConfig
    from megatron_vcr1.model.qwen_vl import build_model
    from megatron_vcr1.parallel import mesh
    from megatron_vcr1.rollout.build import build_engine
    from megatron_vcr1.rollout.special_tokens import read_repetition_penalty
    from megatron_vcr1.serving.server import ChatServer, Limits, listening

    if min(args.max_prompt_tokens, args.max_new_tokens, args.batch) < 1:
        raise UserError("--max-prompt-tokens, --max-new-tokens and --batch must be above 0")
    if args.files is not None and not args.files.is_dir():
        raise UserError(f"--files {args.files}: no such folder")
    if mesh.launched_world_size() > 1:
        raise UserError("vcr1 serve is one process; for a model that needs several, serve its export with SGLang")
    config = run_config(args)
    penalty = read_repetition_penalty(args.model)
    limits = Limits(args.max_prompt_tokens, args.max_new_tokens, args.batch, args.files, penalty)
    model_config, processor = ModelConfig.from_pretrained(args.model), read_processor(args.model)
    with mesh.world(config.parallel):
        model = build_model(model_config, config).to(mesh.device()).eval()
        load_model_weights(model, args.model)
        engine = build_engine(config, model, processor)
        try:
            server = ChatServer(
                (args.host, args.port), args.name or args.model.resolve().name, engine, processor, limits
            )
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {args.host} --port {args.port}: {error}; name another port") from error
        with listening(server):
            if penalty != 1:
                print(f"repetition_penalty: {penalty}, as generation_config.json says, where a request names none")
            print(f"{server.name}: http://{args.host}:{server.server_port}/v1", flush=True)
            server.answer_forever()
    return 0
