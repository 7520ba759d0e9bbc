"""Reinforcement fine-tuning of video language models on megatron-core."""

__version__ = "0.1.0"
