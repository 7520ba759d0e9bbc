"""Judges of captions: AutoDQ's event recall and precision, by a language model at an endpoint or by word matching.

`judge` compares captions with references through a backend: `autodq` asks a language model at an `endpoint` and keeps
its responses in a `cache`, `lexical` matches words.
"""

from megatron_vcr1.judge.judge import CaptionVerdicts, Judge, build_judge

__all__ = ["CaptionVerdicts", "Judge", "build_judge"]
