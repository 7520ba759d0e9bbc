"""`vcr1 train`: arguments here, work in training.train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="GRPO or SFT",
        description="Train as CONFIG says: train.stage is 'grpo' or 'sft'. A run that is in train.run_dir already goes "
        "on from its newest whole checkpoint. For several processes: torchrun --nproc-per-node N --no-python vcr1 "
        "train CONFIG, or srun. SIGTERM or SIGUSR1 end the run behind a checkpoint, with exit code 85: start it again.",
        epilog="Any key can be overridden: vcr1 train run.toml --train.num_steps 100 --parallel.tensor 2",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="settings; `vcr1 config` prints them all")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace and a summary of where the time of this start's second and third step goes to "
        "train.run_dir/profile ([profile] has other steps and ranks)",
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Raises UserError for settings, a model or data that are wrong."""
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.model import cpu
    from megatron_vcr1.rewards.user_reward import UserRewardError
    from megatron_vcr1.rollout.engine import EngineError
    from megatron_vcr1.training.train import train
    from megatron_vcr1.training.trainer import TrainingStopped

    cpu.install()
    overrides = [*args.overrides, *(["--profile.enabled=true"] if args.profile else [])]
    try:
        return train(load_config(args.config, overrides))
    except (EngineError, TrainingStopped, UserRewardError) as error:
        print(f"vcr1: stopped: {error}", file=sys.stderr)
        return 1
