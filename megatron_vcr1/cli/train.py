"""Defines the arguments of `vcr1 train`; `megatron_vcr1.training` does the work."""

from __future__ import annotations

import argparse
import sys

from megatron_vcr1.cli.arguments import path_argument


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `train` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model with GRPO or SFT",
        description="Train as CONFIG.toml says; train.stage is 'grpo' or 'sft'. If train.run_dir already holds a run, "
        "resume from its newest complete checkpoint. For several processes: torchrun --nproc-per-node N --no-python "
        "vcr1 train CONFIG.toml, or srun. After SIGTERM or SIGUSR1 the run saves a checkpoint and exits with code 85; "
        "the same command resumes it.",
        epilog="Any key can be overridden: vcr1 train run.toml --train.num_steps 100 --parallel.tensor 2",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.toml", help="settings; `vcr1 config` prints all of them"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace and a summary of the second and third step after the start to train.run_dir/profile "
        "([profile] selects other steps and ranks)",
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train. Raises UserError for invalid settings, an invalid model or invalid data."""
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.model import cpu
    from megatron_vcr1.rollout.engine import EngineError
    from megatron_vcr1.training.train import train
    from megatron_vcr1.training.trainer import TrainingStopped

    cpu.install()
    overrides = [*args.overrides, *(["--profile.enabled=true"] if args.profile else [])]
    try:
        return train(load_config(args.config, overrides))
    except (EngineError, TrainingStopped) as error:
        print(f"vcr1: stopped: {error}", file=sys.stderr)
        return 1
