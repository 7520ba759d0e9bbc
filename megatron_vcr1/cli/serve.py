"""Defines the arguments of `vcr1 serve`; `megatron_vcr1.serving` does the work."""

from __future__ import annotations

import argparse

from megatron_vcr1.cli.arguments import add_model_arguments, path_argument, positive, run_config


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model through an OpenAI-compatible endpoint, for evaluation programs on this machine",
        description="Serve a model at http://HOST:PORT/v1/chat/completions, in one process, with text, image_url and "
        "video_url parts. Videos are read as in training, so that programs such as lmms-eval measure the same model. "
        "For speed, serve an exported directory with SGLang instead. Needs the extra [serve].",
        allow_abbrev=False,
    )
    add_model_arguments(parser, sharded=False)
    parser.add_argument("--name", help="the model's name for clients (default: the name of its folder)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only); there is no API key",
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on; 0: any free port (default: %(default)s)"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name that clients may use, for example of a proxy; may be repeated (default: on loopback "
        "the names of this machine, on other addresses any name)",
    )
    parser.add_argument(
        "--files",
        type=path_argument,
        metavar="DIR",
        help="clients may name files below DIR by file:// URLs (default: none)",
    )
    parser.add_argument(
        "--max-prompt-tokens", type=positive, default=16384, metavar="N", help="longest prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=1024, metavar="N", help="longest response (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="prompts generated together (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C. Raises UserError for a model or an address that cannot be used."""
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.model import cpu

    try:
        from megatron_vcr1.serving.app import Limits
        from megatron_vcr1.serving.serve import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"vcr1 serve needs {error.name}: pip install 'megatron_vcr1[serve]'") from error

    if args.files is not None and not args.files.is_dir():
        raise UserError(f"--files {args.files}: no such folder")
    cpu.install()
    limits = Limits(args.max_prompt_tokens, args.max_new_tokens, args.batch, args.files)
    serve(run_config(args), (args.host, args.port), limits, name=args.name, extra_hosts=args.allowed_host)
    return 0
