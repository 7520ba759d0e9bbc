"""`vcr1 rollout`: runs the servers that sample responses."""

from __future__ import annotations

import argparse

from megatron_vcr1.cli.arguments import path_argument


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rollout` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "rollout",
        help="run servers that sample responses",
        description="Run SGLang servers on nodes of their own, for runs that name them in sglang.urls.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    serve = actions.add_parser(
        "serve",
        help="start and supervise this node's SGLang servers",
        description="Start the servers that the section [sglang] of FILE describes, and restart those that fail, until "
        "interrupted. A training run uses them if its sglang.urls names them. Their logs are in "
        "train.run_dir/sglang/logs.",
        epilog="Any setting can be overridden: vcr1 rollout serve run.toml --sglang.num_servers 2",
    )
    serve.add_argument("config", type=path_argument, metavar="FILE", help="the run's TOML file")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, which other hosts cannot reach; 0.0.0.0 is all addresses of "
        "this host: use it only in a network that you trust, because servers do not authenticate clients)",
    )
    serve.set_defaults(run=run_serve, takes_overrides=True)


def run_serve(args: argparse.Namespace) -> int:
    """Run the servers until Ctrl-C or SIGTERM (exit code 0), or until a server has no restart left (exit code 1).

    Raises:
        UserError: the settings are wrong, or sglang is not installed.
    """
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.rollout.sglang.serving import serve

    config = load_config(args.config, args.overrides)
    return serve(config.sglang, config.model, run_dir=config.train.run_dir, seed=config.train.seed, host=args.host)
