"""Judges of captions: AutoDQ's event recall and precision, by a language model at an endpoint or by word matching."""

from megatron_vcr1.judge.judge import CaptionVerdicts, Judge, build_judge

__all__ = ["CaptionVerdicts", "Judge", "build_judge"]
