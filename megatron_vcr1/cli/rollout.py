"""`vcr1 rollout`: servers that sample responses."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rollout` to the `vcr1` command."""
    parser = subparsers.add_parser("rollout", help="servers that sample responses", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    serve = actions.add_parser(
        "serve",
        help="start this node's SGLang servers and watch them",
        description="Start the servers that the section [sglang] of FILE asks for, and start again those that die, "
        "until interrupted. A training run on this node finds them when its sglang.urls names them. Logs: "
        "train.run_dir/sglang/logs.",
        epilog="Any key can be overridden: vcr1 rollout serve run.toml --sglang.num_servers 2",
    )
    serve.add_argument("config", type=Path, metavar="FILE", help="the run's TOML file")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, which other hosts cannot reach; 0.0.0.0: all of this host's, "
        "only in a network that you trust: servers ask nobody for a password)",
    )
    serve.set_defaults(run=run_serve, takes_overrides=True)


def run_serve(args: argparse.Namespace) -> int:
    """Returns 1 when a server has no restart left; Ctrl-C and SIGTERM end it and all servers, with 0.

    Raises:
        UserError: the configuration is wrong, or sglang is not installed.
    """
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.rollout.sglang.serving import serve

    return serve(load_config(args.config, args.overrides), args.host)
