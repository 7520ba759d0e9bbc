"""`vcr1 config`: prints and checks settings."""

from __future__ import annotations

import argparse

from megatron_vcr1.cli.arguments import path_argument


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `config` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "config",
        help="print every setting with its description and default, or the settings of a file",
        description="Print a TOML file with every setting, its description and its default. With FILE, print all "
        "settings of that file instead: the file that it extends is merged, overrides are applied, and defaults are "
        "filled in.",
        epilog="Any key can be overridden: vcr1 config run.toml --parallel.tensor 2 --data.sources.0.thinking false",
    )
    parser.add_argument("config", nargs="?", type=path_argument, metavar="FILE", help="print the settings of this file")
    parser.add_argument(
        "--check",
        type=path_argument,
        metavar="FILE",
        help="validate FILE and print its settings, with overrides applied",
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print settings. Raises UserError for an invalid file or override."""
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.config.rendering import default_config, render_toml
    from megatron_vcr1.errors import UserError

    if (file := args.config or args.check) is not None:
        print(render_toml(load_config(file, args.overrides), documented=False), end="")
        return 0
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: nothing to override; name the file: vcr1 config FILE ...")
    print(render_toml(default_config(), documented=True), end="")
    return 0
