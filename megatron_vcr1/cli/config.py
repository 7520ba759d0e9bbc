"""`vcr1 config`: prints and checks settings."""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron_vcr1.cli.arguments import path_argument, positive
from megatron_vcr1.planning.devices import DEVICES, Cluster

_GPUS_PER_NODE, _GPU = 8, "h100"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `config` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "config",
        help="print every setting with its description and default, or print or check a file",
        description="Print a TOML file with every setting, its description and its default. With FILE, print all "
        "settings of that file instead: the file that it extends is merged, overrides are applied, and defaults are "
        "filled in. With --check FILE --ranks N, check everything that a run of that size reads before it loads the "
        "model, on a machine without GPUs: layout, batch, model directory, manifests, first samples, templates, "
        "servers, memory and disk. Exit code 2: `vcr1 train` would refuse it.",
        epilog="Any key can be overridden: vcr1 config run.toml --parallel.tensor 2 --data.sources.0.thinking false",
    )
    parser.add_argument("config", nargs="?", type=path_argument, metavar="FILE", help="print the settings of this file")
    parser.add_argument(
        "--check",
        type=path_argument,
        metavar="FILE",
        help="validate FILE and print its settings, with overrides applied",
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="with --check: check a run of N processes, one per GPU"
    )
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", help=f"with --ranks (default: {_GPUS_PER_NODE})")
    parser.add_argument("--gpu", choices=list(DEVICES), help=f"with --ranks: whose memory counts (default: {_GPU})")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print settings, or the findings of a check. Raises UserError for an invalid file or override."""
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.config.rendering import default_config, render_toml
    from megatron_vcr1.errors import UserError

    if args.config is not None and args.check is not None:
        raise UserError(f"{args.config} and --check {args.check}: name one file")
    if args.ranks is None and (args.gpu or args.gpus_per_node) is not None:
        raise UserError("--gpu and --gpus-per-node: they describe the machine of --check FILE --ranks N; add --ranks")
    if args.ranks is not None:
        if args.check is None:
            raise UserError("--ranks: name the file to check: vcr1 config --check FILE --ranks N")
        return _check(args)
    if (file := args.config or args.check) is not None:
        print(render_toml(load_config(file, args.overrides), documented=False), end="")
        return 0
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: nothing to override; name the file: vcr1 config FILE ...")
    print(render_toml(default_config(), documented=True), end="")
    return 0


def _check(args: argparse.Namespace) -> int:
    from rich.markup import escape

    from megatron_vcr1.command_line import console, text_table
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.model import cpu
    from megatron_vcr1.training.config_check import check_config

    config = load_config(args.check, args.overrides)
    cpu.install()
    device = replace(DEVICES[args.gpu or _GPU], gpus_per_node=args.gpus_per_node or _GPUS_PER_NODE)
    findings = check_config(config, Cluster(device, args.ranks))
    rows = [(finding.subject, finding.status, escape(finding.text)) for finding in findings]
    title = f"{args.check} on {args.ranks} rank{'s' if args.ranks > 1 else ''}"
    console().print(text_table(title, ("", "", ""), rows, left_columns=(0, 1, 2), wrap=True))
    return 2 if any(finding.status == "error" for finding in findings) else 0
